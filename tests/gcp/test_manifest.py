"""Manifests are valid JobSets, say what the job says, and are the same for the same job."""

import copy
import itertools
import re

import pytest
import yaml

from gcp.accelerators import CHIPS_PER_HOST, SLICES
from gcp.invariants import violations
from gcp.job import LONGEST_NAME, difference, read_job
from gcp.manifest import FINGERPRINT, JOB_TEXT, jobset, to_yaml
from tests.gcp.jobs import EVERYTHING, EXAMPLES, job
from tests.gcp.jobset_schema import errors, strict_validator


@pytest.fixture(scope="module")
def schema():
    return strict_validator()


def pod_of(manifest: dict) -> dict:
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]


def container_of(manifest: dict) -> dict:
    return pod_of(manifest)["spec"]["containers"][0]


def variants():
    """Jobs over every choice that changes the manifest's shape, and over every slice of the table."""
    capacities = ({"capacity": "on-demand"}, {"capacity": "spot"}, {"capacity": "reserved", "reservation": "r"})
    parts = [{}, *({key: EVERYTHING[key]} for key in ("secrets", "data", "queue", "env", "service_account"))]
    for capacity, part, slices in itertools.product(capacities, parts, (1, 2, 3, 4)):
        yield job(**capacity, **part, slices=slices)
    yield job(**EVERYTHING)
    for name in SLICES:
        yield job(tpu=name, name="a" * LONGEST_NAME, slices=4)


def test_every_variant_is_a_valid_jobset_without_violations(schema):
    found = {}
    for variant in variants():
        manifest = jobset(variant)
        found[variant.text()] = errors(schema, manifest) + violations(manifest)
    assert len(found) > 100
    assert not [lines for lines in found.values() if lines]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_valid_jobset_without_violations(schema, example):
    manifest = jobset(read_job(example))
    assert errors(schema, manifest) == [] == violations(manifest)


# (path to an object of the manifest, a key of it, the same with a slip of the pen)
SLIPS = [
    ((), "spec", "specs"),
    (("metadata",), "labels", "label"),
    (("spec",), "replicatedJobs", "replicatedJob"),
    (("spec", "failurePolicy"), "maxRestarts", "maxRestart"),
    (("spec", "failurePolicy", "rules", 0), "onJobFailureMessagePatterns", "onJobFailureMessagePattern"),
    (("spec", "replicatedJobs", 0, "template", "spec"), "backoffLimit", "backOffLimit"),
    (("spec", "replicatedJobs", 0, "template", "spec", "podFailurePolicy", "rules", 1), "onExitCodes", "onExitCode"),
    (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec"), "hostNetwork", "hostNetworks"),
    (
        ("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "resources"),
        "limits",
        "limit",
    ),
    (
        ("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "env", 0, "valueFrom"),
        "fieldRef",
        "fieldref",
    ),
]


@pytest.mark.parametrize(("path", "key", "slip"), SLIPS, ids=lambda x: x if isinstance(x, str) else None)
def test_the_schema_is_strict_at_every_depth(schema, path, key, slip):
    manifest = copy.deepcopy(jobset(job(**EVERYTHING)))
    part = manifest
    for step in path:
        part = part[step]
    part[slip] = part.pop(key)
    assert any(f"'{slip}' was unexpected" in line for line in errors(schema, manifest))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "replicatedJobs", 0, "replicas"), "2"),
        (("spec", "failurePolicy", "rules", 0, "action"), "Restart"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "env", 1, "value"), 1),
    ],
)
def test_the_schema_knows_types_and_choices(schema, path, value):
    manifest = copy.deepcopy(jobset(job(**EVERYTHING)))
    part = manifest
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = value
    assert errors(schema, manifest)


def test_the_file_gives_the_manifest_back():
    for variant in variants():
        manifest = jobset(variant)
        assert yaml.safe_load(to_yaml(manifest)) == manifest


def test_the_file_is_the_same_for_the_same_job():
    tables = {key: dict(reversed(EVERYTHING[key].items())) for key in ("env", "secrets", "data")}
    assert to_yaml(jobset(job(**{**EVERYTHING, **tables}))) == to_yaml(jobset(job(**EVERYTHING)))


