"""Kernels for Hopper GPUs: they are lowered and compiled without one, and compute in Pallas' interpreter or, where JAX
sees one (JAX_PLATFORMS=cpu,cuda), on a GPU."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.gpu import _chunk, _walk, _walk_back
from pallas_kernels.gpu import linear_attention as kernels
from pallas_kernels.gpu.linear_attention import linear_attention, supports
from tests.hopper import SHARED_MEMORY, errors_against, kernels_for_hopper, needs_cuda_compiler

BFLOAT16 = float(jnp.finfo(jnp.bfloat16).eps)
# Of the norm of the difference to that of the reference. Results, scores and states are rounded to bfloat16, each by a
# third of an epsilon on average, and errors of single terms average out. dg adds up a span of differences of products
# of such results, of which a part cancels: 2**2.
TOLERANCE = {"o": BFLOAT16, "state": BFLOAT16, "q": BFLOAT16, "k": BFLOAT16, "v": BFLOAT16, "g": 4 * BFLOAT16}


class Case(NamedTuple):
    length: int
    heads: int
    value_heads: int
    key_channels: int
    value_channels: int
    decay: str | None = "steps"  # "steps": [b, t, hv], "heads": [hv]
    documents: bool = False
    segments: bool = False  # as many as there can be, rather than for the chip

    def shapes(self) -> tuple:
        """Of q, k, v, g, the state and the documents' numbers."""
        batch = 2
        gate = {"steps": (batch, self.length, self.value_heads), "heads": (self.value_heads,), None: None}[self.decay]
        of = jax.ShapeDtypeStruct
        key = of((batch, self.length, self.heads, self.key_channels), jnp.bfloat16)
        return (
            key,
            key,
            of((batch, self.length, self.value_heads, self.value_channels), jnp.bfloat16),
            None if gate is None else of(gate, jnp.float32),
            of((batch, self.value_heads, self.key_channels, self.value_channels), jnp.float32),
            of((batch, self.length), jnp.int32) if self.documents else None,
        )

    def arrays(self) -> tuple:
        random = np.random.default_rng(0)
        *shapes, index = self.shapes()
        q, k, v, g, state = (x if x is None else jnp.asarray(random.normal(size=x.shape), x.dtype) for x in shapes)
        g = None if g is None else -jnp.abs(g) / 16
        if index is not None:
            # Rows start in the document of the state, and documents are shorter and longer than a chunk.
            index = jnp.asarray(np.cumsum(random.random(index.shape) < 1 / 50, axis=1), jnp.int32)
        return q, k, v, g, state, index


def forward(q, k, v, g, state, index):
    return linear_attention(q, k, v, g, state, index, scale=q.shape[-1] ** -0.5)


def backward(*arrays):
    """The gradients of everything that has one, with cotangents that are the results."""
    *inputs, index = arrays
    results, pullback = jax.vjp(lambda *inputs: forward(*inputs, index), *inputs)
    return pullback(results)


PROGRAMS = {"forward": forward, "backward": backward}
SIZES = [
    Case(1024, 2, 2, 64, 64),
    Case(1024, 2, 4, 128, 128, documents=True),
    Case(1000, 2, 2, 128, 64, decay="heads"),
    Case(1024, 2, 2, 96, 96, decay=None),
    Case(1024, 1, 1, 256, 256, documents=True),
]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_lowers_for_cuda(case, program):
    lowered = jax.jit(PROGRAMS[program]).trace(*case.shapes()).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


# Bytes that a thread writes to memory and reads back for want of registers, in the kernel that does so most, by the
# channels of a head. Compilers differ by some: jax 0.10.2 has 136, 716 and 2116. A kernel over these has grown.
SPILLS = {64: 200, 128: 1000, 256: 2600}


@needs_cuda_compiler
@pytest.mark.parametrize(
    "case", [*SIZES[:2], *(pytest.param(x, marks=pytest.mark.slow) for x in SIZES[2:-1]), SIZES[-1]], ids=str
)
def test_compiles_for_hopper(case):
    """Forward and backward: what needs a layout that the hardware does not have fails here, too."""
    kernels = kernels_for_hopper(backward, case.shapes())
    assert kernels
    channels = max(case.key_channels, case.value_channels)
    allowed = min(bytes_ for most, bytes_ in SPILLS.items() if channels <= most)
    for kernel in kernels:
        assert kernel.spills <= allowed, kernel
        assert kernel.shared_memory <= SHARED_MEMORY, kernel
        assert kernel.blocks >= 1, kernel


