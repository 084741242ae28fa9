"""The kernel of the linear neural memory for Hopper GPUs: see `test_gpu_kernels`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.gpu.neural_memory import neural_memory, supports
from tests.hopper import compile_for_hopper, needs_cuda_compiler, on_gpu_or_interpreted

LOSS_SCALE = 0.7
BFLOAT16 = float(jnp.finfo(jnp.bfloat16).eps)
# Of the norm of the difference to that of the reference. What is multiplied is rounded to bfloat16, each number by a
# third of an epsilon on average, and errors of single terms average out.
TOLERANCE = BFLOAT16
INPUTS = ("q", "k", "v", "theta", "alpha", "eta", "weights", "momentum")


class Case(NamedTuple):
    length: int
    key_channels: int
    value_channels: int
    mini_batch: int
    batch: int = 1
    heads: int = 1
    forgetting: bool = True
    momentum: bool = True
    at_limits: bool = False  # gates are 0 and 1
    gaps: bool = False  # positions without a token

    def shapes(self) -> dict:
        of = jax.ShapeDtypeStruct
        rows = (self.batch, self.length, self.heads)
        key, value = (of((*rows, x), jnp.bfloat16) for x in (self.key_channels, self.value_channels))
        gate = of(rows, jnp.float32)
        state = of((self.batch, self.heads, self.key_channels, self.value_channels), jnp.float32)
        forgetting, momentum = (gate if x else None for x in (self.forgetting, self.momentum))
        shapes = (key, key, value, gate, forgetting, momentum, state, state if self.momentum else None)
        return dict(zip(INPUTS, shapes))

    def arrays(self) -> dict:
        random = np.random.default_rng(0)
        # So that much of a state goes through a mini-batch, and the memory does not grow without end: lowest, highest,
        # and at the limits the share of ones.
        share = 1 / self.mini_batch
        rates = {"theta": (0, 2 * share, 1 / 16), "alpha": (0, 2 * share, 1 / 8), "eta": (1 - 4 * share, 1, 7 / 8)}

        def draw(name: str, shape: tuple) -> np.ndarray:
            if name == "k":
                x = random.normal(size=shape)
                return x / np.linalg.norm(x, axis=-1, keepdims=True)
            if name in rates:
                lowest, highest, of_ones = rates[name]
                return random.random(shape) < of_ones if self.at_limits else random.uniform(lowest, highest, shape)
            return random.normal(size=shape, scale=1 / self.mini_batch if name == "momentum" else 1)

        shapes = self.shapes().items()
        return {name: None if x is None else jnp.asarray(draw(name, x.shape), x.dtype) for name, x in shapes}

    def token(self) -> np.ndarray | None:
        return np.random.default_rng(2).random((self.batch, self.length)) < 0.7 if self.gaps else None

    def forward(self, arrays: dict) -> tuple:
        o, *states = neural_memory(**arrays, mini_batch=self.mini_batch, loss_scale=LOSS_SCALE, token=self.token())
        return self.of_tokens(o), *states

    def of_tokens(self, o: jax.Array) -> jax.Array:
        return o if self.token() is None else jnp.where(self.token()[..., None, None], o, 0)

    def backward(self, arrays: dict) -> dict:
        """The gradients of everything, with cotangents that are the results."""
        results, pullback = jax.vjp(self.forward, arrays)
        return pullback(results)[0]

    def definition(self, arrays: dict) -> tuple:
        """Equation (1), token by token, in the dtype of its arguments. The mini-batches are of positions."""
        *inputs, W, S = (arrays[name] for name in INPUTS)
        zero = jnp.zeros_like(arrays["theta"])
        token = jnp.ones(zero.shape[:2], bool) if self.token() is None else self.token()
        given = [jnp.swapaxes(zero if x is None else x, 0, 1) for x in (*inputs, token)]

        def step(carry, x):
            W, S, R, place = carry
            q, k, v, *gates, token = x
            before = W, S
            theta, alpha, eta = (gate[..., None, None] for gate in gates)
            error = jnp.einsum("bhk,bhkv->bhv", k, R) - v
            u = 2 * LOSS_SCALE * k[..., :, None] * error[..., None, :]
            S = eta * S - theta * u
            W = (1 - alpha) * W + S
            W, S = (jnp.where(token[:, None, None, None], *x) for x in zip((W, S), before))
            R = jnp.where((place + 1) % self.mini_batch == 0, W, R)
            return (W, S, R, place + 1), jnp.einsum("bhk,bhkv->bhv", q, W)

        start = (W, jnp.zeros_like(W) if S is None else S, W, 0)
        (W, last, *_), o = lax.scan(step, start, given)
        return self.of_tokens(jnp.swapaxes(o, 0, 1)), W, None if S is None else last


PROGRAMS = {"forward": Case.forward, "backward": Case.backward}
SIZES = [
    Case(1024, 128, 128, 64, batch=2, heads=2),
    Case(1024, 128, 256, 32, momentum=False),
    Case(96, 40, 64, 16, forgetting=False),
]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_lowers_for_cuda(case, program):
    traced = jax.jit(lambda arrays: PROGRAMS[program](case, arrays)).trace(case.shapes())
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_cuda_compiler
@pytest.mark.parametrize("case", SIZES[:1], ids=str)
def test_compiles_for_hopper(case):
    """What needs too much shared memory, or a layout that the hardware does not have, fails here."""
    compile_for_hopper(case.backward, (case.shapes(),))


def results_and_gradients(function, arrays) -> dict:
    results, pullback = jax.vjp(function, arrays)
    # Cotangents that do not depend on what is compared, in the dtypes of the results.
    random = np.random.default_rng(1)
    cotangents = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.bfloat16).astype(x.dtype), results)
    return dict(zip(("o", "final weights", "final momentum"), results)) | pullback(cotangents)[0]


def by_kernel(case: Case) -> dict:
    with on_gpu_or_interpreted():
        return jax.tree.map(lambda x: np.asarray(x, np.float64), results_and_gradients(case.forward, case.arrays()))


def errors(case: Case, found: dict, change: dict | None = None) -> dict[str, float]:
    """Of what was found against the definition in float64. change: factors of what the definition gets."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        exact = {
            name: None if x is None else jnp.asarray(np.asarray(x, np.float64)) * (change or {}).get(name, 1)
            for name, x in case.arrays().items()
        }
        expected = results_and_gradients(case.definition, exact)
        expected = {name: np.asarray(x) for name, x in expected.items() if x is not None}
    # With gates of 0 and 1 a result can be 0.
    return {name: np.linalg.norm(found[name] - x) / (np.linalg.norm(x) or 1) for name, x in expected.items()}


