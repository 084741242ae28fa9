"""What travels between devices in a compiled training step, read off the program that XLA made of it."""

import math
import re
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from seqmodels.models import LanguageModel
from seqmodels.parallel.mesh import batch_sharding, batch_shards, make_mesh
from seqmodels.training import AdamW, make_train_step, parameter_shapes, shardings_of, state_shapes

COLLECTIVE = re.compile(
    r"= (?P<type>\S+|\([^)]*\)) (?P<kind>all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(-start)?\("
)
BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "bf16": 2}


class Collective(NamedTuple):
    """kind; bytes of what it gives; whether it is in a loop (over layers), and part of the backward pass."""

    kind: str
    bytes: int
    in_loop: bool
    backward: bool


def collectives(text: str) -> list[Collective]:
    found = []
    for line in text.splitlines():
        match = COLLECTIVE.search(line)
        if match:
            arrays = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", match["type"])
            size = sum(BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in arrays)
            source = re.search(r'op_name="([^"]*)"', line)[1]
            found.append(Collective(match["kind"], size, "while/body" in source, "transpose(" in source))
    return found


def step_collectives(pattern, length, *, remat="full", packed=False, **sizes) -> list[Collective]:
    """Of a step of two layers, where time is split over the devices."""
    model = LanguageModel(vocab_size=32, d_model=32, n_layers=2, pattern=pattern, remat=remat)
    mesh = make_mesh(**sizes)
    optimizer = AdamW(warmup_steps=0)
    state = state_shapes(model, optimizer.build(parameter_shapes(model, 8), 10), seq_len=8, mesh=mesh)
    dtypes = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    if packed:
        dtypes["segment_ids"] = jnp.int32
    shape, sharding = (batch_shards(mesh), length), batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}
    with jax.set_mesh(mesh):
        step = make_train_step(model, optimizer, 10, mesh=mesh, state_shardings=shardings_of(state))
        return collectives(step.lower(state, batch).compile().as_text())


def in_layers(found: list[Collective]) -> Counter:
    """Kinds of those in the loop over layers, with (backward or not), but for sums of gradients."""
    return Counter((x.kind, x.backward) for x in found if x.in_loop and x.kind != "all-reduce")


ONE_EACH_WAY = Counter({("all-gather", False): 1, ("all-gather", True): 1})


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_linear_mixer_gathers_once_each_way_whatever_the_length(remat):
    """Also where the layer is computed again on the way back. Nothing else grows with the length either."""
    lengths = (65_536, 524_288, 2_097_152) if remat == "full" else (65_536,)
    found = [step_collectives(("gated_linear_attention",), n, remat=remat, data=1, seq=8) for n in lengths]
    assert in_layers(found[0]) == ONE_EACH_WAY
    heads, key_dim, value_dim = 4, 4, 8
    gathered = {x.bytes for x in found[0] if x.kind == "all-gather"}
    assert gathered == {8 * 4 * heads * (key_dim * value_dim + key_dim)}
    assert found.count(found[0]) == len(found)


def test_packed_documents_cost_some_numbers_per_row_once_for_all_layers():
    found = step_collectives(("gated_linear_attention",), 65_536, packed=True, data=1, seq=8)
    assert in_layers(found) == ONE_EACH_WAY
    once = [x for x in found if x.kind == "all-gather" and not x.in_loop]
    assert once and all(x.bytes == 8 * 4 for x in once)


@pytest.mark.parametrize(
    ("mixer", "expected"),
    [
        # Convolutions of q, k, v, or of x, B and C together, one message each. It is kept, as the gathered states are.
        ("mamba2", ONE_EACH_WAY + Counter({("collective-permute", False): 1, ("collective-permute", True): 1})),
        ("rglru", ONE_EACH_WAY + Counter({("collective-permute", False): 1, ("collective-permute", True): 1})),
        pytest.param("aaren", ONE_EACH_WAY, marks=pytest.mark.slow),
        pytest.param("mlstm", ONE_EACH_WAY, marks=pytest.mark.slow),
        pytest.param("retention", ONE_EACH_WAY, marks=pytest.mark.slow),
    ],
)
def test_other_mixers(mixer, expected):
    assert in_layers(step_collectives((mixer,), 4096, data=1, seq=8)) == expected
