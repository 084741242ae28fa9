"""How fast a run was, of its TensorBoard event files: the one place of a run directory that knows the time of a row."""

import statistics
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from google.protobuf.message import DecodeError
from tensorboardX.proto.event_pb2 import Event

from seqmodels.files import list_folder, told

if TYPE_CHECKING:
    from etils import epath

SPEED = "speed/tokens_per_second"


class Times(NamedTuple):
    """seconds: in training loops, over all starts, with compilation, evaluations and saves. speeds: step -> tokens per
    second since the row before, without those."""

    seconds: float
    speeds: dict[int, float]

    @property
    def tokens_per_second(self) -> float | None:
        return statistics.median(self.speeds.values()) if self.speeds else None

    def clock(self, steps: list[int], tokens_per_step: int) -> list[float] | None:
        """Seconds of training at these steps, without compilation, evaluations and saves; None where no speed was
        measured. A step whose speed was not measured counts with the median."""
        usual = self.tokens_per_second
        if not usual:
            return None
        found, now, before = [], 0.0, 0
        for step in steps:
            now += (step - before) * tokens_per_step / (self.speeds.get(step) or usual)
            found.append(now)
            before = step
        return found


NO_TIMES = Times(0.0, {})


def read_times(folder: "epath.Path") -> Times:
    """Of the event files in a folder, one for each start of the program; zero seconds where there are none."""
    starts = []
    for file in list_folder(folder):
        if ".tfevents." in file.name:
            with told(f"cannot read {file}", file):
                starts.append(list(_events(file.read_bytes())))
    seconds, speeds = 0.0, {}
    for events in sorted(filter(None, starts), key=lambda events: events[0].wall_time):
        seconds += events[-1].wall_time - events[0].wall_time
        for event in events:
            if event.HasField("session_log"):  # a later start repeats the steps behind its checkpoint
                speeds = {step: speed for step, speed in speeds.items() if step < event.step}
            for value in event.summary.value:
                if value.tag == SPEED and value.simple_value > 0:
                    speeds[event.step] = value.simple_value
    return Times(seconds, speeds)


def _events(data: bytes) -> Iterator[Event]:
    """The records of a file, up to one torn by a kill: length, its checksum, the record, its checksum."""
    at = 0
    while at + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        record = data[at + 12 : at + 12 + length]
        at += length + 16
        if at > len(data):
            return
        try:
            yield Event.FromString(record)
        except DecodeError:
            return
