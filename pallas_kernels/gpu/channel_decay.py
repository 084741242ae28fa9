"""Linear attention on Hopper GPUs with a decay for each channel of the keys: forward and backward.

    S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t;   o_t = scale q_t S_t                                                (1)

(gated linear attention: Yang et al. 2023, arXiv 2312.06635; HGRN2: Qin et al. 2024, arXiv 2404.07904.) In a chunk of
C = 64 positions, with b the inclusive cumulative sum of g, S the state that enters and S' the one that leaves:

    P_ij = scale sum_k q_ik k_jk exp(b_ik - b_jk),  j <= i          (`_channel_decay`)                             (2)
    R    = scale exp(b) * Q            E  = exp(b_C - b) * K                                                       (3)
    O    = P V + R S                   S' = diag(exp(b_C)) S + E^T V                                               (4)

XLA makes (2) and (3) for all chunks at once, then `_prepared_walk` walks the chunks, (4), and writes down the states.
Backward, it walks back and gives dV and dS', the cotangent of what leaves each chunk. What is left are products over
single chunks:

    dR = dO S^T        dE = V dS'^T        dP = dO V^T,  j <= i        dc = sum_v(dS' * S)                         (5)

with c = exp(b_C). What these are for Q, K and g is in `_channel_decay`. Documents are masks on (2) to (4).

    name            shape              dtype
    q, k            [b, t, h, k]       bfloat16            head j of v reads head j // (hv // h)
    v, o            [b, t, hv, v]      bfloat16
    g               [b, t, hv, k]      float32             natural log, <= 0
    initial_state   [b, hv, k, v]      float32             as is the final one
    index           [b, t]             int32               document of each position, non-decreasing; or None
    P, R, E         as `_prepared_walk` has them
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.gpu import _prepared_walk
from pallas_kernels.gpu._arrays import declined, in_chunks_and_tiles, pad
from pallas_kernels.gpu._channel_decay import prepare, prepare_backward
from pallas_kernels.gpu._chunk import CHUNK, TILE
from pallas_kernels.gpu._chunk_products import meet, read_transposed
from pallas_kernels.gpu._scalar_decay import Prepared
from pallas_kernels.once import differentiated_once

Array = jax.Array

NAME = "pallas_gpu channel_decay"


def supports(q: Array, k: Array, v: Array, g: Array | None, *, chunk_size: int | None = None) -> str | None:
    """Why the kernel does not run on these arrays, or None where it does: by shapes, dtypes and the GPU, if any."""
    if g is None or g.ndim != 4:
        return "g is not a decay per channel"
    return declined(q, k, v, chunk_size)


def channel_decay(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    initial_state: Array,
    index: Array | None,
    *,
    scale: float,
    chunk_size: int | None = None,
) -> tuple[Array, Array]:
    """Outputs [b, t, hv, v] in the dtype of v and the final state [b, hv, k, v] in float32.

    Shapes and dtypes are those of the table above. At padding k and g must be 0. Document 0 is the one that
    `initial_state` belongs to. Differentiable once, with respect to q, k, v, g and initial_state.

    Raises ValueError with the reason of `supports`.
    """
    if reason := supports(q, k, v, g, chunk_size=chunk_size):
        raise ValueError(f"{NAME}: {reason}")
    length, key_channels, value_channels = q.shape[1], q.shape[-1], v.shape[-1]
    q, k, v, state, index = in_chunks_and_tiles(q, k, v, initial_state, index)
    g = pad(pad(g.astype(jnp.float32), 1, CHUNK), 3, TILE)
    o, state = _attend(q, k, v, g, state, index, float(scale))
    return o[:, :length, :, :value_channels], state[:, :, :key_channels, :value_channels]


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, g, state, index, scale):
    return _results(scale, False, q, k, v, g, state, index)[0]


def _forward(q, k, v, g, state, index, scale):
    return differentiated_once(NAME, partial(_results, scale, True))(q, k, v, g, state, index)


def _backward(scale, residuals, cotangents):
    return differentiated_once(NAME, partial(_gradients, scale))(*residuals, *cotangents)


_attend.defvjp(_forward, _backward)


def _results(scale, for_gradients, q, k, v, g, state, index):
    """Outputs and final state, and what the gradients need."""
    x = prepare(q, k, g, index, v.shape, scale, correcting=False)
    walked = _prepared_walk.forward(x.R, x.E, None, x.P, v, x.through, state, for_gradients=for_gradients)
    return (walked.o, walked.final), (q, k, v, g, index, walked.states)


def _gradients(scale, q, k, v, g, index, states, do, d_final):
    """Cotangents of q, k, v, g, the initial state and the index, from what `_results` kept and those of the results."""
    x = prepare(q, k, g, index, v.shape, scale, correcting=False)
    back = _prepared_walk.backward(x.R, x.E, None, x.P, do, x.through, d_final)
    d = Prepared(
        P=jnp.tril(meet(do, v)),
        R=read_transposed(do, states),
        E=read_transposed(v, back.d_states),
        through=jnp.sum(back.d_states.astype(jnp.float32) * states, axis=-1),
    )
    dq, dk, dg = prepare_backward(q, k, g, index, scale, x, d)
    return dq, dk, back.dU, dg, back.d_state, None
