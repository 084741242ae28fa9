"""The job file: what to train, on what, and where it goes. A TOML file; `gcp/examples` has some.

A job's name is its identity. It names the JobSet or the queued resource, and with `out` the run directory, so that
submitting it again goes on with it.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gcp.accelerators import Slice, find_slice
from seqmodels.errors import InputError, nearest

BACKENDS = ("gke", "queued_resources")
CAPACITIES = ("on-demand", "spot", "reserved")
LONGEST_NAME = 40  # JobSet makes names of pods of it, which have at most 63 letters.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A training job on TPU slices.

    Args:
        name: of the job and of its run directory; lower-case letters, digits and hyphens, at most 40.
        config: the gin file that `program` trains, as a path in the repository.
        gin: overrides of its bindings, such as "train.steps=1000"; they beat the file.
        program: what runs on every host; it takes --config, --run_dir and --gin.X.y=v, and keeps the contract of exit
            codes in `seqmodels.errors`.
        tpu: the slice, by a name in `gcp.accelerators`.
        slices: how many of them; with several, `DeviceMesh.slices` is set to it.
        capacity: "on-demand", "spot" (cheap, taken back at any moment) or "reserved".
        reservation: its name, where capacity is "reserved".
        backend: "gke": a JobSet in a cluster. "queued_resources": virtual machines of the Cloud TPU API.
        project: of Google Cloud. location: the cluster's, a region or a zone; a zone for queued resources.
        cluster, namespace: of GKE. queue: a Kueue queue of the cluster that admits jobs, "" for none.
        service_account: "" for the default. For queued resources an address, whose rights the program has. On GKE one
            of Kubernetes, whose rights hold for mounting `data`; the program itself has those of its node pool, because
            Workload Identity does not reach pods on their host's network.
        image: of the container, by digest: ...@sha256:...
        out: folder of run directories in a bucket, gs://...
        max_restarts: how often the job starts again by itself; a preemption that GKE announces does not count where its
            pod is seen to fail before the others have left.
        valid_hours: how long the request for a queued resource waits for machines before it fails.
        hours: how long it is expected to run, for the sum of chip hours; None where nobody knows.
        usd_per_chip_hour: what is paid; None where nobody knows.
        env: environment variables of the program.
        secrets: environment variable -> where its value is kept: on GKE "secret:key" of Kubernetes, otherwise the name
            of a secret of Secret Manager.
        data: path in the container -> folder in a bucket that is read there.
    """

    name: str
    config: str
    gin: tuple[str, ...] = ()
    program: str = "train.py"
    tpu: str
    slices: int = 1
    capacity: str = "on-demand"
    reservation: str = ""
    backend: str = "gke"
    project: str
    location: str
    cluster: str = ""
    namespace: str = "default"
    queue: str = ""
    service_account: str = ""
    image: str
    out: str
    max_restarts: int = 50
    valid_hours: float = 24.0
    hours: float | None = None
    usd_per_chip_hour: float | None = None
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    secrets: Mapping[str, str] = dataclasses.field(default_factory=dict)
    data: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def slice(self) -> Slice:
        return find_slice(self.tpu)

    @property
    def hosts(self) -> int:
        """Of all slices."""
        return self.slices * self.slice.hosts

    @property
    def chips(self) -> int:
        """Of all slices."""
        return self.slices * self.slice.chips

    @property
    def run_dir(self) -> str:
        return f"{self.out.rstrip('/')}/{self.name}"

    @property
    def overrides(self) -> list[str]:
        """Of the config's bindings, as `config.parse` takes them."""
        return [*self.gin, *([f"DeviceMesh.slices={self.slices}"] if self.slices > 1 else [])]

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the program that are no secrets."""
        # Programs compiled once are found again when the job restarts.
        return {"JAX_COMPILATION_CACHE_DIR": f"{self.out.rstrip('/')}/compiled", **self.env}

    def command(self, run_dir: str | None = None) -> list[str]:
        """What every host runs, beginning with the arguments of `python`. run_dir: None for the job's own."""
        run_dir = run_dir or self.run_dir
        program = [self.program, "--config", self.config, "--run_dir", run_dir, *(f"--gin.{x}" for x in self.overrides)]
        return ["-m", "gcp.entry", "--run_dir", run_dir, "--", *program]

    def text(self) -> str:
        """All values, defaults included, one `key = value` a line: the same for the same job. Names of secrets stand
        in it, and no secret does."""
        lines = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Mapping):
                lines += [f"{field.name}.{key} = {json.dumps(value[key])}" for key in sorted(value)]
            else:
                lines.append(f"{field.name} = {json.dumps(value)}")
        return "\n".join(lines) + "\n"

    @property
    def fingerprint(self) -> str:
        """Of `text`: 16 hexadecimal digits."""
        return hashlib.sha256(self.text().encode()).hexdigest()[:16]


