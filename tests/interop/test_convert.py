"""The program that converts: a run made of a published model is one like any other, and what is wrong is one line."""

import json
import shutil

import jax
import numpy as np
import pytest

from seqmodels import interop
from seqmodels.errors import EXIT_DONE, EXIT_INPUT
from seqmodels.tools import convert, generate
from seqmodels.training.checkpoint import restore_parameters
from tests.interop import published
from tests.interop.test_files import config_of
from tests.program.programs import contents, load_train_program, write_texts

pytestmark = pytest.mark.xdist_group("programs")


@pytest.fixture
def folder(tmp_path):
    """A published Mamba-2 with an id for every byte, and a config.json that says more than the function."""
    config = {**config_of("mamba2"), "vocab_size": 258}
    fields = interop.family_of(config).fields(config)
    model = interop.build(fields)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), np.int32))["params"]
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)
    mixed = {"backbone.norm_f.weight": "bfloat16"}
    interop.save(tmp_path / "hf", model, params, dtypes=mixed, extra={"eos_token_id": 5})
    return tmp_path / "hf"


@pytest.fixture
def arguments(tmp_path, folder):
    """What makes a run of it that trains for three steps on small texts."""
    texts = write_texts(tmp_path / "texts")
    short = ("train.steps=3", "train.seq_len=16", "train.batch_size=2", "train.eval_batches=1", "AdamW.warmup_steps=1")
    overrides = [f"--gin.{binding}" for binding in (*short, f"TextData.paths='{texts}'")]
    return ["--from", "hf", "--model", folder, "--out", tmp_path / "run", *overrides]


def test_a_published_model_becomes_a_run_and_comes_back(here, folder, arguments, tmp_path):
    run = tmp_path / "run"
    ended = here(convert.main, *arguments)
    assert ended.code == EXIT_DONE and "Mamba2ForCausalLM" in ended.out, ended

    # It is what it was, in every bit, its file of the config included.
    ended = here(convert.main, "--to", "hf", "--run", run, "--out", tmp_path / "back")
    assert ended.code == EXIT_DONE, ended
    before, after = (published.tensors(path) for path in (folder, tmp_path / "back"))
    assert {name: (x.dtype, x.tobytes()) for name, x in before.items()} == {
        name: (x.dtype, x.tobytes()) for name, x in after.items()
    }
    configs = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "back"))
    assert next(configs) == next(configs)

    # It generates, goes on training, and other runs start from it.
    ended = here(generate.main, "--run", run, "--prompt", "line", "--tokens", "3")
    assert ended.code == EXIT_DONE and ended.err.startswith("step 0"), ended
    start = restore_parameters(run / "checkpoints").state
    train = load_train_program()
    ended = here(train, "--config", run / "config.gin", "--run_dir", run)
    assert ended.code == EXIT_DONE and "continuing after step 0" in ended.out, ended
    more = ["--gin.train.start_from=" + repr(str(run)), "--gin.AdamW.learning_rate=0.0", "--gin.train.steps=2"]
    ended = here(train, "--config", run / "config.gin", "--run_dir", tmp_path / "next", *more)
    assert ended.code == EXIT_DONE and "after step 3" in ended.out, ended
    trained, kept = (restore_parameters(path / "checkpoints").state for path in (run, tmp_path / "next"))
    assert all(map(np.array_equal, jax.tree.leaves(trained), jax.tree.leaves(kept)))
    assert not all(map(np.array_equal, jax.tree.leaves(trained), jax.tree.leaves(start)))

    # The names of its authors, in another precision.
    as_original = ("--architecture", "mamba2_original", "--dtype", "bfloat16")
    ended = here(convert.main, "--to", "hf", "--run", run, "--out", tmp_path / "other", *as_original)
    assert ended.code == EXIT_DONE, ended
    tensors = published.tensors(tmp_path / "other")
    assert "backbone.embedding.weight" in tensors and {str(x.dtype) for x in tensors.values()} == {"bfloat16"}


def test_the_tokenizer_is_carried_along(here, folder, arguments, tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers: pip install -e '.[text]'")
    words = {f"w{i}": i for i in range(257)} | {"<|endoftext|>": 257}
    model = tokenizers.models.WordLevel(words, unk_token="w0")
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))
    assert here(convert.main, *arguments).code == EXIT_DONE
    shutil.rmtree(folder)
    config = (tmp_path / "run" / "config.gin").read_text()
    # It has no token to mask with, and the model no room for one.
    assert f"TextData.tokenizer = '{tmp_path}/run/source/tokenizer.json'" in config
    assert "TextData.mask_token = False" in config
    ended = here(generate.main, "--run", tmp_path / "run", "--prompt", "w1", "--tokens", "2")
    assert ended.code == EXIT_DONE, ended
    ended = here(convert.main, "--to", "hf", "--run", tmp_path / "run", "--out", tmp_path / "back")
    assert ended.code == EXIT_DONE and (tmp_path / "back" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "nowhere"], "nowhere is no folder"),
        (["--run", "x"], "--run belongs to the other direction"),
        (["--gin.train.stepz=3"], "did you mean 'steps'"),
        (["--gin.Retention.num_heads=2"], "Retention.num_heads has no effect"),
        (["--gin.TextData.paths='nowhere'"], "nowhere"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_nothing(here, arguments, tmp_path, more, message):
    ended = here(convert.main, *arguments, *more)
    assert ended.code == EXIT_INPUT and message in ended.err.splitlines()[-1], ended
    assert not (tmp_path / "run").exists()


def test_a_wrong_weight_leaves_nothing(here, folder, arguments, tmp_path):
    weights = published.tensors(folder)
    weights.pop("backbone.norm_f.weight")
    published.write_tensors(folder, weights, json.loads((folder / "config.json").read_text()))
    ended = here(convert.main, *arguments)
    assert ended.code == EXIT_INPUT and ended.err == "error: weight 'backbone.norm_f.weight' is missing\n"
    assert not (tmp_path / "run").exists()


def test_nothing_is_overwritten(here, arguments, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    before = contents(tmp_path)
    ended = here(convert.main, *arguments)
    assert ended.code == EXIT_INPUT and "is there already" in ended.err
    assert contents(tmp_path) == before


def test_wrong_command_lines(here, tmp_path):
    for given, message in (
        (["--to", "hf"], "--run is missing"),
        (["--to", "hf", "--run", tmp_path], "is not a run directory"),
        (["--to", "hf", "--run", tmp_path, "--gin.train.steps=1"], "has no effect: a run has its config"),
        (["--from", "hf"], "--model is missing"),
    ):
        ended = here(convert.main, *given, "--out", tmp_path / "out")
        assert ended.code == EXIT_INPUT and message in ended.err, ended
