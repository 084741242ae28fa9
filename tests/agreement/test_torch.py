"""torch: its attention, with and without a window, and its convolution."""

import pytest

from seqmodels.ops.short_conv import short_conv
from seqmodels.ops.softmax_attention import softmax_attention
from seqmodels.tools.benchmark.cases import Workload, inputs
from tests.agreement.side_by_side import SIZES, assert_agree, assert_peer_agrees, named, peers_of

torch = pytest.importorskip("torch", reason="torch is not installed; it comes with the extra 'peers'")
PEERS = peers_of("torch")


@pytest.mark.parametrize("peer, case", PEERS, ids=named(PEERS))
def test_functions_that_the_benchmark_names(peer, case):
    assert_peer_agrees(peer, case)


@pytest.mark.parametrize("window", [1, 20, 200])
def test_attention_with_shared_keys_and_a_window(window):
    arrays = inputs(Workload("softmax_attention", "causal", **{**SIZES, "heads": 4})).arrays
    arrays = {**arrays, "k": arrays["k"][:, :, :2], "v": arrays["v"][:, :, :2]}
    positions = torch.arange(SIZES["length"])
    distance = positions[:, None] - positions
    seen = (distance >= 0) & (distance < window)

    def theirs(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return o.transpose(1, 2)

    assert_agree(lambda **x: softmax_attention(**x, window=window, chunk_size=32)[0], theirs, arrays)


def test_convolution():
    arrays = inputs(Workload("short_conv", "width_4", **SIZES)).arrays
    width, channels = arrays["kernel"].shape

    def theirs(x, kernel, bias):
        padded = torch.nn.functional.pad(x.mT, (width - 1, 0))
        return torch.nn.functional.conv1d(padded, kernel.mT[:, None], bias, groups=channels).mT

    assert_agree(lambda **x: short_conv(**x)[0], theirs, arrays)
