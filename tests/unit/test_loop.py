"""The training loop as `train.py` runs it: resuming, stopping, the guard against NaN, and that nothing
waits."""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AbstractMesh

from seqmodels import config
from seqmodels.data import MQAR
from seqmodels.errors import EXIT_DEFECT, EXIT_DONE, EXIT_RESTART, InputError
from seqmodels.notation import MESH_AXES
from seqmodels.parallel.mesh import make_mesh, must_take_turns, place_batch
from seqmodels.parameter_rules import parameter_paths
from seqmodels.training import SGD, AdamW, DeviceMesh, NonFiniteError, RunDirectory, TrainingJob, create_state
from seqmodels.training import loop as loop_module
from seqmodels.training.checkpoint import list_steps, restore_parameters
from seqmodels.training.in_flight import StepsInFlight
from seqmodels.training.loop import STEPS_IN_FLIGHT
from seqmodels.training.run_directory import read_metrics
from seqmodels.training.state import TrainState, parameter_shapes, state_shapes
from seqmodels.training.step import StepResult, make_train_step

REPOSITORY = Path(__file__).parents[2]
VOCABULARY, LENGTH, BATCH = 16, 16, 8


def load_train():
    specification = importlib.util.spec_from_file_location("train", REPOSITORY / "train.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


train_program = load_train()


class Tiny(nn.Module):
    """An embedding, a hidden layer with dropout, and a head."""

    vocab_size: int = VOCABULARY
    features: int = 8

    @nn.compact
    def __call__(self, tokens, state=None, segment_ids=None):
        x = nn.Embed(self.vocab_size, self.features, name="embedding")(tokens)
        x = nn.gelu(nn.Dense(self.features, name="hidden")(x))
        x = nn.Dropout(0.1, deterministic=not self.has_rng("dropout"))(x)
        return nn.Dense(self.vocab_size, name="head")(x), state


class Tripwire:
    """A data iterator that acts when a certain batch is asked for."""

    def __init__(self, batches, act, before_step):
        self._batches, self._act, self._before_step = batches, act, before_step
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __next__(self):
        if self._batches.get_state()["next_index"] + 1 == self._before_step:
            self._act()
        return next(self._batches)


class Recall(MQAR):
    """MQAR whose training batches pass through a tripwire."""

    trip = (lambda: None, 0)

    def train_batches(self, *arguments, **options):
        return Tripwire(super().train_batches(*arguments, **options), *self.trip)


def make_job(trip=None, **changes):
    data = Recall(vocab_size=VOCABULARY, num_kv_pairs=2, num_test_examples=20)
    if trip:
        object.__setattr__(data, "trip", trip)
    fields = {
        "model": Tiny(),
        "data": data,
        "optimizer": AdamW(warmup_steps=2, learning_rate=1e-2),
        "batch_size": BATCH,
        "seq_len": LENGTH,
        "steps": 10,
        "log_every": 1,
        "eval_every": 3,
        "checkpoint_every": 4,
    }
    return TrainingJob(**fields | changes)


def run_job(job, folder):
    with RunDirectory(folder) as run:
        return train_program.train(job, run)


def parameters_of(folder):
    return restore_parameters(folder / "checkpoints").state


def assert_same_run(folder, reference):
    assert (folder / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()
    same = jax.tree.map(np.array_equal, parameters_of(folder), parameters_of(reference))
    assert jax.tree.leaves(same) and jax.tree.all(same)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run_job(make_job(), folder) == EXIT_DONE
    return folder


# A run from beginning to end


def test_a_run_leaves_its_rows_and_its_checkpoints(undisturbed):
    rows = read_metrics(undisturbed / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 11))
    assert [row["step"] for row in rows if "eval/loss" in row] == [3, 6, 9, 10]
    assert {"loss", "accuracy", "gradient_norm", "update_norm", "learning_rate"} < rows[0].keys()
    assert rows[0]["learning_rate"] == np.float32(1e-2) / 2
    assert list_steps(undisturbed / "checkpoints") == [4, 8, 10]
    done = json.loads((undisturbed / "DONE").read_text())
    assert done == {"step": 10, "metrics": rows[-1]} and "eval/loss" in rows[-1]


def test_a_finished_run_says_so_and_changes_nothing(undisturbed, capsys):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    assert run_job(make_job(), undisturbed) == EXIT_DONE
    assert "finished at step 10" in capsys.readouterr().out
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_the_seed_decides_the_run(undisturbed, tmp_path):
    run_job(make_job(seed=1), tmp_path / "run")
    other, rows = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / "run", undisturbed))
    assert all(a["loss"] != b["loss"] for a, b in zip(other, rows) if "loss" in a)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_continues(undisturbed, tmp_path, capsys, number):
    folder, handler = tmp_path / "run", signal.getsignal(number)
    assert run_job(make_job(trip=(lambda: signal.raise_signal(number), 6)), folder) == EXIT_RESTART
    assert signal.getsignal(number) is handler
    assert "stopped after step 6 and saved" in capsys.readouterr().out
    assert list_steps(folder / "checkpoints") == [4, 6]
    assert run_job(make_job(), folder) == EXIT_DONE
    assert "continuing after step 6" in capsys.readouterr().out
    assert_same_run(folder, undisturbed)


