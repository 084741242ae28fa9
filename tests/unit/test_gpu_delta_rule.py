"""The delta rule for Hopper GPUs: it is lowered and compiled without one, and computes in Pallas' interpreter or, where
JAX sees one (JAX_PLATFORMS=cpu,cuda), on a GPU."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.gpu._channel_scores import GROUP
from pallas_kernels.gpu.delta_rule import delta_rule, supports
from tests.hopper import compile_for_hopper, errors_against, needs_cuda_compiler

NAMES = ("o", "final state", "q", "k", "v", "beta", "g", "state")
# Of the norm of the difference to that of the reference. Rows, pairs, states and results are rounded to bfloat16, each
# by a third of an epsilon on average; about five such errors add up, as squares. With one key that is written again
# and again, dN is a sum over the later positions of its chunk, of which dY has the differences of neighbours: the error
# of a sum of 64 terms in one, in the gradients of v, beta and g.
BFLOAT16 = float(jnp.finfo(jnp.bfloat16).eps)
TOLERANCE = dict.fromkeys(NAMES, BFLOAT16)
ONE_KEY = TOLERANCE | dict.fromkeys(("v", "beta", "g"), 64**0.5 * BFLOAT16)


class Case(NamedTuple):
    length: int
    heads: int
    value_heads: int
    key_channels: int
    value_channels: int
    decay: float | None = 0.1  # mean of -g
    by_channel: bool = False
    documents: bool = False
    one_key: bool = False  # the same at every position, and beta = 1
    batch: int = 1

    def shapes(self) -> tuple:
        """Of q, k, v, beta, g, the state and the documents' numbers."""
        of, rows, scalar = jax.ShapeDtypeStruct, (self.batch, self.length), (self.batch, self.length, self.value_heads)
        gate = (*scalar, self.key_channels) if self.by_channel else scalar
        key = of((*rows, self.heads, self.key_channels), jnp.bfloat16)
        return (
            key,
            key,
            of((*scalar, self.value_channels), jnp.bfloat16),
            of(scalar, jnp.float32),
            None if self.decay is None else of(gate, jnp.float32),
            of((self.batch, self.value_heads, self.key_channels, self.value_channels), jnp.float32),
            of(rows, jnp.int32) if self.documents else None,
        )

    def arrays(self) -> tuple:
        random = np.random.default_rng(0)
        *shapes, index = self.shapes()
        q, k, v, beta, g, state = (x if x is None else random.normal(size=x.shape) for x in shapes)
        k = k / np.linalg.norm(k, axis=-1, keepdims=True)
        beta = 2 / (1 + np.exp(-beta))
        if self.one_key:
            k, beta = np.broadcast_to(k[:, :1], k.shape), np.ones_like(beta)
        g = None if g is None else -self.decay * random.exponential(size=g.shape)
        arrays = (
            x if x is None else jnp.asarray(x, of.dtype) for x, of in zip((q, k, v, beta, g, state), self.shapes())
        )
        if index is not None:
            # Rows start in the document of the state, and documents are shorter and longer than a chunk.
            starts = (random.random(index.shape) < 1 / 40) & (np.arange(self.length) > 0)
            index = jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)
        return *arrays, index


def forward(q, k, v, beta, g, state, index):
    return delta_rule(q, k, v, beta, g, state, index, scale=q.shape[-1] ** -0.5)


def backward(*arrays):
    """The gradients of everything that has one, with cotangents that are the results."""
    *inputs, index = arrays
    results, pullback = jax.vjp(lambda *inputs: forward(*inputs, index), *inputs)
    return pullback(results)


PROGRAMS = {"forward": forward, "backward": backward}
SIZES = [
    Case(1024, 2, 2, 64, 64, decay=None, batch=2),
    Case(1000, 2, 4, 200, 256, documents=True),
    # As large as in a model: XLA's choices depend on it.
    Case(4096, 16, 16, 128, 128, by_channel=True, documents=True, batch=2),
]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_lowers_for_cuda(case, program):
    lowered = jax.jit(PROGRAMS[program]).trace(*case.shapes()).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@needs_cuda_compiler
