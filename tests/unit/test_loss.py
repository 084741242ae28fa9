"""Loss sums, and evaluation, which adds them up."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.errors import InputError
from seqmodels.parallel.mesh import make_mesh
from seqmodels.training.evaluation import make_evaluator
from seqmodels.training.loss import bits_per_byte, loss_sums

EPSILON = float(np.finfo(np.float32).eps)


def random_case(batch=3, length=5, vocabulary=7, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(batch, length, vocabulary)).astype(np.float32)
    targets = rng.integers(vocabulary, size=(batch, length)).astype(np.int32)
    weights = rng.choice([0.0, 0.5, 1.0], size=(batch, length)).astype(np.float32)
    return logits, targets, weights


def test_sums_are_the_definition_in_float64():
    logits, targets, weights = random_case()
    log_normalizer = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    nll = np.sum((log_normalizer - np.take_along_axis(logits, targets[..., None], -1)[..., 0]) * weights)
    z = np.sum(log_normalizer**2 * weights)
    sums = loss_sums(logits, targets, weights)
    assert abs(sums.nll - nll) <= weights.size * EPSILON * nll
    assert abs(sums.z - z) <= weights.size * EPSILON * z
    assert sums.weight == weights.sum()
    assert sums.correct == np.sum((logits.argmax(-1) == targets) * weights)


def test_positions_of_weight_zero_have_no_influence():
    logits, targets, weights = random_case()
    other = np.where(weights[..., None] > 0, logits, -logits)
    other_targets = np.where(weights > 0, targets, 0)

    def value_and_gradient(logits, targets):
        return jax.value_and_grad(lambda x: (s := loss_sums(x, targets, weights)).nll + s.z)(logits)

    value, gradient = value_and_gradient(logits, targets)
    other_value, _ = value_and_gradient(other, other_targets)
    assert value == other_value
    assert np.all(gradient[weights == 0] == 0) and np.all(gradient[weights > 0] != 0)


def test_low_precision_logits_are_summed_in_float32():
    logits, targets, weights = random_case()
    rounded = jnp.asarray(logits, jnp.bfloat16)
    assert loss_sums(rounded, targets, weights) == loss_sums(rounded.astype(jnp.float32), targets, weights)


def test_the_gradient_stores_no_one_hot():
    """Beside the logits and their gradient, nothing of the vocabulary's size is held at once."""
    logits, targets, weights = random_case(2, 64, 4096)
    compiled = (
        jax.jit(jax.grad(lambda x, t, w: loss_sums(x, t, w).nll), donate_argnums=0)
        .lower(logits, targets, weights)
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes <= 2.5 * logits.nbytes


def test_bits_per_byte():
    assert bits_per_byte(math.log(256), 1.0) == 8.0
    assert bits_per_byte(math.log(256), 4.0) == 2.0


class Table:
    """Logits that depend on the token alone; stands for a linen module in `make_evaluator`."""

    def __init__(self, logits):
        self.logits = jnp.asarray(logits)

    def apply(self, variables, tokens, segment_ids=None):
        return self.logits[tokens], None


def as_batches(tokens, targets, weights, size):
    return [
        {"tokens": tokens[i : i + size], "targets": targets[i : i + size], "weights": weights[i : i + size]}
        for i in range(0, len(tokens), size)
    ]


def test_evaluation_weighs_positions_not_batches():
    rng = np.random.default_rng(1)
    tokens, targets = rng.integers(11, size=(2, 6, 4), dtype=np.int32)
    weights = rng.choice([0.0, 1.0], size=(6, 4)).astype(np.float32)
    weights[0] = 0.0
    model, mesh = (
        Table(rng.normal(size=(11, 11))),
        make_mesh(devices=jax.devices()[:1]),
    )

    def evaluate(size, **options):
        batches = as_batches(tokens, targets, weights, size)
        return make_evaluator(model, lambda: batches, mesh=mesh, **options)({})

    whole = loss_sums(model.logits[tokens], targets, weights)
    result = evaluate(1, bytes_per_token=2.0)
    assert abs(result["loss"] - whole.nll / whole.weight) <= tokens.size * EPSILON * result["loss"]
    assert result["accuracy"] == whole.correct / whole.weight
    assert result["bits_per_byte"] == bits_per_byte(result["loss"], 2.0)
    assert evaluate(1) == evaluate(1) and "bits_per_byte" not in evaluate(1)
    assert evaluate(3, max_batches=1)["accuracy"] == evaluate(1, max_batches=3)["accuracy"]


@pytest.mark.parametrize(
    "batches", [[], as_batches(*np.zeros((3, 1, 4), np.int32), 1)], ids=["none", "no weight"]
)
def test_nothing_to_evaluate_is_an_input_error(batches):
    evaluate = make_evaluator(Table(np.zeros((2, 2))), lambda: batches, mesh=make_mesh(devices=jax.devices()[:1]))
    with pytest.raises(InputError, match="held-out data has no batch"):
        evaluate({})