@pytest.mark.parametrize("step", [3, 7, 10])
def test_a_crash_costs_the_steps_since_the_last_checkpoint_and_nothing_else(undisturbed, tmp_path, step):
    def crash():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_job(make_job(trip=(crash, step)), tmp_path / "run")
    assert run_job(make_job(), tmp_path / "run") == EXIT_DONE
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_crash_after_the_last_save_costs_nothing(undisturbed, tmp_path, monkeypatch):
    def crash(*_):
        raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(RunDirectory, "mark_finished", crash)
        run_job(make_job(), tmp_path / "run")
    assert run_job(make_job(), tmp_path / "run") == EXIT_DONE
    assert_same_run(tmp_path / "run", undisturbed)
    assert (tmp_path / "run" / "DONE").read_text() == (undisturbed / "DONE").read_text()


def test_a_profile_is_written_for_the_steps_asked_for(tmp_path):
    assert run_job(make_job(profile_steps=(2, 3), steps=4), tmp_path / "run") == EXIT_DONE
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_a_run_ends_at_its_goal(tmp_path):
    # Every evaluation has an accuracy of at least 0.
    job = make_job(goal=("accuracy", 0.0))
    assert run_job(job, tmp_path / "run") == EXIT_DONE
    assert list_steps(tmp_path / "run" / "checkpoints")[-1] == 3
    rows, done = (tmp_path / "run" / "metrics.jsonl").read_bytes(), (tmp_path / "run" / "DONE").read_bytes()
    assert json.loads(done)["step"] == 3 and "eval/accuracy" in json.loads(done)["metrics"]
    # Killed between its last save and its end it does not go on beyond the goal.
    (tmp_path / "run" / "DONE").unlink()
    assert run_job(job, tmp_path / "run") == EXIT_DONE
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == rows
    assert (tmp_path / "run" / "DONE").read_bytes() == done


def test_a_goal_of_a_loss_is_reached_from_above(tmp_path):
    assert run_job(make_job(goal=("loss", 1e9)), tmp_path / "run") == EXIT_DONE
    assert list_steps(tmp_path / "run" / "checkpoints")[-1] == 3


def test_a_goal_out_of_reach_changes_nothing(tmp_path, undisturbed):
    assert run_job(make_job(goal=("accuracy", 1.1)), tmp_path / "run") == EXIT_DONE
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_goal_that_nothing_reports_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no .acuracy.*accuracy"):
        run_job(make_job(goal=("acuracy", 0.5)), tmp_path / "run")
    with pytest.raises(InputError, match=r"without train\.eval_every"):
        make_job(goal=("accuracy", 0.5), eval_every=None)


# Nothing waits


@pytest.fixture
def slow_step():
    """A real training step that keeps the device busy for a while, and the results that it has handed out."""
    model, optimizer = Tiny(), SGD(warmup_steps=0)
    transform = optimizer.build(parameter_shapes(model, LENGTH), 100)
    real = make_train_step(model, optimizer, 100, mesh=make_mesh(devices=jax.devices()[:1]))

    @jax.jit
    def busy_step(state, batch):
        work = jax.lax.fori_loop(0, 40, lambda _, x: jnp.tanh(x @ x), jnp.full((512, 512), 1e-3 * state.step))
        return real(state.replace(step=state.step + work[0, 0].astype(int)), batch)

    results = []

    def step(state, batch):
        state, result = busy_step(state, batch)
        results.append(result)
        return state, result

    state = create_state(model, transform, seq_len=LENGTH, seed=0, mesh=make_mesh(devices=jax.devices()[:1]))
    return step, state, results


class Silent:
    """Stands where the loop saves and reports; notes the steps that it hears of."""

    def __init__(self, every=None):
        self.every = every
        self.told, self.saved = [], []

    def step(self, step, metrics):
        self.told.append(step)

    def evaluation(self, *_): ...

    def store(self): ...

    def restart_clock(self): ...

    def save(self, step, *_, **__):
        self.saved.append(step)
        return True

    def wait(self): ...


