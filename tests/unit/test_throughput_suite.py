"""The suite `throughput`: its rows, what its bytes are, and what it leaves out. How fast anything is, is not tested."""

import argparse
import ast
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from seqmodels import registry
from seqmodels.data.synthetic import MQAR, LinearRegression
from seqmodels.errors import InputError
from seqmodels.models import LanguageModel, Regressor
from seqmodels.models.accounting import tree_bytes
from seqmodels.tools._measuring import extrapolated
from seqmodels.tools._runs import TrainedRun
from seqmodels.tools.evaluate import throughput
from seqmodels.training import TrainingJob
from tests.conformance.compare import assert_close
from tests.tolerances import TOLERANCES

EXPERIMENT = Path(__file__).parents[2] / "configs/experiments/throughput.gin"
LENGTHS = (16, 32)
COLUMNS = set(throughput.UNITS)


@functools.cache
def tiny_run(mixer: str = "linear_attention") -> TrainedRun:
    model = LanguageModel(vocab_size=16, d_model=16, n_layers=1, pattern=(mixer,), mlp=None)
    job = TrainingJob(model=model, data=MQAR(vocab_size=16, num_kv_pairs=2), batch_size=2, seq_len=16, accumulate=2)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return TrainedRun(job, params, 1)


def options(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    throughput.add_arguments(parser)
    fast = ["--lengths", *map(str, LENGTHS), "--decode_batch", "2", "--decoded", "4", "--span", "8"]
    return parser.parse_args([*fast, *given])


@functools.cache
def evaluated(mixer: str):
    run = tiny_run(mixer)
    before = jax.tree.map(jnp.copy, run.params)
    evaluation = throughput.evaluate(run, options())
    return evaluation, jax.tree.all(jax.tree.map(jnp.array_equal, before, run.params))


MIXERS = ["linear_attention", "softmax_attention"]


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_length_has_a_whole_row_of_positive_numbers_and_the_run_stays_as_it_is(mixer):
    evaluation, unchanged = evaluated(mixer)
    assert evaluation.x == "length" and set(evaluation.units) == COLUMNS
    assert [row["length"] for row in evaluation.rows] == list(LENGTHS)
    for row in evaluation.rows:
        assert set(row) == COLUMNS and all(value > 0 for value in row.values())
    assert json.loads(json.dumps(evaluation.rows)) == evaluation.rows
    assert unchanged


def test_training_bytes_are_arguments_and_temporaries_of_the_step_that_is_measured():
    evaluation, _ = evaluated("linear_attention")
    training = throughput._Training(tiny_run(), LENGTHS[-1])
    for row in evaluation.rows:
        with jax.set_mesh(training._mesh):
            step, program, state, batch = training.compiled(row["length"])
        analysis = program.memory_analysis()
        assert row["training_bytes"] == analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
        key = jax.random.key_data(state.key)
        given = (state.params, state.opt_state, state.step, key, batch, step.hyperparameters)
        assert analysis.argument_size_in_bytes == tree_bytes(given)


@pytest.mark.parametrize("tokens", [32, 96])
def test_a_batch_has_the_same_number_of_tokens_at_every_length(tokens):
    training = throughput._Training(tiny_run(), tokens)
    for length in LENGTHS:
        batch = training.batch(length)
        assert batch["tokens"].shape == batch["targets"].shape == (tokens // length, length)
        assert int(batch["tokens"].max()) < 16 and batch["weights"].min() == 1


def states(decoding: throughput._Decoding, length: int):
    limits = throughput._Limits(1e12, 1e6, powers=(1, 2))
    with limits.cell(length):
        return decoding.states(length, limits)


@pytest.mark.parametrize("mixer", MIXERS)
def test_state_bytes_are_those_of_the_states_that_are_decoded_with(mixer):
    evaluation, _ = evaluated(mixer)
    decoding = throughput._Decoding(tiny_run(mixer), options())
    for row in evaluation.rows:
        assert tree_bytes(states(decoding, row["length"])) == 2 * row["state_bytes"]
    short, long = (row["state_bytes"] for row in evaluation.rows)
    assert long > short if mixer == "softmax_attention" else long == short


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_text_is_read_up_to_the_tokens_that_are_decoded_whatever_its_spans(mixer):
    run = tiny_run(mixer)
    text = throughput._random({"tokens": jax.ShapeDtypeStruct((2, 28), jnp.int32)}, 16)["tokens"]
    _, expected = run.job.model.apply({"params": run.params}, text, run.job.model.initial_state(2, 32))
    at_once, in_spans, less = (
        states(throughput._Decoding(run, options("--decoded", decoded, "--span", span)), 32)
        for decoded, span in (("4", "28"), ("4", "9"), ("8", "9"))
    )
    assert_close(at_once, expected, TOLERANCES["model"], "read at once: ")
    assert_close(in_spans, expected, TOLERANCES["model"], "read in spans: ")
    with pytest.raises(AssertionError):
        assert_close(less, expected, TOLERANCES["model"], "read less far: ")


def left_out(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if "left out" in line]


def test_a_cell_that_takes_too_long_is_left_out_with_the_reason_and_so_are_longer_ones(capsys):
    _, _, rows, _, notes = throughput.evaluate(tiny_run(), options("--max_seconds", "1e-6"))
    assert [set(row) for row in rows] == [{"length", "training_bytes", "state_bytes"}, {"length", "state_bytes"}]
    told = left_out(capsys)
    assert notes[1:] == [f"{line}." for line in told]
    assert len(told) == 4 and all("over the limit of 1e-06" in line for line in told)
    assert [line.partition(" left")[0] for line in told[:2]] == ["length 16, training:", "length 16, decoding:"]
    assert all("takes at least" in line for line in told[:2]) and all("expected to take" in line for line in told[2:])


def test_what_does_not_fit_the_memory_is_left_out_with_the_reason(capsys):
    whole = evaluated("softmax_attention")[0].rows
    between = [row["state_bytes"] * 4 + tree_bytes(tiny_run("softmax_attention").params) for row in whole]
    limit = sum(between) / 2
    assert limit < min(row["training_bytes"] for row in whole)
    rows = throughput.evaluate(tiny_run("softmax_attention"), options("--max_bytes", str(limit))).rows
    assert [set(row) for row in rows] == [
        COLUMNS - {"training_tokens_per_second"},
        COLUMNS - {"training_tokens_per_second", "decoding_tokens_per_second"},
    ]
    told = left_out(capsys)
    assert len(told) == 3 and all("needs" in line and "over the limit" in line for line in told)


def test_memory_that_runs_out_leaves_a_cell_out_and_a_defect_does_not(capsys, monkeypatch):
    def fail(message: str):
        def measure(self, row, limits):
            raise jax.errors.JaxRuntimeError(message)

        monkeypatch.setattr(throughput._Training, "measure", measure)

    fail("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes")
    rows = throughput.evaluate(tiny_run(), options("--lengths", "16")).rows
    assert set(rows[0]) == COLUMNS - {"training_tokens_per_second", "training_bytes"}
    assert "Out of memory allocating 8 bytes" in left_out(capsys)[0]
    fail("INTERNAL: a defect")
    with pytest.raises(jax.errors.JaxRuntimeError, match="a defect"):
        throughput.evaluate(tiny_run(), options("--lengths", "16"))


def test_a_model_that_does_not_decode_is_measured_in_training_alone(capsys):
    body = LanguageModel(vocab_size=1, d_model=8, n_layers=1, pattern=("linear_attention",), mlp=None)
    model = Regressor(body=body, input_size=3)
    job = TrainingJob(model=model, data=LinearRegression(dim=2), batch_size=2, seq_len=16)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4, 3)))["params"]
    rows = throughput.evaluate(TrainedRun(job, params, 1), options("--lengths", "16")).rows
    assert [set(row) for row in rows] == [{"length", "training_tokens_per_second", "training_bytes"}]
    assert "Regressor does not decode" in left_out(capsys)[0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--lengths", "16", "24"], "--lengths has 16, which does not divide 24"),
        (["--tokens", "48"], "--tokens is 48; expected a multiple of every length, 32"),
        (["--decoded", "16"], "--lengths has 16; expected more than the 16 tokens that are decoded"),
        (["--decode_batch", "0"], "--decode_batch is 0; expected more than 0"),
    ],
)
def test_options_that_do_not_go_together_are_told(given, words):
    with pytest.raises(InputError, match=words):
        throughput.evaluate(tiny_run(), options(*given))


