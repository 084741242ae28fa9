"""Every shipped config says what it means: it is read, its model is built in shapes, and no binding is idle."""

import re
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh

from seqmodels import config
from seqmodels.constructors import register_constructors
from seqmodels.errors import InputError
from seqmodels.models import input_shape
from seqmodels.models.accounting import parameter_count
from seqmodels.notation import MESH_AXES
from seqmodels.registry import MIXERS
from seqmodels.tools.compile_check.report import START
from seqmodels.tools.sweep.check import check
from seqmodels.tools.sweep.points import read_sweep
from seqmodels.training import TrainingJob, parameter_shapes
from tests import experiments
from tests.experiments import CONFIGS

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = CONFIGS / "quickstart.gin"
ONE_DEVICE = AbstractMesh((1, 1, 1, 1), MESH_AXES)


LONG_CONTEXT = sorted((CONFIGS / "long_context").glob("*.gin"))
RUNNABLE = [*experiments.EXPERIMENTS, *LONG_CONTEXT]
SWEEPS = [file for file in experiments.EXPERIMENTS if experiments.is_sweep(file)]
EXPERIMENTS = [*experiments.RUNS, *LONG_CONTEXT]
SIZES = sorted((CONFIGS / "sizes").glob("*.gin"))
TASKS = sorted((CONFIGS / "tasks").glob("*.gin"))
PRETRAINING = sorted((CONFIGS / "pretraining").glob("*.gin"))
PARTS = sorted((CONFIGS / "mixers").glob("*.gin"))


def build(*files: Path) -> TrainingJob:
    """The job that the files compose to, after everything of it has been made that needs no memory."""
    register_constructors()
    config.parse(files)
    job = TrainingJob()
    shapes = parameter_shapes(job.model, job.seq_len)
    job.optimizer.build(shapes, job.steps)
    tokens = input_shape(job.model, job.batch_size, job.seq_len)
    logits, _ = jax.eval_shape(lambda params, x: job.model.apply({"params": params}, x), shapes, tokens)
    assert logits.shape == (job.batch_size, job.seq_len, job.model.vocab_size or 1)
    config.check_all_used()
    return job


@pytest.fixture(autouse=True)
def _forget_config():
    yield
    config.clear()


def name(file: Path) -> str:
    return str(file.relative_to(CONFIGS))


def test_there_are_configs():
    assert QUICKSTART.exists() and EXPERIMENTS and SWEEPS and PRETRAINING and SIZES and TASKS and PARTS
    known = {QUICKSTART, CONFIGS / "base.gin", *EXPERIMENTS, *SWEEPS, *PRETRAINING, *SIZES, *TASKS, *PARTS}
    assert known == set(CONFIGS.rglob("*.gin")), "a config that no test here builds"


@pytest.mark.parametrize("file", [QUICKSTART, *EXPERIMENTS], ids=name)
def test_experiment(file):
    build(file).check_fits(ONE_DEVICE)


@pytest.mark.parametrize("file", SWEEPS, ids=name)
def test_sweep(file):
    """Every point of it."""
    sweep, seen = read_sweep(file), []
    assert len(check(sweep, {}, seen.append, lambda job: job.check_fits(ONE_DEVICE))) == len(seen) > 1


@pytest.mark.parametrize("file", PRETRAINING, ids=name)
def test_pretraining(file):
    """The family and the size that its name says, and its batch splits over the slices that its report is of."""
    family, _, size = file.stem.rpartition("_")
    job = build(file)
    assert set(job.model.pattern) == {family} or family not in MIXERS
    parameters = parameter_count(parameter_shapes(job.model, 8))
    low, high = {"125m": (0.9e8, 1.3e8), "1b": (1.1e9, 1.5e9), "7b": (5.5e9, 8e9)}[size]
    assert low < parameters < high
    head = file.read_text().split("\n\n")[0]
    assert f"--config configs/pretraining/{file.name} --run_dir runs/{file.stem}" in head
    for devices in (16,) if size == "125m" else (64, 256):
        assert job.batch_size % devices == 0


def test_reports_are_of_the_configs():
    """docs/compile_reports.md has a section for every config, and every slice fits."""
    text = (REPOSITORY / "docs" / "compile_reports.md").read_text()
    assert sorted(re.findall(r"^## (\S+)$", text, re.MULTILINE)) == [file.stem for file in PRETRAINING]
    assert "DOES NOT" not in text
    assert text.startswith(START)
    for file in PRETRAINING:
        slices = re.search(r"^# Compiled +for ([^:]*:\S+(?:, \S+)*): docs", file.read_text(), re.MULTILINE)[1]
        section = text.partition(f"<!-- {file.stem}: begin -->")[2].partition(f"<!-- {file.stem}: end -->")[0]
        assert all(f"| {name} |" in section for name in slices.split(", ")), file.stem


@pytest.mark.parametrize("mixer", PARTS, ids=name)
def test_mixer_on_a_task(mixer):
    build(CONFIGS / "base.gin", CONFIGS / "tasks/standard_library.gin", CONFIGS / "sizes/tiny.gin", mixer)


@pytest.mark.parametrize("size", SIZES, ids=name)
def test_size(size):
    build(CONFIGS / "base.gin", TASKS[-1], size, CONFIGS / "mixers/gated_linear_attention.gin")


@pytest.mark.parametrize("task", TASKS, ids=name)
def test_task(task):
    build(
        CONFIGS / "base.gin", task, CONFIGS / "sizes/tiny.gin", CONFIGS / "mixers/gated_linear_attention.gin"
    )


def test_every_mixer_has_a_config():
    assert set(MIXERS) <= {file.stem for file in PARTS}


@pytest.mark.parametrize("file", [QUICKSTART, *RUNNABLE], ids=name)
def test_an_experiment_opens_like_a_methods_section(file):
    head = file.read_text().split("\n\n")[0]
    assert all(line.startswith("# ") for line in head.splitlines())
    assert re.search(r"^# Question +\S.*\?$", head, re.MULTILINE), head
    program = r"train\.py --config (\S+) --run_dir runs/\w+"
    if experiments.is_sweep(file):
        program = r"-m seqmodels\.tools\.sweep (\S+) --sweep_dir runs/\w+(?: --jobs \d+)?"
    command = re.search(rf"^# Command +python {program}$", head, re.MULTILINE)
    assert command and REPOSITORY / command[1] == file, "the command is for another file"


def test_an_idle_binding_is_noticed(tmp_path):
    """That the check which the tests above rely on can fail."""
    idle = tmp_path / "idle.gin"
    idle.write_text("SoftmaxAttention.window = 8\n")
    with pytest.raises(InputError, match=r"SoftmaxAttention\.window has no effect"):
        build(QUICKSTART, idle)
