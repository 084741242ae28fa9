"""Runs in a bucket: as on a disk, to the byte, whenever they are killed; and what is told when the bucket refuses."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from seqmodels import config
from seqmodels.errors import EXIT_DONE, EXIT_INPUT, EXIT_RESTART
from seqmodels.files import to_path
from seqmodels.tools import generate
from seqmodels.training.checkpoint import list_steps
from tests.fake_gcs import BUCKET, FakeGCS, Request
from tests.program.programs import (
    CHECKPOINT_EVERY,
    REPOSITORY,
    SHORT,
    STEPS,
    Ended,
    assert_same_run,
    run_command,
    run_here,
    train_command,
    write_config,
)
from tests.program.test_processes import MIXED, run_job

pytestmark = pytest.mark.xdist_group("programs")

PATIENCE = 120.0


@pytest.fixture
def key(request) -> str:
    """The run directory of the test within the bucket."""
    return f"runs/{re.sub(r'[^a-z0-9_]', '-', request.node.name)}"


@pytest.fixture
def run(gcs, key) -> str:
    return f"gs://{BUCKET}/{key}"


@pytest.fixture
def here(monkeypatch, capsys):
    return lambda program, *arguments: run_here(program, arguments, monkeypatch, capsys)


def assert_refused(ended: Ended, message: str, code: int = EXIT_INPUT) -> None:
    """One line that begins with `error: ` and contains `message`. The storage library says on its own by which account
    it asks."""
    lines = [line for line in ended.err.splitlines() if "google_auth_provider" not in line]
    assert ended.code == code and len(lines) == 1 and lines[0].startswith("error: "), ended
    assert re.search(message, lines[0]), ended.err


def steps_of(metrics: bytes) -> list[int]:
    return [json.loads(line)["step"] for line in metrics.splitlines()]


def killed(gcs: FakeGCS, command: list[str], when: Callable[[Request], bool], *, done: bool, env) -> str:
    """Start a command and kill it in the first write or deletion for which `when` holds: before the bucket has done it,
    or when it is `done` and not answered yet. Returns which one that was."""
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    struck: list[Request] = []

    def strike(request: Request) -> int | None:
        if not struck and request.action in ("write", "delete") and when(request):
            struck.append(request)
        if struck and request != struck[0]:
            return 503  # what else is on its way does not arrive
        if struck:
            process.kill()
            return None if done else 503
        return None

    try:
        with gcs.ruled(strike):
            out, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGKILL, (struck, out[-3000:])
    return f"{struck[0].action} of {struck[0].key}{', done' if done else ''}"


@pytest.fixture(scope="module")
def rows_before() -> dict[int, list[int]]:
    """Of `short_run`: by step of a checkpoint, the steps whose rows were in the bucket before anything of it was."""
    return {}


@pytest.fixture(scope="module")
def short_run(gcs, train, finished_run, rows_before) -> str:
    """The folder of a finished run of four steps in the bucket, of the config of `finished_run`. For reading only."""
    key = "runs/short"

    def look(request: Request) -> None:
        saved = re.match(rf"{key}/checkpoints/(\d+)/", request.key)
        if request.action == "write" and saved:
            rows_before.setdefault(int(saved[1]), steps_of(gcs.objects[f"{key}/metrics.jsonl"]))

    with gcs.ruled(look):
        arguments = ["--config", str(finished_run.parent / "tiny.gin"), "--run_dir", f"gs://{BUCKET}/{key}", *SHORT]
        assert train(arguments) == EXIT_DONE
    config.clear()
    return key


@pytest.fixture
def arguments(finished_run, run) -> list:
    """Those of `short_run`, in the test's own folder."""
    return ["--config", finished_run.parent / "tiny.gin", "--run_dir", run, *SHORT]


def test_a_run_in_a_bucket_equals_one_on_a_disk(gcs, short_run, finished_run, rows_before):
    ours = gcs.below(short_run)
    for name in ("config.gin", "operative_config.gin", "metrics.jsonl", "DONE", "checkpoints/4/record/metadata"):
        assert ours[name] == (finished_run / name).read_bytes(), name
    assert {name for name in ours if "/" not in name} == {path.name for path in finished_run.glob("[!.]*.*")} | {"DONE"}
    # The rows of a checkpoint's steps were there before it was; 4 has one of an evaluation as well.
    assert rows_before[2][:2] == [1, 2] and rows_before[4] == [1, 2, 3, 4, 4]


def test_a_finished_run_in_a_bucket_is_left_as_it_is(gcs, short_run, arguments, train, here):
    before, arguments[3] = gcs.below(short_run), f"gs://{BUCKET}/{short_run}"
    again = here(train, *arguments)
    assert (again.code, again.err) == (EXIT_DONE, "") and "short: finished at step 4, nothing left to do" in again.out
    other = here(train, *arguments, "--gin.train.steps=9")
    assert other.code == EXIT_INPUT and "is a run with another config" in other.err
    assert sorted(other.err.splitlines()[1:]) == ["+train.steps = 9", "-train.steps = 4"]
    assert gcs.below(short_run) == before


