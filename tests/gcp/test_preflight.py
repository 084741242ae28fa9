"""Jobs compiled for their slices before they are sent: what fits, what does not and why, and what is wrong."""

import argparse
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest

from gcp import preflight
from gcp.job import read_job
from seqmodels.errors import EXIT_DEFECT, EXIT_DONE, EXIT_INPUT
from tests.program.programs import REPOSITORY, run_command
from tests.tpu_compiler import needs_tpu_compiler

# Programs for TPUs are kept in the cache of compiled programs, but cannot be read without one.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")

EXAMPLES = sorted((REPOSITORY / "gcp" / "examples").glob("*.toml"))
CORPUS = Path("/data/corpus")  # where a job mounts it; not on the machine of who sends it
GIN = f"""
train.model = @LanguageModel()
LanguageModel.vocab_size = 258
LanguageModel.d_model = 64
LanguageModel.n_layers = 1
LanguageModel.pattern = ('retention',)
Retention.num_heads = 2
train.data = @TextData()
TextData.paths = '{CORPUS}'
train.mesh = @DeviceMesh()
DeviceMesh.fsdp = 2
train.batch_size = 8
train.seq_len = 64
"""
JOB = {
    "name": "tiny",
    "tpu": "v5e-4",
    "project": "project",
    "location": "us-west4",
    "cluster": "cluster",
    "image": "us-docker.pkg.dev/project/images/seqmodels@sha256:" + 64 * "5",
    "out": "gs://bucket/runs",
}


def program(argv: list[str]) -> int:
    """What `python -m gcp preflight` runs."""
    parser = argparse.ArgumentParser()
    preflight.add_arguments(parser)
    return preflight.run(parser.parse_args(argv))


