"""Kernels of operators whose state is a matrix for each head: what stands around the two bodies of such a kernel.

An operator reads q, k [b, t, h, k], v [b, t, hv, v], gates, and a state [b, hv, k, v], and gives outputs like v and the
state after them. The forward pass keeps the state that entered each step of the grid. The backward pass walks the steps
from the end and finds what else it needs from those.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.once import differentiated_once
from pallas_kernels.tpu import _tiles
from pallas_kernels.tpu._tiles import Grid, Specs

Arrays = dict[str, jax.Array | None]
Body = Callable[[Grid, float, SimpleNamespace], None]


class Operator(NamedTuple):
    """
    name        in errors and profiles
    forward     (plan, scale, refs) at every step: writes `o`, and replaces the heads' states in `S`
    backward    the same from the last step to the first: writes `dq`, `dk`, `dv`, `dbeta`, `dg`, from `do` and the
                states `entered[0, 0]` of the step's start, and replaces the cotangents of the heads' states in `dS`
    transposed  states are [v, k]
    """

    name: str
    forward: Body
    backward: Body
    transposed: bool = False


class _How(NamedTuple):
    operator: Operator
    plan: Grid
    scale: float
    interpret: Any


def run(
    operator: Operator,
    plan: Grid,
    arrays: Arrays,
    initial: jax.Array,
    *,
    scale: float,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Outputs [b, t, hv, v] in v's dtype, and the final state [b, hv, k, v].

    arrays: q, k, v, and where the operator has them beta [b, t, hv], g [b, t, hv] or [b, t, hv, k] and index [b, t].
    """
    (length, _, key_dim), value_dim = arrays["q"].shape[1:], arrays["v"].shape[3]
    inputs = {name: None if x is None else _lay_out(name, x, plan) for name, x in arrays.items()}
    initial = _oriented(operator, _tiles.lay_out_state(initial, plan))
    o, final = _run(_How(operator, plan, float(scale), interpret), inputs, initial)
    o = o.reshape(*o.shape[:2], plan.heads, plan.value_dim)
    return o[:, :length, :, :value_dim], _oriented(operator, final)[:, :, :key_dim, :value_dim]


def _oriented(operator: Operator, S: jax.Array) -> jax.Array:
    return jnp.swapaxes(S, 2, 3) if operator.transposed else S


def _lay_out(name: str, x: jax.Array, plan: Grid) -> jax.Array:
    if name == "index":
        return _tiles.lay_out_index(x, plan)
    if x.ndim == 3:
        return _tiles.lay_out_decay(x, plan)
    return _tiles.lay_out(x, plan, plan.value_dim if name == "v" else plan.key_dim)


def _block(name: str, x: jax.Array | None, specs: Specs) -> pl.BlockSpec:
    """x: as laid out; of decays, that per channel has three axes."""
    if name == "g" and x is not None and x.ndim == 3:
        return specs.key_decay()
    by_name = {"q": specs.keys, "k": specs.keys, "v": specs.values, "index": specs.index}
    return by_name.get(name, specs.decay)()


def _with_blocks(inputs: Arrays, specs: Specs) -> dict[str, tuple[jax.Array | None, pl.BlockSpec]]:
    return {name: (x, _block(name, x, specs)) for name, x in inputs.items()}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(how: _How, inputs: Arrays, initial: jax.Array) -> tuple[jax.Array, jax.Array]:
    o, final, _ = _forward(how, inputs, initial, keep=False)
    return o, final


def _run_forward(how: _How, inputs: Arrays, initial: jax.Array) -> tuple[tuple, tuple]:
    rule = differentiated_once(how.operator.name, partial(_forward, how, keep=True))
    o, final, entered = rule(inputs, initial)
    return (o, final), (inputs, entered)


def _run_backward(how: _How, residuals: tuple, cotangents: tuple) -> tuple:
    return differentiated_once(how.operator.name, partial(_backward, how))(*residuals, *cotangents)


_run.defvjp(_run_forward, _run_backward)


