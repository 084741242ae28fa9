"""The delta rule against its paper's recurrence in NumPy, and where numbers are hard: keys that resemble each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.triangular_inverse import unit_lower_inverse
from seqmodels.errors import InputError
from seqmodels.ops.delta_rule import delta_rule
from tests.tolerances import TOLERANCES

BATCH, LENGTH, HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM = 2, 37, 2, 4, 6, 3
DECAYS = ("none", "scalar", "channel")
# Padding on the left, between and on the right, a document of one token; and a full row.
SEGMENTS = np.array([[0] * 2 + [3] * 16 + [7] + [0] + [2] * 15 + [0] * 2, [1] * LENGTH])

rule = jax.jit(delta_rule, static_argnames=("scale", "form", "chunk_size"))


def inputs(decay: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    k = rng.normal(size=(BATCH, LENGTH, HEADS, KEY_DIM))
    shape = {"scalar": (VALUE_HEADS,), "channel": (VALUE_HEADS, KEY_DIM)}.get(decay)
    return {
        "q": rng.normal(size=k.shape),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": rng.normal(size=(BATCH, LENGTH, VALUE_HEADS, VALUE_DIM)),
        "beta": rng.uniform(0, 2, size=(BATCH, LENGTH, VALUE_HEADS)),
        "g": None if shape is None else -rng.exponential(size=(BATCH, LENGTH, *shape)),
    }


def oracle(q, k, v, beta, g, segment_ids, S):
    """Kimi Linear's equation, of which the other two are special cases, one token of one head at a time."""
    o, S = np.zeros(v.shape), np.array(S)
    for row, ids in enumerate(segment_ids):
        current = 0
        for t in np.flatnonzero(ids):
            if current not in (0, ids[t]):
                S[row] = 0
            current = ids[t]
            for head in range(VALUE_HEADS):
                shared = head * HEADS // VALUE_HEADS
                key, strength = k[row, t, shared], beta[row, t, head]
                kept = np.zeros(KEY_DIM) if g is None else np.broadcast_to(g[row, t, head], KEY_DIM)
                transition = (np.eye(KEY_DIM) - strength * np.outer(key, key)) @ np.diag(np.exp(kept))
                S[row, head] = transition @ S[row, head] + strength * np.outer(key, v[row, t, head])
                o[row, t, head] = q[row, t, shared] @ S[row, head] / np.sqrt(KEY_DIM)
    return o, S


