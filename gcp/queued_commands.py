"""The commands of queued resources, the script that their machines run, and what both print: no program is run here.

The Cloud TPU API has them for v4 to v6e. A job becomes one, whose virtual machines start the job by themselves.

How a job lives there:

    create     The request waits in a queue until there are machines. All of a job is in it: the startup script, the
               job's text, its fingerprint, and the number of the first attempt.
    boot       Every machine runs `startup_script`: secrets, image, data, then the container with `gcp.entry`.
    exit code  0, 1, 2: the script stops, and another boot does not start the program again. Anything else (42; 137 when
               killed; a failure of Docker): the same script starts the container again, as the next attempt, at most
               `max_restarts` times, unless another host has stopped with a failure, which ends them all. When one
               program is lost, those on the other hosts end with 42 too: all start again together.
    lost       A machine that is taken back suspends the whole queued resource, which never comes back: whoever watches
               the job deletes it and creates it again, with `next_attempt`.
    end        The machines stay, and cost, until the queued resource is deleted.

Each host says where it stands in an object of its own in the run directory, so that this can be seen from anywhere.

All functions here are pure: they make commands and read what such commands print. Nothing has run on Cloud TPU: the
flags exist in the Google Cloud SDK 528, and the script does what it should to stand-ins for its commands.
"""

import re
import shlex
import string
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from gcp.job import Job

FINGERPRINT, JOB_TEXT, ATTEMPT = "seqmodels-fingerprint", "seqmodels-job", "attempt"  # a label and two of metadata
DATA_DIR = "/var/lib/seqmodels/data"  # of a machine


class _Script(string.Template):
    # Shells give every other character a meaning.
    delimiter = "@@"


_STARTUP_SCRIPT = _Script(r"""#!/bin/bash
# Runs one host of a training job; the virtual machine starts it at each boot. gcp/queued_commands.py makes it.
# What it prints is read with `sudo journalctl -u google-startup-scripts`.
set -euo pipefail
export HOME="${HOME:-/root}"

name=@@name
project=@@project
image=@@image
registry=@@registry
run_dir=@@run_dir
max_restarts=@@max_restarts
data_dir=@@data_dir
# Environment variable -> secret of Secret Manager; path in the container -> folder in a bucket.
# A $ in a value is only a $.
# shellcheck disable=SC2016
declare -A secrets=(@@secrets) \
    data=(@@data)
# shellcheck disable=SC2016
declare -a options=(@@options) \
    entry=(@@entry) \
    program=(@@program)

metadata() {
    curl --fail --silent --show-error --retry 10 --retry-connrefused --header 'Metadata-Flavor: Google' \
        "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

# Where this host stands, for all to see. A bucket that cannot be written to is the program's to report.
report() {
    local line="slice $slice host $host attempt $attempt: $1"
    echo "$line"
    echo "$line" | gcloud storage cp - "$place" || echo "this could not be written to $place" >&2
}

# For good: another boot does not start the program again.
stop() {
    report "exit $1, stopped${2:+: $2}"
    exit "$1"
}

# Runs a command again until it succeeds, with longer and longer pauses.
bring() {
    local pause
    for pause in 5 10 20 40 80; do
        if "$@"; then
            return
        fi
        sleep "$pause"
    done
    "$@"
}

# Runs a command with the secrets in its environment, and in no other. `export` is part of the shell: values that it is
# given are in no list of processes.
with_secrets() (
    for variable in "${!values[@]}"; do
        export "$variable=${values[$variable]}"
    done
    exec "$@"
)

# One attempt: the program's exit code, or 125 where Docker failed.
run_container() {
    local code
    docker rm --force "$name" >/dev/null 2>&1 || true
    with_secrets docker run --detach --name "$name" --privileged --network=host --shm-size=16g --log-driver=local \
        --stop-timeout=25 "${options[@]}" "$image" \
        python "${entry[@]}" --host "$host" --slice "$slice" --attempt "$attempt" -- "${program[@]}" \
        >/dev/null || return 125
    code=$(docker wait "$name") || return 125
    [[ $code =~ ^[0-9]+$ ]] || return 125
    return "$code"
}

# What another host of these machines reported when it stopped without being done. It does not come back, and this one
# would wait for it in vain.
stopped_elsewhere() {
    gcloud storage cat "$run_dir/logs/hosts/*" |
        awk -v first="$first" '$6 + 0 >= first && / exit [1-9][0-9]*, stopped/' | sed -n 1p
}

host=$(metadata agent-worker-number)
slice=$(metadata tpu-env | sed -n "s/^MEGASCALE_SLICE_ID:[ ']*\([0-9][0-9]*\).*/\1/p")
slice=${slice:-0}
first=$(metadata attempt)
attempt=$first
place=$run_dir/logs/hosts/slice-$slice-host-$host
# A machine that boots again, or that replaces another, goes on from what was reported before.
last=$(gcloud storage cat "$place") || last=''
if [[ $last =~ attempt\ ([0-9]+):\ (exit\ [0-9]+,\ stopped)? && ${BASH_REMATCH[1]} -ge $first ]]; then
    if [ -n "${BASH_REMATCH[2]}" ]; then
        echo "$last"
        exit 0
    fi
    attempt=$((BASH_REMATCH[1] + 1))
fi
report "starting"

declare -A values=()
for variable in "${!secrets[@]}"; do
    values[$variable]=$(bring gcloud secrets versions access latest --secret="${secrets[$variable]}" \
        --project="$project") || stop 2 "cannot read the secret ${secrets[$variable]}"
    options+=(--env "$variable")
done

if [ -n "$registry" ]; then
    bring gcloud auth configure-docker "$registry" --quiet || stop 2 "cannot log in to $registry"
fi
bring docker pull --quiet "$image" || stop 2 "cannot pull $image"

# The data must fit on the machine's disk. On GKE buckets are mounted instead.
for path in "${!data[@]}"; do
    mkdir -p "$data_dir$path"
    bring gcloud storage rsync --recursive "${data[$path]}" "$data_dir$path" ||
        stop 2 "cannot bring ${data[$path]}"
    options+=(--mount "type=bind,source=$data_dir$path,target=$path,readonly")
done

while true; do
    report "running"
    code=0
    run_container || code=$?
    if [ "$code" -le 2 ]; then
        stop "$code"
    fi
    if [ $((attempt - first)) -ge "$max_restarts" ]; then
        stop "$code" "no restarts are left"
    fi
    report "exit $code, starts again"
    # The other hosts may still be ending.
    sleep 30
    other=$(stopped_elsewhere) || other=''
    if [ -n "$other" ]; then
        stop "$code" "another host has stopped ($other)"
    fi
    attempt=$((attempt + 1))
done
""")


