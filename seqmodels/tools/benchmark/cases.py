"""What is measured: operators with their inputs.

Inputs are float32 from NumPy, so that every library is given the same numbers. Queries and keys are normal, decays
are mild (a weight of exp(g) near 1), as in a model at the start of training.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from seqmodels.errors import InputError, nearest
from seqmodels.ops._memory_network import Linear, Norm


class Workload(NamedTuple):
    """One operator on inputs of one size. dtype: "float32" or "bfloat16"; decays stay in float32."""

    op: str
    case: str
    batch: int
    length: int
    heads: int = 8
    key_dim: int = 64
    value_dim: int = 64
    dtype: str = "float32"

    @property
    def tokens(self) -> int:
        return self.batch * self.length


class Inputs(NamedTuple):
    """Arrays, or tuples of them, by argument name, options of the operator, and a cotangent for its output."""

    arrays: dict[str, Any]
    options: dict[str, Any]
    cotangent: np.ndarray


def inputs(workload: Workload) -> Inputs:
    """The numbers of a workload; equal for equal workloads."""
    return CASES[workload.op][workload.case](workload, np.random.default_rng(0))


Random = np.random.Generator


def _heads(workload: Workload, random: Random) -> dict[str, np.ndarray]:
    """q, k and v, [batch, time, heads, channels]."""
    dims = {"q": workload.key_dim, "k": workload.key_dim, "v": workload.value_dim}
    shape = (workload.batch, workload.length, workload.heads)
    return {name: random.standard_normal((*shape, dim), np.float32) for name, dim in dims.items()}


def _attention(options: dict[str, Any] | None = None) -> Callable[[Workload, Random], Inputs]:
    """Attention without decay. The cotangent is random, as the one that a loss sends back."""

    def make(workload: Workload, random: Random) -> Inputs:
        arrays = _heads(workload, random)
        return Inputs(arrays, options or {}, random.standard_normal(arrays["v"].shape, np.float32))

    return make


def _normalized(workload: Workload, random: Random) -> Inputs:
    """With the feature map elu(x) + 1, so that the normaliser is positive."""
    arrays, _, cotangent = _attention()(workload, random)
    positive = {name: np.where(arrays[name] > 0, arrays[name] + 1, np.exp(arrays[name])) for name in "qk"}
    return Inputs({**arrays, **positive}, {"normalize": True}, cotangent)


def _with_decay(shape: Callable[[Workload], tuple[int, ...]]) -> Callable[[Workload, Random], Inputs]:
    """A log decay of log(sigmoid(x)) / 16 with x normal, as gated linear attention starts with."""

    def make(workload: Workload, random: Random) -> Inputs:
        arrays, options, cotangent = _attention()(workload, random)
        g = -np.logaddexp(0, -random.standard_normal(shape(workload), np.float32)) / 16
        return Inputs({**arrays, "g": g}, options, cotangent)

    return make


def _delta(make: Callable[[Workload, Random], Inputs]) -> Callable[[Workload, Random], Inputs]:
    """With queries and keys of length 1, and a write strength of sigmoid(x) with x normal."""

    def with_strength(workload: Workload, random: Random) -> Inputs:
        arrays, options, cotangent = make(workload, random)
        unit = {name: arrays[name] / np.linalg.norm(arrays[name], axis=-1, keepdims=True) for name in "qk"}
        beta = 1 / (1 + np.exp(random.standard_normal(arrays["v"].shape[:3], np.float32)))
        return Inputs({**arrays, **unit, "beta": beta}, options, cotangent)

    return with_strength


def _decay_per_head(workload: Workload, random: Random) -> Inputs:
    """The fixed slopes of lightning attention: 2^(-8 (h + 1) / heads)."""
    arrays, options, cotangent = _attention()(workload, random)
    slopes = 2.0 ** (-8 * (np.arange(workload.heads) + 1) / workload.heads)
    return Inputs({**arrays, "g": -slopes.astype(np.float32)}, options, cotangent)


def _convolution(workload: Workload, random: Random) -> Inputs:
    channels = workload.heads * workload.value_dim
    shape = (workload.batch, workload.length, channels)
    x, cotangent = (random.standard_normal(shape, np.float32) for _ in range(2))
    arrays = {
        "x": x,
        "kernel": random.standard_normal((4, channels), np.float32),
        "bias": np.zeros(channels, np.float32),
    }
    return Inputs(arrays, {}, cotangent)


def _learned_query(workload: Workload, random: Random) -> Inputs:
    """Keys and values, and one query per head for all positions."""
    arrays, _, cotangent = _attention()(workload, random)
    query = random.standard_normal((workload.heads, workload.key_dim), np.float32)
    return Inputs({"k": arrays["k"], "v": arrays["v"], "query": query}, {}, cotangent)


def _griffin(workload: Workload, random: Random) -> Inputs:
    """Decays between 0.9 and 0.999, raised to eight times a random gate, as in Griffin at the start of training."""
    shape = (workload.batch, workload.length, workload.heads * workload.value_dim)
    x, logits, cotangent = (random.standard_normal(shape, np.float32) for _ in range(3))
    slowest = np.log(random.uniform(0.9, 0.999, shape[-1:]))
    return Inputs({"x": x, "g": (8 * slowest / (1 + np.exp(-logits))).astype(np.float32)}, {}, cotangent)


def _matrix_lstm(workload: Workload, random: Random) -> Inputs:
    """A forget gate sigmoid(x + 4) and an input gate exp(y), x and y normal."""
    arrays, options, cotangent = _attention()(workload, random)
    f, i = (random.standard_normal(cotangent.shape[:3], np.float32) for _ in range(2))
    return Inputs({**arrays, "g": -np.logaddexp(0, -f - 4), "i": i}, options, cotangent)


def _memory(mini_batch: int, *expand: int) -> Callable[[Workload, Random], Inputs]:
    """A memory with momentum and forgetting, its hidden layers `expand` times as wide as a key; gates as in a layer."""

    def make(workload: Workload, random: Random) -> Inputs:
        arrays, _, cotangent = _delta(_attention())(workload, random)
        logits = (random.standard_normal(cotangent.shape[:3], np.float32) for _ in range(3))
        share, alpha, eta = (1 / (1 + np.exp(x + bias)) for x, bias in zip(logits, (0, 4, 0), strict=True))
        del arrays["beta"]
        widths = (workload.key_dim, *(x * workload.key_dim for x in expand), workload.value_dim)
        gates = {"theta": share * (1 - eta) / mini_batch, "alpha": alpha, "eta": eta}
        weights = _network(workload, random, widths)
        return Inputs({**arrays, **gates, "weights": weights}, {"mini_batch": mini_batch}, cotangent)

    return make


def _network(workload: Workload, random: Random, widths: tuple[int, ...], bias: bool = False) -> tuple:
    """The weights of a memory."""
    layers = []
    for i, o in pairwise(widths):
        A = random.standard_normal((workload.heads, i, o), np.float32) / np.float32(i**0.5)
        layers.append(Linear(A, np.zeros((workload.heads, o), np.float32) if bias else None))
    return tuple(layers)


def _test_time_training(workload: Workload, random: Random) -> Inputs:
    """TTT-Linear as its layer starts: mini-batches of 16, a step of sigmoid(x) / key channels."""
    arrays, _, cotangent = _attention()(workload, random)
    theta = 1 / (1 + np.exp(random.standard_normal(cotangent.shape[:3], np.float32))) / workload.key_dim
    place = np.arange(workload.length, dtype=np.float32) % 16
    reach = np.broadcast_to(1 / (1 + place)[:, None], theta.shape)
    shape = (workload.heads, workload.value_dim)
    norm = Norm(np.ones(shape, np.float32), np.zeros(shape, np.float32))
    weights = _network(workload, random, (workload.key_dim, workload.value_dim), bias=True)
    options = {"mini_batch": 16, "residual": True, "loss_scale": 0.5}
    return Inputs({**arrays, "theta": theta, "reach": reach, "weights": weights, "norm": norm}, options, cotangent)


def _state_space(workload: Workload, random: Random) -> Inputs:
    """Steps and decays as Mamba-2 starts with; one group of B and C for all heads."""
    shape = (workload.batch, workload.length, workload.heads)
    x, cotangent = (random.standard_normal((*shape, workload.value_dim), np.float32) for _ in range(2))
    B, C = (random.standard_normal((*shape[:2], 1, workload.key_dim), np.float32) for _ in range(2))
    steps = np.exp(random.uniform(np.log(0.001), np.log(0.1), shape)).astype(np.float32)
    decays = -random.uniform(1, 16, workload.heads).astype(np.float32)
    skip = np.ones(workload.heads, np.float32)
    return Inputs({"x": x, "dt": steps, "A": decays, "B": B, "C": C, "D": skip}, {}, cotangent)


def _with_bonus(workload: Workload, random: Random) -> Inputs:
    """Decay per channel, and a bonus for the current token."""
    arrays, _, cotangent = CASES["linear_attention"]["channel"](workload, random)
    bonus = random.standard_normal((workload.heads, workload.key_dim), np.float32)
    return Inputs({**arrays, "u": bonus}, {"scale": 1.0}, cotangent)


CASES: dict[str, dict[str, Callable[[Workload, Random], Inputs]]] = {
    "linear_attention": {
        "none": _attention(),
        "normalized": _normalized,
        "head": _decay_per_head,
        "scalar": _with_decay(lambda w: (w.batch, w.length, w.heads)),
        "channel": _with_decay(lambda w: (w.batch, w.length, w.heads, w.key_dim)),
    },
    "delta_rule": {
        "none": _delta(_attention()),
        "scalar": _delta(_with_decay(lambda w: (w.batch, w.length, w.heads))),
        "channel": _delta(_with_decay(lambda w: (w.batch, w.length, w.heads, w.key_dim))),
    },
    "softmax_attention": {
        "causal": _attention(),
        "window": _attention({"window": 512}),
    },
    "ssd": {"one_group": _state_space},
    "wkv6": {"channel": _with_bonus},
    "short_conv": {"width_4": _convolution},
    "aaren": {"learned_query": _learned_query},
    "rglru": {"griffin": _griffin},
    "mlstm": {"gated": _matrix_lstm},
    "neural_memory": {
        "matrix": _memory(64),
        "mlp": _memory(64, 4),
        "ttt_linear": _test_time_training,
    },
}


def pairs(ops: Sequence[str], only: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """Operators, or "all", each with its cases, or with those of the named ones that it has.

    Raises InputError for names that do not exist.
    """
    ops = list(CASES) if list(ops) == ["all"] else ops
    for op in ops:
        if op not in CASES:
            raise InputError(f"--op {op} has no inputs to measure it with; {nearest(op, [*CASES, 'all'])}")
    found = [(op, case) for op in ops for case in CASES[op]]
    for case in only or []:
        if case not in (known := dict.fromkeys(case for _, case in found)):
            raise InputError(f"--case {case} is not a case of {', '.join(ops)}; {nearest(case, known)}")
    return [(op, case) for op, case in found if not only or case in only]
