"""Optimizers, learning-rate schedules, and what they do to which parameter.

An update is computed in this order; m and n are what the two tables of rules say of the parameter:

    1. the gradient is clipped to a global norm
    2. d = rule(gradient)                            Adam, Lion, factored second moments, momentum
    3. d = d + weight_decay * m * parameter          decoupled (Loshchilov and Hutter 2017, 1711.05101)
    4. parameter = parameter - learning_rate(step) * n * d

So a learning-rate multiplier of 0 freezes a parameter, decay included.
"""

import copy
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from seqmodels.errors import InputError, nearest
from seqmodels.parameter_rules import Rules, apply_rules

# Decay pulls towards zero, which means nothing for a bias, a norm's scale, or the logarithm of a time
# constant; and small embeddings make large gradients in the first layers (OLMo 2, 2025, 2501.00656).
NO_DECAY: Rules = (
    (
        r"(^|/)([^/]*bias|[^/]*scale|[^/]*embedding|A_log|D|theta|mu|bonus|lower_bound|recurrent_param)$"
        r"|(^|/)[^/]*norm[^/]*/",
        0.0,
    ),
)

SCHEDULES = ("constant", "cosine", "linear", "wsd", "inverse_sqrt")


def make_schedule(
    name: str, peak: float, steps: int, *, warmup_steps: int, final_fraction: float, decay_fraction: float
) -> optax.Schedule:
    """The learning rate as a function of the number of updates done so far.

    It rises linearly from 0 and is `peak` in update number `warmup_steps`; in the last of `steps` updates it
    is `peak * final_fraction` where the schedule decays. Names:

        constant      stays at the peak
        cosine        half a cosine wave from the peak down to the final value
        linear        a straight line from the peak down to the final value
        wsd           stable, then a straight line over the last `decay_fraction` of the steps (2404.06395)
        inverse_sqrt  falls with the square root of the step, whatever the number of steps
    """
    if name not in SCHEDULES:
        raise InputError(f"unknown schedule {name!r}: {nearest(name, SCHEDULES)}")
    if not 0 <= warmup_steps < steps:
        raise InputError(
            f"warmup_steps is {warmup_steps}: expected 0 or more and less than the {steps} steps"
        )
    if not 0 <= final_fraction <= 1 or not 0 < decay_fraction <= 1:
        raise InputError(
            f"final_fraction is {final_fraction} and decay_fraction {decay_fraction}: expected fractions of 1"
        )
    decay_steps, final = steps - warmup_steps, peak * final_fraction
    last = min(max(1, round(decay_fraction * steps)), decay_steps)
    reference = max(warmup_steps, 1)
    schedule = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps, alpha=final_fraction),
        "linear": optax.linear_schedule(peak, final, decay_steps),
        "wsd": optax.linear_schedule(peak, final, last, transition_begin=decay_steps - last),
        "inverse_sqrt": lambda n: peak * jnp.sqrt(reference / (reference + n)),
    }[name]
    if warmup_steps:
        warmup = optax.linear_schedule(0.0, peak, warmup_steps)
        schedule = optax.join_schedules([warmup, schedule], [warmup_steps])
    # One ahead: optax counts updates done, and the first update should not have a rate of zero.
    return lambda updates_done: schedule(updates_done + 1)


