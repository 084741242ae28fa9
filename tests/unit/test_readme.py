"""The README does not lie: its programs run, and the files it names exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("program", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_programs_run(program):
    names: dict = {}
    exec(compile(program, "README.md", "exec"), names)
    assert names.get("state") is not None


def test_the_layer_takes_ten_lines():
    program = re.search(r"## A layer in ten lines.*?```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len([line for line in program.splitlines() if line.strip()]) <= 10


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:configs|seqmodels)/[\w/]*\w+\.(?:gin|py)", README))))
def test_files_exist(path):
    assert (ROOT / path).is_file()


def test_there_is_one_test_command_and_ci_reads_it():
    assert len([line for line in README.splitlines() if "-m pytest" in line]) == 1
    assert "grep -m1 -- '-m pytest' README.md" in (ROOT / ".ci" / "run").read_text()