def _forward(how: _How, inputs: Arrays, initial: jax.Array, *, keep: bool) -> tuple[jax.Array, ...]:
    """Outputs, the final state, and where they are kept the states that entered each step."""
    plan, state = how.plan, initial.shape[2:]
    specs, v = Specs(plan), inputs["v"]
    entered = jax.ShapeDtypeStruct((plan.rows, plan.blocks, plan.heads, *state), jnp.float32)

    def body(refs: SimpleNamespace) -> None:
        step = pl.program_id(2)

        @pl.when(step == 0)
        def _():
            refs.S[...] = refs.initial[0]

        if keep:
            refs.entered[0, 0] = refs.S[...]
        how.operator.forward(plan, how.scale, refs)

        @pl.when(step == plan.blocks - 1)
        def _():
            refs.final[0] = refs.S[...]

    found = _tiles.run(
        body,
        name=f"{how.operator.name}_forward",
        plan=plan,
        inputs={**_with_blocks(inputs, specs), "initial": (initial, specs.state(*state))},
        outputs={
            "o": (jax.ShapeDtypeStruct(v.shape, v.dtype), specs.values()),
            "final": (jax.ShapeDtypeStruct(initial.shape, jnp.float32), specs.state(*state)),
            "entered": (entered, specs.entered(*state)) if keep else None,
        },
        scratch={"S": (plan.step_heads, *state)},
        interpret=how.interpret,
    )
    return found.o, found.final, found.entered


def _backward(
    how: _How, inputs: Arrays, entered: jax.Array, do: jax.Array, d_final: jax.Array
) -> tuple[Arrays, jax.Array]:
    """Cotangents of the inputs and of the initial state."""
    plan, state = how.plan, d_final.shape[2:]
    specs = Specs(plan, backwards=True)
    differentiable = {name: x for name, x in inputs.items() if name != "index" and x is not None}
    gradients = {
        f"d{name}": (jax.ShapeDtypeStruct(x.shape, x.dtype), _block(name, x, specs))
        for name, x in differentiable.items()
    }
    # Parts of a sum are not rounded before it.
    q = inputs["q"]
    dtype = q.dtype if plan.shares == 1 else jnp.float32
    parts = jax.ShapeDtypeStruct((*q.shape[:2], q.shape[2] * plan.shares), dtype)
    gradients |= dict.fromkeys(("dq", "dk"), (parts, specs.key_gradients()))

    def body(refs: SimpleNamespace) -> None:
        step = pl.program_id(2)

        @pl.when(step == 0)
        def _():
            refs.dS[...] = refs.d_final[0]

        how.operator.backward(plan, how.scale, refs)

        @pl.when(step == plan.blocks - 1)
        def _():
            refs.d_initial[0] = refs.dS[...]

    found = _tiles.run(
        body,
        name=f"{how.operator.name}_backward",
        plan=plan,
        inputs={
            **_with_blocks(inputs, specs),
            "entered": (entered, specs.entered(*state)),
            "do": (do, specs.values()),
            "d_final": (d_final, specs.state(*state)),
        },
        outputs={
            **gradients,
            "d_initial": (jax.ShapeDtypeStruct(d_final.shape, jnp.float32), specs.state(*state)),
        },
        scratch={"dS": (plan.step_heads, *state)},
        interpret=how.interpret,
    )
    cotangents = dict.fromkeys(inputs) | {name: getattr(found, f"d{name}") for name in differentiable}
    for name in ("q", "k"):
        cotangents[name] = _tiles.sum_shares(cotangents[name], plan).astype(q.dtype)
    return cotangents, found.d_initial


class KeyGradients:
    """Writes `dq` and `dk`, which heads of values that share a key head add up to, head after head."""

    def __init__(self, plan: Grid, refs: SimpleNamespace) -> None:
        self.plan, self.refs = plan, refs
        self.sums: dict[int, tuple[jax.Array, jax.Array]] = {}

    def add(self, head: int, at: slice, dq: jax.Array, dk: jax.Array) -> None:
        """at: positions of a chunk within the step."""
        if head % self.plan.sharing:
            dq, dk = (sum_ + x for sum_, x in zip(self.sums[at.start], (dq, dk)))
        self.sums[at.start] = dq, dk
        if (head + 1) % self.plan.sharing == 0:
            keys = self.plan.key_lanes(head)
            for ref, x in ((self.refs.dq, dq), (self.refs.dk, dk)):
                ref[0, at, keys] = x.astype(ref.dtype)
