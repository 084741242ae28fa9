"""mamba_ssm, of the authors of Mamba-2: the listing of their paper."""

import importlib.util

import pytest

from tests.agreement.side_by_side import assert_peer_agrees, named, peers_of

pytest.importorskip("torch", reason="torch is not installed; it comes with the extra 'peers'")
if importlib.util.find_spec("mamba_ssm") is None:
    pytest.skip("mamba_ssm is not there; see tests/agreement/__init__.py", allow_module_level=True)
PEERS = peers_of("mamba_ssm")


@pytest.mark.parametrize("peer, case", PEERS, ids=named(PEERS))
def test_values_and_gradients(peer, case):
    assert_peer_agrees(peer, case)
