"""Other people's programs, kubectl and gcloud: every call is shown, bounded in time, and its errors are explained."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from seqmodels.errors import InputError

HOW_TO_INSTALL = {
    "gcloud": "see https://cloud.google.com/sdk/docs/install",
    "kubectl": "`gcloud components install kubectl`, or the package of that name",
    "gke-gcloud-auth-plugin": "`gcloud components install gke-gcloud-auth-plugin`, or the package of that name",
}

# What a program's error says -> what to do. The first that matches counts.
_REMEDIES = (
    (
        r"active account|auth login|Reauthentication|invalid_grant|\(Unauthorized\)|must be logged in",
        "`gcloud auth login` logs in",
    ),
    (r"executable gke-gcloud-auth-plugin not found", HOW_TO_INSTALL["gke-gcloud-auth-plugin"]),
    (
        r"doesn't have a resource type \"jobset|no matches for kind \"JobSet\"",
        "JobSet is not installed in the cluster: see gcp/README.md",
    ),
    (r"storage\.objects|storage\.buckets", "ask for roles/storage.objectUser on the bucket"),
    (r"(?i)quota", "ask for more quota: https://console.cloud.google.com/iam-admin/quotas"),
    (r"\(Forbidden\)|PERMISSION_DENIED|does not have permission", "ask for the permission that it names"),
    (r"SERVICE_DISABLED|has not been used in project", "enable the API that it names, with `gcloud services enable`"),
)
_PASSING = (
    r"timeout|timed out|Unable to connect|connection refused|connection reset|TLS handshake|EOF|try again"
    r"|Temporary failure in name resolution|UNAVAILABLE|Service Unavailable|HTTPError 5\d\d|INTERNAL|etcdserver"
)
# gcloud would ask whether to enable an API that is not, and wait.
_NO_QUESTIONS = {"CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
_ABSENT = r"\(NotFound\)|NOT_FOUND|matched no objects|not found: 404|HTTPError 404"
_PRESENT = r"\(AlreadyExists\)|ALREADY_EXISTS"


class ProgramError(InputError):
    """A program ended with an error. `passing`: the same call may succeed a little later."""

    passing = False


class Answer(NamedTuple):
    """What a program answered: its exit code, and both of its streams."""

    command: Sequence[str]
    code: int
    out: str
    err: str

    @property
    def absent(self) -> bool:
        """What was asked for is not there."""
        return self.code != 0 and re.search(_ABSENT, self.err) is not None

    @property
    def present(self) -> bool:
        """What was to be made is there already."""
        return self.code != 0 and re.search(_PRESENT, self.err) is not None

    def error(self, remedies: Sequence[tuple[str, str]] = ()) -> ProgramError:
        """Its error in one line, and what to do, where that is known; `remedies` come before those of this module."""
        lines = [line.strip() for line in self.err.splitlines() if line.strip()]
        said = next((x for x in lines if re.match(r"error", x, re.IGNORECASE)), lines[-1] if lines else "no message")
        known = next((do for pattern, do in (*remedies, *_REMEDIES) if re.search(pattern, self.err)), None)
        error = ProgramError(f"`{brief(self.command)}`: {said}" + (f"; {known}" if known else ""))
        # Credentials that are wrong stay wrong, though kubectl calls that unable to connect.
        error.passing = known is None and re.search(_PASSING, self.err) is not None
        return error


def brief(command: Sequence[str]) -> str:
    """The program and what it was to do, without flags."""
    words = []
    for word in command:
        if word.startswith("-"):
            break
        words.append(word)
    return " ".join(words)


def missing(programs: Sequence[str]) -> list[str]:
    """Those that are not on PATH, each with how to install it."""
    return [f"{x} is not on PATH: {HOW_TO_INSTALL[x]}" for x in programs if shutil.which(x) is None]


def run(command: Sequence[str], *, text: str | None = None, seconds: float = 90, shown: bool = True) -> Answer:
    """Run a program to its end.

    Args:
        text: what it reads from its standard input.
        seconds: after which it is ended; that is an error that passes.
        shown: print the command first, to standard error.

    Raises `InputError` where the program is not there; what it answers is the caller's to look at.
    """
    if shown:
        print("$", shlex.join(command), file=sys.stderr, flush=True)
    _require(command[0])
    try:
        done = subprocess.run(
            command,
            input=text or "",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            env=os.environ | _NO_QUESTIONS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Answer(command, 124, "", f"error: timed out after {seconds:g} seconds")
    return Answer(command, done.returncode, done.stdout, done.stderr)


def stream(command: Sequence[str]) -> int:
    """Run a program that writes to this terminal until it ends, or Ctrl-C does; returns its exit code."""
    print("$", shlex.join(command), file=sys.stderr, flush=True)
    _require(command[0])
    try:
        return subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:
        return 0


def _require(program: str) -> None:
    for problem in missing([program]):
        raise InputError(problem)
