"""Jobs for the tests of `gcp`: the examples, and one that is varied."""

from pathlib import Path

from gcp.job import Job, make_job

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = sorted((REPOSITORY / "gcp" / "examples").glob("*.toml"))

VALUES = {
    "name": "gla-a",
    "config": "configs/pretraining/gated_linear_attention_1b.gin",
    "tpu": "v5e-256",
    "project": "my-project",
    "location": "us-west4",
    "cluster": "my-cluster",
    "image": "us-docker.pkg.dev/my-project/images/seqmodels@sha256:" + "0" * 64,
    "out": "gs://my-bucket/runs",
}

# Every optional part of a job at once.
EVERYTHING = {
    "gin": ["train.steps=10", "TextData.paths='/data/corpus'"],
    "program": "other.py",
    "slices": 2,
    "capacity": "spot",
    "namespace": "team",
    "queue": "multislice-queue",
    "service_account": "trainer",
    "max_restarts": 3,
    "hours": 12,
    "usd_per_chip_hour": 1.2,
    "env": {"LIBTPU_INIT_ARGS": "--xla_tpu_scoped_vmem_limit_kib=98304", "TOKENIZERS_PARALLELISM": "false"},
    "secrets": {"WANDB_API_KEY": "wandb:key", "HF_TOKEN": "hugging-face:token"},
    "data": {"/data/corpus": "gs://my-bucket/corpus/v1/", "/data/all": "gs://other-bucket"},
}


def job(**changes) -> Job:
    """A small job with some keys changed; None leaves a key out."""
    values = {**VALUES, **changes}
    return make_job({key: value for key, value in values.items() if value is not None})
