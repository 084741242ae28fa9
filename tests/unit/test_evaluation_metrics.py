"""What data sets let an evaluation report: against plain definitions, however rows are cut, and on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seqmodels.data import MQAR, BigramBackcopy, MADInContextRecall
from seqmodels.data.metrics import AttentionSink, ExampleAccuracy, LossWhere, MacroAccuracy
from seqmodels.layers import SoftmaxAttention
from seqmodels.models import LanguageModel
from seqmodels.parallel.mesh import make_mesh
from seqmodels.training import create_state
from seqmodels.training.evaluation import make_evaluator

VOCABULARY, ROWS, LENGTH = 7, 24, 6
EPSILON = float(np.finfo(np.float32).eps)


class Table:
    """Logits that depend on the token alone."""

    def __init__(self, logits):
        self.logits = jnp.asarray(logits, jnp.float32)

    def apply(self, variables, tokens, segment_ids=None, mutable=False):
        return ((self.logits[tokens], None), {}) if mutable else (self.logits[tokens], None)


@pytest.fixture(scope="module")
def rows():
    """Some without weight; ids 5 and 6 are never targets, and 6 is never predicted."""
    random = np.random.default_rng(0)
    tokens, targets = random.integers(5, size=(2, ROWS, LENGTH), dtype=np.int32)
    weights = random.choice([0.0, 1.0], size=(ROWS, LENGTH), p=[0.7, 0.3]).astype(np.float32)
    weights[::5] = 0.0
    return {"tokens": tokens, "targets": targets, "weights": weights}


@pytest.fixture(scope="module")
def model():
    """Three tokens are answered by themselves."""
    logits = np.random.default_rng(1).normal(size=(5, VOCABULARY))
    logits[:, 6] = -9.0
    logits[np.arange(3), np.arange(3)] = 9.0
    logits[3, 5] = 9.0
    return Table(logits)


def cut(rows, size):
    return [{key: x[i : i + size] for key, x in rows.items()} for i in range(0, ROWS, size)]


def evaluate(model, rows, *metrics, size=ROWS, devices=1):
    mesh = make_mesh(devices=jax.devices()[:devices])
    return make_evaluator(model, lambda: cut(rows, size), mesh=mesh, metrics=metrics)({})


def answers(model, rows):
    counted = rows["weights"] > 0
    return counted, np.asarray(model.logits)[rows["tokens"]].argmax(-1), rows["targets"]


def test_macro_accuracy(model, rows):
    counted, said, targets = answers(model, rows)
    said, targets = said[counted], targets[counted]
    shares = [np.mean(said[targets == c] == c) if c in targets else 0.0 for c in sorted({*said, *targets})]
    assert 5 in said and 5 not in targets and len(shares) == 6  # so that it counts as a class
    found = evaluate(model, rows, MacroAccuracy())["macro_accuracy"]
    assert abs(found - np.mean(shares)) < 1e-12
    # Neither the share of positions, nor the mean over the classes that are targets.
    assert abs(found - np.mean(said == targets)) > 1e-4 and abs(found - np.mean(shares[:5])) > 0.01


def test_example_accuracy(model, rows):
    rows = rows | {"targets": np.where(np.arange(ROWS)[:, None] % 2, rows["targets"], rows["tokens"])}
    counted, said, targets = answers(model, rows)
    right = [np.all((said == targets)[i][counted[i]]) for i in range(ROWS) if counted[i].any()]
    assert 0 < sum(right) < len(right) < ROWS
    assert evaluate(model, rows, ExampleAccuracy())["example_accuracy"] == np.mean(right)


def test_loss_where(model, rows):
    counted, _, targets = answers(model, rows)
    logits = np.asarray(model.logits, np.float64)[rows["tokens"]]
    loss = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    kind = counted & (rows["tokens"] > 1)
    metric = LossWhere("some_loss", lambda batch: batch["tokens"] > 1)
    less = LossWhere(
        "less", lambda batch: batch["tokens"] > 1, lambda batch: jnp.where(batch["weights"] > 0, 0.5, jnp.inf)
    )
    found = evaluate(model, rows, metric, less)
    assert abs(found["some_loss"] - loss[kind].mean()) < 100 * EPSILON * loss[kind].mean()
    assert abs(found["less"] - (loss[kind].mean() - 0.5)) < 100 * EPSILON * loss[kind].mean()
    none = LossWhere("none", lambda batch: batch["tokens"] > 100)
    assert "none" not in evaluate(model, rows, none)


def test_rows_may_be_cut_and_spread_in_any_way(model, rows):
    metrics = MacroAccuracy(), ExampleAccuracy(), LossWhere("some_loss", lambda batch: batch["tokens"] > 1)
    whole = evaluate(model, rows, *metrics)
    for size, devices in ((1, 1), (8, 1), (8, 8)):
        other = evaluate(model, rows, *metrics, size=size, devices=devices)
        assert whole.keys() == other.keys() > {"loss", "accuracy"}
        for name, value in whole.items():
            exact = name in ("accuracy", "macro_accuracy", "example_accuracy")
            assert abs(other[name] - value) <= (0 if exact else 100 * EPSILON * value), (name, size, devices)


def test_rows_that_fill_up_the_last_batch_do_not_count():
    task, model = MADInContextRecall(num_test_examples=10), Table(np.eye(16))
    mesh = make_mesh(devices=jax.devices()[:1])
    found = [
        make_evaluator(model, lambda size=size: task.evaluation_batches(size, 31), mesh=mesh, metrics=task.metrics)({})
        for size in (5, 8)
    ]
    assert found[0]["macro_accuracy"] == found[1]["macro_accuracy"] == 0.0 and MQAR().metrics == ()


# ---- attention sinks ----


def everywhere(batch):
    return jnp.ones_like(batch["tokens"], bool)


def indifferent(params):
    """Every query weighs all that it sees alike."""

    def zero(path, leaf):
        return jnp.zeros_like(leaf) if "q_proj" in jax.tree_util.keystr(path) else leaf

    return jax.tree.map_with_path(zero, params)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("devices", [1, 8])
def test_indifferent_attention_has_no_sink(scan, devices):
    """Query t weighs the first token 1 / t: the mean over those from the second on is known."""
    model = LanguageModel(vocab_size=8, d_model=16, n_layers=3, pattern=("softmax_attention",), scan=scan)
    tokens = np.random.default_rng(0).integers(8, size=(8, 16), dtype=np.int32)
    rows = {"tokens": tokens, "targets": tokens, "weights": np.ones((8, 16), np.float32)}
    rows["weights"][:, 0] = 0.0
    mesh = make_mesh(data=-1, seq=1 if devices == 1 else 2, devices=jax.devices()[:devices])
    params = create_state(model, optax.identity(), seq_len=16, seed=0, mesh=mesh).params
    with jax.set_mesh(mesh):
        evaluate = make_evaluator(model, lambda: [rows], mesh=mesh, metrics=[AttentionSink(everywhere)])
        found = evaluate(indifferent(params))
    assert abs(found["sink_mass"] - np.mean(1 / np.arange(2, 17))) < 100 * EPSILON and found["sink_rate"] == 0.0


def test_attention_to_the_first_token_alone_is_a_sink():
    """Grouped heads, of which one of two looks at the first token and the other is indifferent."""
    layer = SoftmaxAttention(16, num_heads=2, num_kv_heads=1, rope_base=None)
    x = jax.random.normal(jax.random.key(0), (3, 10, 16)).at[:, :, 0].set(1.0).at[:, 0, 1].set(50.0)
    params = layer.init(jax.random.key(1), x)["params"]
    # Head 0 asks for channel 1, of which the first token has most; head 1 asks for nothing.
    params["q_proj"]["kernel"] = jnp.zeros((16, 16)).at[0, 0].set(5.0)
    params["k_proj"]["kernel"] = jnp.zeros((16, 8)).at[1, 0].set(1.0)
    y, sown = layer.apply({"params": params}, x, mutable=["intermediates"])
    assert (y[0] == layer.apply({"params": params}, x)[0]).all()
    metric, weights = AttentionSink(everywhere), jnp.ones((3, 10))
    batch = {"tokens": jnp.zeros((3, 10), jnp.int32), "weights": weights}
    sums = jax.tree.map(np.asarray, metric.sums(None, batch, sown["intermediates"]))
    found = metric.values(sums)
    assert abs(found["sink_mass"] - (1 + np.mean(1 / np.arange(1, 11))) / 2) < 1e-5 and found["sink_rate"] == 0.5


def test_documents_of_a_row_do_not_see_its_first_token():
    layer, x = SoftmaxAttention(16, num_heads=2), jax.random.normal(jax.random.key(0), (1, 6, 16))
    variables = layer.init(jax.random.key(1), x)
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 2]])
    _, sown = layer.apply(variables, x, segment_ids=segment_ids, mutable=["intermediates"])
    [weight] = sown["intermediates"]["first_weight"]
    assert (weight[:, 0] == 1).all() and (weight[:, 1:3] > 0).all() and (weight[:, 3:] == 0).all()


def test_a_model_without_attention_has_no_sink(rows, model):
    assert set(evaluate(model, rows, AttentionSink(everywhere))) == {"loss", "accuracy"}
    mixer = LanguageModel(vocab_size=VOCABULARY, d_model=8, n_layers=1, pattern=("linear_attention",))
    params = mixer.init(jax.random.key(0), rows["tokens"])["params"]
    mesh = make_mesh(devices=jax.devices()[:1])
    found = make_evaluator(mixer, lambda: [rows], mesh=mesh, metrics=[AttentionSink(everywhere)])(params)
    assert set(found) == {"loss", "accuracy"}


# ---- Bigram-Backcopy ----


class BackcopyOracle:
    """Says what the task does, and its trigger positions only as far as `copies`."""

    def __init__(self, task, copies):
        self.task, self.copies = task, copies

    def apply(self, variables, tokens, segment_ids=None, mutable=False):
        with np.errstate(divide="ignore"):
            bigrams = jnp.asarray(np.maximum(np.log(self.task.probabilities), -50.0), jnp.float32)[tokens]
        before = jax.nn.one_hot(jnp.roll(tokens, 1, axis=1), self.task.vocab_size) * 100.0
        copies = (tokens < self.task.num_triggers) & self.copies
        return (jnp.where(copies[..., None], before, bigrams), None), {}


def test_backcopy_metrics():
    task, mesh = BigramBackcopy(num_test_examples=100), make_mesh(devices=jax.devices()[:1])
    found = [
        make_evaluator(
            BackcopyOracle(task, copies), lambda: task.evaluation_batches(20, 64), mesh=mesh, metrics=task.metrics
        )({})
        for copies in (True, False)
    ]
    assert abs(found[0]["trigger_loss"]) < 1e-6 and found[1]["trigger_loss"] > 2.0
    for metrics in found:
        assert abs(metrics["bigram_excess"]) < 1e-5 < 1.0 < metrics["bigram_loss"] and "sink_mass" not in metrics
    batch = next(task.evaluation_batches(100, 64))
    share = (batch["tokens"] < 3).mean()
    parts = share * found[1]["trigger_loss"] + (1 - share) * found[1]["bigram_loss"]
    assert abs(parts - found[1]["loss"]) < 1e-5
