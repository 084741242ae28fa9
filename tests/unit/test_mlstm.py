"""The matrix LSTM against its unstabilised equations in float64, and what its stabiliser must not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.errors import InputError
from seqmodels.layers import MLSTM
from seqmodels.ops.mlstm import EPSILON, MLSTMState, mlstm
from seqmodels.ops.mlstm import MLSTM as OP
from tests.operators import LENGTH, SEGMENTS, assert_close

HEADS, KEY_DIM, VALUE_DIM = 2, 4, 3
FORMS = ("recurrent", *OP.forms)
run = jax.jit(mlstm, static_argnames=("scale", "form", "chunk_size"))


pytestmark = pytest.mark.usefixtures("float64")


def inputs(input_gate: float = 0.0):
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(2, LENGTH, HEADS, dim)) for dim in (KEY_DIM, KEY_DIM, VALUE_DIM))
    f, i = random.normal(size=(2, 2, LENGTH, HEADS))
    return q, k, v, -np.logaddexp(0, -f - 1), 2 * i + input_gate


def oracle(q, k, v, g, i, segment_ids):
    """Equations (1) and (2), one position at a time; m only for the 1e-6, which (5) adds in units of exp(m)."""
    o = np.zeros(v.shape)
    for b, h in np.ndindex(len(v), HEADS):
        document = 0
        for t in np.flatnonzero(segment_ids[b]):
            if segment_ids[b, t] != document:
                C, n, m, document = np.zeros((KEY_DIM, VALUE_DIM)), np.zeros(KEY_DIM), 0, segment_ids[b, t]
            f, add, key, query = np.exp(g[b, t, h]), np.exp(i[b, t, h]), k[b, t, h], q[b, t, h] * KEY_DIM**-0.5
            C, n, m = f * C + add * np.outer(key, v[b, t, h]), f * n + add * key, max(m + g[b, t, h], i[b, t, h])
            o[b, t, h] = query @ C / (max(abs(query @ n), 1) + EPSILON * np.exp(m))
    return o


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("input_gate", [0.0, -10.0, 10.0])
def test_values_match_the_oracle(form, input_gate):
    arrays = inputs(input_gate)
    o, _ = run(*arrays, segment_ids=SEGMENTS, form=form, chunk_size=5)
    assert_close(o, oracle(*arrays, SEGMENTS))


@pytest.mark.parametrize("form", FORMS)
def test_the_final_state_is_the_sum_of_what_was_written(form):
    q, k, v, g, i = inputs()
    _, (C, n, m) = run(q, k, v, g, i, form=form, chunk_size=5)
    weights = np.exp(np.cumsum(g[:, ::-1], axis=1)[:, ::-1] - g + i)
    unit = np.exp(np.asarray(m))[..., None]
    assert_close(C * unit[..., None], np.einsum("bth,bthk,bthv->bhkv", weights, k, v))
    assert_close(n * unit, np.einsum("bth,bthk->bhk", weights, k))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [-300.0, 300.0])
def test_input_gates_beyond_the_range_of_exp(form, size):
    """Finite, with finite gradients; all open as wide, they cancel, and all closed, nothing is left."""
    q, k, v, g, i = (jnp.asarray(x, jnp.float32) for x in inputs())

    def total(i):
        o, _ = run(q, k, v, g, i, form=form, chunk_size=5)
        return o.sum(), o

    (_, o), di = jax.value_and_grad(total, has_aux=True)(i + size)
    assert np.isfinite(o).all() and np.isfinite(di).all()
    if size < 0:
        assert np.all(o == 0)


@pytest.mark.parametrize("form", FORMS)
def test_the_unit_of_the_state_changes_no_output(form):
    """But for the 1e-6 of (5), which is added in that unit; its share is here at most 1e-6 times exp(m)."""
    arrays = inputs(-10.0)
    state = _state()
    other = MLSTMState(state.C * np.exp(-1), state.n * np.exp(-1), state.m + 1)
    found, expected = (run(*arrays, initial_state=x, form=form, chunk_size=5)[0] for x in (other, state))
    assert np.abs(found - expected).max() <= 2 * EPSILON * np.exp(np.max(state.m) + 1) * np.abs(expected).max()


def _state() -> MLSTMState:
    random = np.random.default_rng(1)
    shapes = (2, HEADS, KEY_DIM, VALUE_DIM), (2, HEADS, KEY_DIM), (2, HEADS)
    return MLSTMState(*(random.normal(size=shape) for shape in shapes))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": np.zeros((1, 3, 4))}, r"mlstm: q has shape \(1, 3, 4\)"),
        ({"k": np.zeros((1, 3, 2, 5))}, r"mlstm: k has shape \(1, 3, 2, 5\); expected \(1, 3, 2, 4\)"),
        ({"v": np.zeros((1, 3, 3, 4))}, r"mlstm: v has shape \(1, 3, 3, 4\); expected .* a multiple of 2 heads"),
        ({"g": np.zeros((1, 3, 2, 4))}, r"mlstm: g has shape \(1, 3, 2, 4\); expected \(1, 3, 2\)"),
        ({"i": np.zeros((1, 3, 1))}, r"mlstm: i has shape \(1, 3, 1\); expected \(1, 3, 2\)"),
        ({"initial_state": np.zeros((1, 2, 4, 4))}, "initial_state has the structure"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    sound = dict.fromkeys("qkv", np.zeros((1, 3, 2, 4))) | dict.fromkeys("gi", np.zeros((1, 3, 2)))
    with pytest.raises(InputError, match=message):
        mlstm(**{**sound, **changed})


def test_gates_start_as_in_the_paper():
    params = MLSTM(d_model=8, num_heads=4).init(jax.random.key(0), jnp.zeros((1, 1, 8)))["params"]
    assert np.all(params["igate_preact"]["bias"] == -10)
    assert_close(params["fgate_preact"]["bias"], np.array([3, 4, 5, 6]), "jit")
    assert not any(np.any(params[f"{gate}_preact"]["kernel"]) for gate in ("igate", "fgate"))
    assert params["multihead_norm"]["scale"].shape == (4, 2)


def test_gates_are_capped():
    """However large its projection, a gate's argument stays below the cap: two that exceed it by far give the same."""
    layer, x = MLSTM(d_model=8, gate_soft_cap=2.0), jnp.ones((1, 5, 8))
    params = layer.init(jax.random.key(0), x)["params"]

    def outputs(size: float):
        gates = {name: {**params[name], "bias": jnp.full(4, size)} for name in ("igate_preact", "fgate_preact")}
        return np.asarray(layer.apply({"params": {**params, **gates}}, x)[0])

    assert_close(outputs(1e4), outputs(1e3), "jit")
    assert np.abs(outputs(1e4) - outputs(0.0)).max() > 0
