"""A cloud on this machine: programs named `kubectl` and `gcloud` that play GKE, the Cloud TPU API and a bucket.

Their answers have the shapes and the errors of the real ones, as far as the commands under test read them. What happens
to a job is told by a story, a list of scenes: the job is in the first when it is made, and in the next after each
`tick`. A story is the life of one JobSet, or of one queued resource; each creation takes the next story, the last one
again and again.

The programs are small shell scripts, which pass on what they are called with to this process and print its answer.
"""

import copy
import datetime
import fnmatch
import json
import os
import re
import threading
import traceback
from pathlib import Path

import yaml

START = "2026-01-02T03:04:05Z"
# What scene -> (reason of an event, its message).
EVENTS = {
    "no capacity": (
        "FailedScaleUp",
        "Node scale up in zones us-west4-a associated with this pod failed: GCE out of resources. "
        "Pod is at risk of not being scheduled.",
    ),
    "quota": (
        "FailedScaleUp",
        "Node scale up in zones us-west4-a associated with this pod failed: GCE quota exceeded. "
        "Pod is at risk of not being scheduled.",
    ),
    "growing": ("TriggeredScaleUp", "pod triggered scale-up: [{https://…/gke-pods-v5e-grp 0->4 (max: 4)}]"),
    "wrong topology": (
        "NotTriggerScaleUp",
        "pod didn't trigger scale-up: 2 node(s) didn't match Pod's node affinity/selector",
    ),
    "no bucket": (
        "FailedMount",
        'MountVolume.SetUp failed for volume "data-0": rpc error: code = PermissionDenied desc = failed to get bucket',
    ),
    "taken": ("FailedScheduling", "0/7 nodes are available: 4 Insufficient google.com/tpu."),
}
# What scene -> the reason and the message of a container that waits.
CONTAINERS = {
    "bad image": ("ImagePullBackOff", 'Back-off pulling image "us-docker.pkg.dev/…": not found'),
    "no secret": ("CreateContainerConfigError", 'secret "wandb" not found'),
}
RESTARTS = {"preempted": ("RestartJobSetAndIgnoreMaxRestarts", 0), "host lost": ("RestartJobSet", 1)}
EXITS = {"bug": 1, "bad input": 2, "used up": 42}
FAILED_REQUESTS = {
    "no capacity": (8, 'There is no more capacity in the zone "us-west4-a"; you can try in another zone [EID: 0x1]'),
    "quota": (8, "Quota limit 'TPUV5sPreemptibleLitepodPerProjectPerRegionForTPUAPI' has been exceeded. Limit: 0."),
    "not served": (4, "some words"),
}


_PROGRAM = """\
#!/bin/sh
cd '{folder}'
{{
    printf '%s\\0' "$#" {name} "$@"
    case "$*" in *--filename=-* | "storage cp - "*) /bin/cat ;; esac
}} >request
read -r code <reply
/bin/cat out
/bin/cat err >&2
exit "$code"
"""


class Refused(Exception):
    """A program's error."""


