"""A mixer is added by three files and its entry in the registry; every law then holds it, with no other edit.

    pytest tests/conformance -k toy
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from seqmodels.layers._mixer import Mixer
from seqmodels.registry import Entry
from tests.conformance.cases import layer_cases, op_cases
from tests.conformance.laws import LAYER_LAWS, OP_LAWS
from tests.conformance.toy.ops.moving_average import MOVING_AVERAGE

REPOSITORY = Path(__file__).parents[2]
TOY = Path(__file__).parent / "toy"

IMPORTS = """\
from seqmodels.layers.moving_average import MovingAverage
from seqmodels.ops.moving_average import MOVING_AVERAGE
"""
LINE = '    "moving_average": Entry(MOVING_AVERAGE, MovingAverage),\n'


def test_a_toy_mixer_is_three_files_and_an_entry(tmp_path):
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
        [
            *(sys.executable, "-m", "pytest", *suites, "-v", "-p", "no:cacheprovider"),
            *("-k", "moving_average", "-m", "slow or not slow", "--law_table", "laws.md"),
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = {line.partition(" PASSED")[0] for line in run.stdout.splitlines() if " PASSED" in line}
    ops = op_cases({"moving_average": MOVING_AVERAGE})
    layers = layer_cases({"moving_average": Entry(MOVING_AVERAGE, Mixer)})
    for laws, cases in ((OP_LAWS, ops), (LAYER_LAWS, layers)):
        for name in (f"{case}: {law}" for case in cases for law in laws if case.is_asked(law)):
            assert any(f"test_law[{name}]" in line for line in passed), f"{name} did not run"
    assert any("test_costs.py" in line for line in passed), "what it declares of its costs was not checked"
    assert any("moving_average.gin" in line for line in passed), "its config was not built"
    rows = [row for row in (tmp_path / "laws.md").read_text().splitlines() if row.startswith("| `moving_average`")]
    assert len(rows) == 2, "the table of laws has a row for the operator and one for the layer"
    for row in rows:
        assert "pass" in row and "fail" not in row and "not run" not in row and " of " not in row
