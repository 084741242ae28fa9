"""The entry: however the program ends, a code of the contract, and what it said is kept."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gcp import entry
from seqmodels.errors import EXIT_DEFECT, EXIT_DONE, EXIT_INPUT, EXIT_RESTART
from tests.gcp.pods import log_of
from tests.permissions import unprivileged
from tests.program.programs import REPOSITORY


def command(run_dir: Path | str, *program: str) -> list[str]:
    return [sys.executable, "-m", "gcp.entry", "--run_dir", str(run_dir), "--", *program]


def start(run_dir: Path | str, *program: str, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(run_dir, *program), cwd=REPOSITORY, env=os.environ | variables, stdout=subprocess.PIPE, text=True
    )


def ended(run_dir: Path | str, program: str, **variables: str) -> tuple[int, str]:
    """Exit code and output of the entry of `python -c program`."""
    with start(run_dir, "-c", program, **variables) as process:
        said, _ = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (0, EXIT_DONE),
        (1, EXIT_DEFECT),
        (2, EXIT_INPUT),
        (42, EXIT_RESTART),
        *((-number, EXIT_RESTART) for number in (signal.SIGABRT, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM)),
        *((code, EXIT_RESTART) for code in (130, 134, 137, 139, 143)),
        *((code, EXIT_DEFECT) for code in (3, 41, 43, 126, 127, 128, 255)),
    ],
)
def test_every_end_has_a_code_of_the_contract(status, code):
    assert entry.outcome(status, asked=False)[0] == entry.outcome(status, asked=True)[0] == code


def test_a_signal_that_nobody_sent_is_said_to_be_a_loss():
    assert entry.outcome(-signal.SIGABRT, asked=False)[1] == "ended by SIGABRT, taken for a lost process"
    assert entry.outcome(-signal.SIGTERM, asked=True)[1] == "ended by SIGTERM"
    assert "127" in entry.outcome(127, asked=False)[1]


def test_output_and_errors_are_kept_in_order_and_the_log_begins_and_ends_with_the_entrys_words(tmp_path):
    program = """
import os, sys
print("to output")
print("to errors", file=sys.stderr)
os.write(2, b"\\xff no text\\n")
"""
    variables = {"MEGASCALE_SLICE_ID": "1", "TPU_WORKER_ID": "3", "SEQMODELS_ATTEMPT": "2"}
    with subprocess.Popen(
        command(tmp_path, "-c", program), cwd=REPOSITORY, env=os.environ | variables, stdout=subprocess.PIPE
    ) as process:
        said = process.stdout.read()
    log = tmp_path / "logs/attempt-2/slice-1-host-3.log"
    assert process.returncode == 0 and log.read_bytes() == said
    lines = said.split(b"\n")
    assert lines[0].startswith(b"entry: slice-1-host-3, attempt 2: process ")
    assert b"jax " in lines[1] and b"libtpu" in lines[1] and b"runs python -c" in lines[2]
    assert lines[-5:] == [b"to output", b"to errors", b"\xff no text", b"entry: exit code 0, done", b""]


def test_a_second_attempt_of_the_same_number_is_appended(tmp_path):
    for word in ("first", "second"):
        ended(tmp_path, f"print({word!r})", MEGASCALE_SLICE_ID="", TPU_WORKER_ID="")
    log = log_of(tmp_path, "slice-0-host-0")
    assert log.count("entry: exit code 0") == 2 and log.index("first") < log.index("second")


@pytest.mark.parametrize(
    ("program", "code", "last"),
    [
        ("raise SystemExit(1)", EXIT_DEFECT, "a defect"),
        ("raise SystemExit(2)", EXIT_INPUT, "an input is wrong"),
        ("raise SystemExit(3)", EXIT_DEFECT, "the program ended with 3"),
    ],
)
def test_what_the_program_ends_with_is_passed_on_at_once(tmp_path, program, code, last):
    before = time.monotonic()
    assert (found := ended(tmp_path, program))[0] == code
    assert last in found[1].splitlines()[-1] and time.monotonic() - before < entry.GRACE


def test_a_request_to_start_again_is_reported_late(tmp_path):
    """So that the host is reported before that is preempted, or has a defect."""
    before = time.monotonic()
    code, said = ended(tmp_path, "raise SystemExit(42)")
    assert code == EXIT_RESTART and time.monotonic() - before > entry.GRACE
    assert said.endswith("entry: exit code 42, to be started again\n")


def test_an_abort_is_reported_late_as_the_loss_of_a_process(tmp_path):
    before = time.monotonic()
    code, said = ended(tmp_path, "import os; os.write(2, b'last words'); os.abort()")
    assert code == EXIT_RESTART and time.monotonic() - before > entry.GRACE
    assert "last words" in said and "ended by SIGABRT, taken for a lost process" in said.splitlines()[-1]


def test_a_request_to_end_cuts_the_wait_short(tmp_path):
    before = time.monotonic()
    with start(tmp_path, "-c", "import os; print('here'); os.abort()") as process:
        while process.stdout.readline() != "here\n":
            pass
        time.sleep(0.3)
        process.terminate()
        assert process.wait(60) == EXIT_RESTART
    assert time.monotonic() - before < entry.GRACE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_end_reaches_the_program_once(tmp_path, number):
    program = f"""
