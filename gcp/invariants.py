"""What must hold of a job's manifest and no schema can see, stated on the manifest alone.

    for violation in violations(manifest):
        print(violation)

Each invariant is a function in a table: it yields a line for every violation, which says what is wrong, where, and what
is expected. None trusts how the manifest was made, and none stumbles over what is missing.
"""

import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gcp.accelerators import CHIPS_PER_HOST, SLICES, Slice
from gcp.job import ATTEMPT, BUCKET, DIGEST, DNS_NAME, MACHINE_VARIABLES, looks_like_a_secret
from gcp.manifest import (
    ACCELERATOR,
    CHIPS,
    CONTAINER,
    EXCLUSIVE,
    FINGERPRINT,
    FUSE,
    FUSE_ANNOTATION,
    JOB_TEXT,
    NODE_POOL,
    RESERVATION,
    RESTARTS,
    SPOT,
    TOPOLOGY,
)
from seqmodels.errors import nearest

LONGEST = 63  # letters of a label in the domain name system
A_DAY = 24 * 3600

Invariant = Callable[[Mapping], Iterator[str]]


def violations(manifest: Mapping[str, Any]) -> list[str]:
    """One line for every violation; none for a good manifest."""
    return [line for invariant in INVARIANTS for line in invariant(manifest)]


def _at(tree: Any, *path: str | int, default: Any = None) -> Any:
    """What stands there in the manifest, `default` where nothing does."""
    for key in path:
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            return default
    return default if tree is None else tree


def _jobs(manifest: Mapping) -> Mapping:
    return _at(manifest, "spec", "replicatedJobs", 0, default={})


def _slice(manifest: Mapping) -> Mapping:
    return _at(_jobs(manifest), "template", "spec", default={})


def _pod(manifest: Mapping) -> Mapping:
    return _at(_slice(manifest), "template", "spec", default={})


def _container(manifest: Mapping) -> Mapping:
    return _at(_pod(manifest), "containers", 0, default={})


def _command(manifest: Mapping) -> list[str]:
    container = _container(manifest)
    return [*_at(container, "command", default=[]), *_at(container, "args", default=[])]


def _variables(manifest: Mapping) -> list[Mapping]:
    return _at(_container(manifest), "env", default=[])


def _row(manifest: Mapping) -> Slice | None:
    """Of the table of slices: the one that the pods ask for."""
    selector = _at(_pod(manifest), "nodeSelector", default={})
    place = selector.get(ACCELERATOR), selector.get(TOPOLOGY)
    return next((row for row in SLICES.values() if (row.label, row.topology) == place), None)


def _equal(where: str, found: Any, expected: Any, why: str = "") -> Iterator[str]:
    if found != expected or isinstance(found, bool) != isinstance(expected, bool):
        yield f"{where} is {found!r}: expected {expected!r}{why}"


def has_one_kind_of_pod(manifest: Mapping) -> Iterator[str]:
    for where, found in (
        ("spec.replicatedJobs", _at(manifest, "spec", "replicatedJobs", default=[])),
        ("containers", _at(_pod(manifest), "containers", default=[])),
    ):
        if len(found) != 1:
            yield f"{where} has {len(found)} entries: expected one, which all hosts of all slices run"
    yield from _equal("the container's name", _at(_container(manifest), "name"), CONTAINER)


def slice_is_in_the_table(manifest: Mapping) -> Iterator[str]:
    selector = _at(_pod(manifest), "nodeSelector", default={})
    label, topology = str(selector.get(ACCELERATOR)), str(selector.get(TOPOLOGY))
    topologies = [row.topology for row in SLICES.values() if row.label == label]
    if not topologies:
        yield f"nodeSelector {ACCELERATOR} is {label!r}; {nearest(label, {row.label for row in SLICES.values()})}"
    elif topology not in topologies:
        yield f"nodeSelector {TOPOLOGY} is {topology!r}: expected one of {label}: {', '.join(topologies)}"


def has_a_pod_for_every_host(manifest: Mapping) -> Iterator[str]:
    row = _row(manifest)
    for key in ("parallelism", "completions"):
        if row:
            yield from _equal(key, _at(_slice(manifest), key), row.hosts, f", the hosts of {row.name}")


