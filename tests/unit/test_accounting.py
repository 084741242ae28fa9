"""What a model costs: what its mixers declare, layer by layer, and its operations as counted."""

import itertools
import json

import jax.numpy as jnp
import pytest

from seqmodels.errors import InputError
from seqmodels.layers import Mixer, SoftmaxAttention
from seqmodels.models import Autoencoder, LanguageModel, Regressor
from seqmodels.models.accounting import flops_per_token, model_costs
from seqmodels.ops._blockwise_attention import IN_FRONT, Reach, _blocks, _blocks_in_sight, pairs_visited

WIDTH = 32


def narrow_window(**fields) -> SoftmaxAttention:
    return SoftmaxAttention(num_heads=2, window=5, **fields)


def model(**fields) -> LanguageModel:
    return LanguageModel(**{"vocab_size": 11, "d_model": WIDTH, "mlp": None, **fields})


def test_costs_are_told_layer_by_layer():
    beside = ("retention", narrow_window, "retention")
    costs = model_costs(model(n_layers=5, pattern=("softmax_attention", beside)), 24)
    assert json.loads(json.dumps(costs)) == costs
    names = [(entry["layer"], entry["mixer"]) for entry in costs["mixers"]]
    of_pair = ["retention", "narrow_window", "retention_2"]
    assert names == [
        (0, "softmax_attention"),
        *((1, name) for name in of_pair),
        (2, "softmax_attention"),
        *((3, name) for name in of_pair),
        (4, "softmax_attention"),
    ]
    assert [entry["state_grows"] for entry in costs["mixers"][:4]] == [True, False, False, False]
    assert (costs["seq_len"], costs["mixers"][0]["state_bytes"]) == (24, 24 * (2 * WIDTH * 4 + 4) + 4 + 8)
    window = narrow_window(d_model=WIDTH)
    assert costs["mixers"][2] == {
        "layer": 1,
        "mixer": "narrow_window",
        "state_bytes": window.state_bytes(24),
        "state_grows": False,
        "training_flops_per_token": window.flops_per_token(24),
        "decoding_flops_per_token": window.flops_per_token(24, decoding=True),
    }


@pytest.mark.parametrize("scan", [True, False])
def test_a_whole_model_is_its_mixers_and_the_rest(scan):
    """Attention in five blocks of queries: how many blocks of keys each of them visits is known at run time alone."""
    pattern, length, layers, vocabulary = ("gated_linear_attention", "softmax_attention"), 600, 3, 11
    fields = {"n_layers": layers, "pattern": pattern, "scan": scan, "vocab_size": vocabulary}
    costs = model_costs(model(**fields), length)
    of_mixers = sum(entry["training_flops_per_token"] for entry in costs["mixers"])
    assert costs["flops_per_token"] == pytest.approx(of_mixers + 2 * WIDTH * vocabulary)


def test_other_forms_are_counted_as_they_are():
    def parallel(**fields) -> SoftmaxAttention:
        return SoftmaxAttention(num_heads=2, form="parallel", **fields)

    length = 300
    counted = flops_per_token(model(n_layers=1, pattern=(parallel,)), length)
    assert counted == 4 * 2 * WIDTH * WIDTH + 2 * 2 * WIDTH * length + 2 * WIDTH * 11


def test_models_with_other_ends_cost_what_their_body_does():
    body = model(n_layers=2, pattern=("rglru",))
    for other in (Autoencoder(body), Regressor(body, input_size=3)):
        assert model_costs(other, 16)["mixers"] == model_costs(body, 16)["mixers"]


def test_a_mixer_that_declares_nothing_is_named():
    class Silent(SoftmaxAttention):
        state_bytes = Mixer.state_bytes

    with pytest.raises(InputError, match="Silent: state_bytes is not declared"):
        model_costs(model(n_layers=1, pattern=(Silent,)), 8)


def test_pairs_are_those_of_the_blocks_that_attention_visits():
    lengths, prefixes, windows, sinks, blocks = (1, 31), (0, 3, 9), (None, 1, 4, 20), (0, 9), (4, 64)
    for length, prefix, window, sink, block in itertools.product(lengths, prefixes, windows, sinks, blocks):
        rank = jnp.arange(length)[None]
        key = jnp.concatenate([jnp.full((1, prefix), IN_FRONT), rank], axis=1)
        rows, columns = min(block, length), min(block, prefix + length)
        query = Reach(_blocks(jnp.zeros_like(rank), rows), _blocks(rank, rows, -1))
        _, visits = _blocks_in_sight(query, _blocks(key, columns, -1), window, sink)
        found = pairs_visited(length, prefix=prefix, window=window, sinks=sink, block=block)
        assert found == int(visits.sum()) * rows * columns, (length, prefix, window, sink, block)