class Hyperparameters(NamedTuple):
    """The numbers of an optimizer that a compiled step takes as arguments, float32 scalars: runs that differ in them
    alone run one program, which is compiled once."""

    learning_rate: jax.typing.ArrayLike
    weight_decay: jax.typing.ArrayLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What all optimizers share. `weight_decay_rules` and `learning_rate_rules` are tables of (regular
    expression over the parameter's path, multiplier): the first match decides, and by default weight decay
    leaves out biases, norms, embeddings and the recurrences' time constants (`NO_DECAY`). End your own table
    with `('', 1.0)` to decay these as well.
    """

    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 100
    final_fraction: float = 0.1
    decay_fraction: float = 0.2
    clip_norm: float | None = 1.0
    weight_decay: float = 0.1
    weight_decay_rules: Rules = ()
    learning_rate_rules: Rules = ()

    def __post_init__(self) -> None:
        limits = {"learning_rate": math.inf, "weight_decay": math.inf, "clip_norm": math.inf}
        limits |= dict.fromkeys(("b1", "b2", "momentum", "decay_rate"), 1.0)
        for name, limit in limits.items():
            value = getattr(self, name, None)
            if value is not None and not 0 <= value < limit:
                expected = "0 or more" if limit == math.inf else f"0 or more and less than {limit:g}"
                raise InputError(f"{type(self).__name__}.{name} is {value}: expected {expected}")

    @property
    def hyperparameters(self) -> Hyperparameters:
        return Hyperparameters(*(np.float32(getattr(self, name)) for name in Hyperparameters._fields))

    def with_hyperparameters(self, values: Hyperparameters) -> "Optimizer":
        """This optimizer with these values, traced ones too, in the place of its own."""
        other = copy.copy(self)
        for name, value in values._asdict().items():
            object.__setattr__(other, name, value)
        return other

    def direction(self) -> optax.GradientTransformation:
        """Step 2 of the update: from a gradient to the direction to go against."""
        raise NotImplementedError

    def learning_rates(self, steps: int) -> optax.Schedule:
        """The learning rate of a run of `steps` updates, by the number of updates done so far."""
        try:
            return make_schedule(
                self.schedule,
                self.learning_rate,
                steps,
                warmup_steps=self.warmup_steps,
                final_fraction=self.final_fraction,
                decay_fraction=self.decay_fraction,
            )
        except InputError as error:
            raise InputError(f"{type(self).__name__}: {error}") from None

    def build(self, parameters: optax.Params, steps: int) -> optax.GradientTransformation:
        """The optax transformation for these parameters (their shapes are enough) and this number of
        updates."""
        decay = apply_rules(
            self.weight_decay_rules,
            parameters,
            otherwise=NO_DECAY,
            table=f"{type(self).__name__}.weight_decay_rules",
        )
        rates = apply_rules(
            self.learning_rate_rules,
            parameters,
            otherwise=(),
            table=f"{type(self).__name__}.learning_rate_rules",
        )

        def add_decay(updates, parameters):
            return jax.tree.map(lambda u, p, m: u + self.weight_decay * m * p, updates, parameters, decay)

        def multiply(updates, parameters):
            return jax.tree.map(lambda u, n: n * u, updates, rates)

        return optax.chain(
            optax.identity() if self.clip_norm is None else optax.clip_by_global_norm(self.clip_norm),
            self.direction(),
            optax.stateless(add_decay),
            optax.scale_by_learning_rate(self.learning_rates(steps)),
            optax.stateless(multiply),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay. State: two arrays per parameter."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8

    def direction(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """The sign of an interpolated momentum (Chen et al. 2023, 2302.06675). State: one array per parameter. It
    wants a learning rate 3 to 10 times smaller than Adam's, and a weight decay as much larger."""

    learning_rate: float = 1e-4
    weight_decay: float = 1.0
    b1: float = 0.9
    b2: float = 0.99

    def direction(self) -> optax.GradientTransformation:
        return optax.scale_by_lion(b1=self.b1, b2=self.b2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Adam's second moment kept as a row and a column (Shazeer and Stern 2018, 1804.04235), without momentum
    and with updates clipped by their own size. State: next to nothing."""

    decay_rate: float = 0.8
    update_clip: float = 1.0

    def direction(self) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_factored_rms(decay_rate=self.decay_rate), optax.clip_by_block_rms(self.update_clip)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Gradient descent with momentum. State: one array per parameter."""

    learning_rate: float = 0.1
    weight_decay: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False

    def direction(self) -> optax.GradientTransformation:
        return optax.trace(decay=self.momentum, nesterov=self.nesterov)
