"""Short causal convolution on TPU, depthwise, with the activation that follows: forward and backward.

    y_t = act(a_t)        a_t = bias + sum_{j=0}^{W-1} kernel[W-1-j] * x_{t-j}                                     (1)

as before the mixers of H3 (Fu et al. 2022, arXiv 2212.14052) and Mamba (Gu, Dao 2023, arXiv 2312.00752). Tap j of
position t is there where j <= reach_t; at padding reach_t = -1, and y_t = 0. It is bound by memory: XLA reads and
writes the shifted inputs of (1) several times, and keeps them in float32 for the gradients, while here x, y, dy and dx
pass once. The backward pass computes a_t again:

    da_t = act'(a_t) * dy_t                                                                                        (2)
    dx_t = sum_{j <= reach_{t+j}} kernel[W-1-j] * da_{t+j}                                                         (3)
    dkernel[W-1-j] = sum_t da_t * x_{t-j}            dbias = sum_t da_t                                            (4)

A step of the grid has a block of positions of some channels, in float32 in VMEM, after the last 8 rows of its
neighbour: [d / 128, 8 + t, 128], where the rows of 128 channels follow each other, so that rows that are shifted by j
are read at an address j rows away. (In [8 + t, d] they would be put together from pieces of two registers.)

    code     symbol   shape          dtype
    x, y     x, y     [b, t, d]      bfloat16 or float32
    kernel            [W, d]         any float
    bias              [d]            any float; or None
    before            [b, W-1, d]    float32, the inputs before x, oldest first; None for zeros
    reach             [b, t]         int32; or None: all taps are there
"""

import itertools
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.once import differentiated_once
from pallas_kernels.tpu import _tiles
from pallas_kernels.tpu._generations import sizes
from pallas_kernels.tpu._tiles import DTYPES, LANES, round_up

NAME = "short_conv"
ROWS = 8  # of a neighbour: as many as a register has
HALO = 16  # rows that are read for them: as many as bfloat16 comes in
MOST_POSITIONS, MOST_CHANNELS = 512, 512
STRIP = 32  # positions that are in registers together
ACTIVATIONS = (None, "silu")


def supports(x: jax.Array, kernel: jax.Array, activation: str | None) -> str | None:
    """Why the kernel cannot compute this, or None."""
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; expected bfloat16 or float32"
    if kernel.shape[0] > ROWS + 1:
        return f"the convolution reaches over {kernel.shape[0]} tokens; expected at most {ROWS + 1}"
    if activation not in ACTIVATIONS:
        return f"the activation is {activation!r}; expected one of {ACTIVATIONS}"
    return None


def short_conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    before: jax.Array | None,
    reach: jax.Array | None,
    *,
    activation: str | None = None,
    interpret: Any = False,
) -> jax.Array:
    """y [b, t, d] in x's dtype, equation (1). interpret: as for `pallas_call`."""
    (batch, length, channels), width = x.shape, kernel.shape[0]
    plan = _plan(batch, length, channels, width, x.dtype)
    wide = ((0, 0), (0, plan.channels - channels))
    parameters = jnp.zeros((1, channels)) if bias is None else bias[None]
    parameters = jnp.concatenate([kernel.astype(jnp.float32), parameters.astype(jnp.float32)])
    if before is not None:
        before = jnp.pad(before.astype(jnp.float32), ((0, 0), (ROWS - width + 1, 0), wide[1]))
    if reach is not None:
        reach = jnp.pad(reach, ((0, 0), (0, plan.positions - length)), constant_values=-1)[:, None]
    inputs = _Inputs(
        jnp.pad(x, ((0, 0), (0, plan.positions - length), wide[1])), jnp.pad(parameters, wide), before, reach
    )
    return _run(_How(plan, activation, interpret), inputs)[:, :length, :channels]


class _Plan(NamedTuple):
    """
    rows, positions, channels   b, t and d, padded
    block, lanes                positions and channels of a step
    width                       W
    """

    rows: int
    positions: int
    channels: int
    block: int
    lanes: int
    width: int
    memory: int

    @property
    def blocks(self) -> int:
        return self.positions // self.block

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.rows, self.channels // self.lanes, self.blocks

    @property
    def tiles(self) -> int:
        """Of 128 channels, in a step."""
        return self.lanes // LANES

    def strips(self) -> list[slice]:
        """Positions that are in registers together."""
        return [slice(row, row + STRIP) for row in range(0, self.block, STRIP)]


