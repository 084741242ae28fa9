"""Operators compute what ejkernel's programs for XLA do."""

import pytest

from tests.agreement.side_by_side import assert_peer_agrees, named, peers_of

pytest.importorskip("ejkernel", reason="ejkernel is not installed; see tests/agreement/__init__.py")
PEERS = peers_of("ejkernel")


@pytest.mark.parametrize("peer, case", PEERS, ids=named(PEERS))
def test_values_and_gradients(peer, case):
    assert_peer_agrees(peer, case)
