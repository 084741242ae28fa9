"""The first updates of every shipped experiment give the numbers that they gave when it was checked in.

A failure says that the model, the data or the update has changed. Where that is intended:
`python -m tests.golden.regenerate`.
"""

import numpy as np
import pytest

from tests.golden.first_steps import CONFIGS, GOLDEN, golden_file, measure, read_golden
from tests.tolerances import TOLERANCES


@pytest.mark.parametrize("experiment", CONFIGS, ids=lambda file: file.stem)
def test_first_steps(experiment, tmp_path):
    golden = read_golden(experiment)
    assert golden, "nothing is written down for it yet: run python -m tests.golden.regenerate"
    found = measure(experiment, tmp_path)
    assert found.keys() == golden.keys()
    for name, values in golden.items():
        np.testing.assert_allclose(found[name], values, rtol=TOLERANCES["layer"], atol=0, err_msg=name)


def test_no_golden_file_is_left_over():
    assert set(GOLDEN.glob("*.json")) == {golden_file(experiment) for experiment in CONFIGS}
