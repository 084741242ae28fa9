"""The mesh, how a batch and parameters lie on it, and that what XLA makes of a step moves no more than it must."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from seqmodels.errors import InputError
from seqmodels.models import LanguageModel
from seqmodels.ops.softmax_attention import softmax_attention
from seqmodels.parallel.mesh import make_mesh, place_batch, rows_of_process
from seqmodels.parallel.partition import partition, partition_like, partition_table
from seqmodels.training import AdamW, parameter_shapes, state_shapes
from tests.conformance.compare import assert_close
from tests.tolerances import TOLERANCES

MODEL = LanguageModel(vocab_size=32, d_model=16, n_layers=4, pattern=("gated_linear_attention",))


def by_path(tree):
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in jax.tree.leaves_with_path(tree)
    }


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1, 1)),
        ({"seq": 4}, (2, 1, 4, 1)),
        ({"data": 1, "fsdp": 2, "seq": 2, "tensor": -1}, (1, 2, 2, 2)),
        ({"slices": 2, "fsdp": 2}, (4, 2, 1, 1)),
    ],
)
def test_sizes(sizes, shape):
    assert tuple(make_mesh(**sizes).shape.values()) == shape


def test_slices_are_the_outer_part_of_data():
    devices = make_mesh(slices=2, fsdp=2).devices
    assert {device.id for device in devices[:2].flat} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"seq": 3}, "seq=3, tensor=1.* does not fit 8 devices"),
        ({"seq": 16}, "does not fit 8 devices"),
        ({"seq": 8, "slices": 2}, "slices=2 does not divide data=1"),
        ({"fsdp": 0}, "sizes are positive"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(InputError, match=message):
        make_mesh(**sizes)


@pytest.mark.parametrize("sizes", [{}, {"seq": 8}, {"fsdp": 2, "seq": 2, "tensor": 2}])
def test_a_batch_is_the_same_however_it_lies(sizes):
    rows = np.arange(8 * 16, dtype=np.int32).reshape(8, 16)
    mesh = make_mesh(**sizes)
    placed = place_batch({"tokens": rows}, mesh)["tokens"]
    assert np.array_equal(placed, rows) and placed.sharding.spec == P(("data", "fsdp"), "seq")
    assert rows_of_process(mesh) == (0, 1)


def test_parameters_and_moments_lie_alike():
    mesh = make_mesh(data=1, fsdp=2, seq=2, tensor=2)
    transform = AdamW(warmup_steps=0).build(parameter_shapes(MODEL, 8), 10)
    shapes = state_shapes(MODEL, transform, seq_len=8, mesh=mesh)
    found = {path: x.sharding.spec for path, x in by_path(shapes.params).items()}
    mixer = "stack/rounds/block_0/mixer"
    assert found["embed/embedding"] == P("tensor", "fsdp")
    assert found[f"{mixer}/q_proj/kernel"] == P(None, "fsdp", "tensor")
    assert found[f"{mixer}/o_proj/kernel"] == P(None, "tensor", "fsdp")
    assert found["final_norm/scale"] == P(None)
    moments = by_path(shapes.opt_state)
    for path, spec in found.items():
        of_moments = [x.sharding.spec for name, x in moments.items() if name.endswith(f"mu/{path}")]
        assert of_moments == [spec], path
    assert all(x.sharding.spec == P() for name, x in moments.items() if name.endswith("count"))


def test_an_axis_that_does_not_divide_leaves_its_dimension_whole():
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    shapes = {"a": {"kernel": jax.ShapeDtypeStruct((6, 8), jnp.float32)}, "b": jax.ShapeDtypeStruct((8,), jnp.float32)}
    shardings = partition(shapes, mesh)
    assert shardings["a"]["kernel"].spec == P(None, "tensor") and shardings["b"].spec == P(None)
    assert partition(shapes, mesh, [("^b$", ("fsdp",))])["b"].spec == P("fsdp")
    tree = {"mu": shapes, "row": {"b": jax.ShapeDtypeStruct((1,), jnp.float32)}}
    like = partition_like(tree, shapes, shardings, mesh)
    assert like["mu"]["a"]["kernel"].spec == P(None, "tensor") and like["row"]["b"].spec == P()
    table = partition_table(shapes, shardings)
    assert "a/kernel" in table and "(-, tensor)" in table and table.splitlines()[-1].split() == ["all", "128"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("kernel", "fsdp")], "axes of 'kernel' are a tuple"),
        ([("kernel", ("sequence",))], "names the axis 'sequence'; expected data, fsdp, seq, tensor"),
        ([("(", ("fsdp",))], "is not a regular expression"),
        (["kernel"], "a rule is a pair"),
    ],
)
def test_wrong_rules(rules, message):
    with pytest.raises(InputError, match=message):
        partition({"kernel": jax.ShapeDtypeStruct((8,), jnp.float32)}, make_mesh(), rules)


def test_a_rule_that_decides_nothing():
    with pytest.raises(InputError, match="'kernl' matches no parameter; the nearest is 'kernel'"):
        partition({"kernel": jax.ShapeDtypeStruct((8,), jnp.float32)}, make_mesh(), [("kernl", ())])


def test_a_window_knows_how_far_it_is_from_the_start():
    """The cache after eight shards, each of which has heard of its neighbour alone: that of one device."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 24, 2, 4))
    _, state = softmax_attention(q[:, :5], k[:, :5], v[:, :5], window=3)
    expected = softmax_attention(q, k, v, window=3, initial_state=state)
    with jax.set_mesh(make_mesh(data=1, seq=8)):
        found = jax.jit(lambda *x: softmax_attention(*x, window=3, initial_state=state, exchange="halo"))(q, k, v)
    assert int(found[1].length[0]) == 29
    assert_close(found, expected, TOLERANCES["model"], "halo: ")
