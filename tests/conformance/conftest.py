"""Puts every registered mixer before every law."""

import pytest

from seqmodels import registry
from tests.conformance.cases import Case, layer_cases, op_cases
from tests.conformance.laws import LAYER_LAWS, OP_LAWS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "op_law" in metafunc.fixturenames:
        _each_law_on_each_case(metafunc, "op", OP_LAWS, op_cases(registry.ops()))
    if "layer_law" in metafunc.fixturenames:
        _each_law_on_each_case(metafunc, "layer", LAYER_LAWS, layer_cases(registry.MIXERS))
    if "op" in metafunc.fixturenames:
        metafunc.parametrize("op", registry.ops().values(), ids=registry.ops())
    if "mixer" in metafunc.fixturenames:
        metafunc.parametrize("mixer", registry.MIXERS.values(), ids=registry.MIXERS)


def _each_law_on_each_case(metafunc: pytest.Metafunc, kind: str, laws: dict, cases: list[Case]) -> None:
    """Laws that an operator cannot keep are left out here; `test_known_gaps` is about them."""
    found = [(case, law) for case in cases for law in laws if law not in case.op.known_gaps]
    metafunc.parametrize(
        (f"{kind}_case", f"{kind}_law"),
        [pytest.param(case, laws[law], marks=pytest.mark.xdist_group(str(case))) for case, law in found],
        ids=[f"{case}: {law}" for case, law in found],
    )
