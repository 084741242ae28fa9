"""A job as a JobSet in a GKE cluster, by way of kubectl. The cluster restarts it; nothing of ours has to run."""

import collections
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gcp.job import Job
from gcp.manifest import CONTAINER, JOB_TEXT, jobset, to_yaml
from gcp.programs import Answer, run
from gcp.states import MEND, AlreadyThere, Phase, State

# What events and containers say -> (why, what to do). `{...}` are attributes of the job and its slice.
_REASONS = (
    (
        r"(?i)quota exceeded|exceeded quota|Quota '",
        "no quota for {chips} chips of {kind}",
        "https://console.cloud.google.com/iam-admin/quotas, in the cluster's region",
    ),
    (
        r"(?i)out of resources|RESOURCE_POOL_EXHAUSTED|no more capacity|stockout|backoff after failed scale-up",
        "no capacity: there are no free {capacity} {machine_type} machines in the node pool's zone",
        "it starts by itself once there are; another zone or capacity is another node pool",
    ),
    (r"(?i)max node group size reached", "the node pool is full", "raise its maximum, or wait for the jobs in it"),
    (
        r"ErrImagePull|ImagePullBackOff|InvalidImageName",
        "the image cannot be pulled",
        "look at `image`, and whether the nodes' service account has roles/artifactregistry.reader",
    ),
    (r"CreateContainerConfigError", "the container cannot be configured", "look at the names under [secrets]"),
    (
        r"didn't match Pod's node affinity|didn't match Pod's node selector",
        "there are no {label} nodes with topology {topology}{spot}",
        "if they were taken back, it starts by itself once there are others; else make a node pool (gcp/README.md), or "
        "name the slice that there is as `tpu`",
    ),
    (
        r"Insufficient google\.com/tpu",
        "all TPUs of the node pool are taken",
        "it starts by itself once they are free",
    ),
    (
        r"MountVolume|AttachVolume",
        "a bucket of [data] cannot be mounted",
        "look at the bucket's name and at the rights of `service_account` there",
    ),
    (r"untolerated taint", "the nodes have a taint that the job does not tolerate", "look at the node pool's taints"),
)
_EXITS = {
    1: "a defect: the program ended with 1, and its log with a traceback",
    2: "a wrong input: the program ended with 2, and its log with a line that says which",
}
# Reasons of events, in the order in which they tell more.
_TELLING = (
    ("FailedMount", "FailedAttachVolume"),
    ("FailedScaleUp", "TriggeredScaleUp"),
    ("NotTriggerScaleUp",),
    ("FailedScheduling",),
    ("FailedCreate",),
)