def startup_script(job: Job) -> str:
    """What every virtual machine of the job runs when it boots: a bash script, the same for all of them.

    Secrets pass from Secret Manager through the script's memory into the container's environment: they are in no
    argument, no file of ours and no log. Docker keeps a container's environment, for root of the machine to read.

    Folders of `job.data` are copied to the machine's disk at each boot (what is there already is not copied again), and
    must fit there.
    """
    command = job.command()
    split = command.index("--")
    return _STARTUP_SCRIPT.substitute(
        name=_quote(job.name),
        project=_quote(job.project),
        image=_quote(job.image),
        registry=_quote(_google_registry(job.image)),
        run_dir=_quote(job.run_dir),
        max_restarts=_quote(str(job.max_restarts)),
        data_dir=_quote(DATA_DIR),
        secrets=_quote_map(job.secrets),
        data=_quote_map(job.data),
        options=_quote(*(x for key, value in job.environment.items() for x in ("--env", f"{key}={value}"))),
        entry=_quote(*command[:split]),
        program=_quote(*command[split + 1 :]),
    )


def _quote(*words: str) -> str:
    return shlex.join(words)


def _quote_map(values: Mapping[str, str]) -> str:
    return " ".join(f"[{_quote(key)}]={_quote(value)}" for key, value in values.items())


def _google_registry(image: str) -> str:
    """The host of the image's registry where it is Google's, else "": others must not be given Google's credentials."""
    host = image.partition("/")[0]
    return host if re.fullmatch(r"([\w-]+\.)*(gcr\.io|pkg\.dev)", host) else ""


def create_command(job: Job, startup_file: str, job_file: str, attempt: int = 0) -> list[str]:
    """Asks for the job's machines. startup_file, job_file: where `startup_script(job)` and `job.text()` stand, in
    paths without commas. attempt: the first one's number, `next_attempt` for a job that has run before."""
    several = [f"--node-count={job.slices}", f"--node-prefix={job.name}"]
    nodes = several if job.slices > 1 else [f"--node-id={job.name}"]
    capacity = {"on-demand": [], "spot": ["--spot"], "reserved": [f"--reservation={job.reservation}"]}
    account = [f"--service-account={job.service_account}"] if job.service_account else []
    return [
        # A reservation by its name is known to the alpha command alone; --reserved is any one of the project's.
        *_gcloud(job, "create", job.name, alpha=job.capacity == "reserved"),
        *nodes,
        f"--accelerator-type={job.slice.api_type}",
        f"--runtime-version={job.slice.runtime}",
        *capacity[job.capacity],
        *account,
        f"--valid-until-duration={max(round(job.valid_hours * 60), 1)}m",
        f"--labels={FINGERPRINT}={job.fingerprint}",
        f"--metadata={ATTEMPT}={attempt}",
        f"--metadata-from-file=startup-script={startup_file},{JOB_TEXT}={job_file}",
        "--async",
    ]


