"""Every way in which shards of the time axis can exchange what they need gives the same; and how much travels."""

import jax
import jax.numpy as jnp
import pytest

from seqmodels import registry
from seqmodels.errors import InputError
from seqmodels.ops import _sequence_parallel
from tests.conformance.cases import OpCase
from tests.conformance.laws import check_devices

# Two heads are exchanged for two shards of time; other ways are tried on more shards.
MESHES = {"ulysses": (2, 2, 2, 1)}
SHARDS_AND_HEADS = (1, 1, 4, 2)
PLAIN = {"linear_attention", "softmax_attention", "short_conv"}


def ways() -> list:
    found = []
    for op in registry.ops().values():
        examples = op.examples(jax.random.key(0), 1, 2)
        ordinary = [name for name, example in examples.items() if not example.extreme]
        for example in ordinary:
            for exchange in _sequence_parallel.exchanges(op, examples[example].arrays, examples[example].options):
                slow = op.name not in PLAIN or example not in (ordinary[0], ordinary[-1])
                marks = [pytest.mark.slow] if slow else []
                found.append(pytest.param(op, example, exchange, marks=marks, id=f"{op.name}, {example}: {exchange}"))
    return found


@pytest.mark.parametrize(("op", "example", "exchange"), ways())
def test_the_same_by_any_exchange(op, example, exchange):
    check_devices(OpCase(op, example), [MESHES.get(exchange, SHARDS_AND_HEADS)], exchange)


def test_an_exchange_that_an_operator_does_not_have():
    q, k, v = jnp.ones((3, 1, 8, 2, 4))
    with pytest.raises(InputError, match=r"exchange=.ring. does not exist for it; did you mean"):
        registry.ops()["linear_attention"].call(q, k, v, exchange="ring")
