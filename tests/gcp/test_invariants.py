"""Each invariant of manifests catches the error that it is there for: a good one is damaged, one place at a time."""

import pytest

from gcp import invariants
from gcp.invariants import INVARIANTS, violations
from gcp.job import read_job
from gcp.manifest import jobset
from tests.gcp.jobs import EVERYTHING, EXAMPLES, job

JOBS = ("spec", "replicatedJobs", 0)
SLICE = (*JOBS, "template", "spec")
POD = (*SLICE, "template", "spec")
CONTAINER = (*POD, "containers", 0)
LABELS, ANNOTATIONS = ("metadata", "labels"), ("metadata", "annotations")
RULES = ("spec", "failurePolicy", "rules")
POD_RULES = (*SLICE, "podFailurePolicy", "rules")
SELECTOR = (*POD, "nodeSelector")
ACCELERATOR, TOPOLOGY = "cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology"
SPOT, RESERVATION = "cloud.google.com/gke-spot", "cloud.google.com/reservation-name"


def put(*path_and_value):
    """A mutation: this value there."""
    *path, key, value = path_and_value

    def mutate(manifest):
        for step in path:
            manifest = manifest[step]
        manifest[key] = value

    return mutate


def drop(*path):
    """A mutation: nothing there."""

    def mutate(manifest):
        for step in path[:-1]:
            manifest = manifest[step]
        del manifest[path[-1]]

    return mutate


def add(*path_and_value):
    """A mutation: one more element of a list."""
    *path, value = path_and_value

    def mutate(manifest):
        for step in path:
            manifest = manifest[step]
        manifest.append(value)

    return mutate


def change(*path_and_function):
    """A mutation: what is there, changed."""
    *path, key, function = path_and_function

    def mutate(manifest):
        for step in path:
            manifest = manifest[step]
        manifest[key] = function(manifest[key])

    return mutate


def both(*mutations):
    def mutate(manifest):
        for mutation in mutations:
            mutation(manifest)

    return mutate


def variable(name, **source):
    return add(*CONTAINER, "env", {"name": name, **source})


def other_run_directory(command):
    return [*command[:-1], "--run_dir", "gs://other/gla-a"]


