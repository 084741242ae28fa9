"""Manifests beside those of xpk, Google's own launcher, which makes them offline.

    python -m venv xpk && xpk/bin/pip install xpk==1.16.0
    PATH="$PWD/xpk/bin:$PATH" python -m pytest -m 'slow or not slow' tests/gcp/test_xpk.py

What decides where pods go and how many there are is the same. DIFFERENCES lists the rest: xpk needs a queue and
priorities of clusters that it made, and knows other exit codes.
"""

import os
import shutil
import subprocess

import pytest
import yaml

from gcp.accelerators import SLICES
from gcp.manifest import jobset
from tests.gcp.jobs import job

XPK = shutil.which("xpk")
pytestmark = pytest.mark.skipif(XPK is None, reason="the program xpk is not on PATH; see tests/gcp/test_xpk.py")

EXAMPLES = (("v5e-256", 1), ("v5p-128", 1), ("v6e-256", 1), ("v6e-256", 2))
# xpk has no v5e-4.
OTHERS = [(name, 1) for name in SLICES if (name, 1) not in EXAMPLES and name != "v5e-4"]

# Where ours is another, and why.
DIFFERENCES = {
    "metadata.labels": "xpk's queue and its own name of the job; our fingerprint",
    "metadata.namespace": "xpk takes that of kubectl",
    "metadata.annotations.seqmodels/job": "what the job was made of",
    "spec.ttlSecondsAfterFinished": "half a day; we keep a week",
    "spec.failurePolicy.rules": "xpk fails the JobSet for any code but 42 and 127 to 255, and counts preemptions",
    "spec.replicatedJobs.0.name": "slice-job",
    "job.completionMode": "left to JobSet's default, Indexed",
    "job.podFailurePolicy": "as spec.failurePolicy.rules",
    "job.template.metadata": "xpk's own name of the job",
    "pod.schedulerName": "Kubernetes' default",
    "pod.priorityClassName": "one of xpk's clusters",
    "pod.imagePullSecrets": "a secret of the name None",
    "pod.volumes.0.name": "dshm-2",
    "container.name": "jax-tpu",
    "container.command": "a shell around the program",
    "container.env": "nothing",
    "container.image": "any; ours is named by its digest",
    "container.volumeMounts.0.name": "dshm-2",
}
# xpk makes placement policies for slices of several hosts, by whose names it finds its node pools.
ON_TPU7X = "pod.nodeSelector.cloud.google.com/placement-policy-name"


def of_xpk(folder, tpu: str, slices: int) -> dict:
    file = folder / "manifest.yaml"
    command = [XPK, "workload", "create", "--dry-run", "--skip-validation", f"--output-manifest-file={file}"]
    command += ["--cluster=c", "--project=p", "--zone=us-west4-a", "--workload=gla-a", "--docker-image=image"]
    command += [f"--tpu-type={tpu}", f"--num-slices={slices}", "--max-restarts=50", "--command=python train.py"]
    environment = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    return yaml.safe_load(file.read_text())


def fields(tree, at: str = "") -> dict[str, object]:
    """Every value by its place: deep ones by shorter names for a Job, its pods and their container."""
    for long, short in (
        ("spec.replicatedJobs.0.template.spec", "job"),
        ("job.template.spec", "pod"),
        ("pod.containers.0", "container"),
    ):
        at = short + at.removeprefix(long) if at.startswith(long) else at
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    if isinstance(tree, dict) and tree:
        parts = [fields(value, f"{at}.{key}".lstrip(".")) for key, value in tree.items()]
        return {place: value for part in parts for place, value in part.items()}
    return {at: tree}


def differing(ours: dict, theirs: dict) -> set[str]:
    ours, theirs = fields(ours), fields(theirs)
    return {place for place in ours.keys() | theirs.keys() if ours.get(place) != theirs.get(place)}


def compare(folder, name: str, slices: int) -> None:
    row = SLICES[name]
    theirs = of_xpk(folder, row.api_type or name, slices)
    ours = jobset(job(tpu=name, slices=slices))
    places = differing(ours, theirs)
    known = {*DIFFERENCES, *([ON_TPU7X] if row.generation == "tpu7x" and row.hosts > 1 else [])}
    seen = {place: {x for x in known if place == x or place.startswith(f"{x}.")} for place in places}
    assert not [place for place, reasons in seen.items() if not reasons]
    assert set().union(*seen.values()) == known, "a difference that is none any more"
    same = fields(ours)
    assert fields(theirs)["job.parallelism"] == same["job.parallelism"] == row.hosts
    assert fields(theirs)["pod.nodeSelector.cloud.google.com/gke-tpu-topology"] == row.topology


@pytest.mark.parametrize(("name", "slices"), EXAMPLES)
def test_an_example_is_placed_as_xpk_places_it(tmp_path, name, slices):
    compare(tmp_path, name, slices)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "slices"), OTHERS)
def test_every_slice_is_placed_as_xpk_places_it(tmp_path, name, slices):
    compare(tmp_path, name, slices)