@pytest.mark.parametrize("case", SIZES[1:], ids=str)
def test_compiles_for_hopper(case):
    """What needs too much shared memory, or a layout that the hardware does not have, fails here. The terms of pairs of
    a group, GROUP for each channel of each position, are summed up as they are made and never written down."""
    program = compile_for_hopper(backward, case.shapes()).as_text()
    written_down = program[program.index("ENTRY") :]
    assert "f32[" in written_down
    assert f"{GROUP},{GROUP},{-(-case.key_channels // 64) * 64}]" not in written_down


def definition(q, k, v, beta, g, state, index, scale):
    """The recurrence of the kernel's docstring, step by step, in the dtype of its arguments."""
    q, k = (jnp.repeat(x, v.shape[2] // q.shape[2], axis=2) for x in (q, k))
    g = jnp.zeros_like(beta) if g is None else g
    index = jnp.zeros(v.shape[:2], jnp.int32) if index is None else index
    same = index == jnp.pad(index[:, :-1], ((0, 0), (1, 0)))

    def step(state, x):
        q, k, v, beta, g, same = x
        kept = jnp.where(same[:, None, None, None], jnp.exp(g).reshape(*g.shape[:2], -1, 1) * state, 0)
        wrong = v - jnp.einsum("bhk,bhkv->bhv", k, kept)
        state = kept + k[..., :, None] * (beta[..., None] * wrong)[..., None, :]
        return state, scale * jnp.einsum("bhk,bhkv->bhv", q, state)

    state, o = lax.scan(step, state, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (q, k, v, beta, g, same)))
    return jnp.swapaxes(o, 0, 1), state


def errors(case: Case, arrays: tuple | None = None) -> dict[str, float]:
    """Of the kernel against the definition in float64; `arrays` are what the definition gets, by default the same."""
    exactly = partial(definition, scale=case.key_channels**-0.5)
    found = errors_against(exactly, forward, case.arrays(), arrays)
    return dict(zip(NAMES, found, strict=True))


@pytest.mark.parametrize(
    "case",
    [
        Case(130, 1, 2, 64, 64, documents=True),
        Case(80, 1, 1, 64, 64, decay=50.0),
        Case(64, 1, 1, 40, 96, decay=None),
        Case(100, 1, 1, 64, 64, decay=1e-3, one_key=True),
        Case(100, 1, 2, 40, 64, by_channel=True, documents=True),
        Case(80, 1, 1, 64, 64, decay=50.0, by_channel=True),
    ],
    ids=str,
)
def test_agrees_with_the_definition(case):
    for name, error in errors(case).items():
        assert error < (ONE_KEY if case.one_key else TOLERANCE)[name], name


def test_the_comparison_sees_a_small_change():
    case = Case(64, 1, 1, 64, 64, by_channel=True)
    q, k, v, beta, g, state, index = case.arrays()
    found = errors(case, (q, k, v, 1.05 * beta, 1.05 * g, state, index))
    assert all(found[name] > TOLERANCE[name] for name in NAMES)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"g": None}, None),
        ({"beta": jax.ShapeDtypeStruct((1, 100, 4), jnp.int32)}, "beta is int32"),
        ({"v": jax.ShapeDtypeStruct((1, 100, 4, 64), jnp.float32)}, "bfloat16"),
        ({"g": jax.ShapeDtypeStruct((1, 100, 4, 64), jnp.float32)}, None),
        ({"v": jax.ShapeDtypeStruct((1, 100, 3, 64), jnp.bfloat16)}, "multiple"),
        ({"v": jax.ShapeDtypeStruct((1, 100, 4, 320), jnp.bfloat16)}, "at most 256"),
        ({"v": jax.ShapeDtypeStruct((1, 0, 4, 64), jnp.bfloat16)}, "empty"),
        ({"chunk_size": 128}, "chunks of 128"),
    ],
)
def test_says_what_it_does_not_support(change, reason):
    q, k, v, beta, g, state, _ = Case(100, 2, 4, 64, 64).shapes()
    arguments = {"q": q, "k": k, "v": v, "beta": beta, "g": g} | change
    said = supports(**arguments)
    assert (said is None) if reason is None else (reason in said)
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            delta_rule(**arguments, initial=state, index=None, scale=1.0)


def test_second_derivatives_are_refused():
    q, *others = Case(64, 1, 1, 64, 64).shapes()

    def slope(q, *others):
        return jax.grad(lambda q: forward(q, *others)[0].astype(jnp.float32).sum())(q).sum()

    with pytest.raises(NotImplementedError, match="once"):
        jax.jit(jax.grad(slope)).trace(q, *others)