def test_what_a_longer_length_takes_is_told_by_the_power_that_shorter_ones_grow_by():
    assert extrapolated([], 64, 1) == 0
    assert extrapolated([(16, 2.0)], 64, 1) == pytest.approx(8)
    assert extrapolated([(8, 9.0), (16, 2.0), (32, 8.0)], 64, 1) == pytest.approx(32)
    assert extrapolated([(16, 8.0), (32, 2.0)], 64, 0) == pytest.approx(2)  # the shorter one was compiled as well
    assert extrapolated([(16, 2.0), (32, 99.0)], 64, 0, 1) == pytest.approx(198)  # the longer one was disturbed


def test_the_experiment_on_every_mixer_has_every_mixer():
    text = EXPERIMENT.read_text()
    statements = ast.parse(text[text.index("sweep.list") :]).body
    bound = {statement.targets[0].attr: ast.literal_eval(statement.value) for statement in statements}
    options = bound["list"]["mixer"]
    assert options.keys() == registry.MIXERS.keys()
    for name, chosen in options.items():
        assert chosen[0] in (f"include 'configs/mixers/{name}.gin'", f"LanguageModel.pattern = ({name!r},)")


def test_the_experiments_measure_what_the_suite_can():
    """Their arguments are those of the suite, and go together."""
    for file in (EXPERIMENT, EXPERIMENT.with_name("length.gin")):
        (given,) = re.findall(r'"throughput (.*)"', file.read_text())
        parser = argparse.ArgumentParser()
        throughput.add_arguments(parser)
        chosen = parser.parse_args(given.split())
        throughput._check(chosen, sorted(chosen.lengths))
