"""Runs that several files of this folder look at, each made once."""

import os
from pathlib import Path

import pytest

from seqmodels import config
from seqmodels.errors import EXIT_DONE
from tests.program.programs import SHORT, load_train_program, run_command, train_command, write_config


@pytest.fixture(scope="session")
def train():
    """What `python train.py` runs, for use in this process."""
    return load_train_program()


@pytest.fixture(scope="session")
def finished_run(train, tmp_path_factory) -> Path:
    """A run of four steps with two checkpoints, and `tiny.gin` beside it. For reading and copying only."""
    folder = tmp_path_factory.mktemp("finished")
    gin, run = write_config(folder), folder / "run"
    assert train(["--config", str(gin), "--run_dir", str(run), *SHORT]) == EXIT_DONE
    config.clear()
    return run


@pytest.fixture(scope="session")
def own_cache(tmp_path_factory) -> dict[str, str]:
    """An environment with a compilation cache of its own, for processes that may be killed while they write it."""
    return os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled"))}


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, own_cache) -> Path:
    """The tiny run, in one go in a process of its own, and `tiny.gin` beside it. For reading only."""
    folder = tmp_path_factory.mktemp("undisturbed")
    gin, run = write_config(folder), folder / "run"
    ended = run_command(train_command(gin, run), env=own_cache)
    assert ended.code == EXIT_DONE, ended
    return run