def watch_loop(slow_step, steps=3 * STEPS_IN_FLIGHT):
    """Run the loop on slow steps; how many of them were unfinished each time it came back for a batch."""
    step, state, results = slow_step
    batches = MQAR(vocab_size=VOCABULARY, num_kv_pairs=2).train_batches(BATCH, LENGTH, seed=0)
    step(state, place_batch(next(batches), make_mesh(devices=jax.devices()[:1])))[1].metrics["loss"].block_until_ready()
    results.clear()
    unfinished = []

    class Watched:
        get_state = batches.get_state

        def __next__(self):
            unfinished.append(sum(not result.metrics["loss"].is_ready() for result in results))
            return next(batches)

    silent = Silent()
    loop_module.training_loop(
        state,
        Watched(),
        start=0,
        steps=steps,
        train_step=step,
        evaluate=lambda _: {},
        eval_every=None,
        checkpointer=silent,
        report=silent,
        mesh=make_mesh(devices=jax.devices()[:1]),
    )
    assert silent.told == list(range(1, steps + 1))
    return unfinished


def test_the_loop_runs_ahead_of_the_device_and_only_so_far(slow_step):
    unfinished = watch_loop(slow_step)
    assert unfinished[: STEPS_IN_FLIGHT + 1] == list(range(STEPS_IN_FLIGHT + 1)), (
        "it waited although there was room"
    )
    assert max(unfinished) == STEPS_IN_FLIGHT, "it let too many steps queue up"


def test_a_limit_of_zero_waits_for_every_step(slow_step, monkeypatch):
    """What processes on CPUs need, whose collectives hang when one runs ahead."""
    monkeypatch.setattr(loop_module, "STEPS_IN_FLIGHT", 0)
    assert set(watch_loop(slow_step)) == {0}


def test_several_cpu_devices_take_turns():
    class Tpu:
        platform = "tpu"

    assert must_take_turns(jax.devices()[:2])
    assert not must_take_turns(jax.devices()[:1]) and not must_take_turns([Tpu(), Tpu()])


# The guard against NaN


@pytest.mark.parametrize("due", ["save", "evaluation"])
def test_what_the_device_has_not_finished_is_neither_saved_nor_evaluated(slow_step, due):
    """Step 2 is not finite, and still being worked on when it is to be saved or evaluated."""
    step, state, results = slow_step
    batches = MQAR(vocab_size=VOCABULARY, num_kv_pairs=2).train_batches(BATCH, LENGTH, seed=0)
    evaluated = []

    def poisoned(state, batch):
        if len(results) == 1:
            batch |= {"weights": batch["weights"].at[0].set(np.inf)}
        return step(state, batch)

    def evaluate(_):
        evaluated.append(len(results))
        return {}

    silent = Silent(every=2 if due == "save" else None)
    with pytest.raises(NonFiniteError, match="step 2: "):
        loop_module.training_loop(
            state, batches, start=0, steps=8, train_step=poisoned, evaluate=evaluate,
            eval_every=2 if due == "evaluation" else None,
            checkpointer=silent, report=silent, mesh=make_mesh(devices=jax.devices()[:1]),
        )  # fmt: skip
    assert len(results) == 2 and silent.told == [1] and silent.saved == [1] and not evaluated


def test_a_run_that_blows_up_stops_with_step_batch_and_gradients_named(tmp_path):
    job = make_job(
        optimizer=SGD(learning_rate=1e15, schedule="constant", warmup_steps=0, clip_norm=None),
        checkpoint_every=1,
    )
    with pytest.raises(NonFiniteError) as raised:
        run_job(job, tmp_path / "run")
    message = str(raised.value)
    assert "step 2: " in message and "not finite" in message
    assert "read from data position {'next_index': 1}" in message
    assert "largest of 5 gradients: " in message and "head/kernel" in message
    assert list_steps(tmp_path / "run" / "checkpoints") == [1]
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1]


def test_the_guard_names_non_finite_gradients_first():
    names = ["small", "inf", "large", "nan"]
    queue = StepsInFlight(4, names)
    metrics = {name: jnp.float32(np.nan) for name in ("loss", "gradient_norm", "learning_rate")}
    queue.add(7, StepResult(metrics, jnp.array([1.0, np.inf, 5.0, np.nan])), "there")
    with pytest.raises(NonFiniteError, match="nan nan, inf inf, large 5, small 1"):
        list(queue.drain())


# One step


