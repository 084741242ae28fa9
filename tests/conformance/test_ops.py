"""Every registered operator keeps the laws, on each of its examples."""

import jax

from seqmodels.ops._op import SeqOp
from tests.conformance.cases import OpCase
from tests.conformance.laws import OP_LAWS


def test_law(op_case, op_law):
    op_law(op_case)


def test_known_gaps(op: SeqOp):
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