class Gke:
    """See `gcp.states.Backend`. shown: print what asks, too."""

    programs = ("kubectl", "gcloud", "gke-gcloud-auth-plugin")
    over = (Phase.FINISHED, Phase.FAILED)
    billed = "the nodes of its node pool, as long as they are there; `down` says how to look"

    def __init__(self, job: Job, shown: bool = True):
        self.job = job
        self.shown = shown
        self.context = f"gke_{job.project}_{job.location}_{job.cluster}"

    def command(self, *words: str) -> list[str]:
        """kubectl in this job's cluster and namespace, whatever is the user's default."""
        return ["kubectl", *words, "--context", self.context, "--namespace", self.job.namespace]

    def observe(self) -> State:
        answer = self._kubectl("get", "jobset", self.job.name, "--output=json", may_be_absent=True)
        if answer.absent:
            return State(Phase.ABSENT)
        found = json.loads(answer.out)
        pods = self._list("pods", f"--selector=jobset.sigs.k8s.io/jobset-name={self.job.name}")
        pods = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
        state = _state(found, pods, self.job)
        if state.phase in (Phase.WAITING, Phase.RESTARTING) and not _suspended(found):
            why, remedy = _why_waiting(pods, self._list("events"), self.job)
            state = state._replace(why="; ".join(x for x in (state.why, why) if x), remedy=remedy)
        return state

    def send(self) -> None:
        manifest = to_yaml(jobset(self.job))
        answer = self._kubectl("create", "--filename=-", may_be_present=True, shown=True, text=manifest)
        if answer.present:
            raise AlreadyThere

    def delete(self) -> None:
        words = ["delete", "jobset", self.job.name, "--cascade=foreground", "--wait", "--timeout=300s"]
        self._kubectl(*words, may_be_absent=True, shown=True, seconds=330)

    def logs_command(self, *, follow: bool, slice: int, host: int) -> list[str]:
        labels = {
            "jobset.sigs.k8s.io/jobset-name": self.job.name,
            "jobset.sigs.k8s.io/job-index": slice,
            "batch.kubernetes.io/job-completion-index": host,
        }
        selector = ",".join(f"{key}={value}" for key, value in labels.items())
        flags = [f"--selector={selector}", f"--container={CONTAINER}", "--tail=-1", *(["--follow"] if follow else [])]
        return self.command("logs", *flags)

    def send_commands(self) -> list[str]:
        return [shlex.join(self.command("create", "--filename=-")) + " < MANIFEST"]

    def documents(self) -> list[tuple[str, str]]:
        return [("manifest", to_yaml(jobset(self.job)))]

    def still_billed(self) -> list[str]:
        where = f"--cluster={self.job.cluster} --location={self.job.location} --project={self.job.project}"
        return [
            "nodes cost money as long as they are there, with a job or without: a node pool that scales down to 0",
            "loses them in some minutes, one of a fixed size keeps them. What there is, and how to end it:",
            f"  gcloud container node-pools list {where}",
            f"  gcloud container clusters resize {self.job.cluster} --node-pool=POOL --num-nodes=0 "
            f"--location={self.job.location} --project={self.job.project}",
        ]

    def _kubectl(
        self,
        *words: str,
        may_be_absent: bool = False,
        may_be_present: bool = False,
        shown: bool | None = None,
        **options: Any,
    ) -> Answer:
        answer = run(self.command(*words), shown=self.shown if shown is None else shown, **options)
        if answer.code == 0 or (may_be_absent and answer.absent) or (may_be_present and answer.present):
            return answer
        credentials = (
            f"`gcloud container clusters get-credentials {self.job.cluster} --location={self.job.location} "
            f"--project={self.job.project}` makes it known"
        )
        raise answer.error([(r"context .*does not exist|no context exists", credentials)])

    def _list(self, kind: str, *words: str) -> list[dict[str, Any]]:
        return json.loads(self._kubectl("get", kind, *words, "--output=json").out)["items"]


def _state(found: Mapping[str, Any], pods: Sequence[Mapping[str, Any]], job: Job) -> State:
    """Of a JobSet and its pods; why it waits is not looked into."""
    metadata, status = found["metadata"], found.get("status", {})
    conditions = {x["type"]: x for x in status.get("conditions", [])}
    restarts = status.get("restarts", 0)
    phases = collections.Counter(pod["status"].get("phase", "Unknown") for pod in pods)
    state = State(
        Phase.RUNNING,
        made=metadata["creationTimestamp"],
        attempt=restarts,
        restarts=status.get("restartsCountTowardsMax", restarts),
        pods=dict(sorted(phases.items())),
        text=metadata.get("annotations", {}).get(JOB_TEXT),
    )
    condition = conditions.get(status.get("terminalState"), {})
    if status.get("terminalState") == "Completed":
        return state._replace(phase=Phase.FINISHED, since=_since(condition))
    if status.get("terminalState") == "Failed":
        why = _why_failed(condition, pods, job)
        return state._replace(phase=Phase.FAILED, why=why, remedy=MEND, since=_since(condition))
    if _suspended(found):
        if job.queue:
            return state._replace(phase=Phase.WAITING, why=f"the queue {job.queue} has not admitted it")
        return state._replace(phase=Phase.SUSPENDED, why="somebody has set spec.suspend")
    if phases["Running"] + phases["Succeeded"] >= _hosts(found):
        started = [pod["status"].get("startTime", "") for pod in pods]
        return state._replace(since=max(started, default=""))
    if restarts:
        condition = conditions.get("RestartingJobSet", {})
        return state._replace(phase=Phase.RESTARTING, why=_why_restarting(condition), since=_since(condition))
    return state._replace(phase=Phase.WAITING, since=state.made)


