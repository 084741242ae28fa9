"""What a person can get wrong on a command line: one clear line, exit code 2, and nothing lost or left behind."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from seqmodels.errors import EXIT_DONE, EXIT_INPUT
from seqmodels.tools import generate, tokenize_corpus
from seqmodels.training import RunDirectory
from seqmodels.training.run_directory import read_metrics
from tests.program.programs import (
    SHORT,
    Ended,
    contents,
    damage,
    run_command,
    train_command,
    write_config,
    write_texts,
)

pytestmark = pytest.mark.xdist_group("programs")


@pytest.fixture
def gin(tmp_path):
    """The config file of the tiny job."""
    return write_config(tmp_path)


def assert_refused(ended: Ended, message: str) -> None:
    """Exit code 2 and one line that begins with `error: ` and contains `message` (a regular expression).

    Only the differences of two configs may follow it, and only a progress bar stand before it.
    """
    assert ended.code == EXIT_INPUT, ended
    lines = [line for line in re.split(r"[\r\n]+", ended.err) if line]
    first, *more = [line for line in lines if not line.startswith("tokenising: ")]
    assert first.startswith("error: ") and re.search(message, first), ended.err
    assert all(re.match(r"[-+]\S+ = ", line) for line in more), ended.err


# Configs. None of them may leave a run directory behind.


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("LanguageModle.d_model=32", "named 'LanguageModle': did you mean 'LanguageModel'"),
        ("LanguageModel.d_modle=32", "no parameter 'd_modle': did you mean 'd_model'"),
        ("SGD.momentum=0.5", "SGD.momentum has no effect: this job never calls SGD"),
        ("small/AdamW.b1=0.5", "small/AdamW.b1 has no effect: AdamW is never called in scope 'small'"),
        ("train.steps='ten'", "train.steps = 'ten': expected int, got str"),
        ("train.data=3", "train.data = 3: expected Dataset, got int"),
        ("train.steps=%STEPS", "no macro or constant is named 'STEPS'"),
        ("STEPS=4", "nothing refers to the macro 'STEPS'"),
        ("train.steps=[4", "syntax error in 'train.steps=.4'"),
        ("train.steps", "is not an override; write --gin.NAME.PARAMETER=VALUE"),
        ("train.steps=0", "train.steps is 0: expected a whole number of at least 1"),
        ("train.seed=-1", "seed is -1; expected 0 to"),
        ("train.accumulate=3", "train.batch_size is 4: expected a multiple of 3"),
        ("LanguageModel.vocab_size=100", "vocab_size is 100, but the data has tokens up to 257"),
        ("GatedLinearAttention.num_heads=3", "8 is not divisible by 3 heads"),
        ("LanguageModel.pattern=()", "pattern is empty; expected at least one mixer"),
        ("LanguageModel.pattern=('retenton',)", "mixer 'retenton' does not exist; did you mean 'retention'"),
        ("LanguageModel.mlp=@TextData", "mlp = @TextData: expected .*Module.*, got a constructor"),
        ("LanguageModel.remat='dot'", "remat = 'dot' does not exist; did you mean 'dots'"),
        ("LanguageModel.norm='rmsnrom'", "norm 'rmsnrom' does not exist; did you mean 'rmsnorm'"),
        ("GatedLinearAttention.form='chunkd'", "form='chunkd' .* did you mean 'chunked'"),
        ("GatedLinearAttention.backend='palas'", "backend='palas' does not exist"),
        ("GatedLinearAttention.chunk_size=0", "chunk_size=0; expected a positive number"),
        ("AdamW.schedule='cosin'", "unknown schedule 'cosin': did you mean 'cosine'"),
        ("AdamW.warmup_steps=50", "warmup_steps is 50: .* less than the 40 steps"),
        ("AdamW.weight_decay_rules=[('embd', 0.0)]", "'embd' matches no parameter; the nearest is"),
        ("TextData.packing='packd'", "packing is 'packd'; did you mean 'pack'"),
        ("TextData.paths='/nowhere/text.txt'", "no such file or folder: /nowhere/text.txt"),
        ("TextData.paths='/nowhere/*.txt'", "pattern /nowhere/.*txt matches no file"),
        ("TextData.tokenizer='gpt2'", "tokenizer 'gpt2' is no file; expected 'bytes' or the path"),
    ],
)
def test_wrong_override(here, train, gin, tmp_path, override, message):
    before = contents(tmp_path)
    ended = here(train, "--config", gin, "--run_dir", tmp_path / "run", f"--gin.{override}")
    assert_refused(ended, message)
    assert contents(tmp_path) == before


def test_wrong_feature_map(here, train, gin, tmp_path):
    overrides = [
        "--gin.LanguageModel.pattern=('linear_attention',)",
        "--gin.LinearAttention.feature_map='tailor'",
    ]
    ended = here(train, "--config", gin, "--run_dir", tmp_path / "run", *overrides)
    assert_refused(ended, "feature map 'tailor' does not exist; did you mean 'taylor'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("include 'sizes/tny.gin'", r"tiny.gin:\d+: cannot include 'sizes/tny.gin'"),
        ("train.steps = = 3", r"tiny.gin:\d+: syntax error in 'train.steps = = 3'"),
        ("train.steps = ten", r"tiny.gin:\d+: syntax error .* a string needs quotes"),
        ("train.stesp = 3", r"tiny.gin:\d+: train has no parameter 'stesp': did you mean 'steps'"),
        ("import os", r"tiny.gin:\d+: 'import' has no use here"),
        ("include 'tiny.gin'", r"tiny.gin:\d+: include cycle"),
    ],
)
def test_wrong_line_in_a_config(here, train, tmp_path, line, message):
    gin = write_config(tmp_path, more=line)
    assert_refused(here(train, "--config", gin, "--run_dir", tmp_path / "run"), message)
    assert not (tmp_path / "run").exists()


def test_config_that_is_not_there(here, train, gin, tmp_path):
    ended = here(train, "--config", tmp_path / "tny.gin", "--run_dir", tmp_path / "run")
    assert_refused(ended, "config file '.*tny.gin' does not exist; did you mean 'tiny.gin'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("program", "prog"),
    [
        ("train", "train.py"),
        (generate.main, "seqmodels.tools.generate"),
        (tokenize_corpus.main, "tokenize_corpus"),
    ],
)
def test_unknown_flag(here, request, program, prog):
    program = request.getfixturevalue(program) if isinstance(program, str) else program
    ended = here(program, "--stpes", "4")
    assert ended.code == EXIT_INPUT
    assert ended.err.startswith("usage: ") and f"{prog}: error: " in ended.err.splitlines()[-1]


# Data


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "the corpus is empty: no file has any text in it"),
        ("binary.txt", b"a\0b", "binary.txt is not text: it has a zero byte"),
        ("torn.txt.gz", b"\x1f\x8b", "cannot read .*torn.txt.gz"),
        ("picture.png", b"png", "unknown suffix '.png'"),
    ],
)
def test_unreadable_corpus(here, train, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    gin = write_config(tmp_path, paths=tmp_path / name)
    assert_refused(here(train, "--config", gin, "--run_dir", tmp_path / "run"), message)
    output = tmp_path / "tokens"
    assert_refused(here(tokenize_corpus.main, "--input", tmp_path / name, "--output", output), message)
    assert not (tmp_path / "run").exists() and not output.exists()


def test_folder_without_texts(here, train, tmp_path):
    (tmp_path / "nothing").mkdir()
    gin = write_config(tmp_path, paths=tmp_path / "nothing")
    ended = here(train, "--config", gin, "--run_dir", tmp_path / "run")
    assert_refused(ended, "has nothing to read: it holds no files at all")


def test_broken_tokenizer_file(here, train, gin, tmp_path):
    broken = tmp_path / "tokenizer.json"
    broken.write_text('{"version": "1.0"')
    ended = here(
        train, "--config", gin, "--run_dir", tmp_path / "run", f"--gin.TextData.tokenizer='{broken}'"
    )
    assert_refused(ended, "tokenizer.json is not a tokenizer.json of the Hugging Face tokenizers")
    assert not (tmp_path / "run").exists()


def test_interrupted_tokenisation(here, train, tmp_path):
    texts, tokens = write_texts(tmp_path / "texts"), tmp_path / "tokens"
    assert here(tokenize_corpus.main, "--input", texts, "--output", tokens).code == EXIT_DONE
    interrupted = tokens.rename(tmp_path / "tokens.incomplete")
    (interrupted / "manifest.json").unlink()
    for paths in (tokens, interrupted):
        gin = write_config(tmp_path, paths=paths)
        ended = here(train, "--config", gin, "--run_dir", tmp_path / "run")
        assert_refused(ended, "its tokenisation was interrupted; run seqmodels.tools.tokenize_corpus again")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokenizer", "bites"], "did you mean 'bytes'"),
        (["--held-out-fraction", "1.5"], "held_out_fraction is 1.5"),
        (["--input", "/nowhere"], "no such file or folder: /nowhere"),
        (["--output", "/sys/tokens"], "cannot write /sys/tokens"),
        (["--output", "{texts}"], "exists already and is not overwritten"),
    ],
)
def test_wrong_arguments_of_tokenize_corpus(here, tmp_path, arguments, message):
    texts = write_texts(tmp_path / "texts")
    before = contents(tmp_path)
    base = ["--input", texts, "--output", tmp_path / "tokens"]
    ended = here(tokenize_corpus.main, *base, *(text.format(texts=texts) for text in arguments))
    assert_refused(ended, message)
    assert contents(tmp_path) == before


def test_any_sequence_length_works(here, train, gin, tmp_path):
    """37 is a multiple of no chunk, no block and no vector register."""
    overrides = ["--gin.train.seq_len=37", "--gin.train.steps=3"]
    ended = here(train, "--config", gin, "--run_dir", tmp_path / "run", *overrides)
    assert ended.code == EXIT_DONE and ended.err == ""
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row] == [
        1,
        2,
        3,
    ]


# The run directory


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory at `folder`; skips the test where programs may not mount one."""
    folder.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("only root can mount a file system of its own")
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    """Change a mounted file system's options."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@pytest.mark.parametrize("run", ["/sys/run", "/proc/self/run", "{gin}", "{gin}/run", "{texts}"])
def test_run_directory_that_cannot_be(here, train, gin, tmp_path, run):
    run = run.format(gin=gin, texts=tmp_path / "texts")
    message = "cannot write the run directory|is a file; the run directory|is not a run directory: it holds"
    before = contents(tmp_path)
    assert_refused(here(train, "--config", gin, "--run_dir", run), message)
    assert contents(tmp_path) == before


def test_read_only_run_directory(here, train, gin, tmp_path, finished_run):
    with mounted(tmp_path / "disk", "size=16m") as disk:
        shutil.copytree(finished_run, disk / "run")
        (disk / "run" / "DONE").unlink()
        before = contents(disk)
        remount(disk, "ro")
        gin = finished_run.parent / "tiny.gin"
        for run in (disk / "run", disk / "new"):
            ended = here(train, "--config", gin, "--run_dir", run, *SHORT)
            assert_refused(ended, f"cannot write (the run directory )?{run}.*Read-only file system")
        assert contents(disk) == before


@pytest.mark.parametrize("room", ["16k", "96k"])
def test_full_disk(tmp_path, finished_run, room):
    """The first is too small for the rows of the metrics, the second for a checkpoint."""
    gin = write_config(tmp_path)
    with mounted(tmp_path / "disk", f"size={room}") as disk:
        command = train_command(gin, disk / "run", *SHORT)
        assert_refused(run_command(command), "cannot write .*No space left on device")
        remount(disk, "size=16m")
        ended = run_command(command)
        assert ended.code == EXIT_DONE and ended.err == ""
        rows = read_metrics(disk / "run" / "metrics.jsonl")
        assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]


def test_limit_on_file_sizes(tmp_path):
    """What every account can set, and some systems do: 8 blocks of 1,024 bytes."""
    gin = write_config(tmp_path)
    limited = ["bash", "-c", 'ulimit -f 8 && exec "$@"', "bash"]
    command = limited + train_command(gin, tmp_path / "run", *SHORT)
    # A compiled program is larger than that: it could not be kept whole.
    ended = run_command(command, env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"})
    assert_refused(ended, "cannot write .*File too large")


def test_run_of_another_config(here, train, finished_run):
    before = contents(finished_run)
    gin = finished_run.parent / "tiny.gin"
    ended = here(train, "--config", gin, "--run_dir", finished_run, "--gin.train.steps=9")
    assert_refused(ended, "is a run with another config; name another run directory to start a new run")
    assert sorted(ended.err.splitlines()[1:]) == [
        "+train.checkpoint_every = 4",
        "+train.steps = 9",
        "-train.checkpoint_every = 2",
        "-train.steps = 4",
    ]
    assert contents(finished_run) == before


def test_run_directory_in_use(here, train, gin, tmp_path):
    with RunDirectory(tmp_path / "run") as run:
        run.open("")
        before = contents(tmp_path)
        ended = here(train, "--config", gin, "--run_dir", tmp_path / "run")
        assert_refused(
            ended, f"is in use by process {os.getpid()} on this machine; wait for it, stop it, or name"
        )
        assert contents(tmp_path) == before


def test_batch_that_the_devices_do_not_divide(tmp_path):
    gin = write_config(tmp_path)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=3"
    command = train_command(gin, tmp_path / "run")
    ended = run_command(command, env=os.environ | {"XLA_FLAGS": flags})
    assert_refused(ended, r"train.batch_size is 4: expected a multiple of 3 \(3 devices")
    assert not (tmp_path / "run").exists()


# Checkpoints


@pytest.fixture
def unfinished_run(finished_run, tmp_path):
    """A run that has two checkpoints and thinks that it has to go on, and the arguments to do so."""
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    (run / "DONE").unlink()
    arguments = ["--config", finished_run.parent / "tiny.gin", "--run_dir", run]
    return run, [*arguments, *SHORT]


def test_checkpoint_of_another_shape(here, train, unfinished_run):
    run, arguments = unfinished_run
    config = run / "config.gin"
    config.write_text(config.read_text().replace("LanguageModel.d_model = 16", "LanguageModel.d_model = 32"))
    kept = contents(run / "checkpoints"), (run / "metrics.jsonl").read_text()
    ended = here(train, *arguments, "--gin.LanguageModel.d_model=32")
    assert_refused(
        ended, r"array '.*' in checkpoint .*/4 is float32 \(.*16.*\); this model expects float32 \(.*32"
    )
    assert kept == (contents(run / "checkpoints"), (run / "metrics.jsonl").read_text())


def test_every_checkpoint_damaged(here, train, unfinished_run):
    run, arguments = unfinished_run
    for step in (2, 4):
        damage(run / "checkpoints" / str(step))
    kept = contents(run / "checkpoints"), (run / "metrics.jsonl").read_text()
    ended = here(train, *arguments)
    *reports, error = ended.err.splitlines()
    assert [line.split(" is damaged")[0][-2:] for line in reports] == ["/4", "/2"]
    assert_refused(
        ended._replace(err=error), r"every checkpoint in .* is damaged \(4, 2\); nothing was changed"
    )
    assert kept == (contents(run / "checkpoints"), (run / "metrics.jsonl").read_text())


def test_metrics_that_are_none(here, train, unfinished_run):
    run, arguments = unfinished_run
    (run / "metrics.jsonl").write_text("step 1: loss 5.0\n")
    kept = contents(run)
    assert_refused(here(train, *arguments), "metrics.jsonl, line 1: expected a JSON object with a step")
    assert kept.items() <= (contents(run) | {name: kept[name] for name in ("environment.json",)}).items()


# Generation


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompt was given; expected --prompt TEXT or --prompts FILE"),
        (
            ["--prompts", "/nowhere/prompts.txt"],
            "--prompts /nowhere/prompts.txt cannot be read: .*No such file",
        ),
        (["--prompt", "a", "--tokens", "0"], "--tokens is 0; expected at least 1"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0; expected 0 or more"),
        (["--prompt", "a", "--temperature", "nan"], "temperature is nan; expected 0 or more"),
        (["--prompt", "a", "--top_k", "0"], "top_k is 0; expected at least 1"),
        (["--prompt", "a", "--top_p", "0"], "top_p is 0.0; expected more than 0 and at most 1"),
        (["--prompt", "a", "--top_p", "1.5"], "top_p is 1.5; expected more than 0 and at most 1"),
        (["--prompt", "a", "--step", "3"], "no checkpoint of step 3 in .*; there are 2, 4"),
        (["--prompt", "a", "--run", "/nowhere"], "/nowhere is not a run directory: it has no config.gin"),
    ],
)
def test_wrong_arguments_of_generate(here, finished_run, arguments, message):
    before = contents(finished_run)
    assert_refused(here(generate.main, "--run", finished_run, *arguments), message)
    assert contents(finished_run) == before


def test_prompts_that_are_none(here, finished_run, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    ended = here(generate.main, "--run", finished_run, "--prompts", tmp_path / "empty.txt")
    assert_refused(ended, "no prompt was given")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    ended = here(generate.main, "--run", finished_run, "--prompts", tmp_path / "binary.txt")
    assert_refused(ended, "binary.txt cannot be read")


def test_generate_without_a_checkpoint(here, unfinished_run):
    run, _ = unfinished_run
    shutil.rmtree(run / "checkpoints")
    assert_refused(
        here(generate.main, "--run", run, "--prompt", "a"), "no checkpoint in .*checkpoints; expected"
    )


def test_generate_from_damaged_checkpoints(here, unfinished_run):
    run, _ = unfinished_run
    for step in (2, 4):
        damage(run / "checkpoints" / str(step))
    ended = here(generate.main, "--run", run, "--prompt", "a")
    assert_refused(ended._replace(err=ended.err.splitlines()[-1]), "every checkpoint in .* is damaged")


def test_generate_from_a_run_without_text(here, train, tmp_path):
    gin = write_config(tmp_path, more="train.data = @MQAR()\nMQAR.vocab_size = 64\nMQAR.num_kv_pairs = 2\n")
    lines = [line for line in gin.read_text().splitlines() if not line.startswith("TextData.")]
    gin.write_text("\n".join(lines))
    run = tmp_path / "run"
    overrides = ["--gin.train.steps=1", "--gin.AdamW.warmup_steps=0"]
    assert here(train, "--config", gin, "--run_dir", run, *overrides).code == EXIT_DONE
    ended = here(generate.main, "--run", run, "--prompt", "a")
    assert_refused(ended, "was trained on MQAR, whose tokens stand for no text")


def test_tool_in_a_process_of_its_own(tmp_path):
    """That nothing but the line reaches the terminal, which the tests in this process cannot show."""
    command = [sys.executable, "-m", "seqmodels.tools.generate", "--run", str(tmp_path), "--prompt", "a"]
    assert_refused(run_command(command), "is not a run directory: it has no config.gin")