def definition(q, k, v, g, state, index, scale):
    """The recurrence of the kernel's docstring, step by step, in the dtype of its arguments."""
    group = v.shape[2] // q.shape[2]
    q, k = (jnp.repeat(x, group, axis=2) for x in (q, k))
    g = jnp.broadcast_to(0 if g is None else g, v.shape[:3]).astype(v.dtype)
    index = jnp.zeros(v.shape[:2], jnp.int32) if index is None else index
    same = index == jnp.pad(index[:, :-1], ((0, 0), (1, 0)))

    def step(state, x):
        q, k, v, g, same = x
        kept = jnp.where(same[:, None, None, None], jnp.exp(g)[..., None, None] * state, 0)
        state = kept + k[..., :, None] * v[..., None, :]
        return state, scale * jnp.einsum("bhk,bhkv->bhv", q, state)

    state, o = lax.scan(step, state, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (q, k, v, g, same)))
    return jnp.swapaxes(o, 0, 1), state


def errors(case: Case, arrays: tuple | None = None) -> dict[str, float]:
    """Of the kernel against the definition in float64; `arrays` are what the definition gets, by default the same."""
    exactly = partial(definition, scale=case.key_channels**-0.5)
    found = errors_against(exactly, forward, case.arrays(), arrays)
    return dict(zip(("o", "final state", "q", "k", "v", "g", "state"), found, strict=True))


@pytest.mark.parametrize(
    "case",
    [
        Case(300, 1, 2, 64, 64, documents=True, segments=True),
        Case(200, 1, 1, 128, 128, documents=True),
        Case(130, 1, 1, 128, 64, decay="heads"),
        Case(64, 1, 1, 40, 96, decay=None),
    ],
    ids=str,
)
def test_agrees_with_the_definition(case, monkeypatch):
    # A short sequence has as many spans as a long one.
    for module in (kernels, _walk, _walk_back):
        monkeypatch.setattr(module, "SPAN", 2 * _chunk.CHUNK)
    if case.segments:
        monkeypatch.setattr(kernels, "FEW_BLOCKS", 1000)
        monkeypatch.setattr(_chunk, "SHORTEST_SEGMENT", 1)
    for name, error in errors(case).items():
        assert error < TOLERANCE[name.removeprefix("final ")], name


def test_the_comparison_sees_a_small_change():
    case = Case(64, 1, 1, 64, 64)
    q, k, v, g, state, index = case.arrays()
    found = errors(case, (q, k, v, g * 1.25, state, index))
    assert all(found[name] > TOLERANCE[name] for name in ("o", "q", "k", "v", "g"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"g": None}, None),
        ({"v": jax.ShapeDtypeStruct((2, 100, 4, 64), jnp.float32)}, "bfloat16"),
        ({"g": jax.ShapeDtypeStruct((2, 100, 4, 64), jnp.float32)}, "per channel"),
        ({"v": jax.ShapeDtypeStruct((2, 100, 3, 64), jnp.bfloat16)}, "multiple"),
        ({"v": jax.ShapeDtypeStruct((2, 100, 4, 320), jnp.bfloat16)}, "at most 256"),
        ({"v": jax.ShapeDtypeStruct((2, 0, 4, 64), jnp.bfloat16)}, "empty"),
        ({"chunk_size": 128}, "chunks of 128"),
    ],
)
def test_says_what_it_does_not_support(change, reason):
    q, k, v, g, state, _ = Case(100, 2, 4, 64, 64).shapes()
    arguments = {"q": q, "k": k, "v": v, "g": g} | change
    said = supports(**arguments)
    assert (said is None) if reason is None else (reason in said)
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            linear_attention(**arguments, initial_state=state, index=None, scale=1.0)


def test_second_derivatives_are_refused():
    q, k, v, g, state, index = Case(64, 1, 1, 64, 64).arrays()

    def slope(q):
        return jax.grad(lambda q: forward(q, k, v, g, state, index)[0].astype(jnp.float32).sum())(q).sum()

    with pytest.raises(NotImplementedError, match="once"):
        jax.jit(jax.grad(slope)).trace(q)
