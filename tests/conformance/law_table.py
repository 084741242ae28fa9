"""The table of laws: what became of every law on every case, as a file that is checked in.

    pytest tests/conformance -m "slow or not slow" -n 2 --law_table docs/laws.md

A test of a law tells, by its `user_properties`, which law it tries on which case. Reports carry them from the workers
of pytest-xdist to the one process that writes. What the registry has and no report tells of is "not run".
"""

import datetime
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from seqmodels.ops._op import SeqOp
from tests.conformance.cases import Case, OpCase

LAW, GAPS = "law", "known gaps"


class Pair(NamedTuple):
    """A law on a case. suite: "operator" or "layer"; subject: the name of the operator, or of the mixer."""

    suite: str
    subject: str
    case: str
    law: str


class Results(NamedTuple):
    """laws: what became of a pair, "pass" or why it failed. gaps: the same of the check of an operator's known gaps,
    that each is one."""

    laws: dict[Pair, str]
    gaps: dict[str, str]


class Subject(NamedTuple):
    """A row: an operator, or a mixer with its layer, and the cases that the laws are tried on."""

    name: str
    op: SeqOp
    cases: Sequence[Case]


PASS = "pass"

COMMAND = 'pytest tests/conformance -m "slow or not slow" --law_table docs/laws.md'
LEGEND = """\
`pass 5`: kept on five cases, all that it is asked of. `pass 2 of 5`: the other three were not run. `gap (1)`: the
operator says, for the reason below, that it cannot keep the law, and a test has found that it does not. `-`: not asked
of any case. What the laws say is in tests/conformance/laws.py."""
OPERATORS = """\
## Operators

Cases are an operator's examples. Every form is held against the recurrent one in float64."""
MIXERS = """\
## Mixers

Cases are the layer as it is by default, where it has some with optional parts, and without causality, as an encoder's,
in float32. That the other forms of its operator agree is in the table above."""


def pair(case: Case, law: str) -> Pair:
    suite, subject = ("operator", case.op.name) if isinstance(case, OpCase) else ("layer", case.name)
    return Pair(suite, subject, str(case), law)


def write(
    results: Results,
    ops: Sequence[Subject],
    mixers: Sequence[Subject],
    op_laws: Iterable[str],
    layer_laws: Iterable[str],
) -> str:
    """The file's text. Rows in the order of `ops` and `mixers`, columns in that of the laws."""
    by_name = {each.op.name: each.op for each in (*ops, *mixers)}
    gaps = [(name, law, reason) for name, op in by_name.items() for law, reason in op.known_gaps.items()]
    numbers = {(name, law): i for i, (name, law, _) in enumerate(gaps, start=1)}
    tables = [("operator", ops, list(op_laws)), ("mixer", mixers, list(layer_laws))]
    due = [p for _, subjects, laws in tables for each in subjects for law in laws for p in _due(each, law)]
    of_ops, of_mixers = (_table(results, *table, numbers) for table in tables)
    lines = [*_heading(results, due), "", OPERATORS, "", *of_ops, "", MIXERS, "", *of_mixers]
    if gaps:
        lines += ["", "## Known gaps", ""]
        lines += [
            f"{i}. `{name}`, {law}: {reason}{_gap_note(results, name)}"
            for i, (name, law, reason) in enumerate(gaps, start=1)
        ]
    failed = [(p, results.laws[p]) for p in due if results.laws.get(p, PASS) != PASS]
    if failed:
        lines += ["", "## Failures", "", *(f"- {p.suite} `{p.case}`, {p.law}: {why}" for p, why in failed)]
    return "\n".join(lines) + "\n"


def _heading(results: Results, due: Sequence[Pair]) -> list[str]:
    ran = [results.laws[p] for p in due if p in results.laws]
    passed = ran.count(PASS)
    share = "all" if len(ran) == len(due) else f"ONLY {len(ran):,}"
    where = f"Python {platform.python_version()}, jax {jax.__version__}, {jax.default_backend().upper()}"
    return [
        "# The laws, and what keeps them",
        "",
        f"Written by `{COMMAND}` on",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {where}.",
        f"Of {len(due):,} pairs of a law and a case {share} were run: {passed:,} passed, {len(ran) - passed:,} failed.",
        "",
        LEGEND,
    ]


