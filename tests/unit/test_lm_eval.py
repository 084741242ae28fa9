"""The suite `lm_eval`: the harness is told what our own scoring says, on tasks over local files."""

import argparse
import functools
import json
import math
import sys
import tomllib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from seqmodels.data.tokenizers import ByteTokenizer
from seqmodels.errors import InputError
from seqmodels.evaluation.generation import Sampling, encode_prompt, write_until
from seqmodels.evaluation.likelihood import encode_pair, score_continuations, score_texts, windows
from seqmodels.models import LanguageModel
from seqmodels.tools.evaluate import lm_eval as suite
from tests.program.programs import REPOSITORY
from tests.tolerances import TOLERANCES

BYTES = ByteTokenizer()
TASKS = REPOSITORY / "docs" / "lm_eval"
CLOSE = {"rel": TOLERANCES["model"]}


@functools.cache
def tiny_run() -> SimpleNamespace:
    model = LanguageModel(
        vocab_size=258, d_model=16, n_layers=1, pattern=("gated_linear_attention",), tie_embeddings=False
    )
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    job = SimpleNamespace(model=model, data=SimpleNamespace(tokenizer=BYTES))
    return SimpleNamespace(job=job, params=jax.tree.map(lambda x: 4 * x, params), step=1)


def options_of(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    suite.add_arguments(parser)
    return parser.parse_args(arguments)


def evaluate(*arguments: str) -> dict[tuple[str, str], dict]:
    """The rows, by task and metric."""
    evaluation = suite.evaluate(tiny_run(), options_of(*arguments))
    assert evaluation.x == "task"
    return {(row["task"], row["metric"]): row for row in evaluation.rows}


def items_of(task: str) -> list[dict]:
    return [json.loads(line) for line in (TASKS / f"{task}.jsonl").read_text().splitlines()]


def test_one_line_says_how_to_get_the_harness(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in ("lm_eval.api.instance", "lm_eval.api.model", "lm_eval.evaluator", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "seqmodels.evaluation.harness", raising=False)
    with pytest.raises(InputError, match=r"needs the package 'lm_eval.*': pip install -e '.\[lm-eval\]'"):
        evaluate("--tasks", "hellaswag")


def test_every_extra_is_found_by_any_pip():
    """Some take an extra whose name has an underscore for one that is not there, and go on without it."""
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "lm-eval" in extras
    assert not [name for name in extras if not name.replace("-", "").isalnum()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "0"], "--limit is 0; expected at least 1"),
        (["--num_fewshot", "-1"], "--num_fewshot is -1; expected at least 0"),
        (["--batch_size", "0"], "--batch_size is 0; expected at least 1"),
        (["--max_length", "0"], "--max_length is 0; expected at least 1"),
        (["--include_path", "nowhere"], "--include_path nowhere is no folder"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        evaluate("--tasks", "x", *arguments)


def test_a_run_without_text_has_no_harness():
    run = SimpleNamespace(job=SimpleNamespace(data=SimpleNamespace(tokenizer=None)))
    with pytest.raises(InputError, match="needs text, but the run was trained on SimpleNamespace"):
        suite.evaluate(run, options_of("--tasks", "x"))


# With the harness


@pytest.fixture
def harness(monkeypatch):
    """Our adapter; tasks of `docs/lm_eval` name their files as seen from the repository."""
    pytest.importorskip("lm_eval", reason="the extra `lm-eval` is not installed")
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    from lm_eval import tasks

    from seqmodels.evaluation import harness

    # The thousands of tasks that the harness brings take long to find.
    monkeypatch.setattr(harness, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    return harness


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


def test_tasks_are_scored_as_by_hand(harness):
    run = tiny_run()
    rows = evaluate("--tasks", "python_*", "--include_path", str(TASKS), "--batch_size", "8")

    items = items_of("python_next_line")
    scores = [
        [score.log_likelihood for score in score_continuations(run.job.model, run.params, pairs, batch_size=8)]
        for pairs in ([encode_pair(BYTES, item["before"], choice) for choice in item["choices"]] for item in items)
    ]
    right = [of_item.index(max(of_item)) == item["answer"] for of_item, item in zip(scores, items)]
    accuracy = sum(right) / len(items)
    row = rows["python_next_line", "acc"]
    assert row["value"] == pytest.approx(accuracy)
    assert row["stderr"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / (len(items) - 1)))
    assert (row["samples"], row["shots"], row["shortened"], row["filter"]) == (len(items), 0, 0, "none")

    texts = [(REPOSITORY / name).read_bytes() for name in ("train.py", "seqmodels/errors.py", "seqmodels/notation.py")]
    scores = score_texts(run.job.model, run.params, [list(text) for text in texts], BYTES.separator, batch_size=8)
    bits = -sum(scores) / sum(map(len, texts)) / math.log(2)
    assert rows["python_files", "bits_per_byte"]["value"] == pytest.approx(bits, **CLOSE)
    assert rows["python_files", "byte_perplexity"]["value"] == pytest.approx(2**bits, **CLOSE)
    assert "stderr" not in rows["python_files", "bits_per_byte"]

    items = items_of("python_words")
    prompts = [encode_prompt(BYTES, item["before"]) for item in items]
    stops = (" ", "\n", "(", ")", "[", ",", ".", ":")
    written = write_until(run.job.model, run.params, BYTES, prompts, max_tokens=16, stops=stops, batch_size=8)
    exact = sum(text == item["after"] for text, item in zip(written, items)) / len(items)
    assert rows["python_words", "exact_match"]["value"] == pytest.approx(exact)


def test_examples_and_limits_reach_the_harness(harness):
    few = ["--include_path", str(TASKS), "--limit", "3", "--num_fewshot", "2"]
    [row, _] = evaluate("--tasks", "python_next_line", *few, "--max_length", "60").values()
    assert (row["samples"], row["shots"]) == (3, 2)
    assert 0 < row["shortened"] <= 9


def request(*arguments, task="a task") -> SimpleNamespace:
    return SimpleNamespace(args=arguments, task_name=task)


def test_requests_are_answered_in_their_order_and_documents_begin_with_a_separator(harness):
    run = tiny_run()
    model = harness.HarnessModel(run.job.model, run.params, BYTES, batch_size=2)
    texts = [("", "abc"), ("a long context, ", "b"), ("a", "bc")]
    found = model.loglikelihood([request(*pair) for pair in texts], disable_tqdm=True)
    [whole] = model.loglikelihood_rolling([request("abc")], disable_tqdm=True)
    [a] = model.loglikelihood([request("", "a")], disable_tqdm=True)
    assert found[0][0] == pytest.approx(whole, **CLOSE)
    assert a[0] + found[2][0] == pytest.approx(whole, **CLOSE)
    bare = harness.HarnessModel(run.job.model, run.params, BYTES, bare_context=True)
    [without, same] = bare.loglikelihood([request("a", "bc"), request("", "abc")], disable_tqdm=True)
    assert without[0] != pytest.approx(found[2][0], rel=1e-2)
    assert same[0] == pytest.approx(found[0][0], **CLOSE)


def test_tasks_that_write_differently_are_written_apart(harness):
    run = tiny_run()
    model = harness.HarnessModel(run.job.model, run.params, BYTES)
    ways = [{"max_gen_toks": 4}, {"max_gen_toks": 9, "until": "\n"}, {"max_gen_toks": 4}]
    written = model.generate_until([request("ab", way) for way in ways], disable_tqdm=True)
    assert written[0] == written[2]
    assert written[1].startswith(written[0]) and len(written[1]) > len(written[0])


def test_what_does_not_fit_is_counted_by_task(harness):
    run = tiny_run()
    model = harness.HarnessModel(run.job.model, run.params, BYTES, max_length=8)
    model.loglikelihood([request("a" * 20, "b", task="x"), request("a", "b", task="x")], disable_tqdm=True)
    model.loglikelihood_rolling([request("a" * 20, task="y")], disable_tqdm=True)
    model.generate_until([request("a" * 20, {"max_gen_toks": 2}, task="z")], disable_tqdm=True)
    assert model.shortened == {"x": 1, "y": 1, "z": 1}
    with pytest.raises(InputError, match="max_length is 8, but the task 'z' writes up to 9 tokens"):
        model.generate_until([request("a", {"max_gen_toks": 9}, task="z")], disable_tqdm=True)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 23])
