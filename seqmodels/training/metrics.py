"""Where the numbers of a run go: the terminal, `metrics.jsonl`, TensorBoard.

What a run computes and how fast it was are kept apart. A row of `metrics.jsonl` is a pure function of config,
data and seed, so the file of a run that was killed and went on equals that of an undisturbed run byte for
byte. Speed goes to TensorBoard and the terminal.
"""

import re
import socket
import struct
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar
from tqdm import tqdm

from seqmodels.errors import InputError
from seqmodels.files import GrowingFile
from seqmodels.training.loss import bits_per_byte
from seqmodels.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from etils import epath

# Dense bfloat16 FLOP/s of one JAX device, from the vendors' data sheets. A TPU7x chip is two devices.
PEAK_FLOPS = (
    (r"TPU v4", 275e12),
    (r"TPU v5e|TPU v5 lite", 197e12),
    (r"TPU v5p?", 459e12),
    (r"TPU v6e|TPU v6 lite", 918e12),
    (r"TPU7x", 1154e12),
    (r"NVIDIA A100.*", 312e12),
    (r"NVIDIA H100 PCIe", 756e12),
    (r"NVIDIA (H100|H200|GH200).*", 989e12),
    (r"NVIDIA (B200|GB200).*", 2250e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device of this `jax.Device.device_kind`; None where it is not known."""
    return next((peak for kind, peak in PEAK_FLOPS if re.fullmatch(kind, device_kind)), None)


# Of numbers of these names less is better; of others, more.
_LESS_IS_BETTER = re.compile(r"(^|_)(loss|perplexity|excess|bits|error|seconds|bytes|nll)(_|$)")


def less_is_better(name: str) -> bool:
    """Whether a number that an evaluation reports is a cost."""
    return _LESS_IS_BETTER.search(name) is not None


def say(line: str) -> None:
    """A line for the person who watches, from the first process alone; a progress line stays below it."""
    if jax.process_index() == 0:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


class Report:
    """Tells a person and the files how the run is doing; the first process speaks for all.

    On a terminal there is one line that changes in place; elsewhere there is a line for every row.

    Args:
        run: the open run directory, which gets the rows and TensorBoard's event files.
        start, steps: the updates done before this start of the program, and those of the whole run. What
            TensorBoard was told of later steps is hidden.
        tokens_per_step: positions in a batch, over all processes.
        flops_per_token: of a training step, forward and backward; None leaves out the utilisation.
        bytes_per_token: None leaves out the bits per byte.
        every: a row for every so many steps, and for the first and the last one.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        start: int,
        steps: int,
        tokens_per_step: int,
        flops_per_token: float | None,
        bytes_per_token: float | None,
        every: int,
    ):
        self._run, self._steps, self._every = run, steps, every
        self._tokens_per_step, self._bytes_per_token = tokens_per_step, bytes_per_token
        peak = peak_flops(jax.devices()[0].device_kind)
        self._flops = (flops_per_token, peak * jax.device_count()) if flops_per_token and peak else None
        self._speaks = jax.process_index() == 0
        self._tensorboard = None
        if self._speaks:
            self._tensorboard = _EventFile(run.tensorboard, start)
        self._bar = tqdm(
            total=steps,
            initial=start,
            file=sys.stdout,
            disable=not (self._speaks and sys.stdout.isatty()),
            bar_format="{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )
        self._seconds_per_step: float | None = None
        self.restart_clock()

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._bar.close()
        if self._tensorboard:
            try:
                self._tensorboard.close()
            except InputError as lost:
                if error is None:
                    raise
                error.add_note(str(lost))

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The numbers of an update, in the order of the updates."""
        if not self._speaks:
            return
        self._bar.update(step - self._bar.n)
        now = time.perf_counter()
        if self._clock is None:
            self._clock = (step, now)
        if step % self._every and step not in (1, self._steps):
            return
        row = dict(metrics)
        if self._bytes_per_token:
            row["bits_per_byte"] = bits_per_byte(row["loss"], self._bytes_per_token)
        self._run.append_metrics(step, row)
        self._to_tensorboard("train", step, row)
        speed = self._measure(step, now)
        self._to_tensorboard("speed", step, speed)
        parts = [f"loss {row['loss']:.3f}"]
        if "bits_per_byte" in row:
            parts.append(f"{row['bits_per_byte']:.3f} bits/byte")
        if "accuracy" in row:
            parts.append(f"accuracy {row['accuracy']:.3f}")
        if speed:
            parts.append(f"{_short(speed['tokens_per_second'])} tokens/s")
        if "flops_utilisation" in speed:
            parts.append(f"MFU {speed['flops_utilisation']:.1%}")
        self._bar.set_postfix_str(", ".join(parts))
        if self._bar.disable:
            if self._seconds_per_step:
                parts.append(f"{tqdm.format_interval(self._seconds_per_step * (self._steps - step))} left")
            say(f"step {step:>{len(str(self._steps))}}/{self._steps}: {', '.join(parts)}")

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """The numbers on held-out data after update `step`."""
        if not self._speaks:
            return
        self._run.append_metrics(step, {f"eval/{name}": value for name, value in metrics.items()})
        self._to_tensorboard("eval", step, metrics)
        parts = [f"{name.replace('_', ' ')} {value:.3f}" for name, value in metrics.items() if name != "bits_per_byte"]
        if "bits_per_byte" in metrics:
            parts.append(f"{metrics['bits_per_byte']:.3f} bits/byte")
        say(f"step {step:>{len(str(self._steps))}}/{self._steps}: held out: {', '.join(parts)}")

    def store(self) -> None:
        """Return once all that was told is in the run directory, wherever that is. The rows up to a step must be there
        before its checkpoint is saved."""
        self._run.store_metrics()
        if self._tensorboard:
            self._tensorboard.flush()

    def restart_clock(self) -> None:
        """Do not count the time until the next step finishes: it goes into an evaluation or a save."""
        self._clock: tuple[int, float] | None = None

    def _measure(self, step: int, now: float) -> dict[str, float]:
        """Speed since the last measurement; empty when there is no earlier step to measure from."""
        since_step, since = self._clock
        if step == since_step:
            return {}
        self._clock = (step, now)
        self._seconds_per_step = (now - since) / (step - since_step)
        speed = {"tokens_per_second": self._tokens_per_step / self._seconds_per_step}
        if self._flops:
            used, available = self._flops
            speed["flops_utilisation"] = speed["tokens_per_second"] * used / available
        return speed

    def _to_tensorboard(self, folder: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._tensorboard.add(f"{folder}/{name}", step, value)


class _EventFile:
    """Scalars for TensorBoard, as TFRecords, written in the caller's thread: tensorboardX's own `SummaryWriter` writes
    in another, where a full disk ends in a traceback that nobody can catch."""

    def __init__(self, directory: "epath.Path", start: int):
        # The suffix: two starts within a second would otherwise write to one file.
        self._file = GrowingFile(
            directory / f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.after-{start}"
        )
        self._write(file_version="brain.Event:2")
        # Steps after `start` that an earlier process has written are hidden.
        self._write(step=start + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, name: str, step: int, value: float) -> None:
        self._write(step=step, summary=scalar(name, value))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, **fields) -> None:
        data = Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        crcs = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
        self._file.write(length + next(crcs) + data + next(crcs))


def _short(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"