def describe_command(job: Job) -> list[str]:
    """Prints a description, which `state` and others read. Fails where there is no queued resource of that name."""
    return [*_gcloud(job, "describe", job.name), "--format=json"]


def list_command(job: Job) -> list[str]:
    """Prints a list of descriptions: of all queued resources in the job's zone, whoever made them."""
    return [*_gcloud(job, "list"), "--format=json"]


def delete_command(job: Job) -> list[str]:
    """Deletes the machines and the request, and returns when they are gone: the name is free again then."""
    return [*_gcloud(job, "delete", job.name), "--force", "--quiet"]


def logs_command(job: Job, follow: bool = False, slice: int = 0, host: int = 0) -> list[str]:
    """What the program printed in its last attempt on one host, from the machine itself. It needs the machine, and the
    right to log in there by ssh; the files that the ranks write to the run directory need neither."""
    node = job.name if job.slices == 1 else f"{job.name}-{slice}"
    command = ["sudo", "docker", "logs", *(["--follow"] if follow else []), job.name]
    return [
        *("gcloud", "compute", "tpus", "tpu-vm", "ssh", node),
        *(f"--project={job.project}", f"--zone={job.location}", f"--worker={host}"),
        f"--command={_quote(*command)}",
    ]


def hosts_command(job: Job) -> list[str]:
    """Prints where the hosts stand, for `host_reports`. Fails where none has said anything yet."""
    return ["gcloud", "storage", "cat", f"{job.run_dir}/logs/hosts/*"]


def _gcloud(job: Job, verb: str, *names: str, alpha: bool = False) -> list[str]:
    group = ["compute", "tpus", "queued-resources", verb]
    place = [f"--project={job.project}", f"--zone={job.location}"]
    return ["gcloud", *(["alpha"] if alpha else []), *group, *names, *place]


class HostReport(NamedTuple):
    """Where a host stands.

    code: the exit code of that attempt, None until it ends. stopped: that the host does not start it again. text: all
    of it, for people.
    """

    slice: int
    host: int
    attempt: int
    code: int | None
    stopped: bool
    text: str


def host_reports(printed: str) -> list[HostReport]:
    """What `hosts_command` printed, one for each host. A host that has not reported since its queued resource was
    created again still has the report of an earlier attempt than the `attempt_of` the description."""
    pattern = re.compile(r"slice (\d+) host (\d+) attempt (\d+): (?:exit (\d+), (stopped)?)?.*")
    found = filter(None, map(pattern.fullmatch, printed.splitlines()))
    reports = [
        HostReport(*(int(x) for x in m.group(1, 2, 3)), int(m[4]) if m[4] else None, bool(m[5]), m[0]) for m in found
    ]
    return sorted(reports)


def next_attempt(reports: Iterable[HostReport]) -> int:
    """The number of the first attempt that is none of those reported."""
    return 1 + max((report.attempt for report in reports), default=-1)


# What the states of a queued resource mean to whoever waits for it.
_MEANINGS = {
    "CREATING": "the request is being received",
    "ACCEPTED": "waiting in the queue for capacity",
    "WAITING_FOR_RESOURCES": "waiting in the queue for capacity",
    "PROVISIONING": "machines are being made",
    "ACTIVE": "all machines are there",
    "FAILED": "the request failed; it never becomes active",
    "SUSPENDING": "the machines are being taken away",
    "SUSPENDED": "the machines are gone; it never becomes active again",
    "DELETING": "it is being deleted",
}
_INITIATORS = {"SERVICE": "by the service: preempted, or a machine failed", "USER": "by a user"}


def state(description: Mapping[str, Any]) -> str:
    """The API's word, such as "ACTIVE": one of those that `why` explains. SUSPENDED and FAILED are for good."""
    return description.get("state", {}).get("state", "STATE_UNSPECIFIED")


def why(description: Mapping[str, Any]) -> str:
    """One line for people: what the state means, with the API's error where there is one."""
    facts = description.get("state", {})
    meaning = _MEANINGS.get(state(description), "the API does not say where it stands")
    error = facts.get("failedData", {}).get("error", {}).get("message", "")
    initiator = _INITIATORS.get(facts.get("stateInitiator"), "") if state(description).startswith("SUSPEND") else ""
    return ": ".join(" ".join(x.split()) for x in (meaning, initiator, error) if x)


def job_text_of(description: Mapping[str, Any]) -> str | None:
    """`Job.text` of the job that was created; None where the queued resource is not ours."""
    return _node(description).get("metadata", {}).get(JOB_TEXT)


def attempt_of(description: Mapping[str, Any]) -> int:
    """The first attempt of these machines, as they were created."""
    return int(_node(description).get("metadata", {}).get(ATTEMPT, 0))


def _node(description: Mapping[str, Any]) -> Mapping[str, Any]:
    # Of several slices there is one specification too, with their number.
    specifications = description.get("tpu", {}).get("nodeSpec", [])
    return specifications[0].get("node", {}) if specifications else {}