class FakeCloud:
    """What there is, what becomes of it, and what was asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.programs = folder / "bin"
        self.programs.mkdir(parents=True)
        self.jobs: dict[tuple[str, str], dict] = {}  # (place, name) -> job
        self.calls: list[str] = []  # everything that was asked for, a command line each
        self.stories = [["running"]]
        self.contexts = ["gke_my-project_us-west4_pods"]
        self.faults: list[tuple[str, str, int]] = []
        self.rival: str | None = None
        for name in ("kubectl", "gcloud", "gke-gcloud-auth-plugin"):
            program = self.programs / name
            program.write_text(_PROGRAM.format(folder=folder, name=name))
            program.chmod(0o755)
        for name in ("request", "reply"):
            os.mkfifo(folder / name)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        (self.folder / "request").write_bytes(b"")
        self._thread.join()

    # For tests

    def uninstall(self, name: str) -> None:
        (self.programs / name).unlink()

    def tell(self, *stories: list[str]) -> None:
        """The lives of what is made from now on."""
        self.stories = list(stories)

    def tick(self) -> None:
        """The next scene."""
        for job in self.jobs.values():
            if job["scene"] < len(job["story"]) - 1:
                job["scene"] += 1
                self._happen(job)

    def fail(self, call: str, error: str, times: int = 1000) -> None:
        """So many calls that begin so end with this error."""
        self.faults += [(call, error)] * times

    def job(self, name: str) -> dict:
        """The only one of that name."""
        (found,) = (job for (_, own), job in self.jobs.items() if own == name)
        return found

    def places(self, name: str) -> list[str]:
        """Where there is a job of that name."""
        return sorted(place for place, own in self.jobs if own == name)

    def race(self, text: str) -> None:
        """Somebody else makes a job of this text while the next one is being made."""
        self.rival = text

    def sent(self) -> list[str]:
        """What of the calls changes something: program and verb."""
        verbs = re.compile(r"kubectl (create|delete)|gcloud (storage cp|.*queued-resources (?:create|delete))")
        return [found[0] for found in map(verbs.match, self.calls) if found]

    def file(self, url: str) -> Path:
        """Of a bucket."""
        path = self.folder / "buckets" / url.removeprefix("gs://")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    # For the programs

    def make(self, place: str, name: str, **facts) -> None:
        story = self.stories.pop(0) if len(self.stories) > 1 else self.stories[0]
        self.jobs[place, name] = job = {"name": name, "story": story, "scene": 0, **facts}
        self._happen(job)

    def _serve(self) -> None:
        while request := (self.folder / "request").read_bytes():
            count, program, rest = request.decode().split("\0", 2)
            *words, text = rest.split("\0", int(count))
            try:
                code, out, err = self._answer(program, words, text)
            except Exception:
                code, out, err = 99, "", traceback.format_exc()
            (self.folder / "out").write_text(out)
            (self.folder / "err").write_text(err)
            (self.folder / "reply").write_text(f"{code}\n")

    def _answer(self, program: str, words: list[str], text: str) -> tuple[int, str, str]:
        call = " ".join((program, *words))
        self.calls.append(call)
        fault = next((x for x in self.faults if call.startswith(x[0])), None)
        if fault is not None:
            self.faults.remove(fault)
            return 1, "", f"{fault[1]}\n"
        try:
            return 0, {"kubectl": kubectl, "gcloud": gcloud}[program](self, words, text), ""
        except Refused as error:
            return 1, "", f"{error}\n"

    def _happen(self, job: dict) -> None:
        """What a scene leaves in the bucket."""
        scene = job["story"][job["scene"]]
        if scene == "done":
            self.file(f"{job['run']}/DONE").write_text(json.dumps({"step": 100, "metrics": {}}))
        if scene == "running":
            self.file(f"{job['run']}/config.gin").write_text("train.steps = 100\n")
        if "attempt" in job:
            self._report(job, scene)

    def _report(self, job: dict, scene: str) -> None:
        """As the startup script of a queued resource does."""
        again = "exit 42, starts again"
        said = {"starting": "starting", "running": "running", "restarting": again, "done": "exit 0, stopped"}
        said |= dict.fromkeys(EXITS, again)
        if scene not in said:
            return
        if scene == "running" and "restarting" in job["story"][: job["scene"]]:
            job["attempt"] += 1
        for host in range(job["hosts"]):
            text = f"exit {EXITS[scene]}, stopped" if scene in EXITS and host == 0 else said[scene]
            report = self.file(f"{job['run']}/logs/hosts/slice-0-host-{host}")
            report.write_text(f"slice 0 host {host} attempt {job['attempt']}: {text}\n")


def scenes(job: dict) -> list[str]:
    """Those up to the present one."""
    return job["story"][: job["scene"] + 1]


# GKE


def kubectl(cloud: FakeCloud, words: list[str], text: str) -> str:
    names, flags = _split(words)
    if flags["context"] not in cloud.contexts:
        raise Refused(f'error: context "{flags["context"]}" does not exist')
    place = f"{flags['context']}/{flags['namespace']}"
    verb, *names = names
    if verb == "create":
        assert flags["filename"] == "-"
        return _create_jobset(cloud, place, text)
    if verb == "logs":
        return f"log of {flags['selector']}\n"
    kind, *names = names
    if (verb, kind) == ("get", "pods"):
        name = flags["selector"].removeprefix("jobset.sigs.k8s.io/jobset-name=")
        return _list(_pods(cloud.jobs[place, name]) if (place, name) in cloud.jobs else [])
    if (verb, kind) == ("get", "events"):
        return _list([event for (where, _), job in cloud.jobs.items() if where == place for event in _events(job)])
    (name,) = names
    if (place, name) not in cloud.jobs:
        raise Refused(f'Error from server (NotFound): jobsets.jobset.x-k8s.io "{name}" not found')
    if verb == "delete":
        del cloud.jobs[place, name]
        return f'jobset.jobset.x-k8s.io "{name}" deleted\n'
    assert (verb, flags["output"]) == ("get", "json")
    return json.dumps(_jobset(cloud.jobs[place, name]))


def _split(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Names, and the values of flags. Two flags of kubectl have their values behind them."""
    words = re.sub(r"--(context|namespace) ", r"--\1=", " ".join(words)).split(" ")
    flags = [word.removeprefix("--") for word in words if word.startswith("--")]
    return [word for word in words if not word.startswith("--")], dict(flag.partition("=")[::2] for flag in flags)


def _list(items: list[dict]) -> str:
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items})


