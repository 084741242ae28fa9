"""Job files: what is wrong with one is said in a line that names the key, and no line shows a secret; one job has one
fingerprint."""

import dataclasses
import re

import pytest

from gcp.job import Job, difference, make_job, read_job
from seqmodels.errors import InputError
from tests.gcp.jobs import EVERYTHING, EXAMPLES, VALUES, job

SECRET = "hf_" + "a1B2" * 8


def refused(**changes) -> str:
    with pytest.raises(InputError) as error:
        job(**changes)
    return str(error.value)


REQUIRED = [key for key in VALUES if key != "cluster"]
OTHER_TYPE = {key: [5] if key in ("gin", "env", "secrets", "data") else {"a": "b"} for key in {**VALUES, **EVERYTHING}}

# (key of the job file, value, what the line says)
WRONG = [
    ("name", "GLA", "name is 'GLA': expected lower-case letters"),
    ("name", "1b", "name is '1b'"),
    ("name", "a-", "name is 'a-'"),
    ("name", "a" * 41, "at most 40"),
    ("config", "", "config is ''"),
    ("program", "a b", "program is 'a b'"),
    ("tpu", "v5p-100", "tpu is 'v5p-100': there is no such slice; valid: v5p-8"),
    ("slices", 0, "slices is 0: expected at least 1"),
    ("slices", 1.5, "slices is a number: expected a whole number"),
    ("slices", True, "slices is true or false: expected a whole number"),
    ("capacity", "sport", "capacity is 'sport'; did you mean 'spot'?"),
    ("capacity", "reserved", "capacity is 'reserved' and reservation ''"),
    ("reservation", "r", "capacity is 'on-demand' and reservation 'r'"),
    ("backend", "gk", "backend is 'gk'; did you mean 'gke'?"),
    ("project", "", "project is ''"),
    ("project", "My Project", "project is 'My Project'"),
    ("location", "", "location is ''"),
    ("location", "mars", "location is 'mars': expected a region or a zone"),
    ("cluster", "", "cluster is not given"),
    ("cluster", "a_b", "cluster is 'a_b'"),
    ("namespace", "", "namespace is ''"),
    ("queue", "A", "queue is 'A'"),
    ("service_account", "a b", "service_account is 'a b'"),
    ("image", "repository/image:latest", "image is 'repository/image:latest': expected NAME@sha256:DIGEST"),
    ("image", "repository/image@sha256:12", "image is 'repository/image@sha256:12'"),
    ("out", "/runs", "out is '/runs': expected a folder in a bucket"),
    ("out", "gs://", "out is 'gs://'"),
    ("max_restarts", -1, "max_restarts is -1: expected at least 0"),
    ("valid_hours", -1, "valid_hours is -1.0: expected more than 0"),
    ("hours", 0, "hours is 0.0: expected more than 0"),
    ("hours", float("nan"), "hours is nan"),
    ("usd_per_chip_hour", -1.5, "usd_per_chip_hour is -1.5"),
    ("gin", "train.steps=5", "gin is a string: expected a list of strings"),
    ("gin", ["train.steps"], "gin has 'train.steps': expected NAME.PARAMETER=VALUE"),
    ("gin", ["train.steps=5", 5], "gin[1] is a whole number: expected a string"),
    ("gin", ["DeviceMesh.slices=2"], "gin has 'DeviceMesh.slices=2': the number of slices is that of the key `slices`"),
    ("env", {"A": 1}, "env['A'] is a whole number: expected a string"),
    ("env", {"1A": "x"}, "'1A' is no name of an environment variable"),
    ("env", {"TPU_WORKER_ID": "0"}, "TPU_WORKER_ID stands among the variables"),
    ("env", {"MEGASCALE_NUM_SLICES": "2"}, "MEGASCALE_NUM_SLICES stands among the variables"),
    ("env", {"SEQMODELS_ATTEMPT": "0"}, "SEQMODELS_ATTEMPT stands among the variables"),
    ("env", {"WANDB_API_KEY": "x"}, "env.WANDB_API_KEY looks like a secret: expected it under [secrets]"),
    ("env", {"PLAIN": SECRET}, "env.PLAIN looks like a secret"),
    ("secrets", {"HF_TOKEN": "token"}, "secrets.HF_TOKEN: expected SECRET:KEY of a Kubernetes secret"),
    ("secrets", {"HF TOKEN": "a:b"}, "'HF TOKEN' is no name of an environment variable"),
    ("data", {"corpus": "gs://my-bucket/corpus"}, "data has 'corpus': expected an absolute path in the container"),
    ("data", {"/corpus": "/corpus"}, "data./corpus is '/corpus': expected a folder in a bucket"),
    ("data", {"/corpus": "gs://b/a,b"}, "data./corpus is 'gs://b/a,b'"),
]