class Smooth(Tiny):
    """Without dropout, so that the parts of a batch are treated alike."""

    def apply(self, *arguments, rngs=None, **options):
        return super().apply(*arguments, **options)


def one_step(accumulate, batch, z_loss=1e-2):
    optimizer = SGD(learning_rate=1.0, schedule="constant", warmup_steps=0, clip_norm=None)
    transform = optimizer.build(parameter_shapes(Smooth(), LENGTH), 10)
    mesh = make_mesh(devices=jax.devices()[:1])
    step = make_train_step(Smooth(), optimizer, 10, mesh=mesh, z_loss=z_loss, accumulate=accumulate)
    state = create_state(Smooth(), transform, seq_len=LENGTH, seed=0, mesh=mesh)
    return step(state, place_batch(batch, mesh))


def uneven_batch():
    batch = next(MQAR(vocab_size=VOCABULARY, num_kv_pairs=2).train_batches(BATCH, LENGTH, seed=0))
    # Rows of very different weight: an average of the parts' averages would be far off.
    return {
        **batch,
        "weights": (np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) ** 2 % 7).astype(np.float32),
    }


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_an_accumulated_batch_is_the_whole_batch(accumulate):
    batch = uneven_batch()
    (whole, whole_result), (parts, parts_result) = one_step(1, batch), one_step(accumulate, batch)
    # Only the order of summation over the positions differs.
    bound = BATCH * LENGTH * np.finfo(np.float32).eps
    for name, value in whole_result.metrics.items():
        assert abs(parts_result.metrics[name] - value) <= bound * value, name
    for path, a, b in zip(parameter_paths(whole.params), *map(jax.tree.leaves, (whole.params, parts.params))):
        assert np.linalg.norm(a - b) <= bound * np.linalg.norm(a), path


def test_jobs_that_differ_in_learning_rate_and_weight_decay_share_a_program():
    """Which the persistent compilation cache then holds once for all points of a sweep."""
    mesh = make_mesh(devices=jax.devices()[:1])

    def program(optimizer, steps=10):
        transform = optimizer.build(parameter_shapes(Tiny(), LENGTH), steps)
        state = state_shapes(Tiny(), transform, seq_len=LENGTH, mesh=mesh)
        return make_train_step(Tiny(), optimizer, steps, mesh=mesh).lower(state, uneven_batch()).as_text()

    one = program(AdamW(learning_rate=1e-3, weight_decay=0.1, warmup_steps=2))
    assert one == program(AdamW(learning_rate=3e-4, weight_decay=0.0, warmup_steps=2))
    assert one != program(AdamW(learning_rate=1e-3, weight_decay=0.1, warmup_steps=3))


def test_the_loss_is_a_mean_over_weight():
    batch = uneven_batch()
    doubled = {**batch, "weights": 2 * batch["weights"]}
    for one, other in zip(one_step(1, batch)[1].metrics.items(), one_step(1, doubled)[1].metrics.items()):
        assert one == other


def test_a_batch_without_weight_changes_nothing():
    batch = uneven_batch()
    before = create_state(Smooth(), optax.identity(), seq_len=LENGTH, seed=0, mesh=make_mesh(devices=jax.devices()[:1]))
    after, result = one_step(1, {**batch, "weights": np.zeros_like(batch["weights"])})
    assert result.metrics["loss"] == 0
    assert jax.tree.all(jax.tree.map(np.array_equal, before.params, after.params))


def test_the_state_given_to_a_step_is_consumed():
    optimizer = SGD(warmup_steps=0)
    transform = optimizer.build(parameter_shapes(Tiny(), LENGTH), 10)
    state = create_state(Tiny(), transform, seq_len=LENGTH, seed=0, mesh=make_mesh(devices=jax.devices()[:1]))
    step = make_train_step(Tiny(), optimizer, 10, mesh=make_mesh(devices=jax.devices()[:1]))
    new, _ = step(state, place_batch(uneven_batch(), make_mesh(devices=jax.devices()[:1])))
    assert isinstance(new, TrainState) and new.step == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def quiet_job():
    """One whose updates are linear in the gradient, so that rounding is not amplified."""
    return make_job(model=Smooth(), optimizer=SGD(learning_rate=0.1, warmup_steps=0), steps=4, accumulate=2)


