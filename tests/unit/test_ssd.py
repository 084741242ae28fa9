"""Mamba-2 against the paper's equations, and what the operator and the layer refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.errors import InputError
from seqmodels.layers import Mamba2
from seqmodels.ops.ssd import ssd
from tests.by_hand import (
    convolution,
    decayed_memory,
    heads,
    merged,
    random_variables,
    rmsnorm,
    silu,
    softplus,
)
from tests.conformance.compare import assert_close
from tests.tolerances import TOLERANCES

RANDOM = np.random.default_rng(0)
U = RANDOM.standard_normal((2, 21, 16)).astype(np.float32)


def state_space(x, dt, A, B, C, D):
    """y_t = C_t S_t + D x_t, S_t = exp(dt_t A) S_{t-1} + B_t^T dt_t x_t."""
    B, C = (np.repeat(y, x.shape[2] // y.shape[2], axis=2) for y in (B, C))
    y = decayed_memory(C, B, dt[..., None] * x, np.exp(dt * A)[..., None])
    return y + D.reshape(len(A), -1) * x


def arguments(groups: int, skip: tuple[int, ...] = (4,)) -> dict[str, np.ndarray]:
    batch, length, count, channels, states = 2, 21, 4, 3, 5
    return {
        "x": RANDOM.standard_normal((batch, length, count, channels)),
        "dt": softplus(RANDOM.standard_normal((batch, length, count))),
        "A": -np.exp(RANDOM.standard_normal(count)),
        "B": RANDOM.standard_normal((batch, length, groups, states)),
        "C": RANDOM.standard_normal((batch, length, groups, states)),
        "D": RANDOM.standard_normal(skip),
    }


@pytest.mark.parametrize("form", ["recurrent", "chunked", "parallel"])
@pytest.mark.parametrize(("groups", "skip"), [(1, (4,)), (2, (4, 3)), (4, (4,))])
def test_operator(form, groups, skip):
    arrays = arguments(groups, skip)
    with jax.enable_x64(True):
        y, _ = ssd(**arrays, form=form, chunk_size=8)
    assert_close(y, state_space(**arrays), TOLERANCES["forms"], "y")


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_layer(groups, norm_before_gate):
    layer = Mamba2(16, d_state=6, head_dim=8, n_groups=groups, norm_before_gate=norm_before_gate, dt_limit=(0.0, 0.5))
    variables, p = random_variables(layer, U)
    inner, states, count = 32, 6 * groups, 4
    z, xBC, dt = np.split(U @ p["in_proj/kernel"], [inner, 2 * inner + 2 * states], axis=-1)
    x, B, C = np.split(silu(convolution(xBC, p["conv1d/kernel"], p["conv1d/bias"])), [inner, inner + states], axis=-1)
    dt = np.clip(softplus(dt + p["dt_bias"]), 0, 0.5)
    y = merged(state_space(heads(x, count), dt, -np.exp(p["A_log"]), heads(B, groups), heads(C, groups), p["D"]))
    gate = silu(z)
    y = y if norm_before_gate else y * gate
    y = merged(rmsnorm(heads(y, groups), 1e-5)) * p["norm/scale"]
    y = y * gate if norm_before_gate else y
    assert_close(layer.apply(variables, U)[0], y @ p["out_proj/kernel"], TOLERANCES["layer"], "y")


def test_parameters_start_in_their_ranges():
    layer = Mamba2(512, dt_min=0.01, dt_max=0.1, A_init_range=(2.0, 3.0))
    params = layer.init(jax.random.key(0), jnp.zeros((1, 1, 512)))["params"]
    A, dt = jnp.exp(params["A_log"]), jax.nn.softplus(params["dt_bias"])
    assert A.shape == dt.shape == (16,)
    assert A.min() >= 2 and A.max() <= 3 and A.std() > 0.1
    assert dt.min() > 0.0099 and dt.max() < 0.1001 and jnp.log(dt).std() > 0.3
    assert set(params) == {"in_proj", "conv1d", "dt_bias", "A_log", "D", "norm", "out_proj"}


def test_gates_stay_in_float32():
    shapes = jax.eval_shape(Mamba2(16, param_dtype=jnp.bfloat16).init, jax.random.key(0), U)["params"]
    assert {shapes[name].dtype for name in ("dt_bias", "A_log", "D")} == {jnp.dtype("float32")}
    assert shapes["in_proj"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": np.ones((2, 21, 12))}, r"ssd: x has shape \(2, 21, 12\); expected \[batch"),
        ({"dt": np.ones((2, 21))}, r"ssd: dt has shape \(2, 21\); expected \(2, 21, 4\)"),
        ({"A": np.ones(3)}, r"ssd: A has shape \(3,\); expected \(4,\)"),
        ({"B": np.ones((2, 21, 3, 5))}, r"ssd: B has shape \(2, 21, 3, 5\); expected .* a divisor of 4 heads"),
        ({"C": np.ones((2, 21, 1, 5))}, r"ssd: C has shape \(2, 21, 1, 5\); expected \(2, 21, 2, 5\) as B has"),
        ({"D": np.ones((4, 2))}, r"ssd: D has shape \(4, 2\); expected \(4,\) or \(4, 3\)"),
        ({"initial_state": np.ones((2, 4, 3, 5))}, r"initial_state has shape \(2, 4, 3, 5\); expected \(2, 4, 5, 3\)"),
        ({"form": "chunky"}, "did you mean 'chunked'"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    with jax.enable_x64(True), pytest.raises(InputError, match=message):
        ssd(**{**arguments(groups=2), **changed})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_dim": 12}, "Mamba2: expand \\* d_model = 32 does not make heads of 12 channels"),
        ({"head_dim": 0}, "heads of 0 channels"),
        ({"head_dim": 8, "n_groups": 3}, "Mamba2: 4 heads do not make 3 equal groups"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(InputError, match=message):
        Mamba2(16, **fields).init(jax.random.key(0), U)
