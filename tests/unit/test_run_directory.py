"""The folder of a run: created, continued, refused, locked; its metrics after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest

from seqmodels.errors import InputError
from seqmodels.files import GrowingFile, to_path
from seqmodels.training.run_directory import RunDirectory, read_metrics, source_revision
from tests.permissions import unprivileged

CONFIG = "# made by the config\nmodel.width = 64\nmodel.depth = 2\n"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_new_run_then_the_same_again(tmp_path):
    path = tmp_path / "some" / "parents" / "run"
    for start in (1, 2):
        with RunDirectory(path) as run:
            assert (run.finished is None) == (start == 1)
            run.open(CONFIG, "4 x a chip")
            run.write_operative_config("model.width = 64\n")
            run.mark_finished(7, {"loss": 0.1})
            assert run.finished == {"step": 7, "metrics": {"loss": 0.1}}
            assert run.checkpoints.is_dir() and run.tensorboard.is_dir()
        assert (path / "config.gin").read_text() == CONFIG
        assert (path / "operative_config.gin").read_text() == "model.width = 64\n"
        starts = json.loads((path / "environment.json").read_text())
        assert len(starts) == start
        assert {"jax", "numpy"} <= starts[0]["packages"].keys()
        assert starts[0]["command"][1:] == sys.argv
        assert starts[0]["devices"] == "4 x a chip" and starts[0]["processor"] and starts[0]["cores"] == os.cpu_count()
    assert not list(path.glob("*.temporary"))


def test_another_config_is_refused_with_the_lines_that_differ(tmp_path):
    with RunDirectory(tmp_path / "run") as run:
        run.open(CONFIG)
    before = contents(tmp_path / "run")
    with pytest.raises(InputError) as refusal, RunDirectory(tmp_path / "run") as run:
        run.open(CONFIG.replace("64", "128") + "model.heads = 4\n")
    headline, *difference = str(refusal.value).split("\n")
    assert "another run directory" in headline and "config.gin" in headline
    assert difference == ["-model.width = 64", "+model.width = 128", "+model.heads = 4"]
    after = contents(tmp_path / "run")
    assert {name: after[name] for name in before} == before
    with RunDirectory(tmp_path / "run") as run:  # a refusal leaves no lock, and comments are no difference
        run.open(CONFIG.replace("# made by", "# written by"))


def test_a_kill_before_the_config_was_written_leaves_a_folder_that_can_be_used(tmp_path):
    (tmp_path / ".lock").write_text("1\n")
    (tmp_path / "config.gin.temporary").write_text("model.wi")
    (tmp_path / "logs" / "attempt-0").mkdir(parents=True)  # what starts the program writes them
    with RunDirectory(tmp_path) as run:
        run.open(CONFIG)
    assert (tmp_path / "config.gin").read_text() == CONFIG


def test_what_a_sweep_says_of_its_point_may_be_there_first(tmp_path):
    (tmp_path / "point.json").write_text("{}")
    with RunDirectory(tmp_path) as run:
        run.open("train.steps = 1\n")
    assert (tmp_path / "point.json").read_text() == "{}"


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"holds 'thesis\.tex' and no config\.gin"):
        RunDirectory(tmp_path).open(CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("below", ["", "run", "deep/run"])
def test_a_file_in_the_way_is_named(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"^{tmp_path / 'file'} is a file;"):
        RunDirectory(tmp_path / "file" / below).open(CONFIG)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    (tmp_path / "run").mkdir()
    with unprivileged():
        for path in (tmp_path / "run", tmp_path / "new" / "run"):
            with pytest.raises(InputError, match=f"cannot write .*{path}: Permission denied"):
                RunDirectory(path).open(CONFIG)


def test_a_full_disk_is_told_and_leaves_the_old_files(tmp_path):
    """A limit on the size of files makes the system refuse what is written, as a full disk does."""
    program = textwrap.dedent("""
        import resource, sys
        from seqmodels.errors import run_main
        from seqmodels.training.run_directory import RunDirectory
        def main(argv):
            with RunDirectory(argv[0]) as run:
                run.open("a = 1")
                run.append_metrics(1, {"loss": 0.5})
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
                {"operative": lambda: run.write_operative_config("b = 2" * 1000),
                 "metrics": lambda: run.append_metrics(2, {"text": "x" * 2000})}[argv[1]]()
        run_main(main)
    """)
    for what, file in (("operative", "operative_config.gin"), ("metrics", "metrics.jsonl")):
        run = tmp_path / what
        done = subprocess.run(
            [sys.executable, "-c", program, run, what], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"error: cannot write {run / file}: File too large\n"
        assert read_metrics(run / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
        assert not (run / "operative_config.gin").exists()


def test_the_lock_keeps_a_second_program_out_and_dies_with_its_owner(tmp_path):
    program = textwrap.dedent(f"""
        import time
        from seqmodels.training.run_directory import RunDirectory
        run = RunDirectory({str(tmp_path)!r})
        run.open("a = 1")
        time.sleep(60)
    """)
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    try:
        while not (tmp_path / "environment.json").exists():
            assert owner.poll() is None
        with pytest.raises(InputError, match=f"in use by process {owner.pid} on this machine"):
            RunDirectory(tmp_path).open("a = 1")
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    with RunDirectory(tmp_path) as run:
        run.open("a = 1")


def test_metrics_of_a_killed_and_resumed_run_equal_those_of_an_unbroken_one(tmp_path):
    def row(step):
        return {"loss": 1 / (3 + step), "rate": float("nan") if step == 2 else 1e-300 * step}

    texts = []
    for name, torn in (("unbroken", False), ("killed", True)):
        with RunDirectory(tmp_path / name) as run:
            run.open(CONFIG)
            run.cut_metrics(0)
            for step in range(1, 10 if not torn else 7):
                run.append_metrics(step, row(step))
        if torn:
            with run.metrics.open("a") as file:
                file.write('{"step": 7, "lo')
            assert [r["step"] for r in read_metrics(run.metrics)] == [1, 2, 3, 4, 5, 6]
            with RunDirectory(tmp_path / name) as run:
                run.open(CONFIG)
                run.cut_metrics(4)
                for step in range(5, 10):
                    run.append_metrics(step, row(step))
        texts.append(run.metrics.read_text())
    assert texts[0] == texts[1]
    assert read_metrics(run.metrics)[-1] == {"step": 9, **row(9)}


def test_metrics_that_are_none_name_their_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 2}\n')
    with pytest.raises(InputError, match="line 2: expected a JSON object with a step"):
        read_metrics(tmp_path / "metrics.jsonl")
    assert read_metrics(tmp_path / "nothing.jsonl") == []


def test_other_processes_write_nothing(tmp_path):
    with RunDirectory(tmp_path / "run", writer=False) as run:
        run.open(CONFIG)
        run.write_operative_config(CONFIG)
        run.cut_metrics(0)
        run.append_metrics(1, {"loss": 1.0})
        run.mark_finished(1, {})
        assert run.finished is None
    assert not (tmp_path / "run").exists()


def test_the_source_revision_is_that_of_the_checkout():
    found = source_revision()
    head = subprocess.run(
        ["git", "-C", os.path.dirname(__file__), "rev-parse", "--verify", "--quiet", "HEAD"],
        capture_output=True,
        text=True,
    )
    if head.returncode == 0:
        assert found["revision"] == head.stdout.strip()
    else:
        assert found is None or found["revision"] is None


def test_a_container_without_a_checkout_names_its_revision(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert source_revision() is None
    monkeypatch.setenv("SEQMODELS_REVISION", "0123abc")
    assert source_revision() == {"revision": "0123abc"}


def test_a_checkout_is_believed_more_than_a_variable(monkeypatch):
    before = source_revision()
    if before is None:
        pytest.skip("the code is in no checkout")
    monkeypatch.setenv("SEQMODELS_REVISION", "0123abc")
    assert source_revision() == before


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_logs_of_hosts_may_be_there_first(gcs, tmp_path, where):
    path = tmp_path if where == "disk" else to_path("gs://bucket/logs-first")
    with GrowingFile(folder_for(path / "logs" / "attempt-0") / "host-0.log") as log:
        log.write("starting\n")
    with RunDirectory(path) as run:
        run.open(CONFIG)
    assert (path / "config.gin").read_text() == CONFIG


def folder_for(path):
    path.mkdir(parents=True, exist_ok=True)
    return path


def test_a_run_in_a_bucket_is_created_continued_and_refused(gcs):
    path = to_path("gs://bucket/run-directory")
    for start in (1, 2):
        with RunDirectory(path) as run:
            assert (run.finished is None) == (start == 1)
            run.open(CONFIG)
            run.cut_metrics(0)
            run.append_metrics(1, {"loss": 0.5})
            run.mark_finished(1, {"loss": 0.5})
        assert read_metrics(run.metrics) == [{"step": 1, "loss": 0.5}]
        assert len(json.loads((path / "environment.json").read_text())) == start
    with pytest.raises(InputError, match="another config"), RunDirectory(path) as run:
        run.open(CONFIG.replace("64", "128"))
    gcs.put("strange/thesis.tex", b"precious")
    with pytest.raises(InputError, match=r"holds 'thesis\.tex' and no config\.gin"):
        RunDirectory("gs://bucket/strange").open(CONFIG)
    assert gcs.below("strange") == {"thesis.tex": b"precious"}


def test_rows_in_a_bucket_wait_until_they_are_asked_for_or_the_run_is_closed(gcs):
    with RunDirectory("gs://bucket/rows") as run:
        run.open(CONFIG)
        run.cut_metrics(0)
        run.append_metrics(1, {"loss": 1.0})
        assert read_metrics(run.metrics) == []
        run.store_metrics()
        assert [row["step"] for row in read_metrics(run.metrics)] == [1]
        run.append_metrics(2, {"loss": 0.5})
    assert [row["step"] for row in read_metrics(run.metrics)] == [1, 2]