import signal, sys, time
times = []
signal.signal({int(number)}, lambda *_: times.append(1))
print("ready")
while not times:
    time.sleep(0.01)
time.sleep(0.2)
print(f"asked {{len(times)}} times")
sys.exit(42)
"""
    with start(tmp_path, "-c", program) as process:
        while process.stdout.readline() != "ready\n":
            pass
        process.send_signal(number)
        said = process.stdout.read()
        assert process.wait(60) == EXIT_RESTART
    assert "asked 1 times\n" in said


def test_a_program_that_a_request_ends_is_to_be_started_again(tmp_path):
    before = time.monotonic()
    with start(tmp_path, "-c", "import time; print('ready'); time.sleep(60)") as process:
        while process.stdout.readline() != "ready\n":
            pass
        process.terminate()
        assert process.stdout.read().endswith("to be started again: ended by SIGTERM\n")
        assert process.wait(60) == EXIT_RESTART
    assert time.monotonic() - before < entry.GRACE


def is_running(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="there is no such request elsewhere")
def test_the_program_does_not_outlive_its_entry(tmp_path):
    with start(tmp_path, "-c", "import os, time; print(os.getpid()); time.sleep(60)") as process:
        while not (line := process.stdout.readline()).strip().isdecimal():
            pass
        process.kill()
    deadline = time.monotonic() + 30
    while is_running(int(line)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_the_program_leaves_behind_does_not_hold_the_entry(tmp_path):
    """A process that keeps the pipe open, in the program's group."""
    program = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    before = time.monotonic()
    assert ended(tmp_path, program)[0] == EXIT_DONE
    assert time.monotonic() - before < entry.LAST_OUTPUT


@pytest.mark.parametrize("name", ["logs", "run"])
def test_a_log_that_cannot_be_written_costs_one_warning(tmp_path, name):
    """A file stands where a folder is to be."""
    file = tmp_path / "run" / name if name == "logs" else tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    code, said = ended(tmp_path / "run", "for i in range(100): print('line', i, flush=True)")
    assert code == EXIT_DONE and said.count("warning") == 1 and "line 99" in said
    assert file.read_text() == ""


def test_nobody_reads_standard_output_and_the_log_has_it_all(tmp_path):
    with start(tmp_path, "-c", "for i in range(1000): print('line', i, flush=True)") as process:
        process.stdout.close()
        assert process.wait(60) == EXIT_DONE
    log = log_of(tmp_path, "slice-0-host-0")
    assert "line 999" in log and log.endswith("entry: exit code 0, done\n")


def test_a_folder_that_may_not_be_written_costs_one_warning(tmp_path, capfdbinary):
    tmp_path.chmod(0o500)
    with unprivileged():
        log = entry.Log(str(tmp_path / "logs" / "log"))
        log.write(b"line\n")
        log.close()
    tmp_path.chmod(0o700)
    warning, line = capfdbinary.readouterr().out.splitlines()
    assert warning.startswith(b"entry: warning: no more is written to ") and line == b"line"


def test_the_last_line_names_the_step_of_a_finished_run(tmp_path):
    (tmp_path / "DONE").write_text('{"step": 7}')
    assert ended(tmp_path, "")[1].endswith("exit code 0, done: the run is finished at step 7\n")
    (tmp_path / "DONE").write_text("torn")
    assert ended(tmp_path, "")[1].endswith("exit code 0, done\n")


def test_the_log_of_a_run_in_a_bucket_is_there(gcs):
    run = "gs://bucket/runs/logged"
    gcs.put("runs/logged/DONE", b'{"step": 7}')
    code, said = ended(run, "print('a line')", **gcs.environment, TPU_WORKER_ID="3", SEQMODELS_ATTEMPT="2")
    log = gcs.below("runs/logged")["logs/attempt-2/slice-0-host-3.log"].decode()
    assert code == EXIT_DONE and "a line" in log and log == said
    assert log.endswith("exit code 0, done: the run is finished at step 7\n")


def test_a_bucket_that_refuses_the_log_costs_one_warning(gcs):
    with gcs.ruled(lambda request: 403):
        code, said = ended("gs://bucket/runs/refused", "print('a line')", **gcs.environment)
    assert code == EXIT_DONE and said.count("warning") == 1 and "a line" in said
    assert "does not let this account do so (403)" in said


@pytest.mark.parametrize("arguments", [["--run_dir", "x"], ["--run_dir", "x", "--"], ["--", "train.py"]])
def test_a_wrong_command_line(tmp_path, arguments):
    done = subprocess.run(
        [sys.executable, "-m", "gcp.entry", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == EXIT_INPUT and "Traceback" not in done.stderr