def error(found, expected) -> float:
    """The largest difference, relative to the largest value expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("form", ["recurrent", "chunked"])
@pytest.mark.parametrize("decay", DECAYS)
def test_values_match_the_oracle(form, decay):
    arrays = inputs(decay)
    start = np.random.default_rng(1).normal(size=(BATCH, VALUE_HEADS, KEY_DIM, VALUE_DIM))
    expected = oracle(**arrays, segment_ids=SEGMENTS, S=start)
    for size in (8, None):
        found = rule(**arrays, initial_state=start, segment_ids=SEGMENTS, form=form, chunk_size=size)
        for have, want in zip(found, expected, strict=True):
            assert error(have, want) <= TOLERANCES["forms"]


@pytest.mark.parametrize("size", [1, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("angle", ["none", "cosine 0.8", "equal"])
def test_the_inverse_is_exact_for_keys_that_resemble_each_other(size, angle):
    """Where products of powers of N would lose everything: at 64 equal keys they are off by 1e7."""
    rng = np.random.default_rng(size)
    keys = rng.normal(size=(3, size, 32))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    if angle != "none":
        cosine = {"cosine 0.8": 0.8, "equal": 1.0}[angle]
        keys = np.sqrt(cosine) * keys[:, :1] + np.sqrt(1 - cosine) * keys
    N = np.tril(keys @ keys.swapaxes(-1, -2), -1).astype(np.float32)
    expected = np.linalg.inv(np.eye(size) + N.astype(np.float64))
    found = jax.jit(unit_lower_inverse)(N)
    assert found.dtype == jnp.float32
    assert error(found, expected) <= TOLERANCES["kernel"]


@pytest.mark.parametrize("decay", DECAYS)
def test_gradients_in_float32_for_keys_that_resemble_each_other(decay):
    """Full chunks of keys with cosines of about 0.95 and beta near 1: values and gradients as good as in float64."""
    rng = np.random.default_rng(0)
    shape = (1, 192, 2, 16)
    k = rng.normal(size=(1, 1, 2, 16)) + 0.2 * rng.normal(size=shape)
    gate = {"none": None, "scalar": shape[:3], "channel": shape}[decay]
    arrays = {
        "q": rng.normal(size=shape),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": rng.normal(size=shape),
        "beta": rng.uniform(0.9, 1, size=shape[:3]),
    }
    if gate is not None:
        arrays["g"] = -rng.uniform(0, 1e-2, size=gate)
    cotangent = rng.normal(size=shape)
    arrays = {name: x.astype(np.float32) for name, x in arrays.items()}

    def outcome(form, dtype):
        o, pull_back = jax.vjp(lambda arrays: delta_rule(**arrays, form=form, chunk_size=64)[0], cast(arrays, dtype))
        return {"o": o, **pull_back(cotangent.astype(dtype))[0]}

    def cast(arrays, dtype):
        return {name: jnp.asarray(x, dtype) for name, x in arrays.items()}

    found = jax.jit(outcome, static_argnums=(0, 1))("chunked", np.dtype(np.float32))
    with jax.enable_x64(True):
        expected = jax.jit(outcome, static_argnums=(0, 1))("recurrent", np.dtype(np.float64))
    for name, want in expected.items():
        assert error(found[name], want) <= TOLERANCES["extreme"], name


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_a_key_returns_the_last_value_written_to_it(form):
    """Orthonormal keys, each written twice with beta = 1: what came first is gone, but for rounding."""
    keys = np.tile(np.eye(8, dtype=np.float32), (2, 1))[None, :, None]
    values = np.random.default_rng(0).normal(size=(1, 16, 1, 4)).astype(np.float32)
    beta = np.ones((1, 16, 1), np.float32)
    o, S = rule(keys, keys, values, beta, scale=1.0, form=form)
    assert error(o, values) <= TOLERANCES["jit"]
    assert error(S[0, 0], values[0, 8:, 0]) <= TOLERANCES["jit"]


def test_the_backward_pass_holds_a_state_per_chunk_and_no_more():
    """What XLA sets aside for gradients: of the order of the inputs, not of a state per token."""
    shape = (1, 2048, 2, 32)
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name in "qkv"}
    arrays["beta"] = jax.ShapeDtypeStruct(shape[:3], jnp.float32)
    gradient = jax.jit(jax.grad(lambda arrays: delta_rule(**arrays)[0].sum()))
    used = gradient.lower(arrays).compile().memory_analysis().temp_size_in_bytes
    size_of_inputs = sum(x.size * x.dtype.itemsize for x in arrays.values())
    state_per_token = shape[1] * shape[2] * shape[3] ** 2 * 4
    assert used < 4 * size_of_inputs < state_per_token


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 9, 3, 4)}, r"k has shape \(2, 9, 2, 4\); expected \(2, 9, 3, 4\) as q has"),
        ({"v": (2, 9, 3, 5)}, r"v has shape \(2, 9, 3, 5\); expected \[2, 9, a multiple of 2 heads"),
        ({"beta": (2, 9)}, r"beta has shape \(2, 9\); expected \(2, 9, 4\)"),
        ({"beta": (2, 9, 2)}, r"beta has shape \(2, 9, 2\); expected \(2, 9, 4\)"),
        ({"g": (2, 9, 4, 5)}, r"g has shape \(2, 9, 4, 5\); expected \(2, 9, 4\) or \(2, 9, 4, 4\)"),
        ({"initial_state": (2, 2, 4, 5)}, r"initial_state has shape \(2, 2, 4, 5\); expected \(2, 4, 4, 5\)"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    shapes = {"q": (2, 9, 2, 4), "k": (2, 9, 2, 4), "v": (2, 9, 4, 5), "beta": (2, 9, 4)} | change
    with pytest.raises(InputError, match=f"^delta_rule: {message}"):
        delta_rule(**{name: jnp.zeros(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize("decay", DECAYS)
def test_the_kernel_for_gpus_is_taken_by_name_alone(decay):
    of = jax.ShapeDtypeStruct
    row, scalar = of((1, 100, 2, 32), jnp.bfloat16), of((1, 100, 2), jnp.float32)
    g = {"none": None, "scalar": scalar, "channel": of(row.shape, jnp.float32)}[decay]

    def has_kernel(backend: str) -> bool:
        run = jax.jit(delta_rule, static_argnames="backend")
        traced = run.trace(row, row, row, scalar, g, segment_ids=of((1, 100), jnp.int32), backend=backend)
        return "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()

    assert has_kernel("pallas_gpu")
    assert not has_kernel("auto")