def test_long_texts_are_cut_as_the_harness_cuts_them(harness, length):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    text = list(range(length))
    theirs = map(make_disjoint_window, get_rolling_token_windows(text, 99, max_seq_len=8, context_len=1))
    assert [(list(context), list(continuation)) for context, continuation in windows(text, 99, 8)] == list(theirs)


GREEDY = Sampling(0.0)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, (256, (), GREEDY)),
        ({"until": "\n", "max_gen_toks": 5}, (5, ("\n",), GREEDY)),
        ({"until": ["a", "", "b"], "max_new_tokens": 7}, (7, ("a", "b"), GREEDY)),
        ({"do_sample": False, "temperature": 0.7}, (256, (), GREEDY)),
        ({"temperature": 0.0, "num_beams": 1}, (256, (), GREEDY)),
        ({"temperature": 0.7, "top_p": 0.9}, (256, (), Sampling(0.7, top_p=0.9))),
        ({"do_sample": True, "top_k": 0}, (256, (), Sampling(1.0))),
        ({"do_sample": True, "temperature": 0.2, "top_k": 40}, (256, (), Sampling(0.2, top_k=40))),
    ],
)
def test_how_a_task_wants_text(harness, kwargs, expected):
    assert harness.read_generation_kwargs(kwargs) == expected


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_beams": 4}, "of the task 't': num_beams is 4; expected 1"),
        ({"temprature": 1}, "temprature is 1, which is not known here; did you mean 'temperature'?"),
    ],
)
def test_what_cannot_be_done_is_refused(harness, kwargs, message):
    with pytest.raises(InputError, match=message):
        harness.read_generation_kwargs(kwargs, "t")


def test_wrong_tasks_end_in_one_line(harness, tmp_path):
    with pytest.raises(InputError, match="there is no task 'python_word'; did you mean 'python_words'"):
        evaluate("--tasks", "python_word", "--include_path", str(TASKS))
    text = (TASKS / "python_words.yaml").read_text()
    (tmp_path / "lost.yaml").write_text(text.replace("docs/lm_eval", "nowhere").replace("python_words", "lost"))
    with pytest.raises(InputError, match=r"^lost: the data cannot be read: .*nowhere") as error:
        evaluate("--tasks", "lost", "--include_path", str(tmp_path))
    assert "\n" not in str(error.value)
