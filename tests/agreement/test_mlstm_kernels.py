"""mlstm_kernels, of the authors of xLSTM: the forms without kernels."""

import pytest

from tests.agreement.side_by_side import assert_peer_agrees, named, peers_of

pytest.importorskip("torch", reason="torch is not installed; it comes with the extra 'peers'")
pytest.importorskip("mlstm_kernels", reason="mlstm_kernels is not installed; it comes with the extra 'peers'")
PEERS = peers_of("mlstm_kernels")
OTHER_GRADIENT = {"mlstm_kernels native_custbw"}  # its backward pass takes the normaliser as a constant


@pytest.mark.parametrize("peer, case", PEERS, ids=named(PEERS))
def test_functions_that_the_benchmark_names(peer, case):
    assert_peer_agrees(peer, case, grads=peer.name not in OTHER_GRADIENT)
