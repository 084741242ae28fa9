"""What `plan` says of every example, as files: `python -m tests.gcp.golden` writes them anew."""

from pathlib import Path

from gcp.job import read_job
from gcp.plan import plan

EXAMPLES = sorted((Path(__file__).parents[2] / "gcp" / "examples").glob("*.toml"))
FOLDER = Path(__file__).parent / "golden"


def golden_of(example: Path) -> Path:
    return FOLDER / f"{example.stem}.txt"


if __name__ == "__main__":
    for old in FOLDER.glob("*.txt"):
        old.unlink()
    for example in EXAMPLES:
        golden_of(example).write_text(plan(read_job(example)))