def test_what_is_in_a_bucket_can_be_used(gcs, short_run, here, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ((name, data),) = gcs.below(f"{short_run}/tensorboard").items()
    (tmp_path / name).write_bytes(data)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert {"eval/loss", "speed/tokens_per_second"} <= set(events.Tags()["scalars"])
    written = here(generate.main, "--run", f"gs://{BUCKET}/{short_run}", "--prompt", "line 1", "--tokens", "5")
    assert written.code == EXIT_DONE and written.out.startswith("line 1"), written


@pytest.mark.parametrize("done", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_kill_in_the_middle_of_a_save_leaves_no_trace(gcs, key, arguments, finished_run, own_cache, done):
    """Where all but the last object of a checkpoint is there, or where it is but nobody knows."""
    command = [sys.executable, str(REPOSITORY / "train.py"), *map(str, arguments)]
    # A deletion of the same name comes before it.
    last = Request("write", BUCKET, f"{key}/checkpoints/4/commit_success.txt")
    killed(gcs, command, lambda request: request == last, done=done, env=own_cache | gcs.environment)
    assert "checkpoints/4/_CHECKPOINT_METADATA" in gcs.below(key) and "DONE" not in gcs.below(key)
    ended = run_command(command, env=own_cache | gcs.environment)
    assert ended.code == EXIT_DONE and f"continuing after step {4 if done else 2}\n" in ended.out, ended
    for name in ("metrics.jsonl", "DONE", "checkpoints/4/record/metadata"):
        assert gcs.below(key)[name] == (finished_run / name).read_bytes(), name
    assert len(json.loads(gcs.below(key)["environment.json"])) == 2


@pytest.mark.slow
def test_a_long_run_in_a_bucket_equals_one_on_a_disk(gcs, key, run, undisturbed, own_cache):
    ended = run_command(train_command(undisturbed.parent / "tiny.gin", run), env=own_cache | gcs.environment)
    assert ended.code == EXIT_DONE, ended
    assert_same_run(to_path(run), undisturbed)
    # Rows are put before checkpoints and evaluations, not each of them.
    assert gcs.written.count(f"{key}/metrics.jsonl") <= 4 + STEPS // CHECKPOINT_EVERY + 2 * STEPS // 10


@pytest.mark.slow
def test_kills_in_the_middle_of_saves_leave_no_trace(gcs, key, run, undisturbed, own_cache):
    command, env = train_command(undisturbed.parent / "tiny.gin", run), own_cache | gcs.environment
    array = re.compile(rf"{key}/checkpoints/8/state/ocdbt.*/d/.*")
    moments = [killed(gcs, command, lambda request: bool(array.fullmatch(request.key)), done=True, env=env)]
    assert any(name.startswith("checkpoints/8/") for name in gcs.below(key))
    assert list_steps(f"{run}/checkpoints") == [4]
    commit = f"{key}/checkpoints/24/commit_success.txt"
    # A deletion of the same name comes before it.
    when = lambda request: request == Request("write", BUCKET, commit)  # noqa: E731
    moments.append(killed(gcs, command, when, done=False, env=env))
    assert list_steps(f"{run}/checkpoints")[-1] == 20
    ended = run_command(command, env=env)
    note = f"killed in {'; '.join(moments)}"
    assert ended.code == EXIT_DONE and "continuing after step 20\n" in ended.out, (ended, note)
    assert_same_run(to_path(run), undisturbed, note)
    assert len(json.loads(gcs.below(key)["environment.json"])) == 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_kills_in_any_write_leave_no_trace(gcs, key, run, undisturbed, own_cache, seed):
    """Of any file, done or not; and at any time."""
    chance = random.Random(seed)
    command, env = train_command(undisturbed.parent / "tiny.gin", run), own_cache | gcs.environment
    moments: list[str] = []
    # In the second half the run could end before the blow falls.
    while len(moments) < 6 and max(list_steps(f"{run}/checkpoints"), default=0) < STEPS // 2:
        left = chance.randrange(1, 120)

        def count(request: Request) -> bool:
            nonlocal left
            left -= 1
            return left == 0

        moments.append(killed(gcs, command, count, done=chance.random() < 0.5, env=env))
    ended = run_command(command, env=env)
    note = f"seed {seed}, killed in {'; '.join(moments)}"
    assert ended.code == EXIT_DONE, (ended, note)
    assert_same_run(to_path(run), undisturbed, note)


def test_a_damaged_checkpoint_is_passed_over(gcs, key, run, short_run, arguments, train, here):
    for name, data in gcs.below(short_run).items():
        if name.startswith("checkpoints/4/state/") and "/d/" in name:
            data = bytes(byte ^ 1 for byte in data)
        if name != "DONE":
            gcs.put(f"{key}/{name}", data)
    ended = here(train, *arguments)
    assert ended.code == EXIT_DONE and "continuing after step 2\n" in ended.out, ended
    assert re.fullmatch(rf"checkpoint {run}/checkpoints/4 is damaged, trying the one before it: .*\n", ended.err)
    assert gcs.below(key)["metrics.jsonl"] == gcs.below(short_run)["metrics.jsonl"]
    assert list_steps(f"{run}/checkpoints") == [2, 4] and gcs.below(f"{key}/checkpoints/damaged-4")


@pytest.mark.parametrize(
    "refused", ["list", "write", *(pytest.param(x, marks=pytest.mark.slow) for x in ("/2/", "rows"))]
)
def test_a_right_that_is_missing_is_one_line(gcs, key, run, arguments, train, here, refused):
    """403 for an action, for writing a checkpoint, or for all rows but the first."""

    def rule(request: Request) -> int | None:
        in_name = refused in request.key if refused != "rows" else gcs.objects.get(request.key) == b""
        return 403 if refused == request.action or (request.action == "write" and in_name) else None

    with gcs.ruled(rule):
        ended = here(train, *arguments)
    assert_refused(
        ended, rf"gs://{BUCKET} does not let this account do so \(403\); expected .* roles/storage.objectUser"
    )
    assert run in ended.err
    if refused in ("/2/", "rows"):
        assert here(train, *arguments).code == EXIT_DONE
        assert steps_of(gcs.below(key)["metrics.jsonl"]) == [1, 2, 3, 4, 4]


def test_a_bucket_that_is_not_there_is_one_line(gcs, arguments, train, here):
    arguments[3] = "gs://buckut/run"
    ended = here(train, *arguments)
    assert_refused(ended, r"there is no bucket gs://buckut \(404\)")
    ended = here(generate.main, "--run", "gs://buckut/run", "--prompt", "a")
    assert_refused(ended, "gs://buckut")


@pytest.mark.slow
def test_a_run_starts_from_one_in_a_bucket_and_is_traced_into_one(gcs, key, short_run, arguments, train, here):
    more = [f"--gin.train.start_from='gs://{BUCKET}/{short_run}'", "--gin.train.profile_steps=(2, 3)"]
    ended = here(train, *arguments, *more)
    assert ended.code == EXIT_DONE and f"{short_run} after step 4" in ended.out, ended
    assert any(name.endswith(".xplane.pb") for name in gcs.below(f"{key}/profile"))


@pytest.mark.slow
def test_a_bucket_that_cannot_be_reached_asks_for_a_restart(gcs, key, arguments, own_cache):
    """After half a minute of trying again. The same command goes on."""
    command, env = [sys.executable, str(REPOSITORY / "train.py"), *map(str, arguments)], own_cache | gcs.environment
    lost = lambda request: 503 if f"{key}/checkpoints/4/" in request.key and "record" in request.key else None  # noqa: E731
    with gcs.ruled(lost):
        ended = run_command(command, env=env)
    assert_refused(ended, rf"gs://{BUCKET} cannot be reached \(503\); that of step 2 is intact", EXIT_RESTART)
    ended = run_command(command, env=env)
    assert ended.code == EXIT_DONE and "continuing after step 2\n" in ended.out


@pytest.mark.slow
def test_two_processes_are_one_job_in_a_bucket(gcs, key, run, tmp_path, monkeypatch):
    for name, value in gcs.environment.items():
        monkeypatch.setenv(name, value)
    gin = write_config(tmp_path, "train.steps = 8\ntrain.eval_every = 4\n")
    run_job(2, 2, gin, tmp_path / "disk", *MIXED)
    run_job(2, 2, gin, run, *MIXED)
    assert gcs.below(key)["metrics.jsonl"] == (tmp_path / "disk" / "metrics.jsonl").read_bytes()
    assert gcs.below(key)["parameters.txt"] == (tmp_path / "disk" / "parameters.txt").read_bytes()
    assert list_steps(f"{run}/checkpoints") == [4, 8]
    # A kill of both before the second checkpoint was committed, and before anybody knew that it is the end.
    for name in ("DONE", "checkpoints/8/commit_success.txt"):
        del gcs.objects[f"{key}/{name}"]
    assert "continuing after step 4" in run_job(2, 2, gin, run, *MIXED)
    assert gcs.below(key)["metrics.jsonl"] == (tmp_path / "disk" / "metrics.jsonl").read_bytes()


def test_compiled_programs_are_found_again_in_a_bucket(gcs, key, run):
    program = (
        "from seqmodels.start_up import prepare_jax; prepare_jax(); import jax; print(jax.jit(lambda x: x * 3)(2))"
    )
    asked = {"JAX_COMPILATION_CACHE_DIR": run, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    requests: list[Request] = []
    for start in (1, 2):
        requests.clear()
        with gcs.ruled(lambda request: requests.append(request)):
            ended = run_command(
                [sys.executable, "-c", program], env=os.environ | gcs.environment | asked, cwd=REPOSITORY
            )
        assert (ended.code, ended.out, ended.err) == (0, "6\n", "")
        written = {request.key for request in requests if request.action == "write"}
        entries = {f"{key}/{name}" for name in gcs.below(key)}
        assert entries and written == (entries if start == 1 else set())
    assert entries <= {request.key for request in requests if request.action == "read"}