@pytest.fixture
def write(tmp_path):
    """Write the tiny job with other values, and more lines of its config: `write(more, **values)`."""

    def write(more: str = "", **values) -> Path:
        config = tmp_path / "tiny.gin"
        config.write_text(GIN + more)
        env = values.pop("env", {})
        lines = [f"{key} = {json.dumps(value)}" for key, value in {**JOB, "config": str(config), **values}.items()]
        lines += ["[data]", f'"{CORPUS}" = "gs://bucket/corpus"', "[env]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in env.items()]
        file = tmp_path / "job.toml"
        file.write_text("\n".join(lines) + "\n")
        return file

    return write


@needs_tpu_compiler
def test_a_job_that_fits(here, write, tmp_path):
    assert not CORPUS.exists(), "or it could be read unnoticed"
    job, report = write(), tmp_path / "report.json"
    ended = here(program, job, "--json", report, "--hlo", tmp_path / "hlo")
    assert ended.code == EXIT_DONE, ended
    for said in (
        "tiny: ",
        " on v5e-4, 4 chips",
        r"v5e:2x2: 4 x TPU v5 lite, mesh data=2, fsdp=2, ",
        r"[\d.]+ of 15\.75 GiB a device: fits",
        r"kernels      \w+ x \d",
        r"all-gather \w+ +fsdp ",
        r"compiled in +\d+ s",
        r"preset +none",
        r"compiled by +jax \d[\d.]*, libtpu \d[\d.]*; source ",
    ):
        assert re.search(said, ended.out), (said, ended.out)
    assert "warning: this holds for these versions and this source; what is in the image cannot be seen" in ended.err
    assert JOB["image"] in ended.err
    whole = json.loads(report.read_text())
    assert whole["job"] == {"name": "tiny", "fingerprint": read_job(job).fingerprint, "tpu": "v5e-4"}
    assert whole["reports"][0]["fits"] and whole["reports"][0]["target"] == "v5e:2x2"
    assert (tmp_path / "hlo" / "v5e_2x2.hlo.txt").is_file()


@needs_tpu_compiler
@pytest.mark.parametrize(
    "larger",
    [["train.batch_size=4194304"], ["LanguageModel.d_model=8192", "LanguageModel.n_layers=40"]],
    ids=["batch", "model"],
)
def test_a_job_that_does_not_fit_is_refused_for_the_compilers_reason(here, write, larger):
    ended = here(program, write(gin=larger))
    assert ended.code == EXIT_DEFECT, ended
    refused = re.search(r"DOES NOT COMPILE: .*", ended.out)[0]
    assert "memory" in refused and "hbm" in refused.lower()
    wanted, there = map(float, re.findall(r"([\d.]+)G\b", refused)[-2:])
    assert wanted > there == 15.75


@needs_tpu_compiler
def test_several_slices_talk_to_each_other_along_data(here, write):
    ended = here(program, write(tpu="v6e-4", slices=2))
    assert ended.code == EXIT_DONE, ended
    assert " on 2 x v6e-4, 8 chips" in ended.out
    assert "2 x v6e:2x2: 8 x TPU v6 lite, mesh data=4, fsdp=2," in ended.out
    assert re.search(r"^ *send to a slice \w+ +data ", ended.out, re.MULTILINE), ended.out


@needs_tpu_compiler
def test_options_of_the_compiler_are_the_jobs_preset(here, write):
    ended = here(program, write(tpu="v6e-4", gin=["train.compiler_preset='async_gathers'"]), "--option", "xla_x=1")
    assert ended.code == EXIT_DEFECT and "No such compile option: 'xla_x'" in ended.out, ended
    assert "xla_sc_disable_megacore_partitioning=True, xla_x=1" in ended.out
    assert re.search(r"preset +async_gathers", ended.out)


@pytest.fixture
def versions(monkeypatch):
    """Have the job compiled with other versions of packages, and without the compiler: `versions(jax="0.1")`."""

    def versions(**packages):
        conditions = {"packages": packages, "source": None, "time": ""}
        found = preflight.command.Found("tiny", conditions, [argparse.Namespace(preset=None, fits=True)])
        monkeypatch.setattr(preflight.command, "reports_of", lambda *arguments: found)

    return versions


def test_versions_are_compared_with_those_that_images_are_made_of(here, write, versions, tmp_path, monkeypatch):
    pinned = tmp_path / "constraints.txt"
    pinned.write_text("# Of images.\nflax==0.1.0\njax==0.10.2\njaxtyping==9\nlibtpu==0.0.42.1\n")
    monkeypatch.setattr(preflight, "CONSTRAINTS", pinned)
    versions(jax="0.10.2", libtpu="0.0.50")
    ended = here(program, write())
    first, second, image = ended.err.splitlines()
    assert first.startswith("warning: libtpu is 0.0.42.1 in images") and first.endswith("and 0.0.50 here")
    assert second.startswith("warning: flax is 0.1.0 in images") and second.endswith("and none here")
    assert JOB["image"] in image
    assert "source not in a git checkout" in ended.out


def test_another_program_may_train_otherwise(here, write, versions):
    """Said, for the step that is compiled is that of train.py."""
    versions()
    ended = here(program, write(program="mine.py"))
    assert ended.code == EXIT_DONE and "mine.py may train otherwise" in ended.err


@pytest.mark.parametrize(
    ("more", "values", "message"),
    [
        (
            "",
            {"gin": ["train.batch_sise=8"]},
            "job.toml: gin: train has no parameter 'batch_sise': did you mean 'batch_s",
        ),
        ("train.batch_sise = 8\n", {}, "tiny.gin:14: train has no parameter 'batch_sise'"),
        ("", {"config": "configs/no_such.gin"}, "config file 'configs/no_such.gin' does not exist"),
        ("", {"tpu": "v5e-5"}, "job.toml: tpu is 'v5e-5'"),
        ("", {"gin": ["train.compiler_preset='async'"]}, "did you mean 'async_gathers'"),
        ("DeviceMesh.slices = 2\n", {}, "DeviceMesh.slices is 2 in the config: expected 1"),
        pytest.param("", {"gin": ["train.batch_size=6"]}, "expected a multiple of 4", marks=needs_tpu_compiler),
        pytest.param("", {"gin": ["DeviceMesh.fsdp=3"]}, "does not fit 4 devices", marks=needs_tpu_compiler),
    ],
)
def test_wrong_inputs(here, write, more, values, message):
    ended = here(program, write(more, **values))
    assert ended.code == EXIT_INPUT and message in ended.err, ended
    assert ended.err.count("\n") == 1, ended.err


def test_a_job_file_that_is_not_there(here, tmp_path):
    ended = here(program, tmp_path / "job.toml")
    assert ended.code == EXIT_INPUT and "cannot read the job file" in ended.err, ended


def test_without_the_compiler(here, write, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    ended = here(program, write())
    assert ended.code == EXIT_INPUT and "the TPU compiler is not installed" in ended.err, ended


# In processes of their own: what is read from the environment as jax and the compiler are loaded.


def run_preflight(job: Path, **environment: str):
    """Of this shell: `environment`."""
    command = """
import argparse
from gcp import preflight
from seqmodels.errors import run_main

def program(argv):
    parser = argparse.ArgumentParser()
    preflight.add_arguments(parser)
    return preflight.run(parser.parse_args(argv))

run_main(program)
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TPU_"))}
    path = {"PYTHONPATH": str(REPOSITORY)}
    return run_command([sys.executable, "-c", command, str(job)], env={**clean, **path, **environment})


@needs_tpu_compiler
def test_the_compilers_variables_are_those_of_the_job(write):
    """A flag of this shell's, which the compiler would refuse, is not heard; nor does jax look for TPUs here."""
    job = write(env={"JAX_DEFAULT_MATMUL_PRECISION": "highest", "OTHER": "1"})
    ended = run_preflight(job, LIBTPU_INIT_ARGS="--xla_no_such_flag=1")
    assert ended.code == EXIT_DONE and "GiB a device: fits" in ended.out, ended
    assert re.findall("environment +(.*)", ended.out) == ["JAX_DEFAULT_MATMUL_PRECISION=highest"]
    assert all(line.startswith("warning: ") for line in ended.err.splitlines()), ended.err


@needs_tpu_compiler
def test_a_flag_that_the_compiler_does_not_know_is_refused(write):
    ended = run_preflight(write(env={"LIBTPU_INIT_ARGS": "--xla_no_such_flag=1"}))
    assert ended.code == EXIT_DEFECT and "xla_no_such_flag" in ended.err, ended


def test_its_arguments_are_known_in_a_blink():
    """The parser of all commands is made of them."""
    heavy = "import gcp.preflight, sys; sys.exit(bool({'jax', 'numpy', 'flax'} & set(sys.modules)))"
    assert run_command([sys.executable, "-c", heavy], cwd=REPOSITORY).code == 0


@needs_tpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize("job", EXAMPLES, ids=lambda file: file.stem)
def test_every_example_fits(here, job, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    ended = here(program, job)
    assert ended.code == EXIT_DONE, ended
    assert ("send to a slice" in ended.out) == (read_job(job).slices > 1)
