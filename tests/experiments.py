"""The configs of configs/experiments, told apart."""

import re
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"


def is_sweep(file: Path) -> bool:
    """Whether the config is one of a sweep, whose points are what runs."""
    return re.search(r"^sweep\.\w+ = ", file.read_text(), re.MULTILINE) is not None


EXPERIMENTS = sorted((CONFIGS / "experiments").glob("*.gin"))
RUNS = [file for file in EXPERIMENTS if not is_sweep(file)]
