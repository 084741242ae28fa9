"""The examples train what their comments say: their configs are read with what the jobs change in them, and the batch
splits over the mesh."""

import math
import re

import pytest
from jax.sharding import AbstractMesh

from gcp.job import read_job
from seqmodels import config
from seqmodels.constructors import register_constructors
from seqmodels.notation import MESH_AXES
from seqmodels.training import TrainingJob
from tests.gcp.jobs import EXAMPLES, REPOSITORY

examples = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def _forget_config():
    yield
    config.clear()


def head_of(path) -> dict[str, str]:
    """The methods section at the top of an example: what is said of Model, Data and so on."""
    comment = re.sub(r"^# ?", "", path.read_text().split("\n\n")[0], flags=re.MULTILINE)
    parts = re.findall(r"^(\w+)  +(.*(?:\n  +.*)*)", comment, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in parts}


def training_job(job) -> TrainingJob:
    register_constructors()
    config.parse([REPOSITORY / job.config], job.overrides)
    return TrainingJob()


def sizes_of(job, training) -> dict[str, int]:
    sizes = {axis: getattr(training.mesh, axis) for axis in MESH_AXES}
    rest = job.slices * job.slice.devices // math.prod(size for size in sizes.values() if size > 0)
    return {axis: rest if size == -1 else size for axis, size in sizes.items()}


@examples
def test_the_batch_splits_over_the_slices(path):
    job = read_job(path)
    training = training_job(job)
    sizes = sizes_of(job, training)
    assert math.prod(sizes.values()) == job.slices * job.slice.devices
    assert training.mesh.slices == job.slices and sizes["data"] % job.slices == 0
    training.check_fits(AbstractMesh(tuple(sizes.values()), MESH_AXES))


@examples
def test_the_data_is_what_is_mounted(path):
    job = read_job(path)
    assert training_job(job).data._paths == list(job.data)


@examples
def test_an_example_opens_like_a_methods_section(path):
    job, said = read_job(path), head_of(path)
    assert list(said) == ["Model", "Data", "Training", "Machines", "Mesh", "Command"]
    assert said["Command"] == f"python -m gcp up {path.relative_to(REPOSITORY)}"

    training = training_job(job)
    steps, batch, length = training.steps, training.batch_size, training.seq_len
    assert said["Training"].startswith(f"{steps:,} steps of {batch} sequences of {length:,} tokens")
    assert f"{steps * batch * length / 1e9:.0f} billion tokens" in said["Training"]

    assert f"{job.chips} chips" in said["Machines"] and f"{job.hosts} hosts" in said["Machines"]
    assert job.capacity.replace("-", " ") in said["Machines"]
    told = {axis: int(size) for axis, size in re.findall(r"(\w+) (\d+)", said["Mesh"]) if axis in MESH_AXES}
    assert told == {axis: size for axis, size in sizes_of(job, training).items() if size > 1}


@examples
def test_memory_is_that_of_the_compilers_report(path):
    job, said = read_job(path), head_of(path)
    told = re.search(r"according to the compiler ([\d.]+) of ([\d.]+) GiB", said["Machines"])
    if job.slices > 1:
        assert told is None
        return
    name = re.search(r"(\w+)\.gin", job.config)[1]
    report = (REPOSITORY / "docs" / "compile_reports.md").read_text().partition(f"## {name}\n")[2]
    row = re.search(rf"\| {re.escape(job.slice.check_name)} \| ([\d.]+) \| ([\d.]+) \|", report)
    assert float(told[1]) == pytest.approx(float(row[1]), abs=0.06)
    assert float(told[2]) == pytest.approx(float(row[2]), abs=0.06)