def _create_jobset(cloud: FakeCloud, place: str, text: str) -> str:
    manifest = yaml.safe_load(text)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    name = manifest["metadata"]["name"]
    if cloud.rival is not None:
        other = copy.deepcopy(manifest)
        other["metadata"]["annotations"]["seqmodels/job"] = cloud.rival
        _make_jobset(cloud, place, other)
    if (place, name) in cloud.jobs:
        where = f'error when creating "STDIN": jobsets.jobset.x-k8s.io "{name}" already exists'
        raise Refused(f"Error from server (AlreadyExists): {where}")
    _make_jobset(cloud, place, manifest)
    return f"jobset.jobset.x-k8s.io/{name} created\n"


def _make_jobset(cloud: FakeCloud, place: str, manifest: dict) -> None:
    text = json.dumps(manifest)
    run = re.search(r'"--run_dir", "(gs://[^"]+)"', text)[1]
    cloud.make(place, manifest["metadata"]["name"], manifest=manifest, run=run)


def _jobset(job: dict) -> dict:
    manifest, so_far = job["manifest"], scenes(job)
    restarts = [RESTARTS[x] for x in so_far if x in RESTARTS]
    status = {
        "restarts": len(restarts),
        "restartsCountTowardsMax": sum(counts for _, counts in restarts),
        "conditions": [],
    }

    def condition(kind: str, reason: str, message: str) -> None:
        facts = {"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": START}
        status["conditions"].append(facts)

    first = f"(first failed job: {job['name']}-slice-0)"
    scene = so_far[-1]
    if scene == "done":
        status["terminalState"] = "Completed"
        condition("Completed", "AllJobsCompleted", "jobset completed successfully")
    elif scene == "used up":
        status["terminalState"] = "Failed"
        condition("Failed", "ReachedMaxRestarts", f"jobset failed due to reaching max number of restarts {first}")
    elif scene in EXITS:
        status["terminalState"] = "Failed"
        condition("Failed", "FailJobSetFailurePolicyAction", f"applying FailJobSet failure policy action {first}")
    elif restarts and scene != "running":
        action = restarts[-1][0]
        condition("RestartingJobSet", "FailurePolicy_preempted", f"applying {action} failure policy action {first}")
    metadata = {**manifest["metadata"], "uid": "u", "creationTimestamp": START}
    return {**manifest, "metadata": metadata, "status": status}


def _pods(job: dict) -> list[dict]:
    name = job["name"]
    (replicated,) = job["manifest"]["spec"]["replicatedJobs"]
    hosts = replicated["template"]["spec"]["parallelism"]
    places = [(child, host) for child in range(replicated["replicas"]) for host in range(hosts)]
    scene = scenes(job)[-1]
    pods = [_pod(name, *place, "running" if scene == "starting" and place[1] else scene) for place in places]
    if scene not in EVENTS and scene not in RESTARTS:
        return pods
    # Placed on nodes of their own, the others are made once the first has a node.
    pods = [_pod(name, child, 0, scene) for child in range(replicated["replicas"])]
    if scene in RESTARTS:
        leaving = [_pod(name, *place, "running") for place in places]
        for pod in leaving:
            pod["metadata"] |= {"name": f"{pod['metadata']['name']}-old", "deletionTimestamp": START}
        pods += leaving
    return pods


def _pod(name: str, child: int, host: int, scene: str) -> dict:
    phase, state = "Running", {"running": {"startedAt": START}}
    if scene in CONTAINERS:
        phase, state = "Pending", {"waiting": dict(zip(("reason", "message"), CONTAINERS[scene]))}
    elif scene in EVENTS or scene in RESTARTS:
        phase, state = "Pending", None
    elif scene == "starting":
        phase, state = "Pending", {"waiting": {"reason": "ContainerCreating"}}
    elif scene == "done":
        phase, state = "Succeeded", {"terminated": {"exitCode": 0, "reason": "Completed"}}
    elif scene in EXITS:
        code = EXITS[scene] if host == 0 else 42
        phase, state = "Failed", {"terminated": {"exitCode": code, "reason": "Error"}}
    job = f"{name}-slice-{child}"
    labels = {
        "jobset.sigs.k8s.io/jobset-name": name,
        "jobset.sigs.k8s.io/job-index": str(child),
        "batch.kubernetes.io/job-name": job,
        "batch.kubernetes.io/job-completion-index": str(host),
    }
    statuses = [{"name": "program", "ready": phase == "Running", "state": state}] if state else []
    status = {"phase": phase, "containerStatuses": statuses} | ({"startTime": START} if statuses else {})
    return {"metadata": {"name": f"{job}-{host}-abcde", "labels": labels}, "status": status}


