"""The quickstart's job with another mixer: what `train` runs, and whose model `decode` lets write."""

import re
from pathlib import Path

import seqmodels
from seqmodels import config
from seqmodels.constructors import register_constructors
from seqmodels.errors import InputError
from seqmodels.training import TrainingJob

ROOT = Path(seqmodels.__file__).resolve().parents[1]
QUICKSTART, MIXERS, TRAIN = ROOT / "configs/quickstart.gin", ROOT / "configs/mixers", ROOT / "train.py"


def check_checkout() -> None:
    """The program and its configs are beside the package in a checkout alone."""
    for path in (QUICKSTART, TRAIN):
        if not path.is_file():
            raise InputError(f"{path} is not there; expected the package to stand in a checkout of its repository")


def write_config(mixer: str, folder: Path) -> Path:
    """configs/quickstart.gin with the file of this mixer in place of the quickstart's own."""
    text, count = re.subn(
        r"include 'configs/mixers/\w+\.gin'", f"include 'configs/mixers/{mixer}.gin'", QUICKSTART.read_text()
    )
    if count != 1:
        raise InputError(f"{QUICKSTART} includes {count} files of configs/mixers; expected one, to be exchanged")
    file = folder / f"{mixer}.gin"
    file.write_text(text)
    return file


def read_job(file: Path) -> TrainingJob:
    """The job of a config file."""
    register_constructors()
    config.parse([file])
    return TrainingJob()