MESHES = [
    {"data": 4, "seq": 2},
    {"data": 1, "fsdp": 2, "seq": 2, "tensor": 2},
    {"data": 1, "seq": 8},
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_eight_devices_compute_what_one_does(tmp_path, mesh):
    job = dataclasses.replace(quiet_job(), mesh=DeviceMesh(**mesh))
    assert run_job(quiet_job(), tmp_path / "one") == run_job(job, tmp_path / "eight") == EXIT_DONE
    rows, others = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "eight"))
    for row, other in zip(rows, others, strict=True):
        bound = row["step"] * BATCH * LENGTH * np.finfo(np.float32).eps
        for name, value in row.items():
            assert abs(other[name] - value) <= bound * abs(value), (row["step"], name)


# The command line

GIN = """
train.model = @LanguageModel()
LanguageModel.vocab_size = 16
LanguageModel.d_model = 16
LanguageModel.n_layers = 1
LanguageModel.pattern = ('linear_attention',)
train.data = @MQAR()
MQAR.vocab_size = 16
MQAR.num_kv_pairs = 2
train.optimizer = @AdamW()
AdamW.warmup_steps = 1
train.batch_size = 8
train.seq_len = 16
train.steps = 100000
train.log_every = 1
"""


@pytest.fixture
def gin_file(tmp_path):
    file = tmp_path / "tiny.gin"
    file.write_text(GIN)
    yield file
    config.clear()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stesp=5", "'stesp': did you mean 'steps'"),
        ("SGD.momentum=0.5", "SGD.momentum has no effect: this job never calls SGD"),
        ("train.accumulate=3", "train.batch_size is 8: expected a multiple of 3"),
        ("AdamW.warmup_steps=200000", "warmup_steps is 200000"),
        (
            "AdamW.learning_rate_rules=[('embd', 0.0)]",
            "'embd' matches no parameter; the nearest is 'embed/embedding'",
        ),
        ("LanguageModel.vocab_size=8", "vocab_size is 8, but the data has tokens up to 15"),
    ],
)
def test_a_wrong_config_leaves_no_run_directory_behind(gin_file, tmp_path, override, message):
    with pytest.raises(InputError, match=message) as raised:
        train_program.main(
            ["--config", str(gin_file), "--run_dir", str(tmp_path / "run"), f"--gin.{override}"]
        )
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_not_finite_is_exit_code_1_and_a_message(here, gin_file, tmp_path):
    run = tmp_path / "run"
    ended = here(
        train_program.main, "--config", gin_file, "--run_dir", run, "--gin.AdamW.learning_rate=1e30"
    )
    assert ended.code == EXIT_DEFECT
    assert ended.err.startswith("error: step 2: ") or ended.err.startswith("error: step 1: ")
    assert "largest of" in ended.err and "Traceback" not in ended.err


def test_sigterm_from_outside_saves_and_exits_42(gin_file, tmp_path):
    """Twice: the second process continues where the first stopped, and neither says more than it should."""
    run, said = tmp_path / "run", []
    environment = os.environ | {"PYTHONWARNINGS": "error::DeprecationWarning:__main__"}
    for _ in range(2):
        before = len(read_metrics(run / "metrics.jsonl"))
        process = subprocess.Popen(
            [sys.executable, REPOSITORY / "train.py", "--config", gin_file, "--run_dir", run],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        while process.poll() is None and len(read_metrics(run / "metrics.jsonl")) <= before:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == EXIT_RESTART, errors
        assert errors.strip().startswith("asked to stop") and errors.count("\n") == 2, errors
        said.append(output)
    first, second = (int(output.rpartition("stopped after step ")[2].split()[0]) for output in said)
    assert f"continuing after step {first}\n" in said[1] and second > first
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(1, second + 1))


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "train.steps is 0: expected a whole number of at least 1"),
        ({"eval_every": 0}, "train.eval_every is 0"),
        ({"profile_steps": (5, 2)}, "train.profile_steps is .* expected .first, last."),
        ({"model": Tiny(vocab_size=4)}, "vocab_size is 4, .* expected at least 16"),
    ],
)
def test_a_job_that_cannot_be_run_says_why(changes, message):
    with pytest.raises(InputError, match=message):
        make_job(**changes)


def test_a_batch_must_split_evenly_over_devices_and_parts():
    mesh = AbstractMesh((4, 1, 1, 1), MESH_AXES)
    make_job(batch_size=8, accumulate=2).check_fits(mesh)
    with pytest.raises(
        InputError, match=r"batch_size is 12: expected a multiple of 8 .4 devices .*accumulate = 2"
    ):
        make_job(batch_size=12, accumulate=2).check_fits(mesh)


@pytest.mark.parametrize("sizes", [{"data": 3 * jax.device_count()}, {"fsdp": 0}, {"data": -1, "tensor": -1}])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes):
    with pytest.raises(InputError, match=r"mesh .data="):
        make_mesh(**sizes)
