"""Decay per channel on Hopper GPUs: it is lowered and compiled without one, and computes in Pallas' interpreter or,
where JAX sees one (JAX_PLATFORMS=cpu,cuda), on a GPU."""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.gpu import _channel_scores
from pallas_kernels.gpu.channel_decay import channel_decay, supports
from tests.hopper import (
    compile_for_hopper,
    in_float64,
    needs_cuda_compiler,
    on_gpu_or_interpreted,
    results_and_gradients,
)

NAMES = ("o", "final state", "q", "k", "v", "g", "state")
# Of the norm of the difference to that of the reference: factors, pairs, states and results are rounded to bfloat16,
# each by a third of an epsilon on average, and some four such errors add up, as squares.
BFLOAT16 = float(jnp.finfo(jnp.bfloat16).eps)


class Case(NamedTuple):
    length: int
    heads: int
    value_heads: int
    key_channels: int
    value_channels: int
    decay: float = 0.1  # mean of -g
    documents: bool = False
    batch: int = 1

    def shapes(self) -> tuple:
        """Of q, k, v, g, the state and the documents' numbers."""
        of, rows = jax.ShapeDtypeStruct, (self.batch, self.length)
        key = of((*rows, self.heads, self.key_channels), jnp.bfloat16)
        return (
            key,
            key,
            of((*rows, self.value_heads, self.value_channels), jnp.bfloat16),
            of((*rows, self.value_heads, self.key_channels), jnp.float32),
            of((self.batch, self.value_heads, self.key_channels, self.value_channels), jnp.float32),
            of(rows, jnp.int32) if self.documents else None,
        )

    def arrays(self) -> tuple:
        random = np.random.default_rng(0)
        *shapes, index = self.shapes()
        q, k, v, g, state = (jnp.asarray(random.normal(size=x.shape), x.dtype) for x in shapes)
        g = jnp.asarray(-self.decay * random.exponential(size=g.shape), jnp.float32)
        if index is not None:
            # Rows start in the document of the state, and documents are shorter and longer than a chunk.
            index = jnp.asarray(np.cumsum(random.random(index.shape) < 1 / 40, axis=1), jnp.int32)
        return q, k, v, g, state, index


def forward(q, k, v, g, state, index):
    return channel_decay(q, k, v, g, state, index, scale=q.shape[-1] ** -0.5)


def backward(*arrays):
    """The gradients of everything that has one, with cotangents that are the results."""
    *inputs, index = arrays
    results, pullback = jax.vjp(lambda *inputs: forward(*inputs, index), *inputs)
    return pullback(results)


PROGRAMS = {"forward": forward, "backward": backward}
SIZES = [Case(1000, 2, 4, 128, 128, documents=True, batch=2), Case(256, 1, 1, 40, 256)]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_lowers_for_cuda(case, program):
    lowered = jax.jit(PROGRAMS[program]).trace(*case.shapes()).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@needs_cuda_compiler
def test_compiles_for_hopper():
    """What needs too much shared memory, or a layout that the hardware does not have, fails here. The terms of pairs of
    a group, GROUP for each channel of each position, are summed up as they are made and never written down."""
    case = Case(1000, 2, 4, 128, 128, documents=True, batch=2)
    row = 4 * case.batch * case.length * case.value_heads * case.key_channels
    taken = compile_for_hopper(backward, case.shapes()).memory_analysis().temp_size_in_bytes
    assert taken < _channel_scores.GROUP * row


def definition(q, k, v, g, state, index):
    """The recurrence of the kernel's docstring, step by step, in the dtype of its arguments."""
    group, scale = v.shape[2] // q.shape[2], q.shape[-1] ** -0.5
    q, k = (jnp.repeat(x, group, axis=2) for x in (q, k))
    index = jnp.zeros(v.shape[:2], jnp.int32) if index is None else index
    same = index == jnp.pad(index[:, :-1], ((0, 0), (1, 0)))

    def step(state, x):
        q, k, v, g, same = x
        kept = jnp.where(same[:, None, None, None], jnp.exp(g)[..., None] * state, 0)
        state = kept + k[..., :, None] * v[..., None, :]
        return state, scale * jnp.einsum("bhk,bhkv->bhv", q, state)

    state, o = lax.scan(step, state, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (q, k, v, g, same)))
    return jnp.swapaxes(o, 0, 1), state