def difference(old: str, new: str) -> str:
    """From one `Job.text` to another: the lines that differ, with - and +."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm="")
    return "\n".join(line for line in lines if not line.startswith(("--- ", "+++ ", "@@ ")))


def read_job(path: str | Path) -> Job:
    """The job in a file. Raises `InputError`, one line that names the file and the key."""
    try:
        values = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise InputError(f"cannot read the job file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a TOML file: {error}") from error
    try:
        return make_job(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def make_job(values: Mapping[str, Any]) -> Job:
    """The job of a job file's keys and values. Raises `InputError`."""
    fields = {field.name: field for field in dataclasses.fields(Job)}
    hints = typing.get_type_hints(Job)
    for key, value in values.items():
        if key not in fields:
            raise InputError(f"{key!r} is no key of a job file; {nearest(key, fields)}")
        _check_type(key, value, hints[key])
    for key, field in fields.items():
        if key not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise InputError(f"the key {key!r} is missing")
    job = Job(**{key: _plain(value, hints[key]) for key, value in values.items()})
    _check_values(job)
    # One spelling for one job, so that it has one fingerprint.
    data = {path: folder.rstrip("/") for path, folder in job.data.items()}
    return dataclasses.replace(job, tpu=job.slice.name, out=job.out.rstrip("/"), data=data)