def _events(job: dict) -> list[dict]:
    scene = scenes(job)[-1]
    scheduling = ("FailedScheduling", "0/7 nodes are available: 7 node(s) didn't match Pod's node affinity/selector.")
    said = [scheduling, EVENTS[scene]] if scene in EVENTS else [scheduling] if scene in RESTARTS else []
    return [
        {
            "type": "Warning",
            "reason": reason,
            "message": message,
            "involvedObject": {"kind": "Pod", "name": f"{job['name']}-slice-0-0-abcde"},
            "lastTimestamp": START,
        }
        for reason, message in said
    ]


# The Cloud TPU API, and buckets


def gcloud(cloud: FakeCloud, words: list[str], text: str) -> str:
    names, flags = _split(words)
    if names[:2] == ["storage", "cat"]:
        text = "".join(path.read_text() for path in _matching(cloud, names[2]))
        tail = -int(flags.get("range", "0"))
        return text[-tail:] if tail <= len(text) else ""
    if names[:3] == ["storage", "objects", "describe"]:
        assert flags["format"] == "value(creation_time)"
        file = cloud.file(names[3])
        if not file.exists():
            raise Refused(f"ERROR: (gcloud.storage.objects.describe) {names[3]} not found: 404.")
        return f"{datetime.datetime.fromtimestamp(file.stat().st_mtime, datetime.UTC):%Y-%m-%dT%H:%M:%SZ}\n"
    if names[:2] == ["storage", "ls"]:
        root = cloud.folder / "buckets"
        found = sorted(root.glob(names[2].removeprefix("gs://")))
        if not found:
            raise Refused("ERROR: (gcloud.storage.ls) One or more URLs matched no objects.")
        return "".join(f"gs://{path.relative_to(root)}\n" for path in found)
    if names[:2] == ["storage", "cp"]:
        assert names[2] == "-"
        cloud.file(names[3]).write_text(text)
        return ""
    names = names[1:] if names[0] == "alpha" else names
    assert names[:3] == ["compute", "tpus", "queued-resources"], names
    verb, name = names[3:5]
    place = f"projects/{flags['project']}/locations/{flags['zone']}"
    resource = f"{place}/queuedResources/{name}"
    there = (place, name) in cloud.jobs
    if verb == "create":
        if there:
            where = f"Resource '{resource}' already exists."
            raise Refused(f"ERROR: (gcloud.{'.'.join(names[:4])}) ALREADY_EXISTS: {where}")
        _create_queued(cloud, place, name, flags)
        return ""
    if not there:
        raise Refused(f"ERROR: (gcloud.{'.'.join(names[:4])}) NOT_FOUND: Resource '{resource}' was not found.")
    if verb == "delete":
        assert {"force", "quiet"} <= flags.keys()
        del cloud.jobs[place, name]
        return ""
    return json.dumps({"name": resource, **_describe(cloud.jobs[place, name])})


def _matching(cloud: FakeCloud, url: str) -> list[Path]:
    path = cloud.file(url)
    found = [x for x in path.parent.iterdir() if fnmatch.fnmatch(x.name, path.name)]
    if not found:
        raise Refused(f"ERROR: (gcloud.storage.cat) The following URLs matched no objects or files:\n{url}")
    return sorted(found)


def _create_queued(cloud: FakeCloud, place: str, name: str, flags: dict[str, str]) -> None:
    files = dict(pair.split("=") for pair in flags["metadata-from-file"].split(","))
    metadata = {key: Path(file).read_text() for key, file in files.items()}
    metadata |= dict(pair.split("=") for pair in flags["metadata"].split(","))
    run = re.search(r"^run_dir=(\S+)$", metadata["startup-script"], re.MULTILINE)[1]
    node = {
        "acceleratorType": flags["accelerator-type"],
        "labels": dict(pair.split("=") for pair in flags["labels"].split(",")),
        "metadata": metadata,
    }
    # v5litepod-16 has four hosts of four chips.
    hosts = int(flags["accelerator-type"].rpartition("-")[2]) // 4
    cloud.make(place, name, node=node, run=run, hosts=hosts, attempt=int(metadata["attempt"]))


def _describe(job: dict) -> dict:
    scene = scenes(job)[-1]
    state = {"state": scene}
    if scene in FAILED_REQUESTS:
        error = dict(zip(("code", "message"), FAILED_REQUESTS[scene]))
        state = {"state": "FAILED", "failedData": {"error": error}}
    elif scene in ("SUSPENDED", "suspended by a user"):
        by = "SERVICE" if scene == "SUSPENDED" else "USER"
        state = {"state": "SUSPENDED", "stateInitiator": by, "suspendedData": {}}
    elif scene.islower():
        state = {"state": "ACTIVE", "activeData": {}}
    specification = {"nodeId": job["name"], "node": job["node"]}
    made = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=25 if scene == "not served" else 0)
    return {"createTime": made.isoformat(), "state": state, "tpu": {"nodeSpec": [specification]}}
