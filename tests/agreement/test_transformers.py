"""transformers: what its models compute where no kernels are installed."""

import importlib
import inspect

import numpy as np
import pytest

from seqmodels.ops.delta_rule import delta_rule
from seqmodels.ops.mlstm import MLSTMState, mlstm
from seqmodels.ops.rglru import rglru
from seqmodels.ops.ssd import ssd
from seqmodels.tools.benchmark.cases import Workload, inputs
from tests.agreement.side_by_side import SIZES, assert_agree, assert_peer_agrees, named, peers_of, with_state
from tests.interop.published import without_kernels

torch = pytest.importorskip("torch", reason="torch is not installed; it comes with the extra 'peers'")
pytest.importorskip("transformers", reason="transformers is not installed; it comes with the extra 'peers'")
PEERS = peers_of("transformers")
with without_kernels():
    for model in ("mamba2", "minimax", "qwen3_next", "recurrent_gemma", "xlstm"):
        importlib.import_module(f"transformers.models.{model}.modeling_{model}")


@pytest.mark.parametrize("peer, case", PEERS, ids=named(PEERS))
def test_functions_that_the_benchmark_names(peer, case):
    assert_peer_agrees(peer, case)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_mamba2_with_groups_of_heads_from_a_state(groups):
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    sizes = {**SIZES, "heads": 4}
    given = inputs(Workload("ssd", "one_group", **sizes)).arrays
    random = np.random.default_rng(3)
    shape = (sizes["batch"], sizes["length"], groups, sizes["key_dim"])
    B, C = (random.standard_normal(shape, np.float32) for _ in range(2))
    state = random.standard_normal((sizes["batch"], 4, sizes["key_dim"], sizes["value_dim"]), np.float32)

    def theirs(x, dt, A, B, C, D, initial_state):
        o, S = mamba2_chunk_scan(
            x, dt, A, B, C, chunk_size=32, D=D, initial_states=initial_state.mT, return_final_states=True
        )
        return o, S.mT

    assert_agree(ssd, theirs, {**given, "B": B, "C": C, "initial_state": state})


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
@pytest.mark.parametrize("shared_by", [1, 2])
def test_qwen3_next_with_shared_keys_from_a_state(form, shared_by):
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    shape = tuple(SIZES[name] for name in ("batch", "heads", "key_dim", "value_dim"))
    arrays, _ = with_state("delta_rule", "scalar", shape)
    keys = SIZES["heads"] // shared_by
    arrays = {**arrays, "q": arrays["q"][:, :, :keys], "k": arrays["k"][:, :, :keys]}
    reference = inspect.unwrap(getattr(qwen, f"torch_{form}_gated_delta_rule"))

    def theirs(q, k, v, g, beta, initial_state):
        return reference(q, k, v, g, beta, initial_state=initial_state, output_final_state=True)

    assert_agree(delta_rule, theirs, arrays)


def test_recurrentgemma_from_a_state():
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    def theirs(x, g, initial_state):
        driven, no_reset = torch.sqrt(-torch.expm1(2 * g)) * x, torch.zeros_like(g, dtype=torch.bool)
        return RecurrentGemmaRglru._rnn_scan(None, driven, torch.exp(g), no_reset, initial_state)

    arrays, _ = with_state("rglru", "griffin", (SIZES["batch"], SIZES["heads"] * SIZES["value_dim"]))
    assert_agree(rglru, theirs, arrays)


def test_xlstm_token_by_token():
    from transformers.models.xlstm.modeling_xlstm import mlstm_recurrent_sequence_native

    given = inputs(Workload("mlstm", "gated", **SIZES))

    def ours(q, k, v, g, i):
        o, state = mlstm(q, k, v, g, i)
        return o, *state

    def theirs(q, k, v, g, i):
        q, k, v, i, f = (x.transpose(1, 2) for x in (q, k, v, i, g - torch.log(-torch.expm1(g))))
        o, (C, n, m) = mlstm_recurrent_sequence_native(q, k, v, i, f, return_last_states=True)
        return o.transpose(1, 2), C, n, m[..., 0]

    assert MLSTMState._fields == ("C", "n", "m")
    assert_agree(ours, theirs, given.arrays)
