"""flash-linear-attention: its naive references, one token at a time and in chunks."""

from functools import partial

import numpy as np
import pytest

from seqmodels.ops.delta_rule import delta_rule
from seqmodels.ops.linear_attention import linear_attention
from seqmodels.ops.rglru import rglru
from seqmodels.ops.wkv6 import wkv6
from tests.agreement.side_by_side import SIZES, assert_agree, assert_peer_agrees, named, peers_of, with_state

torch = pytest.importorskip("torch", reason="torch is not installed; it comes with the extra 'peers'")
pytest.importorskip("fla", reason="flash-linear-attention is not installed; it comes with the extra 'peers'")

MATRIX_STATE = tuple(SIZES[name] for name in ("batch", "heads", "key_dim", "value_dim"))
PEERS = peers_of("fla")
NOT_DIFFERENTIABLE = {"fla naive_chunk_kda", "fla naive_chunk_rwkv6"}  # they overwrite what their gradients need


@pytest.mark.parametrize("peer, case", PEERS, ids=named(PEERS))
def test_references_that_the_benchmark_names(peer, case):
    assert_peer_agrees(peer, case, grads=peer.name not in NOT_DIFFERENTIABLE)


def test_linear_attention_from_a_state():
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn

    arrays, _ = with_state("linear_attention", "none", MATRIX_STATE)
    theirs = partial(naive_recurrent_linear_attn, output_final_state=True)
    assert_agree(linear_attention, theirs, arrays, grads=False)


def test_normalized_linear_attention():
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn

    arrays, options = with_state("linear_attention", "normalized", MATRIX_STATE)
    arrays.pop("initial_state")
    assert_agree(
        lambda **x: linear_attention(**x, **options)[0],
        lambda **x: naive_recurrent_linear_attn(**x, **options)[0],
        arrays,
        grads=False,
    )


def test_scalar_decay_from_a_state():
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    arrays, _ = with_state("linear_attention", "scalar", MATRIX_STATE)
    assert_agree(linear_attention, partial(naive_recurrent_simple_gla, output_final_state=True), arrays)


def test_decay_per_channel_from_a_state():
    from fla.ops.gla.naive import naive_recurrent_gla

    def theirs(q, k, v, g, initial_state):
        return naive_recurrent_gla(q, k, v, g, initial_state, output_final_state=True)

    arrays, _ = with_state("linear_attention", "channel", MATRIX_STATE)
    assert_agree(linear_attention, theirs, arrays)


def test_retention():
    from fla.ops.retention.naive import naive_retention

    arrays, _ = with_state("linear_attention", "none", MATRIX_STATE)
    arrays.pop("initial_state")
    g = np.log1p(-(2.0 ** (-5 - np.arange(SIZES["heads"])))).astype(np.float32)

    def theirs(**x):
        return naive_retention(**{name: y.transpose(1, 2) for name, y in x.items()}).transpose(1, 2)

    assert_agree(lambda **x: linear_attention(**x, g=g)[0], theirs, arrays)


def test_delta_rule_from_a_state():
    from fla.ops.delta_rule.naive import delta_rule_recurrence

    def theirs(q, k, v, beta, initial_state):
        o, S = delta_rule_recurrence(*(x.transpose(1, 2) for x in (q, k, v, beta)), initial_state)
        return o.transpose(1, 2), S

    arrays, _ = with_state("delta_rule", "none", MATRIX_STATE)
    assert_agree(delta_rule, theirs, arrays)


@pytest.mark.parametrize("case", ["scalar", "channel"])
def test_gated_delta_rules_from_a_state(case):
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.kda.naive import naive_recurrent_kda

    reference = {"scalar": naive_recurrent_gated_delta_rule, "channel": naive_recurrent_kda}[case]
    arrays, _ = with_state("delta_rule", case, MATRIX_STATE)
    assert_agree(delta_rule, partial(reference, output_final_state=True), arrays)


def test_rwkv6_from_a_state():
    from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6

    def theirs(q, k, v, g, u, initial_state):
        inputs = (x.transpose(1, 2) for x in (q, k, v, g))
        o, S = naive_recurrent_rwkv6(*inputs, u, 1.0, initial_state, output_final_state=True)
        return o.transpose(1, 2), S

    arrays, options = with_state("wkv6", "channel", MATRIX_STATE)
    assert_agree(lambda **x: wkv6(**x, **options), theirs, arrays)


def test_hgrn_is_the_recurrence_of_griffin_without_the_factor_of_its_inputs():
    from fla.ops.hgrn.naive import naive_recurrent_hgrn

    def theirs(x, g, initial_state):
        driven = torch.sqrt(-torch.expm1(2 * g)) * x
        return naive_recurrent_hgrn(driven, g, initial_state, output_final_state=True)

    channels = SIZES["heads"] * SIZES["value_dim"]
    arrays, _ = with_state("rglru", "griffin", (SIZES["batch"], channels))
    assert_agree(rglru, theirs, arrays)
