"""Finished runs evaluated: what the suites find is what is there, and it is kept in the run directory."""

import argparse
import functools
import json
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import config
from seqmodels.data import MQAR, InductionHeads, NeedleInAHaystack, Passkey
from seqmodels.data.tokenizers import ByteTokenizer
from seqmodels.errors import EXIT_DONE, EXIT_INPUT, InputError
from seqmodels.evaluation.generation import Sampling, encode_prompt, generate
from seqmodels.evaluation.retrieval import string_match_all
from seqmodels.evaluation.spans import make_reader
from seqmodels.files import copy_folder
from seqmodels.models import LanguageModel
from seqmodels.parallel.mesh import make_mesh
from seqmodels.tools._runs import TrainedRun, open_run
from seqmodels.tools.evaluate import command, needle, perplexity, recall
from seqmodels.tools.evaluate.evaluation import Evaluation
from seqmodels.tools.evaluate.needle import answers_found
from seqmodels.tools.evaluate.results import as_markdown, write
from seqmodels.training import make_evaluator
from seqmodels.training.loss import loss_sums
from seqmodels.training.run_directory import read_metrics
from tests.program.programs import SHORT, write_config
from tests.tolerances import TOLERANCES

MQAR_TASK = """
train.data = @MQAR()
MQAR.vocab_size = 64
MQAR.num_kv_pairs = 2
MQAR.random_non_queries = False
"""
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def text_run(train, tmp_path_factory):
    """A run of four steps on text of which half is held out."""
    folder = tmp_path_factory.mktemp("text")
    gin = write_config(folder, more="TextData.held_out_fraction = 0.5\n")
    assert train(["--config", str(gin), "--run_dir", str(folder / "run"), *SHORT]) == EXIT_DONE
    config.clear()
    return folder / "run"


@pytest.fixture(scope="module")
def mqar_run(train, tmp_path_factory):
    """A run of four steps on two pairs in 32 tokens."""
    folder = tmp_path_factory.mktemp("mqar")
    gin = write_config(folder)
    gin.write_text(gin.read_text().partition("TextData.paths")[0] + MQAR_TASK)
    assert train(["--config", str(gin), "--run_dir", str(folder / "run"), *SHORT]) == EXIT_DONE
    config.clear()
    return folder / "run"


def kept(run, name: str) -> dict:
    return json.loads((run / "evaluations" / f"{name}.json").read_text())


class Copier:
    """A model that says what followed the last `order` tokens when they last came.

    says: ids that it says in the place of others.
    """

    vocab_size = ByteTokenizer.vocab_size

    def __init__(self, order: int, says: dict[int, int] | None = None):
        self.order = order
        self.says = np.arange(self.vocab_size)
        for instead_of, token in (says or {}).items():
            self.says[instead_of] = token

    def initial_state(self, batch_size: int, capacity: int):
        return {"tokens": jnp.zeros((batch_size, capacity), jnp.int32), "length": jnp.zeros((), jnp.int32)}

    def apply(self, variables, tokens, state=None, segment_ids=None):
        state = self.initial_state(*tokens.shape) if state is None else state
        seen = jax.lax.dynamic_update_slice(state["tokens"], tokens, (0, state["length"]))
        now, places = state["length"] + jnp.arange(tokens.shape[1]), jnp.arange(seen.shape[1])

        def last_tokens(at):
            return jnp.stack([seen[:, at - back] for back in range(self.order)], axis=-1)

        alike = (last_tokens(now)[:, :, None] == last_tokens(places)[:, None]).all(axis=-1)
        alike &= (places < now[:, None]) & (places >= self.order - 1)
        latest = jnp.max(jnp.where(alike, places, -1), axis=-1)
        followed = jnp.take_along_axis(seen, latest + 1, axis=1)
        said = jnp.where(latest >= 0, jnp.asarray(self.says)[followed], 0)
        state = {"tokens": seen, "length": state["length"] + tokens.shape[1]}
        return 10.0 * jax.nn.one_hot(said, self.vocab_size), state


FINDS_PASS_KEYS = Copier(len("The pass key is"))
MISTAKES_SEVENS = Copier(len("The pass key is"), says={ord("7"): ord("8")})


