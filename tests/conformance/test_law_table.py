"""The table of laws tells what happened: kept, broken, a gap with its reason, not run."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from seqmodels.ops._op import SeqOp
from tests.conformance.cases import Case, op_cases
from tests.conformance.law_table import PASS, Results, Subject, pair, write
from tests.conformance.laws import OP_LAWS
from tests.conformance.toy.ops.moving_average import MOVING_AVERAGE

REPOSITORY = Path(__file__).parents[2]
WITH_GAP = dataclasses.replace(MOVING_AVERAGE, known_gaps={"split": "it is a toy"})


def table_of(op: SeqOp, found, gaps=()) -> dict[str, str]:
    """The cells of an operator's row, by title, and the whole text under ""."""
    cases = op_cases({op.name: op})
    results = Results({pair(case, law): found(case, law) for case in cases for law in OP_LAWS}, dict(gaps))
    for each in [each for each, outcome in results.laws.items() if outcome is None]:
        del results.laws[each]
    text = write(results, [Subject(op.name, op, cases)], [], OP_LAWS, {})
    titles, _, row = [line for line in text.splitlines() if line.startswith("|")][:3]
    cells = dict(zip(*([cell.strip() for cell in line.split("|")[1:-1]] for line in (titles, row))))
    return cells | {"": text}


def test_all_kept():
    cells = table_of(MOVING_AVERAGE, lambda case, law: PASS)
    assert cells["forms"] == "pass 2"
    assert cells["run as"] == "recurrent, chunked"
    # One of the two examples is extreme: accuracy is not asked of it, finiteness of nothing else.
    assert cells["precision"] == cells["extremes"] == "pass 1"
    assert "Of 22 pairs of a law and a case all were run: 22 passed, 0 failed" in cells[""].replace("\n", " ")


def test_a_broken_law_is_a_failure_with_its_message():
    def found(case: Case, law: str) -> str:
        return "off by 3" if law == "jit" and case.is_extreme else PASS

    cells = table_of(MOVING_AVERAGE, found)
    assert cells["jit"] == "**fail 1 of 2**"
    assert "21 passed, 1 failed" in cells[""]
    assert "- operator `moving_average, at the limits`, jit: off by 3" in cells[""]


def test_what_was_not_run_is_said():
    cells = table_of(MOVING_AVERAGE, lambda case, law: PASS if law == "forms" and case.is_extreme else None)
    assert cells["forms"] == "pass 1 of 2"
    assert cells["split"] == "not run"
    assert "ONLY 1 were run" in cells[""].replace("\n", " ")


@pytest.mark.parametrize(
    ("gaps", "cell", "words"),
    [
        ({"moving_average": PASS}, "gap (1)", "1. `moving_average`, split: it is a toy\n"),
        ({}, "gap, not checked (1)", "it is a toy (not checked in this run)"),
        (
            {"moving_average": "remove the entry"},
            "**fail**, listed as a gap (1)",
            "(the check of it failed: remove the entry)",
        ),
    ],
    ids=["found", "not looked for", "not found"],
)
def test_a_known_gap_has_its_reason(gaps, cell, words):
    cells = table_of(WITH_GAP, lambda case, law: PASS, gaps)
    assert cells["split"] == cell
    assert cells["forms"] == "pass 2"
    assert words in cells[""]


PLUGIN = """
import dataclasses

import jax

from seqmodels import registry
from tests.conformance import laws
from tests.conformance.toy.ops.moving_average import MOVING_AVERAGE


def chunked(*arguments, **how):
    o, state = MOVING_AVERAGE.forms["chunked"](*arguments, **how)
    return (2 * o if isinstance(o, jax.core.Tracer) else o), state


registry.MIXERS.clear()
registry.OTHER_OPS = (
    dataclasses.replace(MOVING_AVERAGE, forms={"chunked": chunked}, known_gaps={"jit": "it looks"}),
)


def check_state(case):
    assert case.is_extreme, "a law | that one example breaks"


laws.OP_LAWS["state"] = check_state
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_the_option_writes_what_happened(processes, tmp_path):
    (tmp_path / "with_defects.py").write_text(PLUGIN)
    file = tmp_path / "docs" / "laws.md"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-p", "with_defects", "-p", "no:cacheprovider", *processes]
    command += ["tests/conformance/test_ops.py", "-m", "slow or not slow", "-k", "state or known_gaps"]
    run = subprocess.run(
        [*command, "--law_table", str(file)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert f"table of laws: {file}" in run.stdout
    text = file.read_text()
    (row,) = (line for line in text.splitlines() if line.startswith("| `moving_average`"))
    cells = [cell.strip() for cell in row.split("|")[4:-1]]
    expected = dict.fromkeys(OP_LAWS, "not run") | {"jit": "gap (1)", "state": "**fail 1 of 2**"}
    assert cells == list(expected.values())
    assert "1. `moving_average`, jit: it looks\n" in text
    assert "`moving_average, slow and fast`, state: AssertionError: a law \\| that one example breaks" in text
