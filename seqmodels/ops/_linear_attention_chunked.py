"""The chunked form of linear attention with decay, forward and backward.

Within a chunk of C positions, with b, the scores A and the weights exp(...) as in `_chunks`, S the state that enters
and S' the state that leaves:

    O    = A V + (Q * exp(b)) S                                                                                   (1)
    S'   = exp(b_C) S + (K * exp(b_C - b))^T V                                                                    (2)
    D    = A 1 + (Q * exp(b)) z;   z' = exp(b_C) z + (K * exp(b_C - b))^T 1      (normaliser; then O is O / D)    (3)

(Yang et al. 2023, arXiv 2312.06635, section 4; Qin et al. 2024, arXiv 2401.04658 for scalar decay.) One `lax.scan`
walks the chunks; the backward pass walks them in reverse, holds one state per chunk, and recomputes the rest. With dO,
dS', dz' the cotangents and N, M those of the numerator and the denominator of (1), (3):

    dA = N V^T + M 1^T          dV = A^T N + (K * exp(b_C - b)) dS'                                                (4)
    dQ = exp(b) * (N S^T + M z^T) + (row side of dA)                                                              (5)
    dK = exp(b_C - b) * (V dS'^T + 1 dz'^T) + (column side of dA)                                                 (6)
    dS = exp(b_C) dS' + (Q * exp(b))^T N                    dz likewise with M                                    (7)

and dg as in `_chunks`. The equations are written for one chunk of one row of the batch.
"""

from functools import partial

import jax
import jax.numpy as jnp

from seqmodels.notation import Array
from seqmodels.ops._chunks import (
    DEFAULT_CHUNK,
    Chunk,
    Inputs,
    chunk,
    chunk_length,
    cut_inputs,
    decay_gradient,
    group_sum,
    joined,
    scan_chunks,
    scores,
    scores_backward,
    swap,
)
from seqmodels.ops._scan import Documents

EPSILON = 1e-6
# Where every key has as many channels, reading and writing the state costs more than the pairs of a longer chunk.
WIDE_KEYS, CHUNK_OF_WIDE_KEYS = 512, 128


def chunked(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None,
    S: Array,
    z: Array | None,
    docs: Documents | None,
    *,
    scale: float,
    chunk_size: int | None,
) -> tuple[Array, Array, Array | None]:
    """Outputs [b, t, hv, v], the final S and the final z (None without a normaliser).

    q, k: [b, t, h, k]; v: [b, t, hv, v]; g: None, [b, t, hv] or [b, t, hv, k]; S: [b, hv, k, v]; z: [b, hv, k] or None.
    With decay per channel `chunk_size` is rounded up to a power of two.
    """
    length = q.shape[1]
    size = chunk_of(length, q.shape[-1], chunk_size, per_channel=g is not None and g.ndim == 4)
    o, S, z = _run(cut_inputs(q, k, v, g, docs, size), S, z, scale)
    return joined(o, length, docs), S, z


def chunk_of(length: int, key_dim: int, chunk_size: int | None, *, per_channel: bool) -> int:
    """Positions per chunk. per_channel: whether every channel has a decay."""
    default = CHUNK_OF_WIDE_KEYS if key_dim >= WIDE_KEYS else DEFAULT_CHUNK
    return chunk_length(chunk_size, length, power_of_two=per_channel, default=default)


def _forward(x: Chunk, S: Array, z: Array | None) -> tuple[Array, Array, Array | None]:
    """Equations (1) to (3) for one chunk."""
    A, q_in, k_out = scores(x), x.q_in, x.k_out
    o = A @ x.v + q_in @ S
    through = jnp.asarray(x.through)
    if z is not None:
        o = o / _denominator(A, q_in, z)
        z = through * z + k_out.sum(axis=-2)
    return o, through[..., None] * S + jnp.einsum("hck,hcv->hkv", k_out, x.v), z


def _denominator(A: Array, q_in: Array, z: Array) -> Array:
    return (A.sum(axis=-1) + jnp.einsum("hck,hk->hc", q_in, z) + EPSILON)[..., None]


def _backward(x: Chunk, heads: int, S: Array, z: Array | None, d_after: tuple, o: Array | None, do: Array):
    """Equations (4) to (7) for one chunk: cotangents of q (scaled), k, v, g and of the state that entered.

    heads: those of q and k
    """
    dS_after, dz_after = d_after
    A, q_in, k_out = scores(x), x.q_in, x.k_out
    through = jnp.asarray(x.through)
    N, M = do, None
    if z is not None:
        N = do / _denominator(A, q_in, z)
        M = -jnp.sum(N * o, axis=-1, keepdims=True)
    dA = jnp.einsum("hiv,hjv->hij", N, x.v)
    dq_in = jnp.einsum("hcv,hkv->hck", N, S)
    dk_out = jnp.einsum("hcv,hkv->hck", x.v, dS_after)
    dS = through[..., None] * dS_after + jnp.einsum("hck,hcv->hkv", q_in, N)
    dz = None
    if z is not None:
        dA = dA + M
        dq_in = dq_in + M * z[:, None]
        dk_out = dk_out + dz_after[:, None]
        dz = through * dz_after + jnp.sum(q_in * M, axis=-2)
    dv = jnp.einsum("hij,hiv->hjv", A, N) + k_out @ dS_after
    dq, dk = scores_backward(x, dA)
    dg = None
    if x.b is not None:
        kept = jnp.sum(dS_after * S, axis=-1)
        if z is not None:
            kept = kept + dz_after * z
        crossing = x.q * dq - x.k * dk if x.decays_per_channel else dA * A
        dg = decay_gradient(x, q_in * dq_in, k_out * dk_out, through * kept, crossing)
    dq = group_sum(dq, heads) + group_sum(dq_in * x.enter, heads)
    dk = group_sum(dk, heads) + group_sum(dk_out * x.leave, heads)
    return dq, dk, dv, dg, dS, dz


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _run(inputs: Inputs, S: Array, z: Array | None, scale: float):
    o, (S, z), _ = _run_chunks(inputs, (S, z), scale)
    return o, S, z


def _run_chunks(inputs: Inputs, state: tuple, scale: float):
    """Outputs, the final state, and the states that entered each chunk."""

    def body(state: tuple, inputs: Inputs):
        o, *after = _forward(chunk(inputs, scale), *state)
        return tuple(after), (swap(o).astype(inputs.v.dtype), state)

    state, (o, entered) = scan_chunks(body, state, inputs)
    return o, state, entered


def _run_forward(inputs: Inputs, S: Array, z: Array | None, scale: float):
    o, final, entered = _run_chunks(inputs, (S, z), scale)
    kept = o if z is not None else None
    return (o, *final), (inputs, entered, kept)


def _run_backward(scale: float, residuals: tuple, cotangents: tuple):
    inputs, entered, o = residuals
    do, *d_final = cotangents
    heads = inputs.q.shape[3]

    def body(d_after: tuple, arrays: tuple):
        inputs, state, o, do = arrays
        x = chunk(inputs, scale)
        o, do = (None if y is None else swap(y).astype(x.q.dtype) for y in (o, do))
        dq, dk, dv, dg, *d_state = _backward(x, heads, *state, d_after, o, do)
        grads = zip((dq * scale, dk, dv, dg), inputs)
        return tuple(d_state), tuple(None if y is None else swap(y).astype(x.dtype) for y, x in grads)

    d_state, grads = scan_chunks(body, tuple(d_final), (inputs, entered, o, do), reverse=True)
    return Inputs(*grads, index=None, incoming=None), *d_state


_run.defvjp(_run_forward, _run_backward)
