"""A job's pod played on this machine: the same command, as many processes, with the environment that GKE gives a pod.

    python -m gcp local JOB.toml --processes 4 --run_dir runs/local --gin.train.steps=40

What is real: processes find each other as hosts of a pod do; the entry, its logs and exit codes, checkpoints. What is
not: chips are devices of the CPU, the network is this machine's, the run directory may be a folder.

The part of JobSet is played too. When a process ends with a code to start again, all are ended, by SIGTERM and after a
while by SIGKILL, and all start again, `max_restarts` times. When one ends with 1 or 2, the job has failed with it.
"""

import argparse
import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gcp.entry import die_with_parent, outcome
from gcp.job import Job, read_job
from seqmodels.errors import EXIT_DEFECT, EXIT_DONE, EXIT_INPUT, EXIT_RESTART, InputError
from seqmodels.files import in_bucket

REPOSITORY = Path(__file__).resolve().parents[1]
# Seconds between SIGTERM and SIGKILL: what GKE leaves a pod whose machine is taken back.
GRACE = 15.0
LOOK_EVERY = 0.1


class Host(NamedTuple):
    """A host of a pod: which of the slices it is in, and which of the slice's hosts it is."""

    slice: int
    host: int

    def __str__(self) -> str:
        return f"slice-{self.slice}-host-{self.host}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument("job", metavar="JOB.toml", type=Path, help="the job file; gcp/examples has some")
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="hosts of the pod, in all slices")
    parser.add_argument("--run_dir", required=True, metavar="DIR", help="a folder or a bucket's, in place of the job's")
    parser.add_argument("--devices", type=int, default=2, metavar="N", help="in place of the chips of a host (2)")
    parser.add_argument(
        "--all_logs", action="store_true", help="show all that every process prints, not the first only"
    )
    parser.add_argument_group("overrides of the config, which beat the job's", "--gin.NAME.PARAMETER=VALUE")


def run(arguments: argparse.Namespace) -> int:
    job = read_job(arguments.job)
    job = dataclasses.replace(job, gin=(*job.gin, *arguments.overrides))
    return run_local(
        job, arguments.processes, arguments.run_dir, devices=arguments.devices, all_logs=arguments.all_logs
    )


