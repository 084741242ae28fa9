"""Models with other ends than a language model's, and that every synthetic task trains from its config."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import config
from seqmodels.constructors import register_constructors
from seqmodels.data import MQAR, LinearRegression, MADCompression
from seqmodels.errors import EXIT_DONE, InputError
from seqmodels.models import Autoencoder, LanguageModel, Regressor, input_shape
from seqmodels.models.accounting import flops_per_token
from seqmodels.models.readouts import sinusoids
from seqmodels.parallel.mesh import make_mesh, place_batch
from seqmodels.tools.compile_check.check import batch_shapes
from seqmodels.training import AdamW, DeviceMesh, RunDirectory, TrainingJob, create_state, make_evaluator
from seqmodels.training.loss import squared_error_sums
from seqmodels.training.run_directory import read_metrics

REPOSITORY = Path(__file__).parents[2]
WIDTH = 16
TASKS = (
    "bigram_backcopy",
    "induction_heads",
    "linear_regression",
    "listops",
    "mad_compression",
    "mad_fuzzy_recall",
    "mad_in_context_recall",
    "mad_memorization",
    "mad_noisy_recall",
    "mad_selective_copying",
    "mqar",
    "passkey",
    "s_niah_1",
    "s_niah_2",
    "s_niah_3",
    "selective_copying",
)
METRICS = {
    "bigram_backcopy": {"trigger_loss", "bigram_loss", "bigram_excess", "sink_mass", "sink_rate"},
    "passkey": {"example_accuracy"},
    "s_niah_1": {"example_accuracy"},
    "s_niah_2": {"example_accuracy"},
    "s_niah_3": {"example_accuracy"},
    "selective_copying": {"example_accuracy"},
    "listops": {"macro_accuracy"},
    **{task: {"macro_accuracy"} for task in TASKS if task.startswith("mad_")},
}


def body(vocab_size):
    return LanguageModel(vocab_size, WIDTH, 1, ("softmax_attention",), scan=False)


def started(model, seq_len):
    tokens = input_shape(model, 1, seq_len)
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros(tokens.shape, tokens.dtype))["params"]


def test_sinusoids():
    table = np.asarray(sinusoids(5, 4))
    for position in range(5):
        expected = [np.sin(position), np.sin(position / 100), np.cos(position), np.cos(position / 100)]
        assert np.abs(table[position] - expected).max() < 1e-6
    assert sinusoids(5, 3).shape == (5, 3) and (sinusoids(5, 3) == sinusoids(5, 4)[:, :3]).all()


def test_an_autoencoder_sees_the_last_position_alone():
    model = Autoencoder(body(16))
    params = started(model, 8)
    tokens = jax.random.randint(jax.random.key(1), (3, 8), 0, 16)
    logits, _ = model.apply({"params": params}, tokens)
    h, _ = model.body.apply({"params": params["body"]}, tokens, method=lambda m, x: m.read(m.embedded(x), None, None))
    table = np.concatenate([f(np.arange(8)[:, None] * 1e4 ** (-np.arange(8) / 8)) for f in (np.sin, np.cos)], axis=1)
    hidden = (np.asarray(h)[:, -1:] + table) @ params["decoder_in"]["kernel"] + params["decoder_in"]["bias"]
    expected = jax.nn.gelu(hidden) @ params["decoder_out"]["kernel"] + params["decoder_out"]["bias"]
    assert logits.shape == (3, 8, 16) and np.abs(logits - expected).max() < 1e-4
    # Its first answer depends on the last token, which a language model's cannot.
    other, _ = model.apply({"params": params}, tokens.at[:, -1].add(1) % 16)
    assert np.abs(other - logits)[:, 0].max() > 1e-4
    with pytest.raises(InputError, match="Autoencoder: segment_ids are given"):
        model.apply({"params": params}, tokens, segment_ids=jnp.ones_like(tokens))


def test_a_regressor_reads_numbers():
    model = Regressor(body(1), input_size=3)
    params = started(model, 8)
    x = jax.random.normal(jax.random.key(1), (2, 8, 3))
    y, _ = model.apply({"params": params}, x)
    assert y.shape == (2, 8, 1) and y.dtype == jnp.float32 and "embed" not in params["body"]
    changed, _ = model.apply({"params": params}, x.at[:, 5].add(1.0))
    assert (changed[:, :5] == y[:, :5]).all() and np.abs(changed - y)[:, 5:].min(axis=0).max() > 0
    assert flops_per_token(model, 8) > 0
    with pytest.raises(
        InputError, match=r"Regressor: tokens has shape \(2, 8\); expected \[batch, time, input_size = 3\]"
    ):
        model.apply({"params": params}, jnp.zeros((2, 8), jnp.int32))


def test_squared_error():
    predictions, targets = np.random.default_rng(0).normal(size=(2, 4, 5)).astype(np.float32)
    weights = np.random.default_rng(1).choice([0.0, 1.0], size=(4, 5)).astype(np.float32)
    sums = squared_error_sums(predictions[..., None], targets, weights)
    assert abs(sums.nll - (weights * (predictions - targets) ** 2).sum()) < 1e-5
    assert sums.weight == weights.sum() and sums.means(sums.weight).keys() == {"loss"}


def job(model, data, **fields):
    fixed = {"batch_size": 8, "seq_len": 16, "steps": 4, "optimizer": AdamW(warmup_steps=1)}
    return TrainingJob(model=model, data=data, **fixed | fields)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (LanguageModel(16), LinearRegression(dim=2), "reads ids, but the data LinearRegression are 3 numbers"),
        (Regressor(body(1), 3), MQAR(vocab_size=16, num_kv_pairs=2), "reads 3 numbers at each position, but the data"),
        (Regressor(body(1), 4), LinearRegression(dim=2), "reads 4 numbers .* are 3 numbers at each position: expected"),
        (Autoencoder(body(8)), MADCompression(), "the model's vocab_size is 8, but the data has tokens up to 15"),
    ],
)
def test_a_model_for_other_data_is_refused(model, data, message):
    with pytest.raises(InputError, match=message):
        job(model, data)


def test_a_z_loss_of_numbers_is_refused():
    with pytest.raises(InputError, match=r"train.z_loss is 0.0001 with data of numbers: expected 0"):
        job(Regressor(body(1), 3), LinearRegression(dim=2), z_loss=1e-4)


CASES = {
    "autoencoder": (Autoencoder(body(16)), MADCompression()),
    "regressor": (Regressor(body(1), 3), LinearRegression(dim=2)),
}


@pytest.mark.parametrize("name", CASES)
def test_parts_of_a_batch_and_devices_add_up(name):
    """One update: the whole batch at once, in two parts, and on meshes of eight devices; and evaluation after it."""
    model, data = CASES[name]
    batch = next(data.train_batches(8, 16, 0))

    def after_an_update(accumulate=1, **mesh):
        this = job(model, data, accumulate=accumulate, mesh=DeviceMesh(**mesh))
        mesh = make_mesh(**mesh) if mesh else make_mesh(devices=jax.devices()[:1])
        this.check_fits(mesh)
        assert jax.tree.map(jnp.shape, batch) == {k: x.shape for k, x in batch_shapes(this, mesh).items()}
        with jax.set_mesh(mesh):
            optimizer = this.optimizer.build(started(model, 16), 4)
            state = create_state(model, optimizer, seq_len=16, seed=0, mesh=mesh)
            step = this.train_step(mesh, state)
            state, result = step(state, place_batch(batch, mesh))
            evaluate = make_evaluator(
                model,
                lambda: data.evaluation_batches(8, 16),
                mesh=mesh,
                max_batches=2,
                loss=this.loss,
                metrics=data.metrics,
            )
            return {key: float(x) for key, x in result.metrics.items()} | evaluate(state.params)

    whole = after_an_update()
    assert ("accuracy" in whole) == (name == "autoencoder")
    for other in (after_an_update(2), after_an_update(data=2, fsdp=2, seq=2)):
        assert other.keys() == whole.keys()
        assert all(abs(other[key] - value) <= 1e-4 * abs(value) for key, value in whole.items())


# ---- every task's config trains ----


@pytest.fixture(autouse=True)
def _forget_config():
    yield
    config.clear()


def load_train():
    specification = importlib.util.spec_from_file_location("train", REPOSITORY / "train.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_every_task_of_synthetic_data_is_here():
    files = {file.stem for file in (REPOSITORY / "configs" / "tasks").glob("*.gin")}
    assert files == {*TASKS, "corpus", "standard_library"}


@pytest.mark.parametrize("task", TASKS)
def test_a_task_trains_from_its_config(task, tmp_path):
    """Three updates of a small model: finite numbers, and every metric of the task, in the run directory."""
    file = tmp_path / "experiment.gin"
    file.write_text(f"""
include '{REPOSITORY}/configs/base.gin'
include '{REPOSITORY}/configs/tasks/{task}.gin'
include '{REPOSITORY}/configs/mixers/softmax_attention.gin'
LanguageModel.d_model = 16
LanguageModel.n_layers = 1
LanguageModel.mlp = None
LanguageModel.scan = False
SoftmaxAttention.num_heads = 2
train.batch_size = 2
train.steps = 3
train.eval_batches = 1
AdamW.warmup_steps = 1
""")
    register_constructors()
    config.parse([file])
    with RunDirectory(tmp_path / "run") as run:
        assert load_train().train(TrainingJob(), run) == EXIT_DONE
    *updates, last, evaluation = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(np.isfinite(list(row.values())).all() for row in (*updates, last, evaluation))
    accuracy = set() if task == "linear_regression" else {"accuracy"}
    assert {"loss", "gradient_norm"} | accuracy <= last.keys()
    expected = {"loss"} | accuracy | METRICS.get(task, set())
    assert {name.removeprefix("eval/") for name in evaluation if name != "step"} == expected