# (invariant, mutation of the manifest of a job that has every optional part, what the line says)
MUTATIONS = [
    ("has_one_kind_of_pod", add("spec", "replicatedJobs", {"name": "head"}), "replicatedJobs has 2 entries"),
    ("has_one_kind_of_pod", add(*POD, "containers", {"name": "proxy"}), "containers has 2 entries"),
    ("has_one_kind_of_pod", put(*CONTAINER, "name", "train"), "name is 'train': expected 'program'"),
    ("slice_is_in_the_table", put(*SELECTOR, ACCELERATOR, "tpu-v5e-slice"), "did you mean 'tpu-v"),
    ("slice_is_in_the_table", put(*SELECTOR, TOPOLOGY, "4x4x4"), "is '4x4x4': expected one of tpu-v5-lite-podslice"),
    ("slice_is_in_the_table", drop(*SELECTOR, TOPOLOGY), "is 'None': expected one of"),
    (
        "has_a_pod_for_every_host",
        put(*SLICE, "parallelism", 63),
        "parallelism is 63: expected 64, the hosts of v5e-256",
    ),
    ("has_a_pod_for_every_host", put(*SLICE, "completions", 256), "completions is 256: expected 64"),
    (
        "has_a_pod_for_every_host",
        put(*SELECTOR, TOPOLOGY, "8x8"),
        "parallelism is 64: expected 16, the hosts of v5e-64",
    ),
    ("takes_all_chips_of_a_host", put(*CONTAINER, "resources", "limits", "google.com/tpu", 8), "is 8: expected 4"),
    ("takes_all_chips_of_a_host", drop(*CONTAINER, "resources"), "is None: expected 4"),
    (
        "takes_all_chips_of_a_host",
        put(*CONTAINER, "resources", "requests", {"google.com/tpu": 1}),
        "request google.com/tpu is 1: expected 4",
    ),
    ("has_slices", put(*JOBS, "replicas", 0), "replicas is 0: expected at least 1"),
    ("numbers_its_pods", put(*SLICE, "completionMode", "NonIndexed"), "is 'NonIndexed': expected 'Indexed'"),
    ("numbers_its_pods", drop(*SLICE, "completionMode"), "is None: expected 'Indexed'"),
    ("restarts_only_as_a_whole", put(*POD, "restartPolicy", "OnFailure"), "is 'OnFailure': expected 'Never'"),
    ("restarts_only_as_a_whole", put(*SLICE, "backoffLimit", 6), "backoffLimit is 6: expected 0"),
    ("restarts_only_as_a_whole", put(*SLICE, "backoffLimit", False), "backoffLimit is False: expected 0"),
    (
        "keeps_the_contract_of_exit_codes",
        put(*POD_RULES, 1, "onExitCodes", "values", [1]),
        "exit code 2 leads to RestartJobSet: expected FailJobSet",
    ),
    (
        "keeps_the_contract_of_exit_codes",
        # One of the two alone would do no harm.
        both(
            put(*POD_RULES, 1, "onExitCodes", "values", [1, 2, 42]),
            put(*RULES, 1, "onJobFailureMessagePatterns", ["failed with exit code"]),
        ),
        "exit code 42 leads to FailJobSet: expected RestartJobSet",
    ),
    (
        "keeps_the_contract_of_exit_codes",
        put(*POD_RULES, 1, "onExitCodes", "operator", "NotIn"),
        "exit code 1, 2 leads to RestartJobSet: expected FailJobSet",
    ),
    (
        "keeps_the_contract_of_exit_codes",
        both(
            put(*POD_RULES, 1, "onExitCodes", {"containerName": "program", "operator": "NotIn", "values": [42]}),
            put(*RULES, 1, "onJobFailureMessagePatterns", ["exit code [12]"]),
        ),
        "exit code 10, 11, 12, 13, ... leads to FailJobSet: expected RestartJobSet",
    ),
    (
        "keeps_the_contract_of_exit_codes",
        drop(*POD_RULES, 1, "onExitCodes", "containerName"),
        "failed container beside the program, exit code 3, 4, 5, 6, ... leads to FailJobSet: expected RestartJobSet",
    ),
    (
        "keeps_the_contract_of_exit_codes",
        drop(*POD_RULES, 0),
        "preemption, exit code 3, 4, 5, 6, ... leads to RestartJobSet: expected RestartJobSetAndIgnoreMaxRestarts",
    ),
    (
        "keeps_the_contract_of_exit_codes",
        change(*POD_RULES, lambda rules: rules[::-1]),
        "preemption, exit code 1, 2 leads to FailJobSet",
    ),
    (
        "keeps_the_contract_of_exit_codes",
        put(*POD_RULES, 0, "action", "Ignore"),
        "leads to a pod that is replaced alone: expected RestartJobSetAndIgnoreMaxRestarts",
    ),
    ("keeps_the_contract_of_exit_codes", put(*POD_RULES, 0, "action", "Count"), "leads to RestartJobSet: expected"),
    (
        "keeps_the_contract_of_exit_codes",
        put(*POD_RULES, 0, "onPodConditions", 0, "type", "Ready"),
        "leads to RestartJobSet: expected RestartJobSetAndIgnoreMaxRestarts",
    ),
    (
        "keeps_the_contract_of_exit_codes",
        drop(*RULES, 0),
        "preemption, exit code 1, 2, 3, 4, ... leads to RestartJobSet:",
    ),
    ("keeps_the_contract_of_exit_codes", drop(*RULES, 1), "exit code 1, 2 leads to RestartJobSet: expected FailJobSet"),
    (
        "keeps_the_contract_of_exit_codes",
        drop(*RULES, 0, "onJobFailureMessagePatterns"),
        "exit code 1, 2 leads to RestartJobSetAndIgnoreMaxRestarts: expected FailJobSet",
    ),
    (
        "keeps_the_contract_of_exit_codes",
        put(*RULES, 1, "onJobFailureReasons", ["BackoffLimitExceeded"]),
        "exit code 1, 2 leads to RestartJobSet: expected FailJobSet",
    ),
    (
        "keeps_the_contract_of_exit_codes",
        put(*RULES, 1, "targetReplicatedJobs", ["slices"]),
        "exit code 1, 2 leads to RestartJobSet: expected FailJobSet",
    ),
    ("keeps_the_contract_of_exit_codes", put(*RULES, 0, "action", "FailJobSet"), "preemption, exit code 1, 2, 3"),
    (
        "keeps_the_contract_of_exit_codes",
        drop("spec", "failurePolicy"),
        "exit code 3, 4, 5, 6, ... leads to FailJobSet",
    ),
    (
        "starts_again_when_all_are_gone",
        put("spec", "failurePolicy", "restartStrategy", "Recreate"),
        "restartStrategy is 'Recreate': expected 'BlockingRecreate'",
    ),
    (
        "starts_again_when_all_are_gone",
        drop("spec", "failurePolicy", "restartStrategy"),
        "restartStrategy is None",
    ),
    ("names_its_rules", put(*RULES, 1, "name", "preempted"), "several rules of the name 'preempted'"),
    ("has_names_that_fit", put("metadata", "name", "GLA_1b"), "metadata.name is 'GLA_1b': expected lower-case"),
    ("has_names_that_fit", put("metadata", "name", "1b"), "metadata.name is '1b'"),
    ("has_names_that_fit", put(*JOBS, "name", "slice.job"), "replicated job's name is 'slice.job'"),
    ("has_names_that_fit", put("metadata", "name", "a" * 50), "of 67 letters: expected at most 63"),
    ("has_names_that_fit", put(*JOBS, "replicas", 10**50), "letters: expected at most 63"),
    ("says_its_namespace", drop("metadata", "namespace"), "namespace is not given"),
    ("has_an_image_that_stays", put(*CONTAINER, "image", "repository/image:latest"), "expected NAME@sha256:DIGEST"),
    ("has_one_run_directory", change(*CONTAINER, "command", other_run_directory), "is given as ["),
    (
        "has_one_run_directory",
        change(*CONTAINER, "command", lambda x: x[:5]),
        "is given as ['gs://my-bucket/runs/gla-a']",
    ),
    ("has_one_run_directory", put("metadata", "name", "gla-b"), "expected gs://BUCKET/FOLDER/gla-b"),
    (
        "has_one_run_directory",
        change(*CONTAINER, "command", lambda x: [y.replace("gs://", "/") for y in x]),
        "is '/my-bucket/runs/gla-a': expected gs://BUCKET",
    ),
    ("shows_no_secret", variable("OTHER_API_KEY", value="x"), "env OTHER_API_KEY has a value that looks like a secret"),
    ("shows_no_secret", variable("PLAIN", value="hf_" + "a1b2" * 8), "env PLAIN has a value that looks like a secret"),
    ("leaves_the_machines_variables_alone", variable("TPU_WORKER_ID", value="0"), "env TPU_WORKER_ID is set"),
    ("leaves_the_machines_variables_alone", variable("MEGASCALE_SLICE_ID", value="0"), "env MEGASCALE_SLICE_ID is set"),
    ("sets_each_variable_once", variable("TOKENIZERS_PARALLELISM", value="true"), "is set 2 times: expected once"),
    ("counts_its_restarts", drop(*CONTAINER, "env", 0), "env SEQMODELS_ATTEMPT from is None"),
    (
        "counts_its_restarts",
        put(*CONTAINER, "env", 0, "valueFrom", "fieldRef", "fieldPath", "metadata.name"),
        "is 'metadata.name': expected",
    ),
    ("carries_its_fingerprint", put(*LABELS, "seqmodels/fingerprint", "0" * 16), "is '0000000000000000': expected"),
    ("carries_its_fingerprint", drop(*LABELS, "seqmodels/fingerprint"), "is None: expected"),
    ("carries_its_fingerprint", change(*ANNOTATIONS, "seqmodels/job", lambda x: x + "more = 1\n"), "of the annotation"),
    ("carries_its_fingerprint", drop(*ANNOTATIONS, "seqmodels/job"), "is missing: expected the job's text"),
    ("uses_the_hosts_network", drop(*POD, "hostNetwork"), "hostNetwork is None: expected True"),
    ("uses_the_hosts_network", put(*POD, "dnsPolicy", "ClusterFirst"), "expected 'ClusterFirstWithHostNet'"),
    (
        "has_node_pools_of_its_own",
        drop(*ANNOTATIONS, "alpha.jobset.sigs.k8s.io/exclusive-topology"),
        "is None: expected 'cloud.google.com/gke-nodepool'",
    ),
    ("is_let_onto_its_nodes", put(*SELECTOR, RESERVATION, "r"), "expected one of them"),
    ("is_let_onto_its_nodes", drop(*POD, "tolerations", 0), "tolerations lack google.com/tpu"),
    ("is_let_onto_its_nodes", drop(*POD, "tolerations", 1), f"tolerations lack {SPOT}"),
    ("shares_memory", put(*POD, "volumes", 0, "emptyDir", {}), "the volume at /dev/shm is None: expected 'Memory'"),
    ("shares_memory", drop(*CONTAINER, "volumeMounts", 0), "the volume at /dev/shm is None"),
    ("mounts_what_it_names", put(*CONTAINER, "volumeMounts", 1, "name", "data-7"), "expected the same"),
    (
        "only_reads_its_data",
        put(*POD, "volumes", 1, "csi", "readOnly", False),
        "data-0: readOnly is False: expected True",
    ),
    (
        "only_reads_its_data",
        drop(*POD, "volumes", 2, "csi", "volumeAttributes", "hostNetworkPodKSA"),
        "volume data-1: hostNetworkPodKSA is None: expected 'true'",
    ),
    ("only_reads_its_data", drop(*SLICE, "template", "metadata"), "gke-gcsfuse/volumes is None: expected 'true'"),
    ("is_not_suspended", put("spec", "suspend", False), "spec.suspend is given: expected nothing"),
    ("is_remembered", put("spec", "ttlSecondsAfterFinished", 60), "is 60: expected at least 86400"),
]


