"""A mixer is added by three files and its entry in the registry; every law then holds it, with no other edit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
TOY = Path(__file__).parent / "toy"

IMPORTS = """\
from seqmodels.layers.moving_average import MovingAverage
from seqmodels.ops.moving_average import MOVING_AVERAGE
"""
LINE = '    "moving_average": Entry(MOVING_AVERAGE, MovingAverage),\n'


def test_three_files_and_an_entry(tmp_path):
    for part in ("seqmodels", "configs", "tests", "pyproject.toml"):
        copy = shutil.copytree if (REPOSITORY / part).is_dir() else shutil.copy
        copy(REPOSITORY / part, tmp_path / part)

    shutil.copy(TOY / "ops/moving_average.py", tmp_path / "seqmodels/ops")
    shutil.copy(TOY / "layers/moving_average.py", tmp_path / "seqmodels/layers")
    shutil.copy(TOY / "configs/mixers/moving_average.gin", tmp_path / "configs/mixers")
    registry = tmp_path / "seqmodels/registry.py"
    table = "MIXERS: dict[str, Entry] = {\n"
    before, after = registry.read_text().split(table)
    registry.write_text(before.replace("\n\nclass Entry", f"{IMPORTS}\n\nclass Entry") + table + LINE + after)

    suites = ["tests/conformance", "tests/unit/test_configs.py"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *suites, "-k", "moving_average", "-v", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for what in (
        "slow and fast: forms",
        "at the limits: extremes",
        "moving_average: split",
        "moving_average.gin",
    ):
        assert any(what in line and "PASSED" in line for line in run.stdout.splitlines()), (
            f"{what} did not run"
        )