@functools.cache
def random_model(*pattern: str):
    model = LanguageModel(vocab_size=ByteTokenizer.vocab_size, d_model=16, n_layers=len(pattern), pattern=pattern)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


# Spans


@pytest.mark.parametrize("packed", [False, True])
def test_spans_score_as_the_whole_does(packed):
    """With a state of constant size and with a cache; the last span is a shorter one."""
    model, params = random_model("gated_linear_attention", "softmax_attention")
    random = np.random.default_rng(0)
    batch = {name: random.integers(model.vocab_size, size=(3, 48), dtype=np.int32) for name in ("tokens", "targets")}
    batch["weights"] = (random.random((3, 48)) < 0.8).astype(np.float32)
    if packed:
        batch["segment_ids"] = np.repeat([[1, 2, 3, 0]], 12, axis=1).repeat(3, axis=0).astype(np.int32)

    @jax.jit
    def whole(params, batch):
        logits, _ = model.apply({"params": params}, batch["tokens"], segment_ids=batch.get("segment_ids"))
        return jax.vmap(jax.vmap(loss_sums))(logits, batch["targets"], batch["weights"])

    expected = whole(params, batch)
    parts = list(make_reader(model, span=20)(params, batch))
    assert [part.nll.shape[1] for part in parts] == [20, 20, 8]
    nll = np.concatenate([part.nll for part in parts], axis=1)
    np.testing.assert_allclose(nll, expected.nll, rtol=0, atol=TOLERANCES["model"] * np.abs(expected.nll).max())
    correct = np.concatenate([part.correct for part in parts], axis=1)
    assert (correct == (np.asarray(expected.correct) > 0)).all()


# Perplexity


def test_perplexity_at_the_training_length_is_that_of_training(here, text_run):
    arguments = ("--suite", "perplexity", "--lengths", 32, 256, "--tokens", 10**6, "--span", 16)
    ended = here(command.main, text_run, *arguments)
    assert ended.code == EXIT_DONE, ended
    row = kept(text_run, "perplexity")["rows"][0]
    run = open_run(text_run)
    evaluator = make_evaluator(
        run.job.model,
        lambda: run.job.data.evaluation_batches(4, 32),
        mesh=make_mesh(data=1, devices=jax.devices()[:1]),
        bytes_per_token=run.job.data.bytes_per_token,
    )
    expected = evaluator(run.params)
    config.clear()
    for name in ("loss", "bits_per_byte"):
        assert row[name] == pytest.approx(expected[name], rel=TOLERANCES["model"])
    assert row["perplexity"] == pytest.approx(np.exp(expected["loss"]), rel=TOLERANCES["model"])
    assert row["length"] == 32


def test_perplexity_by_position_averages_to_that_of_the_length(here, text_run):
    ended = here(command.main, text_run, "--suite", "perplexity", "--lengths", 32, 80, 1000)
    assert ended.code == EXIT_INPUT and "32, which does not divide the longest, 1,000" in ended.err
    arguments = ("--lengths", 500, 1000, "--tokens", 2000, "--span", 250, "--last", 488)
    ended = here(command.main, text_run, "--suite", "perplexity", *arguments)
    assert ended.code == EXIT_DONE, ended
    assert "2,000 held-out tokens" in ended.out and "trained on 32 tokens" in ended.out
    short, long = kept(text_run, "perplexity")["rows"]
    found = kept(text_run, "perplexity_by_position")
    positions = [row["position"] for row in found["rows"]]
    assert positions == [16, 32, 64, 128, 256, 512, 1000] and found["x"] == "position"
    losses = [row["loss"] for row in found["rows"]]
    assert np.average(losses, weights=np.diff([0, *positions])) == pytest.approx(long["loss"])
    assert long["perplexity_last"] == pytest.approx(found["rows"][-1]["perplexity"])
    assert short["length"] == 500 and short["perplexity_last"] != pytest.approx(long["perplexity_last"])


def test_lengths_are_by_default_those_that_the_held_out_text_reaches(here, text_run, monkeypatch):
    monkeypatch.setattr(perplexity, "FACTORS", (1, 4, 16384, 32768))
    assert here(command.main, text_run, "--suite", "perplexity", "--tokens", 2048).code == EXIT_DONE
    assert [row["length"] for row in kept(text_run, "perplexity")["rows"]] == [32, 128]


