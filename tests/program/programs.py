"""What the tests of whole programs share: a job small enough to run many times, and ways to run it."""

import hashlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from seqmodels import config
from seqmodels.errors import run_main
from seqmodels.training.checkpoint import restore_parameters

REPOSITORY = Path(__file__).parents[2]
STEPS, CHECKPOINT_EVERY = 40, 4
SHORT = ("--gin.train.steps=4", "--gin.train.checkpoint_every=2")

# Text data, a layer, evaluations, checkpoints, and a row of metrics for every step.
TINY = """
train.model = @LanguageModel()
LanguageModel.vocab_size = 258
LanguageModel.d_model = 16
LanguageModel.n_layers = 1
LanguageModel.pattern = ('gated_linear_attention',)
GatedLinearAttention.num_heads = 2
train.data = @TextData()
train.optimizer = @AdamW()
AdamW.warmup_steps = 2
train.batch_size = 4
train.seq_len = 32
train.steps = {steps}
train.log_every = 1
train.eval_every = 10
train.eval_batches = 2
train.checkpoint_every = {checkpoint_every}
TextData.paths = {paths!r}
"""


class Ended(NamedTuple):
    """How a program ended: its exit code and what it said."""

    code: int
    out: str
    err: str


def write_texts(folder: Path) -> Path:
    """A folder of small text files, the same ones each time."""
    folder.mkdir()
    for n in range(12):
        lines = (f"line {i} of text {n}: {i * i % (n + 7)} and {i * n}\n" for i in range(60))
        (folder / f"{n}.txt").write_text("".join(lines))
    return folder


def write_config(folder: Path, more: str = "", paths: str | Path | None = None) -> Path:
    """A config file of the tiny job in `folder`, with its texts beside it unless `paths` names others."""
    if paths is None:
        paths = folder / "texts"
        if not paths.exists():
            write_texts(paths)
    file = folder / "tiny.gin"
    file.write_text(TINY.format(steps=STEPS, checkpoint_every=CHECKPOINT_EVERY, paths=str(paths)) + more)
    return file


def load_train_program() -> Callable[[list[str]], int]:
    """What `python train.py` runs."""
    specification = importlib.util.spec_from_file_location("train", REPOSITORY / "train.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.main


def run_here(program: Callable[[list[str]], int | None], arguments: list, monkeypatch, capsys) -> Ended:
    """Run a program to its end in this process: many times quicker than in one of its own."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    capsys.readouterr()
    try:
        run_main(program)
    except SystemExit as end:
        return Ended(end.code or 0, *capsys.readouterr())
    finally:
        config.clear()


def train_command(gin: Path, run: Path, *more: str) -> list[str]:
    """The command line of a run of train.py."""
    return [sys.executable, str(REPOSITORY / "train.py"), "--config", str(gin), "--run_dir", str(run), *more]


def run_command(command: list[str], **options) -> Ended:
    """Run a command line to its end."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)
    return Ended(done.returncode, done.stdout, done.stderr)


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its bytes; folders and links too."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


def damage(checkpoint: Path) -> None:
    """Flip a bit in every stored byte of the arrays of a checkpoint; sizes and names stay."""
    files = [file for file in (checkpoint / "state").rglob("d/*") if file.is_file()]
    assert files
    for file in files:
        file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))


def assert_same_run(run: Path, reference: Path, note: str = "") -> None:
    """Two runs of one config have logged the same numbers and end in the same state, bit for bit."""
    assert (run / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes(), note
    assert (run / "DONE").read_bytes() == (reference / "DONE").read_bytes(), note
    for field in ("params", "opt_state"):
        ours, theirs = (
            restore_parameters(folder / "checkpoints", field=field) for folder in (run, reference)
        )
        assert ours.step == theirs.step == STEPS, note
        same = jax.tree.map(
            lambda a, b: a.tobytes() == b.tobytes(), *map(to_numpy, (ours.state, theirs.state))
        )
        assert jax.tree.leaves(same) and jax.tree.all(same), (field, same, note)
    # The record of a checkpoint has the position in the data, and a checksum of all arrays, the random key too.
    ours, theirs = (
        (folder / f"checkpoints/{STEPS}/record/metadata").read_bytes() for folder in (run, reference)
    )
    assert ours == theirs, note


def to_numpy(tree: Any) -> Any:
    """The same tree with arrays of the host."""
    return jax.tree.map(np.asarray, tree)
