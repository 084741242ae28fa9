"""Aaren against softmax over prefixes in float64, and what its running maximum must not change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.errors import InputError
from seqmodels.layers import Aaren
from seqmodels.ops.aaren import AAREN, AarenState, aaren
from tests.operators import LENGTH, SEGMENTS, assert_close
from tests.tolerances import TOLERANCES

HEADS, KEY_DIM, VALUE_DIM = 2, 5, 3
FORMS = ("recurrent", *AAREN.forms)
run = jax.jit(aaren, static_argnames=("scale", "form", "chunk_size"))


pytestmark = pytest.mark.usefixtures("float64")


def inputs(length: int = LENGTH):
    random = np.random.default_rng(0)
    k, v = (random.normal(size=(2, length, HEADS, dim)) for dim in (KEY_DIM, VALUE_DIM))
    return jnp.asarray(k), jnp.asarray(v), jnp.asarray(random.normal(size=(HEADS, KEY_DIM)))


def oracle(k, v, query, scale, segment_ids):
    """Equation (2), one position at a time."""
    k, v, query = (np.asarray(x) for x in (k, v, query))
    o = np.zeros(v.shape)
    for b, t, h in np.ndindex(v.shape[:3]):
        if segment_ids[b, t] == 0:
            continue
        prefix = np.flatnonzero(segment_ids[b, : t + 1] == segment_ids[b, t])
        s = scale * k[b, prefix, h] @ query[h]
        weights = np.exp(s - s.max())
        o[b, t, h] = weights @ v[b, prefix, h] / weights.sum()
    return o


@pytest.mark.parametrize("form", FORMS)
def test_values_match_the_oracle(form):
    arrays = inputs()
    o, state = run(*arrays, segment_ids=SEGMENTS, form=form, chunk_size=5)
    assert_close(o, oracle(*arrays, KEY_DIM**-0.5, SEGMENTS))
    # The last output of a row is what its final state says.
    last = np.array([21, LENGTH - 1])
    assert_close(state.w / state.u[..., None], np.asarray(o)[np.arange(2), last])


@pytest.mark.parametrize("form", FORMS)
def test_a_constant_added_to_all_scores_changes_no_output(form):
    k, v, query = inputs()
    shifted = k + 100 * query / jnp.sum(query**2, axis=-1, keepdims=True)
    found, expected = (run(x, v, query, scale=1.0, form=form, chunk_size=5)[0] for x in (shifted, k))
    # Scores of a hundred lose 2**7 of the precision.
    assert np.abs(found - expected).max() <= 2**7 * TOLERANCES["forms"] * np.abs(expected).max()


@pytest.mark.parametrize("form", FORMS)
def test_the_unit_of_the_state_changes_no_output(form):
    arrays = inputs()
    _, state = run(*arrays)
    other = AarenState(state.m + 1, state.u * np.exp(-1), state.w * np.exp(-1))
    found, expected = (run(*arrays, initial_state=x, form=form, chunk_size=5)[0] for x in (other, state))
    assert_close(found, expected)


@pytest.mark.parametrize("form", FORMS)
def test_equal_scores_average(form):
    k, v, query = inputs()

    def outputs(k, v, query):
        return run(k, v, 0 * query, form=form, chunk_size=5)[0]

    o, pull_back = jax.vjp(outputs, k, v, query)
    assert_close(o, np.cumsum(v, axis=1) / np.arange(1, LENGTH + 1)[:, None, None])
    dk, dv, _ = pull_back(jnp.ones_like(o))
    counts = 1 / np.arange(1, LENGTH + 1)
    assert_close(dv, np.broadcast_to(np.cumsum(counts[::-1])[::-1, None, None], v.shape))
    assert np.all(dk == 0)


@pytest.mark.parametrize("form", FORMS)
def test_scores_of_ten_thousand_stay_finite(form):
    k, v, query = (jnp.asarray(x, jnp.float32) for x in inputs())
    k = k.at[:, :, :, 0].set(jnp.where(jnp.arange(LENGTH) % 2, 1e4, -1e4)[:, None])
    query = jnp.zeros_like(query).at[:, 0].set(1)

    def total(k, v, query):
        o, state = run(k, v, query, scale=1.0, form=form, chunk_size=5)
        return o.sum() + sum(x.sum() for x in state)

    leaves = jax.tree.leaves(jax.value_and_grad(total, argnums=(0, 1, 2))(k, v, query))
    assert all(np.isfinite(x).all() for x in leaves)


def test_a_tie_for_the_largest_score_shares_its_gradient():
    """The final m of a row whose two largest scores are equal moves with both, by one half each."""
    k = jnp.zeros((1, 4, 1, 1)).at[:, 1:3].set(2.0)
    v, query = jnp.ones((1, 4, 1, 1)), jnp.ones((1, 1))
    dk = jax.grad(lambda k: run(k, v, query, scale=1.0, chunk_size=2)[1].m.sum())(k)
    assert_close(dk[0, :, 0, 0], np.array([0, 0.5, 0.5, 0]))


def test_the_backward_pass_keeps_no_state_for_each_token():
    arrays = inputs(length=1024)
    _, pull_back = jax.vjp(functools.partial(aaren, form="chunked"), *arrays)
    kept, given = (sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (pull_back, arrays))
    states = 1024 * (VALUE_DIM + 2) * arrays[1].itemsize * 2 * HEADS
    # The arrays themselves, their scores, and a few numbers for each chunk.
    assert kept < given + states / 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": np.zeros((1, 3, 4))}, r"aaren: k has shape \(1, 3, 4\); expected \[batch, time, heads"),
        ({"v": np.zeros((1, 3, 1, 4))}, r"aaren: v has shape \(1, 3, 1, 4\); expected \(1, 3, 2\)"),
        ({"query": np.zeros((2, 5))}, r"aaren: query has shape \(2, 5\); expected \(2, 4\)"),
        ({"form": "paralel"}, "did you mean 'parallel'"),
        ({"initial_state": AarenState(*np.zeros((3, 1, 2)))}, r"initial_state.w has shape \(1, 2\)"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    sound = {"k": np.zeros((1, 3, 2, 4)), "v": np.zeros((1, 3, 2, 4)), "query": np.zeros((2, 4))}
    with pytest.raises(InputError, match=message):
        aaren(**{**sound, **changed})


def test_the_layer_has_one_vector_more_than_attention():
    x = jnp.zeros((1, 2, 8))
    shapes = jax.eval_shape(Aaren(d_model=8, num_heads=2).init, jax.random.key(0), x)["params"]
    assert shapes.pop("query").shape == (8,)
    assert {name: leaf["kernel"].shape for name, leaf in shapes.items()} == {
        f"{name}_proj": (8, 8) for name in "qkvo"
    }