def takes_all_chips_of_a_host(manifest: Mapping) -> Iterator[str]:
    yield from _equal(f"limit {CHIPS}", _at(_container(manifest), "resources", "limits", CHIPS), CHIPS_PER_HOST)
    requests = _at(_container(manifest), "resources", "requests", default={})
    if CHIPS in requests:
        yield from _equal(f"request {CHIPS}", requests[CHIPS], CHIPS_PER_HOST)


def has_slices(manifest: Mapping) -> Iterator[str]:
    replicas = _at(_jobs(manifest), "replicas")
    if not isinstance(replicas, int) or replicas < 1:
        yield f"replicas is {replicas!r}: expected at least 1, the number of slices"


def numbers_its_pods(manifest: Mapping) -> Iterator[str]:
    yield from _equal("completionMode", _at(_slice(manifest), "completionMode"), "Indexed")


def restarts_only_as_a_whole(manifest: Mapping) -> Iterator[str]:
    """A program that starts again alone would wait for the others' collectives for ever."""
    yield from _equal("restartPolicy", _at(_pod(manifest), "restartPolicy"), "Never")
    yield from _equal("backoffLimit", _at(_slice(manifest), "backoffLimit"), 0)


FAIL, RESTART, RESTART_UNCOUNTED = "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"


def keeps_the_contract_of_exit_codes(manifest: Mapping) -> Iterator[str]:
    """Found by playing Kubernetes and JobSet, for every exit code."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for code in range(1, 256):
        for event, disrupted, beside in (
            ("exit code", False, 0),
            ("preemption, exit code", True, 0),
            ("failed container beside the program, exit code", False, 1),
        ):
            expected = RESTART_UNCOUNTED if disrupted else FAIL if code in (1, 2) else RESTART
            action = _outcome(manifest, code, disrupted, beside)
            if action != expected:
                found.setdefault((event, action, expected), []).append(code)
    for (event, action, expected), codes in found.items():
        shown = ", ".join(map(str, codes[:4])) + (", ..." if len(codes) > 4 else "")
        yield f"failurePolicy: {event} {shown} leads to {action}: expected {expected}"


def _outcome(manifest: Mapping, code: int, disrupted: bool, beside: int) -> str:
    """What JobSet does when a pod's program ends with the code. beside: exit code of another container of the pod."""
    failed = _what_kubernetes_reports(manifest, {"beside": beside, CONTAINER: code}, disrupted)
    policy = _at(manifest, "spec", "failurePolicy")
    if failed is None or policy is None:
        return "a pod that is replaced alone" if failed is None else FAIL
    reason, message = failed
    for rule in _at(policy, "rules", default=[]):
        reasons, patterns = rule.get("onJobFailureReasons"), rule.get("onJobFailureMessagePatterns")
        targets = rule.get("targetReplicatedJobs")
        if (
            (not reasons or reason in reasons)
            and (not patterns or any(re.search(pattern, message) for pattern in patterns))
            and (not targets or _at(_jobs(manifest), "name") in targets)
        ):
            return str(rule.get("action"))
    return RESTART


def _what_kubernetes_reports(manifest: Mapping, codes: Mapping[str, int], disrupted: bool) -> tuple[str, str] | None:
    """(reason, message) of the failed Job; None where the Job goes on."""
    pod = f"{_at(manifest, 'metadata', 'namespace')}/{_longest_name(manifest)}"
    conditions = [("DisruptionTarget", "True")] if disrupted else []
    for index, rule in enumerate(_at(_slice(manifest), "podFailurePolicy", "rules", default=[])):
        action, by_code = rule.get("action"), rule.get("onExitCodes")
        if by_code:
            container = next((name for name, code in codes.items() if _matches(by_code, name, code)), None)
            event = f"Container {container} for pod {pod} failed with exit code {codes.get(container)}"
        else:
            asked = [(x.get("type"), x.get("status", "True")) for x in rule.get("onPodConditions") or []]
            container = next((kind for kind, status in conditions if (kind, status) in asked), None)
            event = f"Pod {pod} has condition {container}"
        if container is not None:
            if action == "FailJob":
                return "PodFailurePolicy", f"{event} matching FailJob rule at index {index}"
            if action == "Ignore":
                return None
            break
    if _at(_slice(manifest), "backoffLimit", default=6) > 0:
        return None
    return "BackoffLimitExceeded", "Job has reached the specified backoff limit"


def _matches(rule: Mapping, container: str, code: int) -> bool:
    return (
        code != 0
        and rule.get("containerName") in (None, container)
        and (code in rule.get("values", [])) == (rule.get("operator") == "In")
    )