@pytest.mark.parametrize(
    "text",
    ["12345678e9012345", "0x10", "1_000", "0o17", "16x16", "true", "null", "~", "y", "N", "on", "", "1:30", ".5"],
)
def test_no_parser_takes_a_string_for_something_else(text):
    """Parsers of YAML differ in what is a number. What is quoted is a string to all of them."""
    line = to_yaml({"key": text})
    assert re.fullmatch(r"key: '.*'\n", line)
    assert yaml.safe_load(line) == {"key": text}


def test_the_job_can_be_read_off_the_cluster():
    """Enough to tell that a job of the same name is another one, and in what."""
    one, other = job(), job(gin=["train.steps=5"])
    metadata = jobset(one)["metadata"]
    assert metadata["labels"][FINGERPRINT] == one.fingerprint != other.fingerprint
    told = difference(metadata["annotations"][JOB_TEXT], other.text())
    assert told.splitlines() == ["-gin = []", '+gin = ["train.steps=5"]']


def test_a_pod_runs_the_command_of_the_job():
    variant = job(**EVERYTHING)
    container = container_of(jobset(variant))
    assert container["command"] == ["python", *variant.command()]
    assert container["command"].count("gs://my-bucket/runs/gla-a") == 2
    assert container["resources"] == {"limits": {"google.com/tpu": CHIPS_PER_HOST}}
    assert "--gin.DeviceMesh.slices=2" in container["command"]


def test_a_pod_has_the_variables_of_the_job():
    variant = job(**EVERYTHING)
    variables = {variable["name"]: variable for variable in container_of(jobset(variant))["env"]}
    given = {name: variable["value"] for name, variable in variables.items() if "value" in variable}
    assert given == variant.environment
    assert variables["HF_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "hugging-face", "key": "token"}}
    restarts = {"fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"}}
    assert variables["SEQMODELS_ATTEMPT"]["valueFrom"] == restarts
    assert set(variables) == {*variant.environment, *variant.secrets, "SEQMODELS_ATTEMPT"}


def test_kubernetes_expands_nothing_in_commands_and_variables():
    container = container_of(jobset(job(gin=["TextData.paths='$(HOME)'"], env={"WHERE": "a $(B) c"})))
    assert "--gin.TextData.paths='$$(HOME)'" in container["command"]
    assert {"name": "WHERE", "value": "a $$(B) c"} in container["env"]


def test_data_is_mounted_from_its_folder_and_only_read():
    manifest = jobset(job(**EVERYTHING))
    mounts = {mount["mountPath"]: mount for mount in container_of(manifest)["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod_of(manifest)["spec"]["volumes"]}
    options = {}
    for path in EVERYTHING["data"]:
        assert mounts[path]["readOnly"] is True
        csi = volumes[mounts[path]["name"]]["csi"]
        assert csi["driver"] == "gcsfuse.csi.storage.gke.io" and csi["readOnly"] is True
        options[csi["volumeAttributes"]["bucketName"]] = csi["volumeAttributes"]["mountOptions"]
    assert options == {"my-bucket": "implicit-dirs,only-dir=corpus/v1", "other-bucket": "implicit-dirs"}
    assert pod_of(manifest)["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    assert "metadata" not in pod_of(jobset(job()))


@pytest.mark.parametrize(
    ("capacity", "selected"),
    [
        ({"capacity": "on-demand"}, {}),
        ({"capacity": "spot"}, {"cloud.google.com/gke-spot": "true"}),
        ({"capacity": "reserved", "reservation": "r"}, {"cloud.google.com/reservation-name": "r"}),
    ],
)
def test_pods_go_where_the_capacity_is(capacity, selected):
    spec = pod_of(jobset(job(**capacity)))["spec"]
    place = {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
    }
    assert spec["nodeSelector"] == {**place, **selected}
    tolerated = {toleration["key"] for toleration in spec["tolerations"]}
    assert tolerated == {"google.com/tpu", *(key for key in selected if "spot" in key)}


def test_a_queue_is_a_label_and_kueue_does_the_rest():
    manifest = jobset(job(queue="multislice-queue"))
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "multislice-queue"
    assert "suspend" not in manifest["spec"]
    assert list(jobset(job())["metadata"]["labels"]) == [FINGERPRINT]


def test_a_manifest_shares_nothing_with_the_next():
    variant = job(**EVERYTHING)
    first = jobset(variant)
    first["spec"]["failurePolicy"]["rules"].clear()
    container_of(first)["env"].clear()
    assert jobset(variant)["spec"]["failurePolicy"]["rules"] and container_of(jobset(variant))["env"]