def computed(arrays: tuple) -> dict[str, np.ndarray]:
    *inputs, index = arrays
    with on_gpu_or_interpreted():
        return dict(zip(NAMES, results_and_gradients(lambda *inputs: forward(*inputs, index), inputs), strict=True))


@cache
def computed_of(case: Case) -> dict[str, np.ndarray]:
    return computed(case.arrays())


def expected(arrays: tuple) -> dict[str, np.ndarray]:
    """By the definition in float64."""
    *inputs, index = arrays
    return dict(zip(NAMES, in_float64(lambda *inputs: definition(*inputs, index), inputs), strict=True))


def errors(got: dict, right: dict) -> dict[str, float]:
    return {name: float(np.linalg.norm(got[name] - x) / np.linalg.norm(x)) for name, x in right.items()}


@pytest.mark.parametrize(
    "case",
    [
        Case(150, 1, 2, 64, 128, documents=True, batch=2),
        Case(130, 1, 1, 128, 64, decay=0.02),
        Case(70, 1, 1, 40, 72, decay=3.0),
    ],
    ids=str,
)
def test_agrees_with_the_definition(case):
    for name, error in errors(computed_of(case), expected(case.arrays())).items():
        assert error < BFLOAT16, name


def test_what_is_forgotten_has_no_gradient():
    """At a gate of -50 among weak ones nothing of before is left. There dg is the rounding errors of terms that do not
    cross it, which have the same factors and cancel in float32."""
    q, k, v, g, state, index = Case(150, 1, 1, 64, 64).arrays()
    strong = np.zeros(150, bool)
    strong[[0, 1, 5, 16, 40, 63, 64, 65, 100, 149]] = True
    arrays = (q, k, v, jnp.where(strong[:, None, None], -50.0, g), state, index)
    got, right = computed(arrays), expected(arrays)
    assert all(error < BFLOAT16 for error in errors(got, right).values())
    size = np.abs(right["g"]).max()
    assert np.abs(got["g"][:, strong]).max() < 64 * np.finfo(np.float32).eps * size
    everywhere = computed((q, k, v, jnp.full_like(g, -50.0), state, index))
    assert all(np.isfinite(x).all() for x in everywhere.values())
    # What crosses a gate has a factor exp(-50) = 2e-22, and sums up at most some thousand products.
    assert np.abs(everywhere["g"]).max() < 1e4 * np.exp(-50)


def test_the_comparison_sees_a_small_change():
    case = Case(130, 1, 1, 128, 64, decay=0.02)
    q, k, v, g, state, index = case.arrays()
    found = errors(computed_of(case), expected((q, k, v, g * 1.1, state, index)))
    assert all(found[name] > BFLOAT16 for name in ("o", "q", "k", "g"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"g": None}, "per channel"),
        ({"g": jax.ShapeDtypeStruct((1, 100, 4), jnp.float32)}, "per channel"),
        ({"v": jax.ShapeDtypeStruct((1, 100, 4, 64), jnp.float32)}, "bfloat16"),
        ({"v": jax.ShapeDtypeStruct((1, 100, 3, 64), jnp.bfloat16)}, "multiple"),
        ({"v": jax.ShapeDtypeStruct((1, 100, 4, 320), jnp.bfloat16)}, "at most 256"),
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
            channel_decay(**arguments, initial_state=state, index=None, scale=1.0)


def test_second_derivatives_are_refused():
    q, k, v, g, state, index = Case(64, 1, 1, 64, 64).arrays()

    def slope(q):
        return jax.grad(lambda q: forward(q, k, v, g, state, index)[0].astype(jnp.float32).sum())(q).sum()

    with pytest.raises(NotImplementedError, match="once"):
        jax.jit(jax.grad(slope)).trace(q)
