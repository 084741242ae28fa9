"""Write the golden numbers anew, after a change that is meant to change them, and say what has changed.

    python -m tests.golden.regenerate

Commit the files together with the change, and say in its description why the numbers are others.
"""

import json
import tempfile
from pathlib import Path

import tests.conftest  # noqa: F401 - the environment that the tests run in, before jax is imported
from tests.golden.first_steps import CONFIGS, GOLDEN, golden_file, measure, read_golden


def main() -> None:
    stale = set(GOLDEN.glob("*.json")) - {golden_file(experiment) for experiment in CONFIGS}
    for file in stale:
        file.unlink()
        print(f"{file.stem}: removed, there is no such experiment")
    for experiment in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            now = measure(experiment, Path(folder))
        before = read_golden(experiment) or {}
        for name, values in now.items():
            for step, value in enumerate(values, start=1):
                old = before.get(name, [None] * len(values))[step - 1]
                change = "new" if old is None else f"was {old:.9g}, {(value - old) / old:+.1e}"
                print(f"{experiment.stem}: step {step} {name} {value:.9g} ({change})")
        golden_file(experiment).write_text(json.dumps(now, indent=1) + "\n")


if __name__ == "__main__":
    main()
