"""Sums along the time axis, also where devices share it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.ops import _mesh, _scan
from seqmodels.parallel.mesh import make_mesh
from tests.tolerances import TOLERANCES


@pytest.mark.parametrize("length", [1, 4, 5, 16, 17, 100])
def test_sums_after_each_position(length, float64):
    x = np.random.default_rng(0).normal(size=(2, length, 3))
    expected = x[:, ::-1].cumsum(axis=1)[:, ::-1] - x
    off = np.abs(_scan.sums_after(jnp.asarray(x), size=4) - expected).max()
    assert off <= TOLERANCES["forms"] * np.abs(expected).max(initial=1)


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("kind", ["sum", "max", "last"])
@pytest.mark.parametrize("sizes", [{"data": 1, "seq": 8}, {"data": 2, "seq": 4}])
def test_running_values_do_not_depend_on_the_devices(kind, exclusive, sizes):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 9, (2, 24), np.int32) * (rng.random((2, 24)) < 0.3)
    expected = np.zeros_like(x)
    for row, out in zip(x, expected):
        value = 0
        for t, now in enumerate(row):
            after = {"sum": value + now, "max": max(value, now), "last": now or value}[kind]
            out[t] = value if exclusive else after
            value = after
    with jax.set_mesh(make_mesh(**sizes)):
        found = jax.jit(lambda x: _mesh.running(kind, x, exclusive=exclusive))(x)
    assert found.sharding.num_devices == 8 and np.array_equal(found, expected)
    assert np.array_equal(_mesh.running(kind, jnp.asarray(x), exclusive=exclusive), expected)