@pytest.mark.parametrize(("key", "value", "told"), WRONG, ids=[f"{i}-{x[0]}" for i, x in enumerate(WRONG)])
def test_a_wrong_value(key, value, told):
    line = refused(**{key: value})
    assert told in line and "\n" not in line


def test_every_key_has_a_wrong_value():
    assert {key for key, *_ in WRONG} == {field.name for field in dataclasses.fields(Job)}


@pytest.mark.parametrize("key", sorted(OTHER_TYPE))
def test_a_wrong_type(key):
    line = refused(**{key: OTHER_TYPE[key]})
    assert re.match(rf"{key} is (a list|a table): expected ", line) or line.startswith("gin[0] is a whole number")


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key(key):
    assert refused(**{key: None}) == f"the key {key!r} is missing"


@pytest.mark.parametrize(
    ("key", "told"), [("slice", "did you mean 'slices'?"), ("machines", "valid: "), ("environment", "valid: ")]
)
def test_an_unknown_key(key, told):
    assert re.match(rf"'{key}' is no key of a job file; ({re.escape(told)}|did you mean)", refused(**{key: 1}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tpu": "tpu7x-128"}, "the Cloud TPU API does not have it"),
        ({"location": "us-west4"}, "location is 'us-west4': expected a zone"),
        ({"cluster": "c"}, "cluster is 'c': a queued resource has none"),
        ({"queue": "q"}, "queue is 'q': a queued resource has none"),
        ({"secrets": {"HF_TOKEN": "a:b"}}, "secrets.HF_TOKEN: expected the name of a secret of Secret Manager"),
    ],
)
def test_what_queued_resources_cannot(changes, told):
    line = refused(**{"backend": "queued_resources", "location": "us-west4-a", "cluster": None, **changes})
    assert told in line and "\n" not in line


def test_a_queued_resource():
    queued = job(backend="queued_resources", location="us-west4-a", cluster=None, secrets={"HF_TOKEN": "hugging-face"})
    assert queued.slice.api_type == "v5litepod-256"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name = ", "is not a TOML file: "),
        ("name = 'a'\nname = 'b'\n", "is not a TOML file: "),
        (f"[env]\nHF_TOKEN = {SECRET}\n", "is not a TOML file: "),
        ("name = 'a'\n", "the key 'config' is missing"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, text, told):
    path = tmp_path / "job.toml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_job(path)
    line = str(error.value)
    assert line.startswith(str(path)) and told in line and "\n" not in line and SECRET not in line


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the job file .*none\.toml: No such file"):
        read_job(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "changes",
    [
        {"env": {"HF_TOKEN": SECRET}},
        {"env": {"OTHER": SECRET}},
        {"env": {"OTHER": SECRET, "NUMBER": 5}},
        {"env": {"TPU_NAME": SECRET}},
        {"env": {"NOT A NAME": SECRET}},
        {"env": SECRET},
        {"env": [SECRET]},
        {"secrets": {"HF_TOKEN": SECRET}},
        {"secrets": {"HF_TOKEN": [SECRET]}},
        {"secrets": {"HF_TOKEN": SECRET, "NUMBER": 5}},
        {"secrets": SECRET},
        {"HF_TOKEN": SECRET},
        {"gin": {"HF_TOKEN": SECRET}},
    ],
)
def test_no_line_shows_a_secret(changes):
    assert SECRET not in refused(**changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WANDB_API_KEY", "x"),
        ("HF_TOKEN", "x"),
        ("HUGGING_FACE_HUB_TOKEN", "x"),
        ("AWS_SECRET_ACCESS_KEY", "x"),
        ("GITHUB_TOKEN_FILE", "x"),
        ("DATABASE_PASSWORD", "x"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "x"),
        ("A", "0123456789abcdef0123456789abcdef01234567"),
        ("A", "ghp_0123456789abcdef"),
        ("A", "AIzaSyA0123456789"),
    ],
)
def test_what_looks_like_a_secret_is_refused(name, value):
    assert refused(env={name: value}).startswith(f"env.{name} looks like a secret")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "false"),
        ("MAX_TOKENS", "1024"),
        ("TPU_STDERR_LOG_LEVEL", "0"),
        ("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=98304"),
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=8"),
        ("JAX_COMPILATION_CACHE_DIR", "gs://my-bucket/0123456789abcdef0123456789abcdef"),
        ("KEYBOARD", "qwerty"),
    ],
)
def test_what_people_set_is_no_secret(name, value):
    assert job(env={name: value}).environment[name] == value


