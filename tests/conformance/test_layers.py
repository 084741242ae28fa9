"""Every registered layer keeps the laws that can be seen from outside."""

from seqmodels import registry
from tests.conformance.cases import layer_cases
from tests.conformance.laws import LAYER_LAWS, each_law_on_each_case


@each_law_on_each_case(LAYER_LAWS, layer_cases(registry.MIXERS))
def test_law(law, case):
    law(case)
