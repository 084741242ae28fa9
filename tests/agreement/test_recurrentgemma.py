"""recurrentgemma, of the authors of Griffin: its scan."""

import jax.numpy as jnp
import pytest

from seqmodels.ops.rglru import rglru
from tests.agreement.side_by_side import SIZES, assert_agree, assert_peer_agrees, named, peers_of, with_state

scan = pytest.importorskip(
    "recurrentgemma.jax.scan", reason="recurrentgemma is not installed; see tests/agreement/__init__.py"
)
PEERS = peers_of("recurrentgemma")


@pytest.mark.parametrize("peer, case", PEERS, ids=named(PEERS))
def test_functions_that_the_benchmark_names(peer, case):
    assert_peer_agrees(peer, case)


@pytest.mark.parametrize("kind", ["LINEAR_NATIVE", "ASSOCIATIVE_NATIVE"])
def test_the_scan_from_a_state(kind):
    from recurrentgemma.common import ScanType

    def theirs(x, g, initial_state):
        driven = jnp.sqrt(-jnp.expm1(2 * g)) * x
        return scan.linear_scan(driven, jnp.exp(g), initial_state, scan_type=ScanType[kind])

    arrays, _ = with_state("rglru", "griffin", (SIZES["batch"], SIZES["heads"] * SIZES["value_dim"]))
    assert_agree(rglru, theirs, arrays, framework="jax")