@pytest.mark.parametrize(
    "case",
    [
        Case(192, 64, 64, 64, gaps=True),
        Case(48, 128, 96, 16, batch=2, at_limits=True),
        Case(64, 40, 64, 32, heads=2, momentum=False),
    ],
    ids=str,
)
def test_agrees_with_the_definition(case):
    for name, error in errors(case, by_kernel(case)).items():
        assert error < TOLERANCE, name


def test_agrees_with_the_definition_and_with_nothing_near_it():
    case = Case(64, 64, 64, 64, forgetting=False)
    found = by_kernel(case)
    assert max(errors(case, found).values()) < TOLERANCE
    changed = errors(case, found, {"theta": 1.25})
    assert all(changed[name] > TOLERANCE for name in ("o", "final momentum", "q", "k", "v", "eta"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"chunk_size": 64}, None),
        ({"v": jax.ShapeDtypeStruct((2, 128, 2, 64), jnp.float32)}, "must be bfloat16"),
        ({"mini_batch": 128}, "mini_batch=128; expected one of"),
        ({name: jax.ShapeDtypeStruct((2, 128, 2, 192), jnp.bfloat16) for name in "qk"}, "192 channels, at most 128"),
        ({"v": jax.ShapeDtypeStruct((2, 128, 2, 320), jnp.bfloat16)}, "320 channels, at most 256"),
        ({"v": jax.ShapeDtypeStruct((2, 0, 2, 64), jnp.bfloat16)}, "empty"),
        ({"chunk_size": 128}, "chunk_size=128; the states of every mini-batch are kept"),
    ],
    ids=str,
)
def test_says_what_it_does_not_support(change, reason):
    shapes = Case(128, 64, 64, 64, batch=2, heads=2).shapes() | {"mini_batch": 64} | change
    said = supports(**{name: x for name, x in shapes.items() if name not in INPUTS[3:]})
    assert (said is None) if reason is None else (reason in said)
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            neural_memory(**shapes, loss_scale=1.0)


def test_second_derivatives_are_refused():
    case = Case(64, 64, 64, 64)

    def slope(arrays):
        return jax.tree.reduce(lambda x, y: x + y.sum(), case.backward(arrays), 0.0)

    with pytest.raises(NotImplementedError, match="once"):
        jax.jit(jax.grad(slope)).trace(case.arrays())
