"""What would be sent for the examples is what has been looked at: `python -m tests.gcp.golden` writes it anew."""

import pytest

from gcp.job import read_job
from gcp.plan import plan
from tests.gcp.golden import EXAMPLES, FOLDER, golden_of


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_plan_of_an_example_is_the_one_that_is_checked_in(example):
    assert plan(read_job(example)) == golden_of(example).read_text()


def test_every_example_has_a_plan_and_every_plan_an_example():
    assert sorted(FOLDER.glob("*.txt")) == sorted(map(golden_of, EXAMPLES))
    assert len(EXAMPLES) >= 4
