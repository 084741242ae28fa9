"""The delta rule on Hopper GPUs, without decay, with one for each head and step, or per channel: forward and backward.

    S~_t = diag(exp(g_t)) S_{t-1};   S_t = S~_t + beta_t k_t^T (v_t - k_t S~_t);   o_t = scale q_t S_t             (1)

(DeltaNet, Yang et al. 2024, arXiv 2406.06484; with decay Gated DeltaNet, Yang, Kautz, Hatamizadeh 2024, 2412.06464;
with a decay per channel KDA, Kimi Team 2025, 2510.26692.) In a chunk of C = 64 positions, with b the inclusive
cumulative sum of g and S the state that enters, T diag(beta) (V - exp(b) * (K S)) is written in place of V:

    A_ij = sum_k k_ik k_jk exp(b_ik - b_jk),  j < i              T = (I + diag(beta) A)^-1                         (2)
    X = exp(b) * K             W = T diag(beta) X                U = T diag(beta) V                                (3)
    P_ij = scale sum_k q_ik k_jk exp(b_ik - b_jk),  j <= i       R = scale exp(b) * Q    E = exp(b_C - b) * K      (4)

None of this waits for a state: XLA makes it for all chunks at once, T by products of matrices (`triangular_inverse`),
the rest by `_scalar_decay` or `_channel_decay`. Then `_prepared_walk` walks the chunks,

    N = U - W S                O = R S + P N                     S' = exp(b_C) S + E^T N                           (5)

and writes down N and S for the gradients. Walking back it gives dN and dS', the cotangents of N and of S', the state
that leaves a chunk. With them

    dY = T^T dN                dV = beta * dY                    dX = -beta * (dY S^T)                             (6)
    H  = -dY N^T,  j < i       dA = beta * H                                                                       (7)
    dbeta_i = v_i dY_i - x_i (dY S^T)_i + sum_j H_ij A_ij                                                          (8)
    dR = dO S^T                dE = N dS'^T                      dP = dO N^T,  j <= i                              (9)

(7) is the derivative -T^T dT T^T of the inverse, since dT = dN (beta * (V - X S))^T, of which T makes N. The terms of
(8) nearly cancel where the memory already holds what it is told: they have the same rounded dY. What dP, dA, dR, dX, dE
and the cotangent of exp(b_C), the sum over v of dS' * S, are for Q, K and g, is in those two modules.

No exponent is positive. Documents are masks on (2) to (5).

    name         shape             dtype
    q, k         [b, t, h, k]      bfloat16             head j of v reads head j // (hv // h)
    v, o         [b, t, hv, v]     bfloat16
    beta         [b, t, hv]        float32              in [0, 2]
    g            [b, t, hv]        float32              natural log, <= 0; or [b, t, hv, k]; or None
    initial      [b, hv, k, v]     float32              as is the final state
    index        [b, t]            int32                document of each position, non-decreasing; or None
    A, T, H      [b, hv, n, C, C]  float32              n = t / C chunks; T is bfloat16 in products
    W, X, dX     [b, t, hv, k]     bfloat16             cotangents are float32
    U, N, dY     [b, t, hv, v]     bfloat16
    P, R, E, S   as `_prepared_walk` has them
"""

from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp

from pallas_kernels.gpu import _channel_decay, _prepared_walk, _scalar_decay
from pallas_kernels.gpu._arrays import declined, in_chunks_and_tiles, pad
from pallas_kernels.gpu._chunk import CHUNK, TILE
from pallas_kernels.gpu._chunk_products import (
    apply,
    apply_transposed,
    by_chunk,
    by_position,
    meet,
    read_transposed,
)
from pallas_kernels.gpu._scalar_decay import Prepared
from pallas_kernels.once import differentiated_once
from pallas_kernels.triangular_inverse import unit_lower_inverse

Array = jax.Array

NAME = "pallas_gpu delta_rule"


def supports(
    q: Array, k: Array, v: Array, beta: Array, g: Array | None, *, chunk_size: int | None = None
) -> str | None:
    """Why the kernel does not run on these arrays, or None where it does: by shapes, dtypes and the GPU, if any."""
    if not jnp.issubdtype(beta.dtype, jnp.floating):
        return f"beta is {beta.dtype}; expected a floating-point type"
    return declined(q, k, v, chunk_size)