def run_local(
    job: Job,
    processes: int,
    run_dir: str | Path,
    *,
    devices: int = 2,
    all_logs: bool = False,
    grace: float = GRACE,
) -> int:
    """Run a job as processes of this machine until it is done or has failed; returns its exit code.

    That is 1 where the restarts are used up, too. Ctrl-C and SIGTERM make all processes save and end: 42.

    Args:
        processes: of all slices together, which have the same number each.
        run_dir: a folder, or one in a bucket, in place of the job's.
        devices: of every process, in place of the chips of a host.
        all_logs: show all that every process prints, and not of others than the first their starts, ends and errors.
        grace: seconds between SIGTERM and SIGKILL.

    Raises `InputError` where processes do not divide over the slices.
    """
    if processes < 1 or processes % job.slices:
        raise InputError(f"--processes is {processes}: expected a multiple of the job's slices, {job.slices}")
    if devices < 1:
        raise InputError(f"--devices is {devices}: expected at least 1")
    hosts = [Host(*divmod(i, processes // job.slices)) for i in range(processes)]
    run_dir = os.fspath(run_dir) if in_bucket(run_dir) else os.path.abspath(run_dir)
    screen = _Screen(hosts[0], all_logs)
    for line in _what_differs(job):
        screen.say(line)
    for attempt in range(job.max_restarts + 1):
        with _Pod(job, hosts, run_dir, devices, attempt, screen) as pod, _signals_interrupt():
            code, reason = pod.wait(grace)
        if code != EXIT_RESTART:
            screen.say(f"exit code {code}: {reason}")
            return code
        if pod.asked:
            screen.say("exit code 42: ended on request, the same command goes on")
            return EXIT_RESTART
        left = job.max_restarts - attempt
        screen.say(f"{reason}: {f'restart {attempt + 1} of {job.max_restarts}' if left else 'no restart is left'}")
    screen.say(f"exit code {EXIT_DEFECT}: given up after {job.max_restarts} restarts; the same command goes on")
    return EXIT_DEFECT


class _Pod:
    """The processes of one attempt, which do not outlive the context. asked: whether a person has ended it."""

    def __init__(
        self, job: Job, hosts: Sequence[Host], run_dir: str, devices: int, attempt: int, screen: "_Screen"
    ) -> None:
        self.asked = False
        self._screen = screen
        port = _free_port()
        self._processes = {
            host: subprocess.Popen(
                [sys.executable, *job.command(run_dir)],
                cwd=REPOSITORY,
                env=os.environ | _variables(job, host, len(hosts) // job.slices, devices, attempt, port),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C reaches this process alone.
                preexec_fn=die_with_parent,
            )
            for host in hosts
        }
        self._readers = [
            threading.Thread(target=self._read, args=(host, process)) for host, process in self._processes.items()
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> "_Pod":
        return self

    def __exit__(self, *_) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()
        for reader in self._readers:
            reader.join()

    def wait(self, grace: float) -> tuple[int, str]:
        """Wait until all have ended, or one has failed; then end the others. The job's exit code, and why."""
        try:
            while True:
                codes = [process.poll() for process in self._processes.values()]
                if any(codes) or None not in codes:
                    break
                time.sleep(LOOK_EVERY)
        except KeyboardInterrupt:
            self.asked = True
        first = next((host for host, process in self._processes.items() if process.poll()), None)
        self._end_all(grace)
        return self._outcome(first)

    def _end_all(self, grace: float) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + grace
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            for process in self._processes.values():
                process.wait(max(0.0, deadline - time.monotonic()))
        for process in self._processes.values():
            process.kill()
            process.wait()

    def _outcome(self, first: Host | None) -> tuple[int, str]:
        """A code that is no restart beats one that is. first: the host that ended first with another code than 0."""
        ends = {host: outcome(process.returncode, asked=False) for host, process in self._processes.items()}
        for host in sorted(ends, key=lambda host: host != first):
            code, _ = ends[host]
            if code in (EXIT_DEFECT, EXIT_INPUT):
                return code, f"{host} has failed"
        if first is None:
            return (EXIT_RESTART, "ended on request") if self.asked else (EXIT_DONE, "done")
        code, reason = ends[first]
        return code, f"{first} has ended with {code}" + (f", {reason}" if reason else "")

    def _read(self, host: Host, process: subprocess.Popen) -> None:
        for line in process.stdout:
            self._screen.show(host, line.rstrip("\n"))


class _Screen:
    """Lines of all processes, each with its host in front."""

    def __init__(self, first: Host, all_logs: bool) -> None:
        self._first, self._all = first, all_logs
        self._lock = threading.Lock()
        self._in_traceback: dict[Host, bool] = {}

    def say(self, line: str) -> None:
        self._print(f"[local] {line}")

    def show(self, host: Host, line: str) -> None:
        if self._all or host == self._first or self._tells(host, line):
            self._print(f"[{host}] {line}")

    def _tells(self, host: Host, line: str) -> bool:
        """Whether it is one of a start, an end or an error."""
        within = self._in_traceback.get(host, False)
        # The first line that is not indented is the error, the traceback's last.
        self._in_traceback[host] = line.startswith("Traceback ") or (within and line[:1] in (" ", ""))
        return within or line.startswith("Traceback ") or re.match(_TELLING, line) is not None

    def _print(self, line: str) -> None:
        with self._lock:
            print(line, flush=True)


_TELLING = r"entry: (slice-|exit code|warning)|error: |process \d+ (failed|ends the job)"


def _variables(job: Job, host: Host, hosts: int, devices: int, attempt: int, port: int) -> dict[str, str]:
    """The environment of a host in a slice of so many: the job's, what GKE sets, and what stands for chips."""
    slices = {
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
        "MEGASCALE_NUM_SLICES": str(job.slices),
        "MEGASCALE_SLICE_ID": str(host.slice),
    }
    return {
        **{name: value for name, value in job.env.items() if _holds_here(name, value)},
        "TPU_WORKER_ID": str(host.host),
        "TPU_WORKER_HOSTNAMES": ",".join(["localhost"] * hosts),
        # Where they are not set, jax asks the machine.
        **(slices if job.slices > 1 else dict.fromkeys(slices, "")),
        "SEQMODELS_ATTEMPT": str(attempt),
        **_instead_of_chips(devices, port),
    }


def _instead_of_chips(devices: int, port: int) -> dict[str, str]:
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_FORCE_TPU_INIT": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "JAX_COORDINATOR_PORT": str(port),
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip(),
        # Threads of several processes would fight for the cores.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }


def _holds_here(name: str, value: str) -> bool:
    """Whether a variable of the job's can be set here: it neither speaks of chips nor of a bucket."""
    return name not in _instead_of_chips(0, 0) and not value.startswith("gs://")


def _what_differs(job: Job) -> Iterator[str]:
    """Lines on what the job has on a pod and has not here."""
    if left_out := [name for name, value in job.env.items() if not _holds_here(name, value)]:
        yield f"left out of the environment: {', '.join(left_out)}"
    if missing := [name for name in job.secrets if name not in os.environ]:
        yield f"secrets that are not set here: {', '.join(missing)}"
    for path in job.data:
        if not Path(path).exists():
            yield f"{path} is not here: say where the data is by overriding the config, as --gin.TextData.paths=..."


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM is Ctrl-C, which this process hears even where it was started to ignore it, as in the background."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, previous):
            signal.signal(number, handler)