def _table(
    results: Results,
    title: str,
    subjects: Iterable[Subject],
    laws: Sequence[str],
    numbers: Mapping[tuple[str, str], int],
) -> list[str]:
    lines = [f"| {title} | cases | run as | " + " | ".join(laws) + " |", "|---" * (len(laws) + 3) + "|"]
    for each in subjects:
        forms = dict.fromkeys(["recurrent", *(v.form for case in each.cases for v in case.variants)])
        cells = [_cell(results, each, law, numbers) for law in laws]
        lines.append(f"| `{each.name}` | {len(each.cases)} | {', '.join(forms)} | " + " | ".join(cells) + " |")
    return lines


def _due(subject: Subject, law: str) -> list[Pair]:
    """The pairs of a subject that a complete run tries."""
    if law in subject.op.known_gaps:
        return []
    return [pair(case, law) for case in subject.cases if case.is_asked(law)]


def _cell(results: Results, subject: Subject, law: str, numbers: Mapping[tuple[str, str], int]) -> str:
    if law in subject.op.known_gaps:
        checked = results.gaps.get(subject.op.name)
        word = {PASS: "gap", None: "gap, not checked"}.get(checked, "**fail**, listed as a gap")
        return f"{word} ({numbers[subject.op.name, law]})"
    due = _due(subject, law)
    found = [results.laws[p] for p in due if p in results.laws]
    failures = sum(result != PASS for result in found)
    if not due:
        return "-"
    if failures:
        return f"**fail {failures} of {len(due)}**"
    if not found:
        return "not run"
    return f"pass {len(found)}" + (f" of {len(due)}" if len(found) < len(due) else "")


def _gap_note(results: Results, op: str) -> str:
    checked = results.gaps.get(op)
    return {PASS: "", None: " (not checked in this run)"}.get(checked, f" (the check of it failed: {checked})")


class Recorder:
    """The plugin. In every process it marks the tests; where reports arrive it collects them, and writes at the end."""

    def __init__(self, path: Path):
        self.path, self.results = path, Results({}, {})

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if {"law", "case"} <= set(parameters):
            law = item.callspec.id.rpartition(": ")[2]
            item.user_properties.append((LAW, list(pair(parameters["case"], law))))
        elif isinstance(parameters.get("op"), SeqOp):
            item.user_properties.append((GAPS, parameters["op"].name))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped or not (report.failed or report.when == "call"):
            return
        outcome = _reason(report) if report.failed else PASS
        for kind, value in report.user_properties:
            if kind == LAW:
                self.results.laws[Pair(*value)] = outcome
            elif kind == GAPS:
                self.results.gaps[value] = outcome

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput") or session.config.option.collectonly:
            return
        # Here, so that what a plugin has put in the registry or among the laws is seen.
        from seqmodels import registry
        from tests.conformance.cases import layer_cases, op_cases
        from tests.conformance.laws import LAYER_LAWS, OP_LAWS

        of_ops, of_layers = op_cases(registry.ops()), layer_cases(registry.MIXERS)
        ops = [Subject(name, op, [c for c in of_ops if c.op is op]) for name, op in registry.ops().items()]
        mixers = [
            Subject(name, entry.op, [c for c in of_layers if c.name == name])
            for name, entry in registry.MIXERS.items()
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(write(self.results, ops, mixers, OP_LAWS, LAYER_LAWS))

    def pytest_terminal_summary(self, terminalreporter) -> None:
        terminalreporter.write_line(f"table of laws: {self.path}")


def _reason(report: pytest.TestReport) -> str:
    """The first line of what was raised, without the bars that would end a cell of a table."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    return next(iter(text.strip().splitlines()), "no message").replace("|", "\\|")[:300]
