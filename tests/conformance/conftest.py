"""Runs the laws over the table of mixers that the option --mixers names."""

import importlib

import pytest

from tests.conformance.cases import Case, layer_cases, op_cases
from tests.conformance.laws import LAYER_LAWS, OP_LAWS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    table = importlib.import_module(metafunc.config.getoption("mixers"))
    if "op_law" in metafunc.fixturenames:
        _each_law_on_each_case(metafunc, "op", OP_LAWS, op_cases(table.MIXERS, table.OTHER_OPS))
    if "layer_law" in metafunc.fixturenames:
        _each_law_on_each_case(metafunc, "layer", LAYER_LAWS, layer_cases(table.MIXERS))
    if "op" in metafunc.fixturenames:
        ops = {case.op.name: case.op for case in op_cases(table.MIXERS, table.OTHER_OPS)}
        metafunc.parametrize("op", ops.values(), ids=ops)
    if "mixer" in metafunc.fixturenames:
        metafunc.parametrize("mixer", table.MIXERS.values(), ids=table.MIXERS)


def _each_law_on_each_case(metafunc: pytest.Metafunc, kind: str, laws: dict, cases: list[Case]) -> None:
    """Laws that the operator cannot keep are left out: `test_known_gaps` is about them."""
    found = [(case, law) for case in cases for law in laws if law not in case.op.known_gaps]
    metafunc.parametrize(
        (f"{kind}_case", f"{kind}_law"),
        [pytest.param(case, laws[law], marks=pytest.mark.xdist_group(str(case))) for case, law in found],
        ids=[f"{case}: {law}" for case, law in found],
    )