def _since(condition: Mapping[str, Any]) -> str:
    return condition.get("lastTransitionTime", "")


def _hosts(found: Mapping[str, Any]) -> int:
    """Of the JobSet that is there, which may be another than the job file's."""
    return sum(x["replicas"] * x["template"]["spec"]["parallelism"] for x in found["spec"]["replicatedJobs"])


def _suspended(found: Mapping[str, Any]) -> bool:
    return bool(found["spec"].get("suspend"))


def _why_failed(condition: Mapping[str, Any], pods: Iterable[Mapping[str, Any]], job: Job) -> str:
    if condition.get("reason") == "ReachedMaxRestarts":
        return f"it has used its {job.max_restarts} restarts"
    codes = {x.get("terminated", {}).get("exitCode") for pod in pods for x in _container_states(pod, CONTAINER)}
    known = next((does for code, does in _EXITS.items() if code in codes), None)
    return known or condition.get("message", "the JobSet does not say why")


def _why_restarting(condition: Mapping[str, Any]) -> str:
    message = condition.get("message", "")
    counts = "IgnoreMaxRestarts" not in message
    why = "a host was lost, or asked for a restart" if counts else "a machine was taken back, which does not count"
    return f"{why} ({message})"


def _why_waiting(pods: Sequence[Mapping[str, Any]], events: Iterable[Mapping[str, Any]], job: Job) -> tuple[str, str]:
    """(why, what to do about it)."""
    stuck = [x["waiting"] for pod in pods for x in _container_states(pod) if "waiting" in x]
    for waiting in stuck:
        text = f"{waiting.get('reason', '')}: {waiting.get('message', '')}"
        if re.search(r"Err|BackOff|Error|Invalid", waiting.get("reason", "")):
            return _reason(text, job)
    own = {job.name} | {pod["metadata"]["name"] for pod in pods}
    own |= {pod["metadata"].get("labels", {}).get("batch.kubernetes.io/job-name") for pod in pods}
    events = sorted((x for x in events if x["involvedObject"]["name"] in own), key=_time)
    for reasons in _TELLING:
        newest = next((x for x in reversed(events) if x["reason"] in reasons), None)
        if newest is None:
            continue
        if newest["reason"] == "TriggeredScaleUp":
            return f"the node pool is growing: {newest['message']}", ""
        return _reason(newest["message"], job)
    if any(x.get("reason") == "ContainerCreating" for x in stuck):
        return "its containers are being made", ""
    return f"{len(pods)} of {job.hosts} pods are there", ""


def _reason(text: str, job: Job) -> tuple[str, str]:
    names = {
        "chips": job.chips,
        "kind": job.slice.generation,
        "capacity": job.capacity,
        "machine_type": job.slice.machine_type,
        "label": job.slice.label,
        "topology": job.slice.topology,
        "spot": " and capacity spot" if job.capacity == "spot" else "",
    }
    for pattern, why, remedy in _REASONS:
        if re.search(pattern, text):
            return f"{why.format(**names)} ({text})", remedy
    return text, ""


def _container_states(pod: Mapping[str, Any], name: str = "") -> list[Mapping[str, Any]]:
    """Of its containers, or of the one of that name."""
    statuses = pod["status"].get("containerStatuses", [])
    return [x.get("state", {}) for x in statuses if name in ("", x["name"])]


def _time(event: Mapping[str, Any]) -> str:
    return event.get("lastTimestamp") or event.get("eventTime") or ""