def starts_again_when_all_are_gone(manifest: Mapping) -> Iterator[str]:
    strategy = _at(manifest, "spec", "failurePolicy", "restartStrategy")
    yield from _equal("restartStrategy", strategy, "BlockingRecreate", ", or old pods may write beside new ones")


def names_its_rules(manifest: Mapping) -> Iterator[str]:
    names = [rule.get("name") for rule in _at(manifest, "spec", "failurePolicy", "rules", default=[])]
    for name in sorted({str(name) for name in names if names.count(name) > 1}):
        yield f"failurePolicy has several rules of the name {name!r}: expected names that differ"


def _longest_name(manifest: Mapping) -> str:
    """Of the pods that are made, with the five letters that Kubernetes adds."""
    replicas, completions = _at(_jobs(manifest), "replicas", default=1), _at(_slice(manifest), "completions", default=1)
    names = _at(manifest, "metadata", "name", default=""), _at(_jobs(manifest), "name", default="")
    return "-".join(map(str, (*names, replicas - 1, completions - 1, "abcde")))


def has_names_that_fit(manifest: Mapping) -> Iterator[str]:
    for where, name in (
        ("metadata.name", _at(manifest, "metadata", "name", default="")),
        ("the replicated job's name", _at(_jobs(manifest), "name", default="")),
    ):
        if not re.fullmatch(DNS_NAME, name):
            yield f"{where} is {name!r}: expected lower-case letters, digits and hyphens, a letter first"
    longest = _longest_name(manifest)
    if len(longest) > LONGEST:
        yield f"pods get names as {longest}, of {len(longest)} letters: expected at most {LONGEST}"


def says_its_namespace(manifest: Mapping) -> Iterator[str]:
    """`kubectl` would take the one that its user happens to be in."""
    if not _at(manifest, "metadata", "namespace"):
        yield "metadata.namespace is not given: expected one"


def has_an_image_that_stays(manifest: Mapping) -> Iterator[str]:
    image = str(_at(_container(manifest), "image"))
    if not re.fullmatch(DIGEST, image):
        yield f"image is {image!r}: expected NAME@sha256:DIGEST"


def has_one_run_directory(manifest: Mapping) -> Iterator[str]:
    command, name = _command(manifest), _at(manifest, "metadata", "name", default="")
    given = [value for flag, value in itertools.pairwise(command) if flag == "--run_dir"]
    if len(given) != 2 or len(set(given)) != 1:
        yield f"--run_dir is given as {given}: expected the same for the entry and for the program"
    for folder in dict.fromkeys(given):
        if not re.fullmatch(BUCKET, folder) or not folder.endswith(f"/{name}"):
            yield f"--run_dir is {folder!r}: expected gs://BUCKET/FOLDER/{name}"


def shows_no_secret(manifest: Mapping) -> Iterator[str]:
    """The lines show none either."""
    for variable in _variables(manifest):
        name = str(variable.get("name"))
        if looks_like_a_secret(name, str(variable.get("value", ""))) and "value" in variable:
            yield f"env {name} has a value that looks like a secret: expected valueFrom.secretKeyRef"


def leaves_the_machines_variables_alone(manifest: Mapping) -> Iterator[str]:
    for name in (str(variable.get("name")) for variable in _variables(manifest)):
        if name in MACHINE_VARIABLES:
            yield f"env {name} is set: expected none of those that GKE sets"


def sets_each_variable_once(manifest: Mapping) -> Iterator[str]:
    names = [str(variable.get("name")) for variable in _variables(manifest)]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"env {name} is set {names.count(name)} times: expected once"


def counts_its_restarts(manifest: Mapping) -> Iterator[str]:
    sources = [variable.get("valueFrom") for variable in _variables(manifest) if variable.get("name") == ATTEMPT]
    found = _at(sources, 0, "fieldRef", "fieldPath")
    yield from _equal(f"env {ATTEMPT} from", found, RESTARTS)


def carries_its_fingerprint(manifest: Mapping) -> Iterator[str]:
    text = _at(manifest, "metadata", "annotations", JOB_TEXT)
    if text is None:
        yield f"annotation {JOB_TEXT} is missing: expected the job's text"
        return
    expected = hashlib.sha256(text.encode()).hexdigest()[:16]
    found = _at(manifest, "metadata", "labels", FINGERPRINT)
    yield from _equal(f"label {FINGERPRINT}", found, expected, f", of the annotation {JOB_TEXT}")