# Needles


@pytest.mark.parametrize(
    ("model", "least", "most"),
    [(FINDS_PASS_KEYS, 100, 100), (MISTAKES_SEVENS, 20, 95), (random_model("gated_linear_attention")[0], 0, 0)],
    ids=["oracle", "flawed", "random"],
)
def test_what_is_scored_is_what_greedy_decoding_writes(model, least, most):
    """Text by text, and in the mean over depths, with texts that span several spans and batches."""
    params = random_model("gated_linear_attention")[1]
    tokenizer, found = ByteTokenizer(), []
    for depth in (0.3, 1.0):
        task = Passkey(depth=depth, num_test_examples=10)
        found.append(answers_found(make_reader(model, span=105), params, task, 420, at_once=4))
        prompts = list(task.test_prompts(420))
        ids = [encode_prompt(tokenizer, prompt.text) for prompt in prompts]
        room = max(len(prompt.answer) for prompt in prompts)
        steps = np.stack(list(generate(model, params, ids, max_tokens=room, sampling=Sampling(0.0))), axis=1)
        written = [tokenizer.decode(row) for row in steps]
        begins = [text.startswith(prompt.answer) for text, prompt in zip(written, prompts)]
        assert found[-1].tolist() == begins
        assert 100 * np.mean(begins) <= string_match_all(written, [[prompt.reference] for prompt in prompts])
    assert least <= 100 * np.mean(found) <= most


@pytest.mark.parametrize("task", [Passkey, *(functools.partial(NeedleInAHaystack, level=n) for n in (1, 2, 3))])
def test_the_needle_is_at_its_depth(task):
    """And it is the same one at every depth."""
    hidden = [[prompt.answer for prompt in task(num_test_examples=5).test_prompts(2000)]]
    for depth, least, most in ((0.0, 0.0, 0.0), (0.5, 0.2, 0.8), (1.0, 1.0, 1.0)):
        prompts = list(task(depth=depth, num_test_examples=5).test_prompts(2000))
        hidden.append([prompt.answer for prompt in prompts])
        for prompt in prompts:
            _, body = prompt.text.split("\n", 1)
            body, _ = body.rsplit("\n", 1)
            before, after = map(str.strip, re.split(rf"[^.?!\n]* is:? {prompt.reference}\.(?: Remember.*)?", body))
            assert len(before) + len(after) > 1000
            assert least <= len(before) / len(before + after) <= most
    assert hidden[0] == hidden[1] == hidden[2] == hidden[3]


def test_a_grid_of_needles(here, text_run):
    arguments = ("--lengths", 400, 300, "--depths", 1, 0.5, 0, "--examples", 3, "--span", 128)
    ended = here(command.main, text_run, "--suite", "needle", *arguments)
    assert ended.code == EXIT_DONE, ended
    found = kept(text_run, "needle")
    cells = [(length, depth) for length in (300, 400) for depth in (0.0, 0.5, 1.0)]
    assert [(row["length"], row["depth"]) for row in found["rows"]] == cells
    assert found["x"] == "length" and found["y"] == "depth" and {row["score"] for row in found["rows"]} == {0.0}
    assert (text_run / "evaluations" / "needle.png").read_bytes().startswith(PNG)
    assert "| 0.5 | 0 | 0 |" in ended.out


def test_what_a_model_writes_can_be_looked_through_for_the_needle(here, text_run, monkeypatch):
    asked = []
    monkeypatch.setattr(needle, "retrieval_score", lambda _, params, *what: asked.append(what) or 50.0)
    arguments = ("--write", "--lengths", 300, "--depths", 0, 1, "--examples", 2, "--name", "written")
    assert here(command.main, text_run, "--suite", "needle", *arguments).code == EXIT_DONE
    assert [(task.depth, task.num_test_examples, length) for task, length in asked] == [(0.0, 2, 300), (1.0, 2, 300)]
    assert [row["score"] for row in kept(text_run, "written")["rows"]] == [50.0, 50.0]


# Recall