def delta_rule(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    g: Array | None,
    initial: Array,
    index: Array | None,
    *,
    scale: float,
    chunk_size: int | None = None,
) -> tuple[Array, Array]:
    """Outputs [b, t, hv, v] in v's dtype and the final state [b, hv, k, v] in float32, equation (1).

    At padding k and g must be 0. Document 0 is the one that `initial` belongs to. Differentiable once, with respect to
    all but `index`.

    Raises ValueError with the reason of `supports`.
    """
    if reason := supports(q, k, v, beta, g, chunk_size=chunk_size):
        raise ValueError(f"{NAME}: {reason}")
    length, key_channels, value_channels = q.shape[1], q.shape[-1], v.shape[-1]
    q, k, v, state, index = in_chunks_and_tiles(q, k, v, initial, index)
    beta, g = (x if x is None else pad(x.astype(jnp.float32), 1, CHUNK) for x in (beta, g))
    if g is not None and g.ndim == 4:
        g = pad(g, 3, TILE)
    o, state = _run(q, k, v, beta, g, state, index, float(scale))
    return o[:, :length, :, :value_channels], state[:, :, :key_channels, :value_channels]


def _decay(g: Array | None) -> ModuleType:
    """What makes rows and pairs with this decay."""
    return _channel_decay if g is not None and g.ndim == 4 else _scalar_decay


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def _run(q, k, v, beta, g, state, index, scale):
    return _results(scale, False, q, k, v, beta, g, state, index)[0]


def _forward(q, k, v, beta, g, state, index, scale):
    return differentiated_once(NAME, partial(_results, scale, True))(q, k, v, beta, g, state, index)


def _backward(scale, residuals, cotangents):
    return differentiated_once(NAME, partial(_gradients, scale))(*residuals, *cotangents)


_run.defvjp(_forward, _backward)


def _results(scale, for_gradients, q, k, v, beta, g, state, index):
    """Outputs and final state, and what the gradients need."""
    decay = _decay(g)
    x = decay.prepare(q, k, g, index, v.shape, scale)
    strength = by_chunk(beta)
    T = unit_lower_inverse(strength[..., :, None] * x.A)
    W, U = _corrected(T, strength, x.X), _corrected(T, strength, v)
    walked = _prepared_walk.forward(x.R, x.E, W, x.P, U, x.through, state, for_gradients=for_gradients)
    return (walked.o, walked.final), (q, k, v, beta, g, index, T.astype(v.dtype), walked.N, walked.states)


def _corrected(T: Array, strength: Array, x: Array) -> Array:
    """T diag(beta) x, equation (3)."""
    return apply(T * strength[..., None, :], x).astype(x.dtype)


def _gradients(scale, q, k, v, beta, g, index, T, N, S, do, d_final):
    """Cotangents of q, k, v, beta, g, the initial state and the index, from what `_results` kept and those of the
    results.
    """
    decay = _decay(g)
    x = decay.prepare(q, k, g, index, v.shape, scale)
    strength = by_chunk(beta)
    W = _corrected(T, strength, x.X)
    back = _prepared_walk.backward(x.R, x.E, W, x.P, do, x.through, d_final)
    dS = back.d_states
    # (6) and (7)
    dY = apply_transposed(T, back.dU).astype(v.dtype)
    returned = read_transposed(dY, S)
    H = jnp.tril(-meet(dY, N), -1)
    # (8)
    dbeta = jnp.sum(v.astype(jnp.float32) * dY, axis=-1) - jnp.sum(x.X * returned, axis=-1)
    dbeta += by_position(jnp.sum(H * x.A, axis=-1))
    # (9)
    d = Prepared(
        P=jnp.tril(meet(do, N)),
        A=strength[..., :, None] * H,
        R=read_transposed(do, S),
        X=-beta[..., None] * returned,
        E=read_transposed(N, dS),
        through=jnp.sum(dS.astype(jnp.float32) * S, axis=-1),
    )
    dq, dk, dg = decay.prepare_backward(q, k, g, index, scale, x, d)
    return dq, dk, (beta[..., None] * dY).astype(v.dtype), dbeta, dg, back.d_state, None
