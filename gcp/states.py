"""In what state a job is, in the same words for both backends, and what a backend can do."""

import enum
import types
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol


class Phase(enum.Enum):
    ABSENT = "not there"
    WAITING = "waiting"
    RUNNING = "running"
    RESTARTING = "restarting"
    SUSPENDED = "suspended"
    FINISHED = "finished"
    FAILED = "failed"


# What to do about a job that has failed by what its program did.
MEND = (
    "`logs` shows more; once that is mended, as by another image in the job file, `up --again` goes on from the last "
    "checkpoint"
)


class State(NamedTuple):
    """What a backend says of a job.

    Args:
        why, remedy: why it is in this phase, and what a person can do about it; "" where there is nothing to say.
        since: when it came to be in it, as the backend writes times; "" where that is not known.
        made: when the job was made.
        attempt: number of its present start. restarts: how many of them count against `max_restarts`.
        pods: how many hosts there are by what they do.
        text: of the job that it was made of; None where this package did not make it.
        lost: it ended for want of machines, not by what it did; starting it again goes on with it.
    """

    phase: Phase
    why: str = ""
    remedy: str = ""
    since: str = ""
    made: str = ""
    attempt: int = 0
    restarts: int = 0
    pods: Mapping[str, int] = types.MappingProxyType({})
    text: str | None = None
    lost: bool = False

    def __str__(self) -> str:
        return f"{self.phase.value}: {self.why}" if self.why else self.phase.value


class AlreadyThere(Exception):
    """A job of that name was there when it was to be made."""


class Backend(Protocol):
    """What takes jobs: `gcp.gke`, `gcp.queued`. Errors of its programs are `ProgramError`."""

    programs: Sequence[str]
    billed: str  # what costs money while the job is there
    over: Collection[Phase]  # those in which a job will never write again, and has nothing that costs money

    def observe(self) -> State:
        """Asks; changes nothing."""

    def send(self) -> None:
        """Make the job. Raises `AlreadyThere`."""

    def delete(self) -> None:
        """Returns once it is gone; the run directory stays."""

    def logs_command(self, *, follow: bool, slice: int, host: int) -> list[str]:
        """Prints what a host writes."""

    def send_commands(self) -> list[str]:
        """What `send` runs, for a person to read."""

    def documents(self) -> list[tuple[str, str]]:
        """What `send` hands over: (what it is, its text)."""

    def still_billed(self) -> list[str]:
        """What may cost money once the job is gone, and how to look."""
