"""Cross-attention against sums over all pairs, written by hand in float64; and the layers that have it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import registry
from seqmodels.errors import InputError
from seqmodels.layers import Based, LinearAttention, SoftmaxAttention
from seqmodels.ops.cross_attention import linear_cross_attention, softmax_cross_attention
from tests.conformance.compare import assert_close, bytes_of
from tests.tolerances import TOLERANCES

RANDOM = np.random.default_rng(0)
B, T, S, H, K, V = 3, 9, 7, 2, 3, 2
IDS = np.array([[1, 1, 4, 4, 4, 2, 2, 0, 0], [0, 3, 3, 3, 5, 5, 5, 5, 0], [7] * 9])
# In another order than the readers, not in one piece, with an id that nobody has; 5 and 7 are not there.
CONTEXT_IDS = np.array([[4, 4, 2, 0, 1, 1, 4], [3, 0, 3, 6, 6, 3, 0], [0] * 7])
SIDES = {
    "no ids": (None, None),
    "ids of the readers": (IDS, None),
    "ids of the context": (None, CONTEXT_IDS),
    "ids of both": (IDS, CONTEXT_IDS),
}
WIDTH = 16
LAYERS = {
    "softmax": SoftmaxAttention(WIDTH, num_heads=4, num_kv_heads=2, qk_norm=True),
    "linear": LinearAttention(WIDTH, num_heads=2),
    "hedgehog": LinearAttention(WIDTH, num_heads=2, feature_map="hedgehog", output_norm=True),
    "based": Based(WIDTH, num_heads=2, feature_dim=4),
}
X, CONTEXT = RANDOM.standard_normal((B, T, WIDTH), np.float32), RANDOM.standard_normal((B, S, WIDTH), np.float32)


def seen(ids, context_ids, row, i):
    """The tokens of the context that token i of a row sees."""
    if ids is not None and ids[row, i] == 0:
        return []
    real = [j for j in range(S) if context_ids is None or context_ids[row, j] != 0]
    return [j for j in real if ids is None or context_ids is None or context_ids[row, j] == ids[row, i]]


def by_hand(q, k, v, sides, weight, epsilon):
    """Equation (1); epsilon is None without the quotient."""
    o = np.zeros((*q.shape[:3], v.shape[3]))
    for row, i, head in np.ndindex(q.shape[:3]):
        tokens, group = seen(*sides, row, i), head * k.shape[2] // q.shape[2]
        w = np.array([weight(q[row, i, head], k[row, j, group]) for j in tokens])
        if tokens:
            o[row, i, head] = w @ v[row, tokens, group] / (1 if epsilon is None else w.sum() + epsilon)
    return o


def arrays(key_heads):
    q, k = RANDOM.standard_normal((B, T, H, K)), RANDOM.standard_normal((B, S, key_heads, K))
    return q, k, RANDOM.standard_normal((B, S, key_heads, V))


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("key_heads", [1, 2])
def test_softmax(sides, key_heads):
    q, k, v = arrays(key_heads)
    ids = dict(zip(("segment_ids", "context_segment_ids"), SIDES[sides]))
    with jax.enable_x64(True):
        o, memory = jax.jit(lambda *x: softmax_cross_attention(*x, scale=0.7, chunk_size=4, **ids))(q, k, v)
        expected = by_hand(q, k, v, SIDES[sides], lambda q, k: np.exp(0.7 * q @ k), 0.0)
        assert_close(o, expected, TOLERANCES["forms"], sides)
        again, _ = softmax_cross_attention(q, memory=memory, scale=0.7, segment_ids=ids["segment_ids"])
        assert_close(again, expected, TOLERANCES["forms"], f"{sides}, from memory")


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("normalize", [False, True])
def test_linear(sides, normalize):
    q, k, v = map(np.abs, arrays(2))
    ids = dict(zip(("segment_ids", "context_segment_ids"), SIDES[sides]))
    how = {"scale": 0.7, "normalize": normalize}
    with jax.enable_x64(True):
        o, memory = jax.jit(lambda *x: linear_cross_attention(*x, **how, **ids))(q, k, v)
        expected = by_hand(q, k, v, SIDES[sides], lambda q, k: 0.7 * q @ k, 1e-6 if normalize else None)
        assert_close(o, expected, TOLERANCES["forms"], sides)
        again, _ = linear_cross_attention(q, memory=memory, segment_ids=ids["segment_ids"], **how)
        assert_close(again, expected, TOLERANCES["forms"], f"{sides}, from memory")


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_go_on_from_what_they_read(name, sides):
    layer, (ids, context_ids) = LAYERS[name], SIDES[sides]
    variables = jax.jit(layer.init)(jax.random.key(0), X)
    expected, _ = jax.jit(layer.apply)(variables, X, None, ids, CONTEXT, context_ids)
    outputs, state = [], None
    for t in range(T):
        now = None if ids is None else ids[:, t : t + 1]
        context = {"context": CONTEXT, "context_segment_ids": context_ids} if t == 0 else {}
        y, state = layer.apply(variables, X[:, t : t + 1], state, now, **context)
        outputs.append(y)
    assert_close(jnp.concatenate(outputs, axis=1), expected, TOLERANCES["layer"], f"{name}, {sides}")


@pytest.mark.parametrize("name", LAYERS)
def test_a_sequence_that_reads_itself_is_an_encoders(name):
    """Without positions a token that reads its own sequence as a context is one that sees both sides."""
    layer = LAYERS[name].clone(**{"rope_base": None} if name == "softmax" else {})
    variables = jax.jit(layer.init)(jax.random.key(0), X)

    def gradient(layer, across, **ids):
        def loss(variables, x):
            y, _ = layer.apply(variables, x, segment_ids=IDS, **({"context": x} if across else {}), **ids)
            return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(variables, X)

    found = gradient(layer, True, context_segment_ids=IDS)
    assert_close(found, gradient(layer.clone(causal=False), False), TOLERANCES["layer"], name)


def test_linear_layers_remember_a_context_of_any_length_in_as_many_bytes():
    layer = LAYERS["linear"]
    variables = layer.init(jax.random.key(0), X)
    states = [layer.apply(variables, X, context=CONTEXT[:, :length])[1] for length in (1, S)]
    assert bytes_of(states[0]) == bytes_of(states[1])


@pytest.mark.parametrize("name", [name for name, entry in registry.MIXERS.items() if entry.layer.cross is None])
def test_other_layers_say_that_they_have_none(name):
    layer = registry.mixer(name)(d_model=16)
    with pytest.raises(InputError, match="has no cross-attention"):
        jax.eval_shape(lambda x: layer.init(jax.random.key(0), x, context=x), jnp.zeros((1, 3, 16)))


@pytest.mark.parametrize(
    ("layer", "arguments", "message"),
    [
        (SoftmaxAttention(WIDTH, num_heads=2, window=3), {}, "window = 3 with a context; expected None"),
        (LinearAttention(WIDTH, num_heads=2, conv_size=4), {}, "conv_size = 4 with a context; expected None"),
        (LinearAttention(WIDTH, num_heads=2), {"context": CONTEXT[:, :, 1:]}, r"context has shape \(3, 7, 15\); ex"),
        (LinearAttention(WIDTH, num_heads=2), {"context_segment_ids": IDS}, r"context_segment_ids has shape \(3, 9\)"),
        (LinearAttention(WIDTH, num_heads=2), {"state": {"cursor": None}}, "a context and a state are given"),
    ],
)
def test_bad_inputs_are_named(layer, arguments, message):
    variables = layer.init(jax.random.key(0), X)
    with pytest.raises(InputError, match=message):
        layer.apply(variables, X, **{"context": CONTEXT, **arguments})


@pytest.mark.parametrize(
    ("op", "shapes", "message"),
    [
        (softmax_cross_attention, [(1, 2, 4, 3)], "no context is given"),
        (softmax_cross_attention, [(1, 2, 4, 3), (1, 5, 3, 3), (1, 5, 3, 2)], "3 heads; expected a divisor of 4"),
        (softmax_cross_attention, [(1, 2, 4, 3), (1, 5, 2, 3), (1, 5, 4, 2)], r"v has shape \(1, 5, 4, 2\)"),
        (linear_cross_attention, [(1, 2, 4, 3), (1, 5, 2, 3), (1, 5, 2, 2)], "2 heads; expected 4 as q has"),
        (linear_cross_attention, [(1, 2, 4, 3), (2, 5, 4, 3), (2, 5, 4, 2)], r"k has shape \(2, 5, 4, 3\)"),
        (linear_cross_attention, [(1, 2, 4, 3), (1, 5, 4, 3), (1, 5, 6, 2)], "a multiple of 4"),
    ],
)
def test_bad_shapes_are_named(op, shapes, message):
    with pytest.raises(InputError, match=message):
        op(*map(jnp.zeros, shapes))
