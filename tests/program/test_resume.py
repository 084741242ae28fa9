"""Runs that stop and go on: by SIGTERM, past a damaged checkpoint, after the end, from another folder."""

import re
import shutil
import signal
import subprocess

import pytest

from seqmodels.errors import EXIT_DONE, EXIT_INPUT, EXIT_RESTART
from seqmodels.tools import generate
from seqmodels.training.checkpoint import list_steps
from tests.program.programs import (
    SHORT,
    STEPS,
    assert_same_run,
    contents,
    damage,
    run_command,
    run_here,
    train_command,
    write_config,
)
from tests.program.test_kill import last_step, wait_for

pytestmark = pytest.mark.xdist_group("programs")


def test_sigterm_then_a_damaged_checkpoint(undisturbed, own_cache, tmp_path):
    run = tmp_path / "run"
    command = train_command(undisturbed.parent / "tiny.gin", run)
    process = subprocess.Popen(
        command, env=own_cache, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: last_step(run) >= STEPS // 4, process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == EXIT_RESTART, err
    *_, before, newest = list_steps(run / "checkpoints")
    assert f"stopped after step {newest} and saved: the same command continues" in out

    damage(run / "checkpoints" / str(newest))
    ended = run_command(command, env=own_cache)
    assert ended.code == EXIT_DONE, ended
    report = (
        rf"checkpoint {re.escape(str(run))}/checkpoints/{newest} is damaged, trying the one before it: .*\n"
    )
    assert re.fullmatch(report, ended.err), ended.err
    assert f"continuing after step {before}\n" in ended.out
    assert (run / "checkpoints" / f"damaged-{newest}").is_dir()
    assert_same_run(run, undisturbed)


def test_a_finished_run_is_left_as_it_is(train, undisturbed, monkeypatch, capsys):
    before = contents(undisturbed)
    del before[".lock"]
    arguments = ["--config", undisturbed.parent / "tiny.gin", "--run_dir", undisturbed]
    ended = run_here(train, arguments, monkeypatch, capsys)
    assert ended.code == EXIT_DONE and ended.err == ""
    assert f"finished at step {STEPS}, nothing left to do" in ended.out
    assert before == {name: hash for name, hash in contents(undisturbed).items() if name != ".lock"}


def test_paths_may_be_relative(train, tmp_path, monkeypatch, capsys):
    """As they are in the README's command."""
    write_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", "tiny.gin", "--run_dir", "runs/tiny"]
    ended = run_here(train, [*arguments, *SHORT], monkeypatch, capsys)
    assert ended.code == EXIT_DONE and ended.err == "", ended
    again = run_here(train, [*arguments, *SHORT], monkeypatch, capsys)
    assert again.code == EXIT_DONE and "nothing left to do" in again.out
    written = run_here(
        generate.main, ["--run", "runs/tiny", "--prompt", "line 1", "--tokens", "5"], monkeypatch, capsys
    )
    assert written.code == EXIT_DONE and written.out.startswith("line 1"), written


def test_other_texts_are_refused(train, undisturbed, tmp_path, monkeypatch, capsys):
    """A run does not go on with another corpus than it began with."""
    shutil.copytree(undisturbed.parent / "texts", tmp_path / "texts")
    config = write_config(tmp_path)
    arguments = ["--config", config, "--run_dir", tmp_path / "run"]
    assert run_here(train, [*arguments, *SHORT], monkeypatch, capsys).code == EXIT_DONE
    (tmp_path / "run" / "DONE").unlink()
    shutil.copy(config, tmp_path / "texts" / "another.txt")
    before = contents(tmp_path / "run" / "checkpoints")
    refused = run_here(train, [*arguments, *SHORT], monkeypatch, capsys)
    assert refused.code == EXIT_INPUT and refused.err.count("\n") == 1, refused
    assert "was trained on other data" in refused.err
    assert contents(tmp_path / "run" / "checkpoints") == before
