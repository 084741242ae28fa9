"""The program that tokenises a corpus: what it writes, and what is left when it is stopped."""

import itertools
import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from test_data_tokenizers import train_bpe

from seqmodels.data import TextData
from seqmodels.data.tokens import BLOCK
from seqmodels.errors import EXIT_INPUT, InputError
from seqmodels.tools.tokenize_corpus import main, tokenize_corpus

COMMAND = [sys.executable, "-m", "seqmodels.tools.tokenize_corpus"]


def write_corpus(folder, documents=60, words=2000):
    folder.mkdir()
    rng = random.Random(0)
    for index in range(documents):
        (folder / f"{index}.txt").write_text(
            f"{index} " + " ".join(rng.choices(["plain", "words", "é"], k=words))
        )
    return str(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


def test_shards_and_manifest_add_up(corpus, tmp_path, capsys):
    output = tmp_path / "tokens"
    arguments = ["--input", corpus, "--output", str(output), "--held-out-fraction", "0.1"]
    assert main([*arguments, "--shard-tokens", str(3 * BLOCK)]) == 0
    assert "train: " in capsys.readouterr().out
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["tokenizer"] == "bytes" and manifest["dtype"] == "<u2"
    listed = {name: size for split in manifest["splits"].values() for name, size in split["files"].items()}
    assert listed | {"manifest.json": 0} == {
        file.name: 0 if file.name == "manifest.json" else file.stat().st_size for file in output.iterdir()
    }
    train = manifest["splits"]["train"]
    assert len(train["files"]) - 1 == -(-train["tokens"] // (3 * BLOCK)) > 5
    memory, disk = TextData(corpus, held_out_fraction=0.1).splits, TextData(str(output)).splits
    for side in ("train", "held_out"):
        length = len(disk[side])
        assert length == len(memory[side]) == manifest["splits"][side]["tokens"]
        whole = memory[side].read(0, length)
        assert (disk[side].read(0, length) == whole).all()
        assert (disk[side].separators == memory[side].separators).all()
        for start, stop in itertools.combinations([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, length], 2):
            assert (disk[side].read(start, stop) == whole[start:stop]).all()


def test_file_tokenizer(corpus, tmp_path):
    bpe = train_bpe(tmp_path / "tokenizer.json")
    output = tmp_path / "tokens"
    tokenize_corpus([corpus], str(output), bpe)
    data = TextData(str(output), tokenizer=str(output / "tokenizer.json"))
    memory = TextData(corpus, tokenizer=bpe)
    assert data.vocab_size == memory.vocab_size and data.bytes_per_token == memory.bytes_per_token > 1
    first, second = (source.train_batches(2, 64, seed=0) for source in (data, memory))
    for _ in range(5):
        assert (next(first)["tokens"] == next(second)["tokens"]).all()
    text = data.tokenizer.decode(next(first)["tokens"][0])
    assert set(text.split()) & {"plain", "words", "é"}
    with pytest.raises(InputError, match=r"another tokenizer: set the tokenizer to '.*tokenizer\.json'"):
        next(TextData(str(output), tokenizer="bytes").train_batches(2, 64, 0))
    own = TextData(str(output))  # the tokeniser that the corpus brings
    assert (next(own.train_batches(2, 64, 0))["tokens"] == next(data.train_batches(2, 64, 0))["tokens"]).all()


def test_large_vocabulary_takes_four_bytes(tmp_path):
    import tokenizers

    words = {f"w{index}": index for index in range(70_000)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.save(str(tmp_path / "words.json"))
    (tmp_path / "x.txt").write_text(" ".join(f"w{index}" for index in range(69_000, 70_000)))
    manifest = tokenize_corpus([str(tmp_path / "x.txt")], str(tmp_path / "out"), str(tmp_path / "words.json"))
    assert manifest["dtype"] == "<u4"
    splits = TextData(str(tmp_path / "out"), tokenizer=str(tmp_path / "words.json")).splits
    ids = np.concatenate([tokens.read(1, len(tokens) - 1) for tokens in splits.values()])
    assert list(ids) == list(range(69_000, 70_000))


def test_finished_output_is_never_touched(corpus, tmp_path):
    output = tmp_path / "tokens"
    tokenize_corpus([corpus], str(output))
    before = {file.name: file.stat().st_mtime_ns for file in output.iterdir()}
    with pytest.raises(InputError, match="exists already and is not overwritten"):
        tokenize_corpus([corpus], str(output))
    assert before == {file.name: file.stat().st_mtime_ns for file in output.iterdir()}


def test_killed_run_leaves_no_output_and_the_next_starts_clean(tmp_path):
    corpus, output = tmp_path / "texts", tmp_path / "tokens"
    corpus.mkdir()
    text = random.Random(0).randbytes(2_000_000).hex()
    for index in range(20):
        (corpus / f"{index}.txt").write_text(f"{index} {text}")
    command = [*COMMAND, "--input", str(corpus), "--output", str(output), "--shard-tokens", "1000000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("tokens.incomplete/train-00003*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -9
    assert not output.exists()
    for path in (output, tmp_path / "tokens.incomplete"):
        with pytest.raises(InputError, match=r"no manifest\.json: its tokenisation was interrupted"):
            next(TextData(str(path)).train_batches(1, 16, 0))
    (tmp_path / "tokens.incomplete" / "train-99999.tokens.arrayrecord").write_text("left behind")
    small = write_corpus(tmp_path / "small")
    tokenize_corpus([small], str(output))
    tokenize_corpus([small], str(tmp_path / "clean"))
    assert sorted(os.listdir(output)) == sorted(os.listdir(tmp_path / "clean"))
    assert not (tmp_path / "tokens.incomplete").exists()
    assert next(TextData(str(output)).train_batches(1, 16, 0))["weights"].all()


def test_full_disk_is_one_line_and_leaves_no_output(corpus, tmp_path):
    """A limit on the size of files stands for a disk that is full."""
    output = tmp_path / "tokens"
    limited = ["bash", "-c", 'ulimit -f 50 && exec "$@"', "bash", *COMMAND]
    done = subprocess.run(
        [*limited, "--input", corpus, "--output", str(output)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == EXIT_INPUT
    assert "Traceback" not in done.stderr and "error: cannot write" in done.stderr.splitlines()[-1]
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokenizer", "bite"], "did you mean 'bytes'?"),
        (["--held-out-fraction", "2"], "held_out_fraction is 2.0"),
        (["--input", "/nowhere/x.txt"], "no such file or folder"),
    ],
)
def test_bad_arguments_end_in_one_line(corpus, tmp_path, arguments, message):
    base = ["--input", corpus, "--output", str(tmp_path / "tokens")]
    with pytest.raises(InputError) as error:
        main(base + arguments)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_program_says_what_it_does(corpus, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--input", "--output", "--tokenizer", "--shard-tokens"))
    run = subprocess.run(
        [*COMMAND, "--input", corpus, "--output", str(tmp_path / "tokens")],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "100%" in run.stderr and "B/s" in run.stderr
    assert run.stdout.startswith("train: ")


def test_damaged_corpora_are_refused(corpus, tmp_path):
    output = tmp_path / "tokens"
    tokenize_corpus([corpus], str(output), held_out_fraction=0.1)

    def first_batch(**options):
        return next(TextData(str(output), **options).train_batches(1, 16, 0))

    with pytest.raises(InputError, match=r"tokenised with held_out_fraction 0\.1, not 0\.2"):
        first_batch(held_out_fraction=0.2)
    first_batch(held_out_fraction=0.1)
    with pytest.raises(InputError, match="stands alone"):
        next(TextData([str(output), corpus]).train_batches(1, 16, 0))
    shard = output / "train-00000.tokens.arrayrecord"
    with pytest.raises(InputError, match="is a shard of a tokenised corpus; give its folder"):
        next(TextData(str(shard)).train_batches(1, 16, 0))

    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1000])
    with pytest.raises(InputError, match=r"is damaged: .* tokenise the corpus again"):
        first_batch()
    damaged = bytearray(whole)
    damaged[100 : len(damaged) // 2] = bytes(len(damaged) // 2 - 100)
    shard.write_bytes(damaged)
    with pytest.raises(InputError, match="is damaged"):
        for _ in zip(range(100), TextData(str(output)).train_batches(8, 512, 0)):
            pass
    shard.unlink()
    with pytest.raises(InputError, match="is damaged: missing"):
        first_batch()
    (output / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot read .*manifest\.json"):
        first_batch()
    (output / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(InputError, match="is not of a tokenised corpus"):
        first_batch()
