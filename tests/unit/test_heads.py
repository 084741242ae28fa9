"""Work on heads in the order in which a TPU has them: the same numbers, and no copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from seqmodels.layers.norms import make_norm, unit
from seqmodels.ops import _heads, _mesh
from seqmodels.ops._heads import by_head, times_heads
from seqmodels.tools.compile_check.chips import target
from seqmodels.tools.kernel_report.worker import TOPOLOGIES
from tests.tpu_compiler import needs_tpu_compiler


def random(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape)


def plain_norm(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(params=[True, False], ids=["for TPUs", "for others"])
def tiles(request, monkeypatch):
    """Whether tiles are used, and how often they were."""
    uses = []
    monkeypatch.setattr(_mesh, "on_tpus", lambda: request.param)
    monkeypatch.setattr(_heads, "_helps", lambda length, helps=_heads._helps: uses.append(helps(length)) or uses[-1])
    yield lambda: any(uses)
    assert request.param or not any(uses)


@pytest.mark.parametrize(
    ("shape", "helps"), [((2, 16, 3, 128), True), ((1, 8, 2, 256), True), ((2, 12, 3, 128), False)]
)
def test_heads_in_tiles_are_the_same(shape, helps, tiles):
    x = random(*shape)
    np.testing.assert_allclose(by_head(plain_norm, x), plain_norm(x), rtol=1e-6)
    np.testing.assert_allclose(unit(x), plain_norm(x), rtol=1e-5, atol=1e-6)
    norm = make_norm("rmsnorm")
    weights = {"params": {"scale": jnp.arange(1.0, 1 + shape[-1])}}
    found = by_head(lambda x: norm.apply(weights, x), x)
    np.testing.assert_allclose(found, norm.apply(weights, x), rtol=1e-6)
    assert not tiles() or helps


@pytest.mark.parametrize("shape", [(2, 16, 4, 64), (1, 8, 3, 128), (1, 8, 8, 32), (2, 16, 3, 64), (1, 9, 2, 64)])
def test_weights_of_heads_in_tiles_are_the_same(shape, tiles):
    x, weights = random(*shape), random(*shape[:3])
    expected, pullback = jax.vjp(lambda x, w: x * w[..., None], x, weights)
    found, found_pullback = jax.vjp(times_heads, x, weights)
    np.testing.assert_array_equal(found, expected)
    for a, b in zip(found_pullback(expected), pullback(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert times_heads(x.astype(jnp.bfloat16), weights).dtype == jnp.bfloat16


@pytest.mark.usefixtures("tiles")
def test_a_device_has_whole_tiles(monkeypatch):
    mesh = _mesh.MeshView(frozenset({"seq"}), (), 1, 2, 1, ())
    monkeypatch.setattr(_mesh, "view", lambda: mesh)
    assert not _heads._helps(8)
    assert _heads._helps(16) == _mesh.on_tpus()


@needs_tpu_compiler
def test_a_tpu_copies_nothing(monkeypatch):
    def norm(x):
        return by_head(plain_norm, x.reshape(1, 1024, 16, 128)).reshape(x.shape)

    def bytes_accessed() -> float:
        # A function of its own for each, as what was traced is kept.
        with jax.set_mesh(mesh):
            return jax.jit(lambda x: norm(x)).lower(x).compile().cost_analysis()["bytes accessed"]

    mesh = jax.sharding.Mesh(target(TOPOLOGIES["v5e"]).devices[:1], ("device",))
    x = jax.ShapeDtypeStruct((1, 1024, 2048), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    jax.config.update("jax_enable_compilation_cache", False)  # a program for a TPU cannot be read back here
    try:
        in_tiles = bytes_accessed()
        monkeypatch.setattr(_heads, "_helps", lambda length: False)
        assert in_tiles < bytes_accessed() / 2
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
