"""What a `Job.text` says, wherever it is found: in the bucket, in a JobSet, in a queued resource."""

import difflib
import json
from typing import Any

from gcp.job import Job, make_job
from seqmodels.errors import InputError

# Keys that decide what is trained: with another of these it would be another run, and train.py would refuse to go on.
_TRAINED = {"name", "config", "gin", "program", "slices", "out", "data"}
# Keys that only this machine reads.
_REMARKS = {"hours", "usd_per_chip_hour"}


def job_of_text(text: str) -> Job:
    """The job that has this text; keys that it lacks have their defaults. Raises `InputError`."""
    values: dict[str, Any] = {}
    for line in text.splitlines():
        key, _, value = line.partition(" = ")
        key, _, name = key.partition(".")
        try:
            value = json.loads(value)
        except ValueError:
            raise InputError(f"{line!r} is no line of a job's text") from None
        if name:
            values.setdefault(key, {})[name] = value
        elif value is not None:
            values[key] = value
    return make_job(values)


def is_same_job(one: str, other: str) -> bool:
    """Whether two texts differ in nothing that is sent."""
    return _changed(one, other) <= _REMARKS


def is_same_run(one: str, other: str) -> bool:
    """Whether two texts differ in nothing that decides what is trained. The rest may change when a run is resumed: the
    machines, where they are, the image, the environment."""
    return not _changed(one, other) & _TRAINED


def _changed(one: str, other: str) -> set[str]:
    """Keys of a job file."""
    lines = difflib.ndiff(one.splitlines(), other.splitlines())
    return {line[2:].partition(" = ")[0].partition(".")[0] for line in lines if line[0] in "+-"}
