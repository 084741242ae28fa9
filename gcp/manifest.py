"""A job as a JobSet: what `kubectl apply` sends to a GKE cluster.

A slice is a Job of the JobSet, a host of it a pod, and JobSet gives every Job a node pool of its own. What tells a
process its place (TPU_WORKER_ID, MEGASCALE_COORDINATOR_ADDRESS and their like) is added by GKE.

What ends a pod decides what becomes of the job:

    done                              0          the JobSet is complete when all pods are
    preempted, drained                any        all slices start again; it does not count
    a defect, an input that is wrong  1, 2       the JobSet has failed
    anything else                     42, 137    all slices start again; it counts towards `max_restarts`

Kubernetes says in one message which of a Job's pods failed and by which of the Job's rules ("Pod NS/NAME has condition
DisruptionTarget matching FailJob rule at index 0", "Container program for pod NS/NAME failed with exit code 1 matching
FailJob rule at index 1"), and JobSet takes the first of its rules that finds its pattern anywhere in it. A pod that
matches no rule of the Job has used up the Job's `backoffLimit`, which is no reason that a rule of the JobSet names.
The first failure that Kubernetes sees decides: hosts that leave because of another had better wait until it has been
seen, in particular those of other slices, whose Job may end before that of the culprit, which waits for all its pods.

Facts read in sources: kubernetes/pkg/controller/job/pod_failure_policy.go; jobset/pkg/controllers (failure_policy.go;
constructJob, which puts the number of restarts on the pods' template as a label). JobSet 0.10.0 is the first one with
`onJobFailureMessagePatterns`.

Data is mounted by GKE's driver for Cloud Storage FUSE, an add-on of the cluster. Its documentation says that pods on
their host's network need `hostNetworkPodKSA` and a driver of 1.17.2 or later, and that the rights are then those of the
pod's service account in Kubernetes. Which versions of GKE bring that driver has not been verified.
"""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from gcp.accelerators import CHIPS_PER_HOST
from gcp.job import ATTEMPT, Job

FINGERPRINT = "seqmodels/fingerprint"  # label: `Job.fingerprint`
JOB_TEXT = "seqmodels/job"  # annotation: `Job.text`
REPLICATED_JOB, CONTAINER = "slice", "program"

ACCELERATOR, TOPOLOGY = "cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology"
SPOT, RESERVATION = "cloud.google.com/gke-spot", "cloud.google.com/reservation-name"
CHIPS = "google.com/tpu"
EXCLUSIVE, NODE_POOL = "alpha.jobset.sigs.k8s.io/exclusive-topology", "cloud.google.com/gke-nodepool"
RESTARTS = "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"
QUEUE = "kueue.x-k8s.io/queue-name"
FUSE, FUSE_ANNOTATION = "gcsfuse.csi.storage.gke.io", "gke-gcsfuse/volumes"

A_WEEK = 7 * 24 * 3600


def jobset(job: Job) -> dict[str, Any]:
    """The manifest, of plain values."""
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            "namespace": job.namespace,
            # Kueue itself suspends what has the label until there is room. A manifest that said `suspend` would stop
            # the job when it is applied again.
            "labels": {FINGERPRINT: job.fingerprint, **({QUEUE: job.queue} if job.queue else {})},
            "annotations": {EXCLUSIVE: NODE_POOL, JOB_TEXT: job.text()},
        },
        "spec": {
            "ttlSecondsAfterFinished": A_WEEK,  # until then it can be asked how the job ended
            "failurePolicy": {
                "maxRestarts": job.max_restarts,
                # All pods are gone before any starts again: they share ports of their hosts, and the run directory.
                "restartStrategy": "BlockingRecreate",
                "rules": _rules_of_the_jobset(),
            },
            "replicatedJobs": [{"name": REPLICATED_JOB, "replicas": job.slices, "template": {"spec": _slice(job)}}],
        },
    }


def _rules_of_the_jobset() -> list[dict]:
    def rule(name: str, action: str, pattern: str) -> dict:
        return {
            "name": name,
            "action": action,
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": [pattern],
        }

    return [
        rule("preempted", "RestartJobSetAndIgnoreMaxRestarts", "has condition DisruptionTarget matching FailJob"),
        rule("not_to_be_repeated", "FailJobSet", "failed with exit code [12] matching FailJob"),
    ]


