"""Every registered operator keeps the laws, on each of its examples."""

import jax
import pytest

from seqmodels import registry
from seqmodels.ops._op import SeqOp
from tests.conformance.cases import OpCase, op_cases
from tests.conformance.laws import OP_LAWS, each_law_on_each_case


@each_law_on_each_case(OP_LAWS, op_cases(registry.ops()))
def test_law(law, case):
    law(case)


@pytest.mark.parametrize("op", registry.ops().values(), ids=registry.ops())
def test_known_gaps(op):
    check_known_gaps(op)


def check_known_gaps(op: SeqOp) -> None:
    """A gap names a law, says why, and is one: on some example the law is broken."""
    for law, reason in op.known_gaps.items():
        assert law in OP_LAWS, f"{op.name}: known_gaps names {law!r}, which is none of {', '.join(OP_LAWS)}"
        assert reason, f"{op.name}: known_gaps gives no reason for {law!r}"
        cases = [OpCase(op, example) for example in op.examples(jax.random.key(0), 1, 2)]
        assert any(_breaks(law, case) for case in cases), (
            f"{op.name}: known_gaps lists {law!r}, but every example keeps it; remove the entry"
        )


def _breaks(law: str, case: OpCase) -> bool:
    try:
        OP_LAWS[law](case)
    except AssertionError:
        return True
    return False
