"""Operators and layers without causality: against sums over all pairs, in float64, written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.errors import InputError
from seqmodels.ops.aaren import aaren
from seqmodels.ops.linear_attention import linear_attention
from seqmodels.ops.short_conv import short_conv
from seqmodels.ops.softmax_attention import softmax_attention
from seqmodels.ops.ssd import ssd
from tests.conformance.compare import assert_close
from tests.tolerances import TOLERANCES

RANDOM = np.random.default_rng(0)
SEGMENT_IDS = np.array([[0, 3, 3, 3, 3, 3, 0, 5, 5, 3, 3], [1] * 11, [0] * 11, [4, 2, 2, 2, 2, 2, 2, 2, 7, 0, 0]])
B, T, H, K, V = 4, 11, 2, 3, 2
LAYOUTS = {"one document": None, "packed": SEGMENT_IDS}


def same_document(segment_ids):
    """[b, t] number of each real token's document, -1 at padding, read off token by token."""
    numbers = np.full((B, T), -1)
    for row, ids in enumerate(np.ones((B, T), int) if segment_ids is None else segment_ids):
        number, last = 0, None
        for t, segment in enumerate(ids):
            if segment:
                number += last is not None and segment != last
                numbers[row, t], last = number, segment
    return numbers


def decay_between(g, numbers, row, head, i, j):
    """The log decays that a reader at i finds between itself and j, its own among them; padding has none."""
    places = range(j + 1, i + 1) if j <= i else range(i, j)
    return sum((g[row, m, head] for m in places if numbers[row, m] >= 0), np.zeros(g.shape[-1]))


def linear_by_hand(q, k, v, g, numbers, scale, normalize):
    o = np.zeros((B, T, H, V))
    for row, i, head in np.ndindex(B, T, H):
        top, bottom = np.zeros(V), 0.0
        for j in range(T):
            if numbers[row, i] >= 0 and numbers[row, i] == numbers[row, j]:
                decay = np.exp(decay_between(g, numbers, row, head, i, j))
                weight = scale * (q[row, i, head] * decay * k[row, j, head]).sum()
                top, bottom = top + weight * v[row, j, head], bottom + weight
        o[row, i, head] = top / (bottom + 1e-6) if normalize else top
    return o


def attention_by_hand(q, k, v, numbers, window):
    o = np.zeros((B, T, H, V))
    for row, i, head in np.ndindex(B, T, H):
        seen = [
            j
            for j in range(T)
            if numbers[row, i] >= 0 and numbers[row, i] == numbers[row, j]
            and (not window or distance(numbers[row], i, j) < window)
        ]
        if seen:
            s = np.array([q[row, i, head] @ k[row, j, head] for j in seen]) / K**0.5
            p = np.exp(s - s.max())
            o[row, i, head] = (p / p.sum()) @ v[row, seen, head]
    return o


def distance(numbers, i, j):
    return sum(numbers[m] >= 0 for m in range(min(i, j) + 1, max(i, j) + 1))


def arrays():
    q, k = RANDOM.standard_normal((2, B, T, H, K))
    return q, k, RANDOM.standard_normal((B, T, H, V))


@pytest.mark.parametrize("decay", ["none", "per head", "scalar", "per channel"])
@pytest.mark.parametrize("normalize", [False, True])
def test_linear_attention(decay, normalize):
    q, k, v = arrays()
    shapes = {"none": None, "per head": (H,), "scalar": (B, T, H), "per channel": (B, T, H, K)}
    g = None if shapes[decay] is None else -np.abs(RANDOM.standard_normal(shapes[decay]))
    if normalize:
        q, k = np.abs(q), np.abs(k)
    every = np.zeros((B, T, H, K)) if g is None else g if g.ndim == 4 else np.broadcast_to(g[..., None], (B, T, H, K))
    with jax.enable_x64(True):
        how = {"normalize": normalize, "causal": False, "chunk_size": 4}
        run = jax.jit(lambda *args, ids: linear_attention(*args, g, segment_ids=ids, **how))
        for layout, ids in LAYOUTS.items():
            o, state = run(q, k, v, ids=ids)
            expected = linear_by_hand(q, k, v, every, same_document(ids), K**-0.5, normalize)
            assert_close(o, expected, TOLERANCES["forms"], f"{decay}, {layout}: ")
            assert state == ()


@pytest.mark.parametrize("window", [None, 1, 3])
def test_softmax_attention(window):
    q, k, v = arrays()
    with jax.enable_x64(True):
        how = {"window": window, "causal": False, "chunk_size": 4}
        run = jax.jit(lambda *args, ids: softmax_attention(*args, segment_ids=ids, **how))
        for layout, ids in LAYOUTS.items():
            expected = attention_by_hand(q, k, v, same_document(ids), window)
            assert_close(run(q, k, v, ids=ids)[0], expected, TOLERANCES["forms"], f"window {window}, {layout}: ")


def test_aaren():
    q, k, v = arrays()
    query = q[0, 0]
    with jax.enable_x64(True):
        for layout, ids in LAYOUTS.items():
            o, _ = aaren(*map(jnp.asarray, (k, v, query)), causal=False, segment_ids=ids)
            every = np.broadcast_to(query, q.shape)
            assert_close(o, attention_by_hand(every, k, v, same_document(ids), None), TOLERANCES["forms"], layout)


def test_short_convolution_is_centred():
    x, kernel, bias = RANDOM.standard_normal((B, T, 5)), RANDOM.standard_normal((3, 5)), RANDOM.standard_normal(5)
    with jax.enable_x64(True):
        for layout, ids in LAYOUTS.items():
            numbers, y = same_document(ids), np.zeros((B, T, 5))
            for row, t, j in np.ndindex(B, T, T):
                if numbers[row, t] >= 0 and numbers[row, t] == numbers[row, j] and distance(numbers[row], t, j) < 3:
                    y[row, t] += kernel[2 - distance(numbers[row], t, j)] * x[row, j] + (t == j) * bias
            o, _ = short_conv(*map(jnp.asarray, (x, kernel, bias)), causal=False, segment_ids=ids)
            assert_close(o, y, TOLERANCES["forms"], layout)


def test_other_operators_add_the_reversed_span():
    keys = jax.random.split(jax.random.key(0), 4)
    x, dt = jax.random.normal(keys[0], (B, T, H, V)), jax.nn.softplus(jax.random.normal(keys[1], (B, T, H)))
    b, c = (jax.random.normal(key, (B, T, 1, K)) for key in keys[2:])
    rates = -jnp.ones(H)

    @jax.jit
    def run(x, dt, b, c):
        flipped = [jnp.flip(y, axis=1) for y in (x, dt, b, c)]
        backward = ssd(flipped[0], flipped[1], rates, *flipped[2:], segment_ids=SEGMENT_IDS[:, ::-1])[0]
        expected = ssd(x, dt, rates, b, c, segment_ids=SEGMENT_IDS)[0] + jnp.flip(backward, axis=1)
        return ssd(x, dt, rates, b, c, segment_ids=SEGMENT_IDS, causal=False)[0], expected

    assert_close(*run(x, dt, b, c), TOLERANCES["layer"], "ssd")


def test_no_state_goes_in():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in arrays())
    with pytest.raises(InputError, match="linear_attention: causal=False has no state to go on from"):
        linear_attention(q, k, v, causal=False, initial_state=jnp.zeros((B, H, K, V)))
    with pytest.raises(InputError, match="sinks=1 with causal=False"):
        softmax_attention(q, k, v, causal=False, sinks=1)
