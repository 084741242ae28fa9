"""Softmax attention against a loop over queries in float64, and the laws of its cache."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.errors import InputError
from seqmodels.ops import _scan
from seqmodels.ops._blockwise_attention import _blocks_in_sight, reach
from seqmodels.ops.softmax_attention import SOFTMAX_ATTENTION, KVCache, empty_cache, softmax_attention
from tests.operators import LENGTH, SEGMENTS, assert_close

MASKS = {
    "full": {},
    "window": {"window": 5},
    "window and sinks": {"window": 4, "sinks": 3},
    "window beyond the length": {"window": 40, "sinks": 2},
}
STATIC = ("scale", "window", "sinks", "capacity", "form", "chunk_size")
attention = jax.jit(softmax_attention, static_argnames=STATIC)
FORMS = ("recurrent", "chunked", "parallel")


pytestmark = pytest.mark.usefixtures("float64")


def inputs(length: int = LENGTH, heads: int = 4, key_heads: int = 2, key_dim: int = 6, value_dim: int = 3):
    rng = np.random.default_rng(0)
    shapes = (heads, key_dim), (key_heads, key_dim), (key_heads, value_dim)
    return tuple(jnp.asarray(rng.normal(size=(2, length, *shape))) for shape in shapes)


def prefix():
    rng = np.random.default_rng(2)
    return {"prefix_k": jnp.asarray(rng.normal(size=(3, 2, 6))), "prefix_v": jnp.asarray(rng.normal(size=(3, 2, 3)))}


def oracle(q, k, v, segment_ids=None, window=None, sinks=0, prefix_k=None, prefix_v=None):
    """Equation (1), one query at a time."""
    q, k, v = (np.asarray(x) for x in (q, k, v))
    none = np.zeros((0, *k.shape[2:])), np.zeros((0, *v.shape[2:]))
    in_front = none if prefix_k is None else (np.asarray(prefix_k), np.asarray(prefix_v))
    batch, length, heads, key_dim = q.shape
    ids = np.ones((batch, length), int) if segment_ids is None else segment_ids
    o = np.zeros((batch, length, heads, v.shape[-1]))
    for b in range(batch):
        for t in np.flatnonzero(ids[b]):
            document = np.flatnonzero(ids[b] == ids[b, t])
            keys = [
                j for j in document if j <= t and (window is None or t - j < window or j in document[:sinks])
            ]
            for h in range(heads):
                group = h // (heads // k.shape[2])
                seen_k, seen_v = (
                    np.concatenate([x[:, group], y[b, keys, group]]) for x, y in zip(in_front, (k, v), strict=True)
                )
                s = seen_k @ q[b, t, h] * key_dim**-0.5
                p = np.exp(s - s.max())
                o[b, t, h] = p / p.sum() @ seen_v
    return o


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", MASKS)
def test_values_match_the_oracle(form, mask):
    q, k, v = inputs()
    o, _ = attention(q, k, v, **MASKS[mask], segment_ids=SEGMENTS, form=form, chunk_size=5)
    assert_close(o, oracle(q, k, v, SEGMENTS, **MASKS[mask]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", ["full", "window and sinks"])
def test_a_prefix_is_seen_by_every_token_and_by_no_padding(form, mask):
    q, k, v = inputs()
    options = {**MASKS[mask], **prefix()}
    o, state = attention(q, k, v, **options, segment_ids=SEGMENTS, form=form, chunk_size=5)
    assert_close(o, oracle(q, k, v, SEGMENTS, **options))
    assert_same(state, attention(q, k, v, **MASKS[mask], segment_ids=SEGMENTS, form=form, chunk_size=5)[1])


def test_a_window_of_one_returns_the_values():
    q, k, v = inputs()
    assert_same(attention(q, k, v, window=1)[0], jnp.repeat(v, 2, axis=2))


@pytest.mark.parametrize("mask", ["full", "window and sinks"])
def test_forms_agree_on_every_gradient(mask):
    """With documents, padding and a state; also through the final state."""
    q, k, v = inputs()
    before = inputs(9)
    options = {**MASKS[mask], "capacity": LENGTH + 9}
    _, state = attention(*before, **options)
    rng = np.random.default_rng(1)
    weight = jnp.asarray(rng.normal(size=(2, LENGTH, 4, 3)))
    weights = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), (state.k, state.v))

    def loss(q, k, v, keys, values, form):
        start = state._replace(k=keys, v=values)
        o, end = softmax_attention(
            q, k, v, **options, initial_state=start, segment_ids=SEGMENTS, form=form, chunk_size=5
        )
        return jnp.sum(o * weight) + jnp.sum(end.k * weights[0]) + jnp.sum(end.v * weights[1]), (o, end)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True), static_argnums=5)
    recurrent = run(q, k, v, state.k, state.v, "recurrent")
    assert np.abs(recurrent[1][3]).max() > 0  # the state matters
    for form in ("chunked", "parallel"):
        assert_close(run(q, k, v, state.k, state.v, form), recurrent)


@pytest.mark.parametrize("mask", ["full", "window and sinks"])
def test_split_anywhere_equals_whole(mask):
    q, k, v = inputs()
    ids = jnp.asarray(SEGMENTS)
    options = {**MASKS[mask], "capacity": LENGTH}
    o, end = attention(q, k, v, **options, segment_ids=ids)
    for cut in (5, 13):  # inside a document: a span's first token starts none
        first, state = attention(
            q[:, :cut], k[:, :cut], v[:, :cut], **options, segment_ids=ids[:, :cut], chunk_size=4
        )
        second, state = attention(
            q[:, cut:], k[:, cut:], v[:, cut:], **options, segment_ids=ids[:, cut:], initial_state=state
        )
        assert_close(jnp.concatenate([first, second], axis=1), o)
        assert_same(state, end)


@pytest.mark.parametrize("mask", ["full", "window and sinks"])
def test_prefill_then_decode_in_one_compiled_loop(mask):
    q, k, v = inputs()
    expected, end = attention(q, k, v, **MASKS[mask])
    first, state = attention(q[:, :7], k[:, :7], v[:, :7], **MASKS[mask], capacity=LENGTH)

    def decode(state, token):
        o, state = softmax_attention(*(x[:, None] for x in token), **MASKS[mask], initial_state=state)
        return state, o[:, 0]

    by_time = tuple(jnp.moveaxis(x[:, 7:], 1, 0) for x in (q, k, v))
    state, rest = jax.jit(lambda *x: jax.lax.scan(decode, *x))(state, by_time)
    assert_close(jnp.concatenate([first, jnp.moveaxis(rest, 0, 1)], axis=1), expected)
    assert_same(state, end)


def test_window_cache_is_constant_in_the_length():
    shapes = [jax.tree.map(jnp.shape, attention(*inputs(length), window=4, sinks=2)[1]) for length in (1, 50)]
    assert shapes == [KVCache((2, 6, 2, 6), (2, 6, 2, 3), (2, 6), (2,))] * 2


def test_window_cache_holds_sinks_and_the_last_tokens():
    _, cache = attention(*inputs(), window=4, sinks=3)
    assert np.sort(cache.position[0]).tolist() == [0, 1, 2, 20, 21, 22, 23]
    assert_same(cache.k[0], inputs()[1][0][cache.position[0]])


@pytest.mark.parametrize("mask", ["full", "window and sinks"])
def test_summaries_give_the_final_state_and_combine_associatively(mask):
    _, k, v = inputs()
    options = MASKS[mask]
    _, state = attention(*inputs(6), **options, capacity=LENGTH + 6)
    _, end = attention(*inputs(), **options, initial_state=state, segment_ids=SEGMENTS)
    ids, cuts = jnp.asarray(SEGMENTS), (0, 6, 15, LENGTH)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def summary(start, stop):
        docs = _scan.documents(ids[:, start:stop])
        arrays = {"q": None, "k": k[:, start:stop], "v": v[:, start:stop]}
        return SOFTMAX_ATTENTION.summarize(arrays, docs, options)

    combine = jax.jit(functools.partial(SOFTMAX_ATTENTION.combine, options=options))
    assert_same(SOFTMAX_ATTENTION.apply(summary(0, LENGTH), state, options), end)
    # The last cut lies in the third document of the first row: the middle span starts two.
    a, b, c = (summary(*span) for span in itertools.pairwise(cuts))
    assert_same(combine(combine(a, b), c), combine(a, combine(b, c)))
    assert_same(SOFTMAX_ATTENTION.apply(combine(combine(a, b), c), state, options), end)


@pytest.mark.parametrize("form", FORMS)
def test_no_room_is_an_error_or_nan_and_a_new_document_recovers(form):
    q, k, v = inputs()
    ids = jnp.asarray([[1] * 11 + [2] * 13, [1] * 10 + [0] * 4 + [2] * 10])
    with pytest.raises(InputError, match=r"a document reaches 13 tokens and the cache has 10 slots"):
        softmax_attention(q, k, v, capacity=10, segment_ids=ids, form=form)
    options = {"form": form, "chunk_size": 4}
    o, cache = attention(q, k, v, capacity=10, segment_ids=ids, **options)
    lost = np.zeros((2, LENGTH), bool)
    lost[0, [10, 21, 22, 23]] = True
    assert_same(np.isnan(o), np.broadcast_to(lost[..., None, None], o.shape))
    assert_close(np.where(np.isnan(o), 0, o), np.where(lost[..., None, None], 0, oracle(q, k, v, ids)))
    assert cache.length.tolist() == [13, 10]
    o, _ = attention(q[:, :1], k[:, :1], v[:, :1], initial_state=cache, **options)
    assert np.isnan(o).all()  # both caches are full now


def test_capacity_enlarges_a_cache():
    q, k, v = inputs()
    _, state = softmax_attention(q[:, :7], k[:, :7], v[:, :7])
    o, state = softmax_attention(q[:, 7:], k[:, 7:], v[:, 7:], initial_state=state, capacity=30)
    assert_close(o, oracle(q, k, v)[:, 7:])
    assert state.slots == 30


@pytest.mark.parametrize("form", FORMS)
def test_padding_alone_gives_zero_finite_gradients_and_the_same_state(form):
    q, k, v = inputs()
    _, state = attention(*inputs(3), capacity=LENGTH)

    def run(q, k, v):
        o, end = softmax_attention(
            q, k, v, initial_state=state, segment_ids=jnp.zeros((2, LENGTH), int), form=form
        )
        return jnp.sum(o**2), (o, end)

    gradients, (o, end) = jax.jit(jax.grad(run, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    assert_same((o, end), (jnp.zeros_like(o), state))
    assert_same(gradients, jax.tree.map(jnp.zeros_like, gradients))


@pytest.mark.parametrize("form", FORMS)
def test_scores_in_the_thousands_stay_exact_choices(form):
    q, k, v = (x.astype(jnp.float32) for x in inputs())
    call = functools.partial(attention, scale=1e4, form=form, chunk_size=5)
    o, gradients = jax.value_and_grad(lambda *x: jnp.sum(call(*x)[0]), argnums=(0, 1, 2))(q, k, v)
    assert np.isfinite(o)
    assert all(np.isfinite(x).all() for x in gradients)
    best = np.argmax(
        np.where(np.tri(LENGTH, dtype=bool), np.einsum("btk,bjk->btj", q[:, :, 0], k[:, :, 0]), -1e9), -1
    )
    assert_close(
        call(q, k, v)[0][:, :, 0], np.take_along_axis(v[:, :, 0], best[..., None], axis=1), "extreme"
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_outputs_and_cache_are_in_the_dtype_of_the_inputs(dtype):
    o, cache = attention(*(x.astype(dtype) for x in inputs()))
    assert {o.dtype, cache.k.dtype, cache.v.dtype} == {jnp.dtype(dtype)}
    assert {cache.position.dtype, cache.length.dtype} == {jnp.dtype("int32")}


def temporary_bytes(length: int, gradient: bool, **options) -> int:
    x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)

    def loss(q, k, v):
        return jnp.sum(softmax_attention(q, k, v, **options)[0])

    run = jax.grad(loss, argnums=(0, 1, 2)) if gradient else loss
    return jax.jit(run).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("gradient", [False, True])
def test_memory_is_linear_in_the_length(gradient):
    in_front = {"prefix_k": jnp.zeros((4, 2, 16), jnp.float32), "prefix_v": jnp.zeros((4, 2, 16), jnp.float32)}

    def growth(form, **prefix):
        longer, shorter = (temporary_bytes(length, gradient, form=form, **prefix) for length in (4096, 2048))
        return longer / shorter

    assert growth("chunked") < 2.1
    assert growth("chunked", **in_front) < 2.1
    assert growth("parallel") > 3.5  # the check can fail


def test_blocks_out_of_sight_are_not_visited():
    query = reach(jnp.zeros(1, jnp.int32), None, 1024)
    blocks = jax.tree.map(lambda x: x.reshape(16, 1, 64), query)

    def visits(window, sinks=0, blocks=blocks):
        return _blocks_in_sight(blocks, blocks.rank, window, sinks)[1].tolist()

    assert visits(None) == list(range(1, 17))
    assert visits(64) == [1] + [2] * 15
    assert visits(65) == [1] + [2] * 15
    assert visits(66) == [1, 2] + [3] * 14
    assert visits(64, sinks=4) == [1, 2] + [3] * 14
    packed = jnp.repeat(jnp.arange(1, 9), 128)[None]
    in_documents = reach(jnp.zeros(1, jnp.int32), _scan.documents(packed), 1024)
    assert visits(None, blocks=jax.tree.map(lambda x: x.reshape(16, 1, 64), in_documents)) == [1, 2] * 8


BAD = {
    "q: no heads": (
        lambda q, k, v: softmax_attention(q[0], k, v),
        r"q has shape \(24, 4, 6\); expected \[batch",
    ),
    "head counts": (lambda q, k, v: softmax_attention(q[:, :, :3], k, v), "heads that divides 3"),
    "v: length": (lambda q, k, v: softmax_attention(q, k, v[:, 1:]), "v has shape"),
    "dtypes": (
        lambda q, k, v: softmax_attention(q, k.astype("float32"), v),
        "k is float32; expected float64",
    ),
    "window": (lambda q, k, v: softmax_attention(q, k, v, window=0), "window=0"),
    "sinks": (lambda q, k, v: softmax_attention(q, k, v, window=2, sinks=-1), "sinks=-1"),
    "capacity": (lambda q, k, v: softmax_attention(q, k, v, capacity=0), "capacity=0"),
    "half a prefix": (
        lambda q, k, v: softmax_attention(q, k, v, prefix_k=prefix()["prefix_k"]),
        r"prefix_v is None; expected \('n', 2, 3\), or no prefix",
    ),
    "prefix heads": (
        lambda q, k, v: softmax_attention(q, k, v, **{**prefix(), "prefix_k": jnp.zeros((3, 4, 6))}),
        r"prefix_k has shape \(3, 4, 6\); expected \('n', 2, 6\)",
    ),
    "no room": (lambda q, k, v: softmax_attention(q, k, v, capacity=23), "reaches 24 tokens"),
    "not a cache": (
        lambda q, k, v: softmax_attention(q, k, v, initial_state=(k, v)),
        "tuple; expected a KVCache",
    ),
    "cache heads": (
        lambda q, k, v: softmax_attention(q, k, v, initial_state=empty_cache(2, 30, 4, 6, 3)),
        r"initial_state.k has shape \(2, 30, 4, 6\); expected \(2, 30, 2, 6\)",
    ),
    "cache of another window": (
        lambda q, k, v: softmax_attention(q, k, v, window=4, initial_state=empty_cache(2, 30, 2, 6, 3)),
        r"has 30 slots; expected window \+ sinks = 4",
    ),
    "cache over the capacity": (
        lambda q, k, v: softmax_attention(q, k, v, capacity=25, initial_state=empty_cache(2, 30, 2, 6, 3)),
        "has 30 slots; expected capacity = 25",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_what_was_expected(case):
    call, message = BAD[case]
    with pytest.raises(InputError, match=message):
        call(*inputs())
