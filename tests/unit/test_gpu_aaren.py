"""The kernel of Aaren for Hopper GPUs: lowered and compiled without one; in Pallas' interpreter or on a GPU it computes
what the recurrence does in float64."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.gpu import aaren as kernels
from pallas_kernels.gpu.aaren import aaren, supports
from tests.hopper import (
    compile_for_hopper,
    in_float64,
    needs_cuda_compiler,
    on_gpu_or_interpreted,
    results_and_gradients,
)

BFLOAT16 = float(jnp.finfo(jnp.bfloat16).eps)
INPUTS = ("k", "v", "query", "m", "u", "w")
RESULTS = ("o", "final m", "final u", "final w")
# Of the norm of the difference to that of the reference. o, v's gradient and the weights are rounded to bfloat16, each
# by a third of an epsilon on average; m and u are float32 throughout.
TOLERANCE = dict.fromkeys((*RESULTS, *INPUTS), BFLOAT16) | {"final m": 1e-6, "final u": 1e-5}


class Case(NamedTuple):
    length: int
    heads: int
    key_channels: int
    value_channels: int
    batch: int = 1
    key_dtype: str = "bfloat16"
    documents: bool = False  # padding, too
    segments: int | None = None  # None: for the chip
    size: float = 1.0  # of the scores
    empty: bool = False  # the initial state

    @property
    def scale(self) -> float:
        return self.size * self.key_channels**-0.5

    def shapes(self) -> tuple:
        """Of k, v, query, m, u, w, index, real."""
        of = jax.ShapeDtypeStruct
        positions, state = (self.batch, self.length), (self.batch, self.heads)
        return (
            of((*positions, self.heads, self.key_channels), self.key_dtype),
            of((*positions, self.heads, self.value_channels), jnp.bfloat16),
            of((self.heads, self.key_channels), jnp.float32),
            of(state, jnp.float32),
            of(state, jnp.float32),
            of((*state, self.value_channels), jnp.float32),
            of(positions, jnp.int32) if self.documents else None,
            of(positions, jnp.bool) if self.documents else None,
        )

    def arrays(self) -> tuple:
        random = np.random.default_rng(0)
        *shapes, index, real = self.shapes()
        k, v, query, m, u, w = (jnp.asarray(random.normal(size=x.shape), x.dtype) for x in shapes)
        # Averages of something, as what a layer gets: differences of values are smaller than these.
        v, u, m = v + 1, 1 + jnp.abs(u), self.size * m
        w = u[..., None] * w
        if self.empty:
            m, u, w = 0 * m, 0 * u, 0 * w
        if index is not None:
            # A third of each row or more is of the document of the state. Some documents are longer than a chunk.
            starts = (random.random(index.shape) < 1 / 40) & (np.arange(self.length) >= self.length / 3)
            index = jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)
            # The first positions see nothing where the state is empty.
            real = jnp.asarray(random.random(real.shape) < 0.9).at[:, :3].set(False)
        return k, v, query, m, u, w, index, real


def results(k, v, query, m, u, w, index, real, scale=1.0):
    o, state = aaren(k, v, query, m, u, w, index, real, scale=scale)
    return (o if real is None else jnp.where(real[..., None, None], o, 0)), *state


def gradients(*arrays):
    """Of everything that has them, with cotangents that are the results."""
    *inputs, index, real = arrays
    found, pull_back = jax.vjp(lambda *inputs: results(*inputs, index, real), *inputs)
    return pull_back(found)


PROGRAMS = {"forward": results, "backward": gradients}
SIZES = [
    Case(1024, 2, 64, 64, batch=100),
    Case(1000, 1, 32, 256, documents=True, key_dtype="float32"),
]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_lowers_for_cuda(case, program):
    lowered = jax.jit(PROGRAMS[program]).trace(*case.shapes()).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@needs_cuda_compiler
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_compiles_for_hopper(case):
    compile_for_hopper(gradients, case.shapes())


def definition(k, v, query, m, u, w, index, real, scale):
    """The recurrence of the kernel's docstring, step by step, in the dtype of its arguments."""
    index = jnp.zeros(v.shape[:2], jnp.int32) if index is None else index
    real = jnp.ones(v.shape[:2], bool) if real is None else real
    same = index == jnp.pad(index[:, :-1], ((0, 0), (1, 0)))

    def step(state, x):
        s, v, same, real = x
        m, u, w = state
        same, real = same[:, None], real[:, None]
        seen = same & (u > 0)
        m_after = jnp.where(seen, jnp.maximum(m, s), s)
        keep = jnp.where(seen, jnp.exp(jnp.where(seen, m - m_after, 0)), 0)
        add = jnp.exp(s - m_after)
        after = m_after, keep * u + add, keep[..., None] * w + add[..., None] * v
        # Padding changes nothing, but the document that it belongs to may be a new one.
        before = jax.tree.map(lambda x: jnp.where(jnp.expand_dims(same, range(2, x.ndim)), x, 0), state)
        state = jax.tree.map(
            lambda new, old: jnp.where(jnp.expand_dims(real, range(2, new.ndim)), new, old), after, before
        )
        o = state[2] / jnp.where(state[1] > 0, state[1], 1)[..., None]
        return state, jnp.where(real[..., None], o, 0)

    s = scale * jnp.einsum("bthk,hk->bth", k, query)
    state, o = lax.scan(step, (m, u, w), jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (s, v, same, real)))
    return jnp.swapaxes(o, 0, 1), *state


