"""The walk over prepared chunks on Hopper GPUs: it is compiled without one, and computes in Pallas' interpreter or,
where JAX sees one (JAX_PLATFORMS=cpu,cuda), on a GPU."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.gpu import _prepared_walk
from pallas_kernels.gpu._chunk import CHUNK
from tests.hopper import compile_for_hopper, needs_cuda_compiler, on_gpu_or_interpreted

# Of the norm of the difference to that of the reference: results, N and the states that are read are rounded.
BFLOAT16 = float(jnp.finfo(jnp.bfloat16).eps)


class Case(NamedTuple):
    chunks: int
    heads: int
    key_channels: int
    value_channels: int
    erasing: bool

    def shapes(self) -> tuple:
        """Of R, E, W, P, U, through and the state."""
        of, rows = jax.ShapeDtypeStruct, (1, CHUNK * self.chunks, self.heads)
        row, chunks = of((*rows, self.key_channels), jnp.bfloat16), (1, self.heads, self.chunks)
        return (
            row,
            row,
            row if self.erasing else None,
            of((*chunks, CHUNK, CHUNK), jnp.bfloat16),
            of((*rows, self.value_channels), jnp.bfloat16),
            of((*chunks, self.key_channels), jnp.float32),
            of((1, self.heads, self.key_channels, self.value_channels), jnp.float32),
        )


def gradients(R, E, W, P, U, through, state):
    """dU and the cotangent of the state, and what leaves each chunk, for cotangents that are U and the state."""
    walked = _prepared_walk.forward(R, E, W, P, U, through, state, for_gradients=True)
    return walked, _prepared_walk.backward(R, E, W, P, U, through, state)


@needs_cuda_compiler
@pytest.mark.parametrize("erasing", [False, True])
@pytest.mark.parametrize("key_channels", [64, 256])
def test_compiles_for_hopper(key_channels, erasing):
    compile_for_hopper(gradients, Case(16, 2, key_channels, 128, erasing).shapes())


def by_chunk(x):
    """[b, t, h, d] -> [n, b, h, C, d]."""
    return jnp.transpose(x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:]), (1, 0, 3, 2, 4)).astype(jnp.float32)


def scanned(R, E, W, P, U, through, state, shifts):
    """O, N, the final state and those that enter each chunk, in float32; `shifts` are added to what leaves each."""
    W = jnp.zeros_like(R) if W is None else W
    P, through, shifts = (jnp.moveaxis(x, 2, 0).astype(jnp.float32) for x in (P, through, shifts))

    def step(S, x):
        R, E, W, U, P, through, shift = x
        N = U - W @ S
        return through[..., None] * S + jnp.swapaxes(E, -1, -2) @ N + shift, (R @ S + P @ N, N, S)

    final, (O, N, S) = lax.scan(step, state, (*map(by_chunk, (R, E, W, U)), P, through, shifts))
    O, N = (jnp.transpose(x, (1, 0, 3, 2, 4)).reshape(U.shape) for x in (O, N))
    return O, final, N, jnp.moveaxis(S, 0, 2)


@pytest.mark.parametrize(
    "case", [Case(3, 2, 64, 128, True), Case(3, 1, 128, 64, False), Case(2, 1, 256, 64, True)], ids=str
)
def test_agrees_with_a_scan(case):
    random = np.random.default_rng(0)
    scales = (case.key_channels**-0.5, 1 / 8, 0.5 * case.key_channels**-0.5, 0.1, 1, 1, 1)
    R, E, W, P, U, through, state = (
        x if x is None else jnp.asarray(scale * random.normal(size=x.shape), x.dtype)
        for x, scale in zip(case.shapes(), scales)
    )
    arrays = (R, E, W, jnp.tril(P), U, jnp.exp(-jnp.abs(through)), state)
    with on_gpu_or_interpreted():
        walked, back = gradients(*arrays)
    shifts = jnp.zeros((1, case.heads, case.chunks, case.key_channels, case.value_channels))

    def outputs(U, state, shifts):
        O, final, N, states = scanned(*arrays[:4], U, arrays[5], state, shifts)
        return (O, final), (N, states)

    (O, final), pullback, (N, states) = jax.vjp(outputs, U.astype(jnp.float32), state, shifts, has_aux=True)
    compared = [(walked.o, O), (walked.final, final), (walked.states, states)]
    compared += zip(back, pullback((U.astype(jnp.float32), state)))
    if case.erasing:
        compared.append((walked.N, N))
    for n, (got, right) in enumerate(compared):
        assert np.linalg.norm(np.asarray(got - right)) < BFLOAT16 * np.linalg.norm(right), n