def test_recall_at_the_training_length_is_the_evaluation_of_training(here, mqar_run):
    assert here(command.main, mqar_run, "--suite", "recall", "--examples", 8).code == EXIT_DONE
    rows = kept(mqar_run, "recall")["rows"]
    logged = read_metrics(mqar_run / "metrics.jsonl")[-1]
    assert rows == [{"length": 32, "loss": logged["eval/loss"], "accuracy": logged["eval/accuracy"]}]


def test_recall_has_a_row_for_each_combination_that_there_is(here, mqar_run):
    arguments = ("--lengths", 64, 16, "--pairs", 2, 8, "--vary", "random_non_queries=True,False", "--examples", 8)
    ended = here(command.main, mqar_run, "--suite", "recall", *arguments)
    assert ended.code == EXIT_DONE, ended
    found = kept(mqar_run, "recall")
    keys = [(row["length"], row["num_kv_pairs"], row["random_non_queries"]) for row in found["rows"]]
    expected = [(64, 2), (64, 8), (16, 2)]
    assert keys == [(length, pairs, other) for length, pairs in expected for other in ("True", "False")]
    left_out = [note for note in found["notes"] if note.startswith("Left out: length 16, num_kv_pairs 8")]
    assert len(left_out) == 2 and "at least 32" in left_out[0]
    assert found["arguments"]["pairs"] == [2, 8]