CHANGED = {
    "name": "gla-b",
    "config": "configs/pretraining/mamba2_1b.gin",
    "gin": ["train.steps=11"],
    "program": "another.py",
    "tpu": "v6e-256",
    "slices": 3,
    "capacity": "on-demand",
    "reservation": "r",
    "backend": "queued_resources",
    "project": "other",
    "location": "us-east5",
    "cluster": "other",
    "namespace": "other",
    "queue": "other",
    "service_account": "other",
    "image": VALUES["image"].replace("0" * 64, "1" * 64),
    "out": "gs://other-bucket/runs",
    "max_restarts": 4,
    "valid_hours": 25,
    "hours": 13,
    "usd_per_chip_hour": 1.3,
    "env": {"OTHER": "1"},
    "secrets": {"WANDB_API_KEY": "wandb:other"},
    "data": {"/data/corpus": "gs://my-bucket/other"},
}


def test_every_field_changes_the_fingerprint():
    assert set(CHANGED) == {field.name for field in dataclasses.fields(Job)}
    one = job(**EVERYTHING)
    for key, value in CHANGED.items():
        plain = tuple(value) if isinstance(value, list) else value
        other = dataclasses.replace(one, **{key: plain})
        assert other.fingerprint != one.fingerprint, key
        told = difference(one.text(), other.text()).splitlines()
        assert told and all(re.match(rf"[-+]{key}[ .]", line) for line in told), told


def test_order_and_spelling_do_not_change_the_fingerprint():
    one = job(**EVERYTHING)
    turned = {key: dict(reversed(EVERYTHING[key].items())) for key in ("env", "secrets", "data")}
    spelt = {"tpu": "v5litepod-256", "hours": 12.0, "out": "gs://my-bucket/runs/"}
    turned["data"] = {path: f"{folder.rstrip('/')}/" for path, folder in turned["data"].items()}
    other = make_job(dict(reversed({**VALUES, **EVERYTHING, **turned, **spelt}.items())))
    assert other == one and other.fingerprint == one.fingerprint


def test_the_text_of_a_job_makes_its_fingerprint_and_has_a_line_for_every_value():
    one = job(**EVERYTHING)
    assert re.fullmatch("[0-9a-f]{16}", one.fingerprint)
    assert one.text().count("\n") == len(dataclasses.fields(Job)) - 3 + 2 + 2 + 2
    assert difference(one.text(), one.text()) == ""


def test_both_names_of_a_slice_are_the_same_job():
    assert job(tpu="v5litepod-256") == job(tpu="v5e-256")


def test_what_follows_from_the_keys():
    two = job(slices=2, out="gs://my-bucket/runs/")
    assert (two.hosts, two.chips, two.run_dir) == (128, 512, "gs://my-bucket/runs/gla-a")
    assert two.overrides == ["DeviceMesh.slices=2"] and job().overrides == []
    assert two.command().count("--run_dir") == 2
    assert two.command("/tmp/here").count("/tmp/here") == 2 and two.run_dir not in two.command("/tmp/here")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_can_be_read(example):
    assert read_job(example).slice.generation in example.stem


def test_there_are_four_examples():
    assert [path.stem for path in EXAMPLES] == ["two_v6e_256", "v5e_256", "v5p_128", "v6e_256"]
