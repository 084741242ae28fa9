"""A sweep's points as jobs of their own: what stands in the job files, and what is sent."""

import json
import re
import tomllib

import pytest

from gcp.job import LONGEST_NAME, read_job
from seqmodels import config
from seqmodels.errors import EXIT_DONE, EXIT_INPUT
from seqmodels.tools.sweep import __main__ as program
from seqmodels.tools.sweep import pods
from tests.gcp.jobs import REPOSITORY

SWEEP = """\
include 'configs/base.gin'
include 'configs/tasks/mqar.gin'
include 'configs/mixers/retention.gin'
LanguageModel.d_model = 16
LanguageModel.n_layers = 1
Retention.num_heads = 2
train.batch_size = 64
AdamW.learning_rate = 1e-3
sweep.product = {'train.seed': [0, 1], 'LanguageModel.embedding_scale': [1.0, 2.0]}
"""
TEMPLATE = f"""\
name = "recall"
config = "configs/base.gin"
gin = ["train.checkpoint_every=500", "train.sample_prompt='a \\"b\\"'"]
tpu = "v5e-16"
project = "my-project"
location = "us-west4"
cluster = "pods"
image = "us-docker.pkg.dev/p/r/seqmodels@sha256:{"0" * 64}"
out = "gs://my-bucket/runs"
max_restarts = 3

[env]
LIBTPU_INIT_ARGS = "--xla_a=1"
"""


@pytest.fixture
def sweep(here, tmp_path, monkeypatch):
    """Run the tool on files of these texts: `sweep(template, *arguments)`."""
    monkeypatch.chdir(REPOSITORY)

    def run(*arguments: str, template: str = TEMPLATE, text: str = SWEEP):
        (tmp_path / "sweep.gin").write_text(text)
        (tmp_path / "job.toml").write_text(template)
        files = ["--sweep_dir", tmp_path / "sweep", "--pod", tmp_path / "job.toml"]
        return here(program.main, tmp_path / "sweep.gin", *files, *arguments)

    return run


def written(tmp_path) -> dict[str, dict]:
    return {file.stem: tomllib.loads(file.read_text()) for file in sorted((tmp_path / "sweep/jobs").iterdir())}


def test_a_job_trains_its_point_and_is_else_the_template(sweep, tmp_path):
    ended = sweep()
    assert ended.code == EXIT_DONE, ended
    assert "recall-1-2-0: 16 chips, 4 hosts, gs://my-bucket/runs/recall-1-2-0" in ended.out
    assert "4 jobs, 64 chips if all run at once; each 16 chip hours an hour" in ended.out
    files = written(tmp_path)
    assert [*files] == ["0-1.0", "0-2.0", "1-1.0", "1-2.0"]
    template = tomllib.loads(TEMPLATE)
    for name, values in files.items():
        assert {key: values[key] for key in values if key not in ("name", "gin")} == {
            key: template[key] for key in template if key not in ("name", "gin")
        }
        job = read_job(tmp_path / f"sweep/jobs/{name}.toml")
        config.parse([REPOSITORY / job.config], job.overrides)
        assert config.config_text() == (tmp_path / "sweep" / name / "config.gin").read_text()
        assert "train.checkpoint_every=500" in job.gin and "train.sample_prompt='a \"b\"'" in job.gin
        assert "train.model=@LanguageModel()" not in job.gin  # the template's config has it


def test_up_sends_every_job_once_and_says_what_each_is(sweep, cloud, tmp_path):
    ended = sweep("--up", "--only", "seed=1")
    assert ended.code == EXIT_DONE, ended
    assert cloud.sent().count("kubectl create") == 2
    point = json.loads(cloud.file("gs://my-bucket/runs/recall-1-2-0/point.json").read_text())
    assert point["axes"] == {"seed": 1, "embedding_scale": 2.0}
    cloud.calls.clear()
    again = sweep("--up", "--only", "seed=1")
    assert again.code == EXIT_DONE and again.out.count("already there") == 2
    assert not cloud.sent()


def test_what_cannot_be_sent_is_named(sweep, cloud):
    cloud.fail("kubectl create", "Error from server (Forbidden): no")
    ended = sweep("--up")
    assert ended.code == EXIT_INPUT
    assert "error: recall-0-1-0: `kubectl create`" in ended.err and "were not sent" in ended.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"batch_size = 64": "batch_size = 24"},
            "0-1.0 and the 3 other points: train.batch_size is 24: .*multiple of 16",
        ),
        ({"Retention.num_heads = 2": "Retention.num_heads = 3"}, "0-1.0 and the 3 other points: .*3 heads"),
    ],
)
def test_a_point_that_does_not_fit_its_slices_is_found_before_anything_is_written(sweep, tmp_path, change, message):
    text = SWEEP
    for old, new in change.items():
        text = text.replace(old, new)
    ended = sweep(text=text)
    assert ended.code == EXIT_INPUT and not (tmp_path / "sweep").exists(), ended
    assert re.search(message, ended.err), ended.err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("train.checkpoint_every=500", "SGD.momentum=0.5", "SGD.momentum has no effect"),
        ("train.checkpoint_every=500", "train.seed=5", "the jobs of 0-1.0 and 1-1.0 would have one run"),
        ("configs/base.gin", "configs/quickstart.gin", "quickstart.gin binds .*, which 0-1.0 does not: expected one"),
        ("v5e-16", "v5e-17", "v5e-17"),
    ],
)
def test_a_template_that_does_not_do_is_one_line(sweep, tmp_path, old, new, message):
    ended = sweep(template=TEMPLATE.replace(old, new))
    assert ended.code == EXIT_INPUT and ended.err.count("\n") == 1, ended
    assert re.search(message, ended.err), ended.err
    assert not (tmp_path / "sweep").exists()


def test_names_of_jobs_are_short_and_different():
    names = [pods._name("recall", f"{'x' * 50}{end}") for end in "ab"]
    assert len(set(names)) == 2 and all(len(name) <= LONGEST_NAME for name in names)
    assert pods._name("recall", "Based-32_1e-05") == "recall-based-32-1e-05"