def errors(case: Case, given: tuple | None = None) -> dict[str, float]:
    """Of the kernel against the definition in float64; `given` is what the definition gets, by default the same."""
    *inputs, index, real = arrays = case.arrays()
    with on_gpu_or_interpreted():
        found = results_and_gradients(lambda *inputs: results(*inputs, index, real, scale=case.scale), inputs)
    *inputs, index, real = arrays if given is None else given
    expected = in_float64(lambda *inputs: definition(*inputs, index, real, case.scale), inputs)
    got, expected = (dict(zip((*RESULTS, *INPUTS), x, strict=True)) for x in (found, expected))
    # Where a state has no weight left its gradients underflow in float32.
    sizes = {name: max(np.linalg.norm(x), 1e-6) for name, x in expected.items()}
    # The gradients of m and u are single numbers, sums over channels of which most may cancel: beside their terms.
    u, w = (np.asarray(x) for x in arrays[4:6])
    terms = np.sqrt(np.sum((w * expected["w"]) ** 2, axis=-1))
    sizes["m"] = max(sizes["m"], np.linalg.norm(terms))
    sizes["u"] = max(sizes["u"], np.linalg.norm(terms / np.maximum(u, 1)))
    return {name: np.linalg.norm(got[name] - x) / sizes[name] for name, x in expected.items()}


@pytest.mark.parametrize(
    "case",
    [
        Case(60, 2, 16, 64, batch=2, documents=True, empty=True),
        Case(192, 1, 16, 128, documents=True, segments=2),
        Case(70, 2, 16, 40, size=100.0, key_dtype="float32"),
    ],
    ids=str,
)
def test_agrees_with_the_definition(case, monkeypatch):
    if case.segments:
        monkeypatch.setattr(kernels, "_segments", lambda v: case.segments)
    for name, error in errors(case).items():
        assert error < TOLERANCE[name], name


def test_the_comparison_sees_a_small_change():
    case = Case(64, 1, 16, 64)
    k, v, query, *rest = case.arrays()
    found = errors(case, (k, v, query * 1.1, *rest))
    assert all(found[name] > TOLERANCE[name] for name in ("o", "final m", "final u", "final w", *INPUTS))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"k": jax.ShapeDtypeStruct((2, 100, 4, 64), jnp.float32)}, None),
        ({"k": jax.ShapeDtypeStruct((2, 100, 4, 64), jnp.float16)}, "k must be"),
        ({"v": jax.ShapeDtypeStruct((2, 100, 4, 64), jnp.float32)}, "v must be bfloat16"),
        ({"v": jax.ShapeDtypeStruct((2, 100, 4, 320), jnp.bfloat16)}, "at most 256"),
        ({"v": jax.ShapeDtypeStruct((2, 0, 4, 64), jnp.bfloat16)}, "empty"),
        ({"v": jax.ShapeDtypeStruct((1024, 100, 64, 64), jnp.bfloat16)}, "65535"),
        ({"chunk_size": 128}, "chunks of 128"),
    ],
)
def test_says_what_it_does_not_support(change, reason):
    k, v, *rest = Case(100, 4, 64, 64, batch=2).shapes()
    arguments = {"k": k, "v": v} | change
    said = supports(**arguments)
    assert (said is None) if reason is None else (reason in said)
    if reason is not None:
        names = ("query", "m", "u", "w", "index", "real")
        with pytest.raises(ValueError, match=reason):
            aaren(**arguments, **dict(zip(names, rest)), scale=1.0)


def test_second_derivatives_are_refused():
    k, *rest = Case(64, 1, 8, 64).arrays()

    def slope(k):
        return jax.grad(lambda k: results(k, *rest)[0].astype(jnp.float32).sum())(k).sum()

    with pytest.raises(NotImplementedError, match="once"):
        jax.jit(jax.grad(slope)).trace(k)


def operator(backend):
    """`seqmodels.ops.aaren` of k, v, the query and segment_ids on a backend, where what it imports is there."""
    op = pytest.importorskip("seqmodels.ops.aaren")
    return lambda k, v, query, ids: op.aaren(k, v, query, segment_ids=ids, backend=backend)


@pytest.mark.parametrize(("backend", "is_there"), [("pallas_gpu", True), ("auto", False)])
def test_the_operator_lowers_it_where_it_is_asked_for_by_name(backend, is_there):
    k, v, query, *_, index, _ = Case(100, 1, 8, 16, documents=True).shapes()
    lowered = jax.jit(operator(backend)).trace(k, v, query, index).lower(lowering_platforms=("cuda",))
    assert ("mosaic_gpu" in lowered.as_text()) == is_there


def test_the_operator_says_why_not():
    k, v, query, *_, index, _ = Case(100, 1, 8, 16, documents=True, key_dtype="float32").shapes()
    with pytest.raises(ValueError, match="'pallas_gpu' cannot run this: v must be bfloat16"):
        jax.eval_shape(operator("pallas_gpu"), k, jax.ShapeDtypeStruct(v.shape, jnp.float32), query, index)


def test_the_operator_agrees_with_its_other_form():
    k, v, query, *_, index, real = Case(100, 1, 8, 16, documents=True).arrays()
    ids = jnp.where(real, index + 1, 0)
    expected, final = operator("xla")(k, v, query, ids)
    with on_gpu_or_interpreted():
        found, state = operator("pallas_gpu")(k, v, query, ids)
    for x, y in zip((found, *state), (expected, *final)):
        assert np.linalg.norm(np.asarray(x - y, np.float64)) < BFLOAT16 * np.linalg.norm(np.asarray(y, np.float64))