def _plan(batch: int, length: int, channels: int, width: int, dtype: jnp.dtype) -> _Plan:
    blocks = -(-length // MOST_POSITIONS)
    # A multiple of 128: `reach` lies along the lanes.
    block = round_up(-(-length // blocks), LANES)
    channels = round_up(channels, LANES)
    lanes = max(n for n in range(LANES, MOST_CHANNELS + 1, LANES) if channels % n == 0)
    return _Plan(batch, blocks * block, channels, block, lanes, width, sizes().memory)


class _How(NamedTuple):
    plan: _Plan
    activation: str | None
    interpret: Any


class _Inputs(NamedTuple):
    """Padded. parameters [W + 1, d]: the kernel and the bias; before [b, 8, d]; reach [b, 1, t]."""

    x: jax.Array
    parameters: jax.Array
    before: jax.Array | None
    reach: jax.Array | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(how: _How, inputs: _Inputs) -> jax.Array:
    return _forward(how, inputs)


def _run_forward(how: _How, inputs: _Inputs) -> tuple[jax.Array, _Inputs]:
    return differentiated_once(NAME, partial(_forward, how))(inputs), inputs


def _run_backward(how: _How, inputs: _Inputs, dy: jax.Array) -> tuple[_Inputs]:
    return (differentiated_once(NAME, partial(_backward, how))(inputs, dy),)


_run.defvjp(_run_forward, _run_backward)


class _Specs:
    """Blocks of the arrays. backwards: time is walked from its end."""

    def __init__(self, plan: _Plan, backwards: bool = False) -> None:
        self.plan, self.backwards = plan, backwards

    def _block_at(self, t: jax.Array) -> jax.Array:
        return self.plan.blocks - 1 - t if self.backwards else t

    def positions(self) -> pl.BlockSpec:
        return pl.BlockSpec((1, self.plan.block, self.plan.lanes), lambda b, d, t: (b, self._block_at(t), d))

    def halo(self) -> pl.BlockSpec:
        """The last rows of the block before; of the first block any."""
        each = self.plan.block // HALO
        return pl.BlockSpec(
            (1, HALO, self.plan.lanes), lambda b, d, t: (b, jnp.maximum(self._block_at(t) * each - 1, 0), d)
        )

    def parameters(self) -> pl.BlockSpec:
        return pl.BlockSpec((self.plan.width + 1, self.plan.lanes), lambda b, d, t: (0, d))

    def gradients(self) -> pl.BlockSpec:
        """Of the parameters, [b, W + 1, 8, d]: sums of every eighth position."""
        return pl.BlockSpec((1, self.plan.width + 1, ROWS, self.plan.lanes), lambda b, d, t: (b, 0, 0, d))

    def before(self) -> pl.BlockSpec:
        return pl.BlockSpec((1, ROWS, self.plan.lanes), lambda b, d, t: (b, 0, d))

    def reach(self) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, self.plan.block), lambda b, d, t: (b, 0, self._block_at(t)))

    def inputs(self, inputs: _Inputs) -> dict[str, tuple[jax.Array | None, pl.BlockSpec]]:
        return {name: (x, getattr(self, name, self.positions)()) for name, x in inputs._asdict().items()}


def _forward(how: _How, inputs: _Inputs) -> jax.Array:
    plan = how.plan
    specs = _Specs(plan)

    def body(refs: SimpleNamespace) -> None:
        step = pl.program_id(2)

        @pl.when(step == 0)
        def _():
            _put(refs.wide, 0, _rows_before(refs, plan))

        @pl.when(step > 0)
        def _():
            refs.wide[:, :ROWS] = refs.wide[:, plan.block :]

        _put(refs.wide, ROWS, refs.x[0])
        reach = _column(refs.reach)
        for tile, rows in itertools.product(range(plan.tiles), plan.strips()):
            here = None if reach is None else reach[rows]
            y = _activated(_sum_of_taps(refs, plan, tile, rows, here)[0], how.activation)
            refs.y[0, rows, _lanes(tile)] = _where(here, 0, y).astype(refs.y.dtype)

    found = _tiles.run(
        body,
        name=f"{NAME}_forward",
        plan=plan,
        inputs=specs.inputs(inputs),
        outputs={"y": (jax.ShapeDtypeStruct(inputs.x.shape, inputs.x.dtype), specs.positions())},
        scratch={"wide": (plan.tiles, ROWS + plan.block, LANES)},
        interpret=how.interpret,
    )
    return found.y


def _backward(how: _How, inputs: _Inputs, dy: jax.Array) -> _Inputs:
    """Cotangents of the inputs."""
    plan = how.plan
    specs = _Specs(plan, backwards=True)
    edges = (ROWS, plan.block, ROWS)  # of `wide_da` and `wide_reach`: zeros, this block, the first rows of the next

    def body(refs: SimpleNamespace) -> None:
        step = pl.program_id(2)

        @pl.when(step == 0)
        def _():
            refs.dparameters[...] = jnp.zeros_like(refs.dparameters)
            refs.wide_da[...] = jnp.zeros_like(refs.wide_da)
            if refs.reach is not None:
                refs.wide_reach[...] = jnp.zeros_like(refs.wide_reach)

        @pl.when(step > 0)
        def _():
            for ref in (refs.wide_da, refs.wide_reach):
                if ref is not None:
                    ref[:, -ROWS:] = ref[:, ROWS : 2 * ROWS]

        _put(refs.wide, 0, refs.halo[0, HALO - ROWS :])

        @pl.when(step == plan.blocks - 1)
        def _():
            _put(refs.wide, 0, _rows_before(refs, plan))

        _put(refs.wide, ROWS, refs.x[0])
        reach = _column(refs.reach)
        if reach is not None:
            refs.wide_reach[0, ROWS:-ROWS] = reach
        for tile, rows in itertools.product(range(plan.tiles), plan.strips()):
            lanes, here = _lanes(tile), None if reach is None else reach[rows]
            a, taps = _sum_of_taps(refs, plan, tile, rows, here)
            dy = _where(here, 0, refs.dy[0, rows, lanes].astype(jnp.float32))
            da = dy * _slope(a, how.activation)
            refs.wide_da[tile, _from(rows, ROWS)] = da
            for n, x in enumerate([*taps, None]):
                product = da if x is None else da * x
                refs.dparameters[0, n, :, lanes] += product.reshape(-1, ROWS, LANES).sum(0)
        for tile, rows in itertools.product(range(plan.tiles), plan.strips()):
            dx = _read_back(refs, plan, tile, _from(rows, ROWS))
            refs.dx[0, rows, _lanes(tile)] = dx.astype(refs.dx.dtype)

        @pl.when(step == plan.blocks - 1)
        def _():
            for tile in range(plan.tiles):
                refs.dbefore[0, :, _lanes(tile)] = _read_back(refs, plan, tile, slice(0, ROWS))

    rows = jax.ShapeDtypeStruct((plan.rows, ROWS, plan.channels), jnp.float32)
    sums = jax.ShapeDtypeStruct((plan.rows, plan.width + 1, ROWS, plan.channels), jnp.float32)
    found = _tiles.run(
        body,
        name=f"{NAME}_backward",
        plan=plan,
        inputs={**specs.inputs(inputs), "halo": (inputs.x, specs.halo()), "dy": (dy, specs.positions())},
        outputs={
            "dx": (jax.ShapeDtypeStruct(inputs.x.shape, inputs.x.dtype), specs.positions()),
            "dparameters": (sums, specs.gradients()),
            "dbefore": (rows, specs.before()),
        },
        scratch={
            "wide": (plan.tiles, ROWS + plan.block, LANES),
            "wide_da": (plan.tiles, sum(edges), LANES),
            "wide_reach": None if inputs.reach is None else (1, sum(edges), LANES),
        },
        interpret=how.interpret,
    )
    dbefore = None if inputs.before is None else found.dbefore
    return _Inputs(found.dx, found.dparameters.sum((0, 2)), dbefore, None)


def _rows_before(refs: SimpleNamespace, plan: _Plan) -> jax.Array:
    return jnp.zeros((ROWS, plan.lanes), jnp.float32) if refs.before is None else refs.before[0]


def _put(wide: Any, row: int, x: jax.Array) -> None:
    """x [t, d] into rows of `wide` [d / 128, rows, 128]."""
    for tile in range(wide.shape[0]):
        wide[tile, row : row + x.shape[0]] = x[:, _lanes(tile)].astype(jnp.float32)


def _lanes(tile: int) -> slice:
    return slice(tile * LANES, (tile + 1) * LANES)


def _column(reach: Any) -> jax.Array | None:
    """[t, 128]: `reach`, the same in all lanes."""
    if reach is None:
        return None
    row = reach[0].astype(jnp.float32)
    return jnp.transpose(jnp.broadcast_to(row, (LANES, row.shape[1])))


def _where(reach: jax.Array | None, j: int, x: jax.Array) -> jax.Array:
    """x [t, 128] where tap j is there, else 0."""
    return x if reach is None else jnp.where(reach >= j, x, 0.0)


def _from(rows: slice, by: int) -> slice:
    return slice(rows.start + by, rows.stop + by)


def _sum_of_taps(
    refs: SimpleNamespace, plan: _Plan, tile: int, rows: slice, reach: jax.Array | None
) -> tuple[jax.Array, list[jax.Array]]:
    """a of (1), and what each row of the kernel multiplies in it."""
    lanes, taps = _lanes(tile), []
    a = refs.parameters[plan.width :, lanes]
    for n in range(plan.width):
        j = plan.width - 1 - n
        taps.append(_where(reach, j, refs.wide[tile, _from(rows, ROWS - j)]))
        a = a + refs.parameters[n : n + 1, lanes] * taps[-1]
    return a, taps


def _read_back(refs: SimpleNamespace, plan: _Plan, tile: int, rows: slice) -> jax.Array:
    """dx of (3). rows: of `wide_da`."""
    dx = jnp.zeros((rows.stop - rows.start, LANES), jnp.float32)
    for j in range(plan.width):
        at, n = _from(rows, j), plan.width - 1 - j
        reach = None if refs.wide_reach is None else refs.wide_reach[0, at]
        dx += refs.parameters[n : n + 1, _lanes(tile)] * _where(reach, j, refs.wide_da[tile, at])
    return dx


def _activated(a: jax.Array, activation: str | None) -> jax.Array:
    return a if activation is None else a * _sigmoid(a)


def _slope(a: jax.Array, activation: str | None) -> jax.Array | float:
    if activation is None:
        return 1.0
    s = _sigmoid(a)
    return s * (1.0 + a * (1.0 - s))


def _sigmoid(a: jax.Array) -> jax.Array:
    # A hyperbolic tangent is one instruction of a TPU, a division by 1 + exp(-a) some twenty.
    return 0.5 + 0.5 * jnp.tanh(0.5 * a)