def uses_the_hosts_network(manifest: Mapping) -> Iterator[str]:
    yield from _equal("hostNetwork", _at(_pod(manifest), "hostNetwork"), True)
    yield from _equal("dnsPolicy", _at(_pod(manifest), "dnsPolicy"), "ClusterFirstWithHostNet")


def has_node_pools_of_its_own(manifest: Mapping) -> Iterator[str]:
    found = _at(manifest, "metadata", "annotations", EXCLUSIVE)
    yield from _equal(f"annotation {EXCLUSIVE}", found, NODE_POOL)


def is_let_onto_its_nodes(manifest: Mapping) -> Iterator[str]:
    selector = _at(_pod(manifest), "nodeSelector", default={})
    if SPOT in selector and RESERVATION in selector:
        yield f"nodeSelector has {SPOT} and {RESERVATION}: expected one of them"
    tolerated = {toleration.get("key") for toleration in _at(_pod(manifest), "tolerations", default=[])}
    for key in (CHIPS, *([SPOT] if SPOT in selector else [])):
        if key not in tolerated:
            yield f"tolerations lack {key}: expected it, as nodes have such a taint"


def shares_memory(manifest: Mapping) -> Iterator[str]:
    volumes = {volume.get("name"): volume for volume in _at(_pod(manifest), "volumes", default=[])}
    mounts = _at(_container(manifest), "volumeMounts", default=[])
    name = next((mount.get("name") for mount in mounts if mount.get("mountPath") == "/dev/shm"), None)
    yield from _equal("the volume at /dev/shm", _at(volumes, name, "emptyDir", "medium"), "Memory")


def mounts_what_it_names(manifest: Mapping) -> Iterator[str]:
    volumes = [volume.get("name") for volume in _at(_pod(manifest), "volumes", default=[])]
    mounts = [mount.get("name") for mount in _at(_container(manifest), "volumeMounts", default=[])]
    if sorted(map(str, volumes)) != sorted(map(str, mounts)):
        yield f"volumeMounts name {mounts}, volumes {volumes}: expected the same"


def only_reads_its_data(manifest: Mapping) -> Iterator[str]:
    buckets = [volume for volume in _at(_pod(manifest), "volumes", default=[]) if _at(volume, "csi", "driver") == FUSE]
    for volume in buckets:
        where = f"volume {volume.get('name')}"
        yield from _equal(f"{where}: readOnly", _at(volume, "csi", "readOnly"), True)
        by_pod = _at(volume, "csi", "volumeAttributes", "hostNetworkPodKSA")
        yield from _equal(f"{where}: hostNetworkPodKSA", by_pod, "true", ", as the pod is on its host's network")
    if buckets:
        found = _at(_slice(manifest), "template", "metadata", "annotations", FUSE_ANNOTATION)
        yield from _equal(f"the pod's annotation {FUSE_ANNOTATION}", found, "true")


def is_not_suspended(manifest: Mapping) -> Iterator[str]:
    if "suspend" in _at(manifest, "spec", default={}):
        yield "spec.suspend is given: expected nothing, as applying the manifest again would stop the job"


def is_remembered(manifest: Mapping) -> Iterator[str]:
    """Without an end of its time it is kept for ever, which is right too."""
    seconds = _at(manifest, "spec", "ttlSecondsAfterFinished")
    if seconds is not None and seconds < A_DAY:
        yield f"ttlSecondsAfterFinished is {seconds}: expected at least {A_DAY}, to see how the job ended"


INVARIANTS: tuple[Invariant, ...] = (
    has_one_kind_of_pod,
    slice_is_in_the_table,
    has_a_pod_for_every_host,
    takes_all_chips_of_a_host,
    has_slices,
    numbers_its_pods,
    restarts_only_as_a_whole,
    keeps_the_contract_of_exit_codes,
    starts_again_when_all_are_gone,
    names_its_rules,
    has_names_that_fit,
    says_its_namespace,
    has_an_image_that_stays,
    has_one_run_directory,
    shows_no_secret,
    leaves_the_machines_variables_alone,
    sets_each_variable_once,
    counts_its_restarts,
    carries_its_fingerprint,
    uses_the_hosts_network,
    has_node_pools_of_its_own,
    is_let_onto_its_nodes,
    shares_memory,
    mounts_what_it_names,
    only_reads_its_data,
    is_not_suspended,
    is_remembered,
)