def options_of(suite, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    suite.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize("task", [MQAR(vocab_size=64, num_kv_pairs=2, random_non_queries=False), InductionHeads()])
def test_recall_of_an_oracle_and_of_chance(task):
    accuracies = []
    for model in (Copier(1), random_model("gated_linear_attention")[0]):
        job = SimpleNamespace(model=model, data=task, batch_size=4, seq_len=64, loss=loss_sums)
        run = TrainedRun(job, random_model("gated_linear_attention")[1], 0)
        found = recall.evaluate(run, options_of(recall, "--lengths", "32", "64", "--examples", "50"))
        assert [row["length"] for row in found.rows] == [32, 64]
        accuracies.append([row["accuracy"] for row in found.rows])
    assert accuracies[0] == [1.0, 1.0] and max(accuracies[1]) < 0.25


# What is kept


def test_what_is_kept_is_what_was_found(tmp_path):
    first = [{"length": 1, "mixer": "a", "loss": 2.5}, {"length": 1, "mixer": "b", "loss": 0.1}]
    rows = [*first, {"length": 2, "mixer": "a"}]
    evaluation = Evaluation("length", {"loss": "nats", "unused": "m"}, rows, notes=["A sentence."])
    assert evaluation.columns == ["length", "mixer", "loss"] and evaluation.keys == ["length", "mixer"]
    told = write(tmp_path, "some", 7, {"lengths": [1, 2]}, evaluation)
    assert str(tmp_path / "some.json") in told and str(tmp_path / "some.png") in told
    assert json.loads((tmp_path / "some.json").read_text()) == {
        "suite": "some",
        "step": 7,
        "arguments": {"lengths": [1, 2]},
        "x": "length",
        "y": None,
        "units": {"loss": "nats"},
        "rows": rows,
        "notes": ["A sentence."],
    }
    assert "| 2 | a |  |\n\nA sentence." in as_markdown(evaluation)


@pytest.mark.parametrize(
    "rows",
    [
        [{"length": 1, "loss": 1.0, "other": 5}],
        [{"task": "a", "score": 1.0}, {"task": "b", "score": float("nan")}],
        [{"length": n, "loss": 10.0**n} for n in range(20)],
        [{"length": 1}],
    ],
)
def test_every_evaluation_has_a_picture(tmp_path, rows):
    write(tmp_path, "some", 1, {}, Evaluation(next(iter(rows[0])), {}, rows))
    assert (tmp_path / "some.png").read_bytes().startswith(PNG)


def test_without_matplotlib_there_is_no_picture(here, mqar_run, tmp_path, monkeypatch):
    run = shutil.copytree(mqar_run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ended = here(command.main, run, "--suite", "recall", "--examples", 4, "--name", "mine", "--step", 2)
    assert ended.code == EXIT_DONE and "needs matplotlib" in ended.out
    assert [file.name for file in (run / "evaluations").iterdir()] == ["mine.json"]
    assert kept(run, "mine")["step"] == 2


def test_a_run_in_a_bucket(here, gcs, mqar_run):
    copy_folder(mqar_run, "gs://bucket/evaluated")
    ended = here(command.main, "gs://bucket/evaluated", "--suite", "recall", "--examples", 8)
    assert ended.code == EXIT_DONE, ended
    assert {"evaluated/evaluations/recall.json", "evaluated/evaluations/recall.png"} <= set(gcs.objects)


# The command line


def test_the_help_lists_the_suites_and_each_has_its_own(here, monkeypatch):
    def refuse(name):
        raise AssertionError(f"{name} is imported for the help")

    with monkeypatch.context() as patch:
        patch.setattr(command.importlib, "import_module", refuse)
        listed = here(command.main, "--help")
    assert listed.code == EXIT_DONE
    for name, suite in command.SUITES.items():
        assert re.search(rf"^  {name} +{re.escape(suite.summary)}$", listed.out, re.MULTILINE)
    for name in command.SUITES:
        own = here(command.main, "--suite", name, "--help")
        assert own.code == EXIT_DONE and f"\n{name}\n" in own.out and "--step" in own.out


@pytest.mark.parametrize(
    ("run", "arguments", "message"),
    [
        ("text", "", "--suite is missing; expected one of perplexity, needle, recall"),
        ("text", "--suite perplexty", "--suite 'perplexty' does not exist; did you mean 'perplexity'"),
        ("text", "--suite recall --suite needle", "--suite is given 2 times; expected one"),
        ("text", "--suite recall", "recall varies a synthetic task, but the run was trained on TextData"),
        ("text", "--suite needle --task pass_key", "--task 'pass_key' does not exist; did you mean 'passkey'"),
        ("text", "--suite needle --lengths 100", "seq_len is 100; an example without any filler needs"),
        ("text", "--suite needle --depths 1.5", "depth is 1.5; expected 0 .* to 1"),
        ("text", "--suite needle --examples 0", "--examples has 0; expected whole numbers of at least 1"),
        ("text", "--suite perplexity --lengths 32 0", "--lengths has 0; expected whole numbers of at least 1"),
        ("text", "--suite perplexity --lengths 10000000", "no window of 10,000,000 tokens that is more than half full"),
        ("text", "--suite perplexity --lengths 32 --last 33", "--last is 33; expected at most 32"),
        ("text", "--suite perplexity --step 3", "step 3"),
        ("mqar", "--suite perplexity", "perplexity reads text, but the run was trained on MQAR"),
        ("mqar", "--suite needle", "needle reads text, but the run was trained on MQAR, whose tokens stand for none"),
        ("mqar", "--suite recall --vary num_kv_pair=2", "MQAR has no field 'num_kv_pair'; did you mean 'num_kv_pairs'"),
        ("mqar", "--suite recall --vary num_kv_pairs=2.5", "2.5 is no int"),
        ("mqar", "--suite recall --vary num_kv_pairs", "expected FIELD=A,B,..."),
        ("mqar", "--suite recall --pairs 2 --vary num_kv_pairs=4", "--vary gives num_kv_pairs twice"),
        ("mqar", "--suite recall --vary vocab_size=512", "none .* tokens up to 511; expected at most 257"),
        ("mqar", "--suite recall --lengths 7", "none of the combinations .* seq_len is 7"),
        ("empty", "--suite recall", "is not a run directory: it has no config.gin"),
        ("untrained", "--suite recall", "no checkpoint"),
    ],
)
def test_wrong_input(here, request, tmp_path, run, arguments, message):
    if run == "untrained":
        shutil.copytree(request.getfixturevalue("mqar_run"), tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "checkpoints")
    path = request.getfixturevalue(f"{run}_run") if run in ("text", "mqar") else tmp_path / "run"
    ended = here(command.main, path, *arguments.split())
    assert ended.code == EXIT_INPUT, ended
    lines = [line for line in re.split(r"[\r\n]+", ended.err) if line.strip()]
    assert lines[-1].startswith("error: ") and re.search(message, lines[-1]), ended.err
    assert "Traceback" not in ended.err


def test_depths_lie_between_beginning_and_end():
    with pytest.raises(InputError, match=r"depth is -0.1; expected 0"):
        Passkey(depth=-0.1)
