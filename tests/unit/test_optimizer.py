"""Schedules against their formulas, rules over parameter paths, and the order of an update."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seqmodels.errors import InputError
from seqmodels.parameter_rules import apply_rules, parameter_paths
from seqmodels.training.optimizer import SCHEDULES, SGD, Adafactor, AdamW, Lion, make_schedule

PARAMETERS = {
    "embedding": {"embedding": jnp.ones((4, 2))},
    "blocks": {
        "mixer": {
            "q_proj": {"kernel": jnp.ones((3, 2, 2))},
            "A_log": jnp.ones((3, 2)),
            "dt_bias": jnp.ones((3, 2)),
        },
        "mixer_norm": {"scale": jnp.ones((3, 2))},
        "mlp": {"up": {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))}},
    },
}


def schedule(name, steps=1000, **options):
    options = {"warmup_steps": 100, "final_fraction": 0.1, "decay_fraction": 0.2, **options}
    return make_schedule(name, 0.5, steps, **options)


def optimizer_of(kind, **options):
    return kind(**{"warmup_steps": 0, "schedule": "constant", "clip_norm": None, **options})


# Schedules


def test_cosine_is_that_of_optax():
    """Our argument counts the updates done, theirs the number of this update."""
    theirs = optax.warmup_cosine_decay_schedule(0.0, 0.5, 100, 1000, end_value=0.05)
    ours = schedule("cosine")
    done = jnp.arange(1000)
    np.testing.assert_array_equal(jax.vmap(ours)(done), jax.vmap(theirs)(done + 1))


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_starts_above_zero_and_reaches_the_peak(name):
    rate = schedule(name)
    assert rate(0) == optax.linear_schedule(0.0, 0.5, 100)(1) > 0
    assert rate(99) == 0.5
    assert rate(100) <= 0.5


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_the_last_update_has_the_final_rate(name):
    rate = schedule(name)
    assert rate(999) == np.float32(0.5) * np.float32(0.1)
    assert rate(998) > rate(999)


def test_the_middle_of_each_schedule():
    assert schedule("constant")(999) == 0.5
    assert schedule("linear", final_fraction=0.0)(99 + 450) == 0.25
    assert schedule("wsd")(799) == 0.5 and schedule("wsd")(800) < 0.5
    assert schedule("wsd", final_fraction=0.0)(899) == 0.25
    assert schedule("inverse_sqrt")(399) == 0.25


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_warm_up_starts_near_the_peak(name):
    assert schedule(name, warmup_steps=0)(0) >= 0.5 * 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "cosin"}, "did you mean 'cosine'"),
        (
            {"name": "cosine", "warmup_steps": 1000},
            "warmup_steps is 1000: expected .* less than the 1000 steps",
        ),
        ({"name": "wsd", "decay_fraction": 1.5}, "decay_fraction 1.5: expected fractions of 1"),
    ],
)
def test_bad_schedules_say_what_was_expected(options, message):
    with pytest.raises(InputError, match=message):
        schedule(**options)


# Rules


def test_paths():
    assert "blocks/mixer/q_proj/kernel" in parameter_paths(PARAMETERS)


def test_the_first_rule_that_matches_decides():
    chosen = apply_rules(
        [("mixer/", 3.0), ("kernel$", 2.0)], PARAMETERS, otherwise=[("embedding", 0.5)], table="rules"
    )
    assert chosen["blocks"]["mixer"]["q_proj"]["kernel"] == 3.0
    assert chosen["blocks"]["mlp"]["up"] == {"kernel": 2.0, "bias": 1.0}
    assert chosen["embedding"]["embedding"] == 0.5


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [("blocks/mixer/k_proj/kernel", 0.0)],
            "matches no parameter; the nearest is 'blocks/mixer/q_proj/kernel'",
        ),
        (
            [("kernel", 1.0), ("q_proj", 0.0)],
            "'q_proj' never applies, earlier rules take all that it matches",
        ),
        ([("(", 1.0)], "is not a regular expression"),
        ([("kernel", "no")], "must be a number, not 'no'"),
        (["kernel"], "a rule is a pair"),
    ],
)
def test_bad_rules_say_what_was_expected(rules, message):
    with pytest.raises(InputError, match=message) as raised:
        optimizer_of(AdamW, learning_rate_rules=rules).build(PARAMETERS, 10)
    assert "AdamW.learning_rate_rules" in str(raised.value) and "\n" not in str(raised.value)


# Updates


def updates_of(optimizer, gradients=None, steps=10):
    transform = optimizer.build(PARAMETERS, steps)
    gradients = jax.tree.map(jnp.zeros_like, PARAMETERS) if gradients is None else gradients
    return transform.update(gradients, transform.init(PARAMETERS), PARAMETERS)[0]


def test_weight_decay_touches_matrices_alone():
    updates = updates_of(optimizer_of(AdamW, learning_rate=0.5, weight_decay=0.5))
    decayed = [
        path for path, leaf in zip(parameter_paths(updates), jax.tree.leaves(updates)) if jnp.any(leaf != 0)
    ]
    assert decayed == ["blocks/mixer/q_proj/kernel", "blocks/mlp/up/kernel"]
    assert jnp.all(updates["blocks"]["mlp"]["up"]["kernel"] == -0.25)


def test_a_rule_of_ones_decays_everything():
    updates = updates_of(optimizer_of(AdamW, weight_decay_rules=[("A_log", 0.0), ("", 1.0)]))
    still = [
        path for path, leaf in zip(parameter_paths(updates), jax.tree.leaves(updates)) if jnp.all(leaf == 0)
    ]
    assert still == ["blocks/mixer/A_log"]


def test_learning_rate_rules_scale_the_whole_update_and_zero_freezes():
    rules = [("mlp/up/kernel", 0.5), ("mixer", 0.0)]
    gradients = jax.tree.map(jnp.ones_like, PARAMETERS)
    plain = updates_of(optimizer_of(AdamW), gradients)
    scaled = updates_of(optimizer_of(AdamW, learning_rate_rules=rules), gradients)
    assert jnp.array_equal(
        scaled["blocks"]["mlp"]["up"]["kernel"], plain["blocks"]["mlp"]["up"]["kernel"] * 0.5
    )
    assert all(jnp.all(leaf == 0) for leaf in jax.tree.leaves(scaled["blocks"]["mixer"]))


def test_adamw_is_that_of_optax():
    theirs = optax.adamw(1e-2, b1=0.9, b2=0.95, weight_decay=0.25)
    ours = optimizer_of(AdamW, learning_rate=1e-2, weight_decay=0.25, weight_decay_rules=[("", 1.0)])
    ours = ours.build(PARAMETERS, 10)
    ours_state, theirs_state = ours.init(PARAMETERS), theirs.init(PARAMETERS)
    for step in range(3):
        gradients = jax.tree.map(lambda p, s=step: jnp.full_like(p, 0.5 - s), PARAMETERS)
        a, ours_state = ours.update(gradients, ours_state, PARAMETERS)
        b, theirs_state = theirs.update(gradients, theirs_state, PARAMETERS)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, a, b))


def test_gradients_are_clipped_by_their_global_norm():
    gradients = jax.tree.map(lambda p: jnp.full_like(p, 100.0), PARAMETERS)
    sgd = optimizer_of(SGD, learning_rate=1.0, clip_norm=0.5)
    norm = float(optax.tree.norm(updates_of(sgd, gradients)))
    size = sum(leaf.size for leaf in jax.tree.leaves(PARAMETERS))
    assert abs(norm - 0.5) <= size * float(np.finfo(np.float32).eps)


@pytest.mark.parametrize("kind", [AdamW, Lion, Adafactor, SGD])
def test_every_optimizer_descends(kind):
    """A quadratic bowl, at the default settings."""
    parameters = {"w": {"kernel": jnp.linspace(1.0, 2.0, 12).reshape(3, 4)}}
    transform = kind(warmup_steps=0).build(parameters, 50)
    state = transform.init(parameters)

    def loss(p):
        return jnp.sum(p["w"]["kernel"] ** 2)

    @jax.jit
    def step(parameters, state):
        updates, state = transform.update(jax.grad(loss)(parameters), state, parameters)
        return optax.apply_updates(parameters, updates), state

    losses = [loss(parameters)]
    for _ in range(50):
        parameters, state = step(parameters, state)
        losses.append(loss(parameters))
    assert all(after < before for before, after in itertools.pairwise(losses[:11]))