def _slice(job: Job) -> dict:
    """The Job of one slice: a pod for every host."""
    return {
        "parallelism": job.slice.hosts,
        "completions": job.slice.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {
                    "action": "FailJob",
                    # Of the program alone: what mounts the data runs in a container beside it.
                    "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [1, 2]},
                },
            ]
        },
        "template": _pod(job),
    }


def _pod(job: Job) -> dict:
    spec = {
        "restartPolicy": "Never",  # rules on failed pods ask for it
        "nodeSelector": {ACCELERATOR: job.slice.label, TOPOLOGY: job.slice.topology, **_nodes_of(job)},
        "tolerations": [{"key": CHIPS, "operator": "Exists"}, *_tolerations_of(job)],
        # Slices talk to each other over the network of their machines, which is fastest without another one on top.
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        # A machine that is taken back is gone after this time, whatever a pod asks for.
        "terminationGracePeriodSeconds": 30,
        **({"serviceAccountName": job.service_account} if job.service_account else {}),
        "containers": [_container(job)],
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}, *_data_volumes(job)],
    }
    if not job.data:
        return {"spec": spec}
    # The container that reads the bucket has small limits by default; "0" is none.
    limits = {f"gke-gcsfuse/{kind}-limit": "0" for kind in ("cpu", "memory", "ephemeral-storage")}
    return {"metadata": {"annotations": {FUSE_ANNOTATION: "true", **limits}}, "spec": spec}


def _nodes_of(job: Job) -> dict[str, str]:
    return {
        "on-demand": {},
        "spot": {SPOT: "true"},
        "reserved": {RESERVATION: job.reservation},
    }[job.capacity]


def _tolerations_of(job: Job) -> list[dict]:
    if job.capacity != "spot":
        return []
    # Node pools that GKE makes by itself have this taint; others, where someone put it there.
    return [{"key": SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}]


def _container(job: Job) -> dict:
    return {
        "name": CONTAINER,
        "image": job.image,
        "command": ["python", *map(_literal, job.command())],
        "env": _variables(job),
        "resources": {"limits": {CHIPS: CHIPS_PER_HOST}},
        # To lock as much memory as the chips' direct access takes; nothing else runs on these machines.
        "securityContext": {"privileged": True},
        "volumeMounts": [
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            *({"name": name, "mountPath": path, "readOnly": True} for name, path, _ in _data(job)),
        ],
    }


def _variables(job: Job) -> list[dict]:
    secrets = {name: place.partition(":") for name, place in job.secrets.items()}
    return [
        {"name": ATTEMPT, "valueFrom": {"fieldRef": {"fieldPath": RESTARTS}}},
        *({"name": name, "value": _literal(value)} for name, value in sorted(job.environment.items())),
        *(
            {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
            for name, (secret, _, key) in sorted(secrets.items())
        ),
    ]


def _literal(text: str) -> str:
    """Kubernetes puts variables for $(NAME), and a dollar for two of them before a parenthesis."""
    return text.replace("$(", "$$(")


def _data(job: Job) -> list[tuple[str, str, str]]:
    """(name of the volume, path in the container, folder in a bucket)"""
    return [(f"data-{index}", path, job.data[path]) for index, path in enumerate(sorted(job.data))]


def _data_volumes(job: Job) -> list[dict]:
    volumes = []
    for name, _, url in _data(job):
        bucket, _, folder = url.removeprefix("gs://").partition("/")
        # Objects lie in folders that nobody has made.
        options = ["implicit-dirs", *([f"only-dir={folder}"] if folder else [])]
        attributes = {"bucketName": bucket, "mountOptions": ",".join(options), "hostNetworkPodKSA": "true"}
        volumes.append({"name": name, "csi": {"driver": FUSE, "readOnly": True, "volumeAttributes": attributes}})
    return volumes


class _Dumper(yaml.SafeDumper):
    """Readable, and read by every parser as the same strings."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# Strings that start otherwise may be numbers to one parser of YAML or another, as 12345678e9012345 is; y and n, truth.
_PLAIN = r"(?![yYnN]$)[A-Za-z_/][^\n]*"


def _represent_string(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None if re.fullmatch(_PLAIN, text) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_string)


def to_yaml(manifest: Mapping[str, Any]) -> str:
    """The manifest as a file; `yaml.safe_load` gives it back."""
    return yaml.dump(dict(manifest), Dumper=_Dumper, sort_keys=False, width=10**6)