def _plain(value: Any, hint: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return float(value) if float in (hint, *typing.get_args(hint)) else value


_KINDS = {
    str: (str, "a string"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    tuple: (list, "a list of strings"),
    Mapping: (dict, "a table of strings"),
}


def _check_type(key: str, value: Any, hint: Any) -> None:
    """Messages show no value: it may be a secret in the wrong place."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    accepted, described = _KINDS[typing.get_origin(parts[0]) or parts[0]]
    if not isinstance(value, accepted) or isinstance(value, bool):
        raise InputError(f"{key} is {_kind(value)}: expected {described}")
    for name, element in _elements(key, value):
        if not isinstance(element, str):
            raise InputError(f"{name} is {_kind(element)}: expected a string")


def _elements(key: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, list):
        return [(f"{key}[{index}]", element) for index, element in enumerate(value)]
    return [(f"{key}[{name!r}]", element) for name, element in value.items()] if isinstance(value, dict) else []


def _kind(value: Any) -> str:
    """Of a TOML value, in words."""
    words = {bool: "true or false", str: "a string", int: "a whole number", float: "a number", list: "a list"}
    return "a table" if isinstance(value, dict) else words.get(type(value), "a date or time")


DNS_NAME = r"[a-z]([-a-z0-9]*[a-z0-9])?"
DIGEST = r"[^\s@]+@sha256:[0-9a-f]{64}"
# No commas, which separate the options of a mount.
BUCKET = r"gs://[a-z0-9][a-z0-9._-]+[a-z0-9](/[^\s,]*)?"
# What the machines themselves say of a host's place in its slices, to jax and to libtpu.
MACHINE_VARIABLES = (
    "CLOUD_TPU_TASK_ID",
    "MEGASCALE_COORDINATOR_ADDRESS",
    "MEGASCALE_NUM_SLICES",
    "MEGASCALE_PORT",
    "MEGASCALE_SLICE_ID",
    "TPU_ACCELERATOR_TYPE",
    "TPU_CHIPS_PER_HOST_BOUNDS",
    "TPU_CHIPS_PER_PROCESS_BOUNDS",
    "TPU_HOST_BOUNDS",
    "TPU_NAME",
    "TPU_PROCESS_ADDRESSES",
    "TPU_PROCESS_BOUNDS",
    "TPU_PROCESS_PORT",
    "TPU_SKIP_MDS_QUERY",
    "TPU_TOPOLOGY",
    "TPU_VISIBLE_CHIPS",
    "TPU_VISIBLE_DEVICES",
    "TPU_WORKER_HOSTNAMES",
    "TPU_WORKER_ID",
)
ATTEMPT = "SEQMODELS_ATTEMPT"  # in a pod: how often the job has started again
_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
# What keys of the services that people use begin with, and anything long with digits in it and neither a space nor a
# slash, unless it is a flag.
_SECRET_VALUE = r"(hf_|sk-|ghp_|glpat-|xox[abp]-|AIza|ya29\.)\S{8,}|(?!--)(?=\D*\d)[A-Za-z0-9+_=-]{32,}"
# Not what only has such a word in a longer one, as TOKENIZERS_PARALLELISM.
_SECRET_NAME = r"(?i).*(secrets?|token|passw(or)?ds?|(api|access|private)_?keys?|credentials?)(_.*)?"


def looks_like_a_secret(name: str, value: str) -> bool:
    """Whether an environment variable seems to hold what nobody may read in a job file or a manifest."""
    return bool(re.fullmatch(_SECRET_NAME, name) or re.fullmatch(_SECRET_VALUE, value))


_OPTIONAL = ("cluster", "queue", "reservation", "service_account")
_RESOURCE = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_FORMS = {
    "config": (r"\S+", "the path of a gin file in the repository"),
    "program": (r"\S+", "the path of a program in the repository"),
    "project": (rf"([a-z0-9.-]+:)?{_RESOURCE}", "the identifier of a project, as my-project"),
    "location": (r"[a-z]+-[a-z]+\d+(-[a-z])?", "a region or a zone, as us-west4 or us-west4-a"),
    **dict.fromkeys(("cluster", "namespace", "queue"), (_RESOURCE, "lower-case letters, digits and hyphens")),
    "reservation": (r"[a-z0-9][-a-z0-9./]*", "the name of a reservation"),
    "service_account": (r"[a-z0-9][-a-z0-9.]*(@[a-z0-9.-]+)?", "the name of a service account"),
}


def _check_values(job: Job) -> None:
    if not re.fullmatch(DNS_NAME, job.name) or len(job.name) > LONGEST_NAME:
        raise InputError(
            f"name is {job.name!r}: expected lower-case letters, digits and hyphens, a letter first, at most "
            f"{LONGEST_NAME} of them"
        )
    for key, valid in (("backend", BACKENDS), ("capacity", CAPACITIES)):
        value = getattr(job, key)
        if value not in valid:
            raise InputError(f"{key} is {value!r}; {nearest(value, valid)}")
    kind = job.slice
    for key, least in (("slices", 1), ("max_restarts", 0)):
        if getattr(job, key) < least:
            raise InputError(f"{key} is {getattr(job, key)}: expected at least {least}")
    for key in ("valid_hours", "hours", "usd_per_chip_hour"):
        value = getattr(job, key)
        if value is not None and not (0 < value < math.inf):
            raise InputError(f"{key} is {value}: expected more than 0")
    if not re.fullmatch(DIGEST, job.image):
        raise InputError(
            f"image is {job.image!r}: expected NAME@sha256:DIGEST, which a later push cannot change; "
            "`docker buildx imagetools inspect IMAGE` prints it"
        )
    for key, folder in (("out", job.out), *((f"data.{path}", folder) for path, folder in job.data.items())):
        if not re.fullmatch(BUCKET, folder):
            raise InputError(f"{key} is {folder!r}: expected a folder in a bucket, gs://BUCKET/FOLDER")
    if bool(job.reservation) != (job.capacity == "reserved"):
        raise InputError(
            f"capacity is {job.capacity!r} and reservation {job.reservation!r}: expected the name of a reservation "
            "where capacity is 'reserved', and only there"
        )
    if job.backend == "gke" and not job.cluster:
        raise InputError("cluster is not given: expected the GKE cluster that the job goes to")
    if job.backend == "queued_resources":
        if kind.api_type is None:
            raise InputError(f"tpu is {job.tpu!r}: the Cloud TPU API does not have it; expected backend = 'gke'")
        if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", job.location):
            raise InputError(f"location is {job.location!r}: expected a zone, as us-west4-a")
        for key in ("cluster", "queue"):
            if getattr(job, key):
                raise InputError(f"{key} is {getattr(job, key)!r}: a queued resource has none; leave it out")
    for key, (pattern, form) in _FORMS.items():
        # Only what a job need not have may be empty.
        if not re.fullmatch(pattern, getattr(job, key)) and (getattr(job, key) or key not in _OPTIONAL):
            raise InputError(f"{key} is {getattr(job, key)!r}: expected {form}")
    for path in job.data:
        if not re.fullmatch(r"(/[\w.-]+)+", path):
            raise InputError(f"data has {path!r}: expected an absolute path in the container")
    for binding in job.gin:
        if not re.fullmatch(r"[\w./]+=.+", binding, re.DOTALL):
            raise InputError(f"gin has {binding!r}: expected NAME.PARAMETER=VALUE")
        if binding.startswith("DeviceMesh.slices="):
            raise InputError(f"gin has {binding!r}: the number of slices is that of the key `slices`")
    _check_variables(job)


def _check_variables(job: Job) -> None:
    """Messages show no value: it may be a secret in the wrong place."""
    for key in (*job.env, *job.secrets):
        if not re.fullmatch(_VARIABLE, key):
            raise InputError(f"{key!r} is no name of an environment variable")
        if key in (*MACHINE_VARIABLES, ATTEMPT):
            raise InputError(f"{key} stands among the variables: expected none that the machines themselves set")
    for key, value in job.env.items():
        if looks_like_a_secret(key, value):
            raise InputError(
                f"env.{key} looks like a secret: expected it under [secrets], by the name of where its value is kept"
            )
    for key, value in job.secrets.items():
        if key in job.env:
            raise InputError(f"{key} stands under [env] and under [secrets]: expected one of them")
        pattern, form = (
            (r"[a-z0-9][-a-z0-9.]*:[-\w.]+", "SECRET:KEY of a Kubernetes secret")
            if job.backend == "gke"
            else (r"[\w-]+", "the name of a secret of Secret Manager")
        )
        if not re.fullmatch(pattern, value):
            raise InputError(f"secrets.{key}: expected {form}")