def good() -> dict:
    return jobset(job(**EVERYTHING))


def test_good_manifests_violate_nothing():
    assert violations(good()) == []
    assert [violations(jobset(read_job(example))) for example in EXAMPLES] == [[]] * 4


@pytest.mark.parametrize(
    ("name", "mutate", "words"), [pytest.param(*x, id=f"{i}-{x[0]}") for i, x in enumerate(MUTATIONS)]
)
def test_an_invariant_catches_its_error(name, mutate, words):
    manifest = good()
    mutate(manifest)
    lines = list(getattr(invariants, name)(manifest))
    assert any(words in line for line in lines), lines
    assert all("\n" not in line for line in lines)
    assert set(lines) <= set(violations(manifest))


def test_every_invariant_has_a_mutation():
    assert {name for name, *_ in MUTATIONS} == {invariant.__name__ for invariant in INVARIANTS}


def test_nothing_has_to_be_there():
    """Where much is missing there are many violations, and no exception."""
    assert len(violations({})) > 15
    assert len(violations({"metadata": {}, "spec": {"replicatedJobs": [{"template": {}}]}})) > 15


def test_no_violation_shows_a_secret():
    manifest = good()
    secret = "hf_" + "a1b2" * 8
    variable("HF_TOKEN", value=secret)(manifest)
    assert violations(manifest) and not any(secret in line for line in violations(manifest))
