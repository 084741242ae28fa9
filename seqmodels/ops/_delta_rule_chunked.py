"""The chunked form of the delta rule, forward and backward.

Within a chunk of C positions, with b, the weights exp(...) and the scores A of queries against keys as in `_chunks`, S
the state that enters and S' the state that leaves:

    G_ij = sum_k k_ik k_jk exp(b_ik - b_jk),  j < i           scores of keys against earlier keys                  (1)
    T    = (I + diag(beta) G)^-1                              the writes of a chunk correct one another           (2)
    E    = V - (K * exp(b)) S                                 what S would get wrong                              (3)
    Y    = T diag(beta) E                                     what is written                                     (4)
    O    = A Y + (Q * exp(b)) S                                                                                   (5)
    S'   = exp(b_C) S + (K * exp(b_C - b))^T Y                                                                    (6)

This is the WY form of a product of Householder-like matrices (Yang et al. 2024, arXiv 2406.06484, section 3; with
decay, Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464; per channel, Kimi Team 2025, arXiv 2510.26692). One `lax.scan`
walks the chunks; the backward pass walks them in reverse, holds one state per chunk, and recomputes the rest. With dX
the cotangent of X, and R = diag(beta) E:

    dY    = A^T dO + (K * exp(b_C - b)) dS'         dR = T^T dY         dE = diag(beta) dR         dV = dE         (7)
    dA    = dO Y^T         dG = -dE Y^T         dbeta = rowsum(dR * E) - rowsum((dR Y^T) * G)                      (8)
    dQ    = exp(b) * (dO S^T) + (row side of dA)                                                                  (9)
    dK    = exp(b_C - b) * (Y dS'^T) - exp(b) * (dE S^T) + (column side of dA) + (both sides of dG)               (10)
    dS    = exp(b_C) dS' + (Q * exp(b))^T dO - (K * exp(b))^T dE                                                  (11)

and dg as in `_chunks`, over the pairs of A and of G. The equations are written for one chunk of one row of the batch.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.triangular_inverse import unit_lower_inverse
from seqmodels.notation import Array
from seqmodels.ops._chunks import (
    Chunk,
    Inputs,
    chunk,
    chunk_length,
    cut,
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

# What corrects one another within a chunk costs more than what only adds: half the length of linear attention.
DEFAULT_CHUNK = 32


def chunked(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    g: Array | None,
    S: Array,
    docs: Documents | None,
    *,
    scale: float,
    chunk_size: int | None,
) -> tuple[Array, Array]:
    """Outputs [b, t, hv, v] and the final S.

    q, k: [b, t, h, k]; v: [b, t, hv, v]; beta: [b, t, hv]; g: None, [b, t, hv] or [b, t, hv, k]; S: [b, hv, k, v].
    `chunk_size` is rounded up to a power of two.
    """
    length = q.shape[1]
    size = chunk_length(chunk_size, length, power_of_two=True, default=DEFAULT_CHUNK)
    o, S = _run(cut_inputs(q, k, v, g, docs, size), cut(beta[..., None], size), S, scale)
    return joined(o, length, docs), S


def _writes(x: Chunk, beta: Array, S: Array) -> tuple[Array, Array, Array, Array]:
    """G, T, E and Y of equations (1) to (4)."""
    G = jnp.tril(scores(x._replace(q=x.k)), -1)
    T = unit_lower_inverse(beta * G)
    E = x.v - x.k_in @ S
    return G, T, E, T @ (beta * E)


def _forward(x: Chunk, beta: Array, S: Array) -> tuple[Array, Array]:
    """Equations (1) to (6) for one chunk."""
    _, _, _, Y = _writes(x, beta, S)
    o = scores(x) @ Y + x.q_in @ S
    return o, jnp.asarray(x.through)[..., None] * S + jnp.einsum("hck,hcv->hkv", x.k_out, Y)


def _backward(x: Chunk, heads: int, beta: Array, S: Array, dS_after: Array, do: Array):
    """Equations (7) to (11) for one chunk: cotangents of q (scaled), k, v, beta, g and of the state that entered.

    heads: those of q and k
    """
    q_in, k_in, k_out, through = x.q_in, x.k_in, x.k_out, jnp.asarray(x.through)
    G, T, E, Y = _writes(x, beta, S)
    A = scores(x)
    # (7)
    dY = jnp.einsum("hij,hiv->hjv", A, do) + k_out @ dS_after
    dR = jnp.einsum("hij,hiv->hjv", T, dY)
    dE = beta * dR
    # (8)
    dA = jnp.einsum("hiv,hjv->hij", do, Y)
    negative = jnp.einsum("hiv,hjv->hij", dR, Y)
    dG = jnp.tril(-beta * negative, -1)
    dbeta = jnp.sum(dR * E, axis=-1, keepdims=True) - jnp.sum(negative * G, axis=-1, keepdims=True)
    # (9) and (10)
    dq_in = jnp.einsum("hcv,hkv->hck", do, S)
    dk_in = -jnp.einsum("hcv,hkv->hck", dE, S)
    dk_out = jnp.einsum("hcv,hkv->hck", Y, dS_after)
    dq, dk = scores_backward(x, dA)
    dk_later, dk_earlier = scores_backward(x._replace(q=x.k), dG)
    # (11)
    dS = through[..., None] * dS_after + jnp.einsum("hck,hcv->hkv", q_in, do) - jnp.einsum("hck,hcv->hkv", k_in, dE)
    dg = None
    if x.b is not None:
        if x.decays_per_channel:
            crossing = x.q * dq + x.k * (dk_later - dk_earlier - dk)
        else:
            crossing = dA * A + dG * G
        kept = jnp.sum(dS_after * S, axis=-1)
        dg = decay_gradient(x, q_in * dq_in + k_in * dk_in, k_out * dk_out, through * kept, crossing)
    dq = group_sum(dq, heads) + group_sum(dq_in * x.enter, heads)
    dk = group_sum(dk + dk_later + dk_earlier, heads) + group_sum(dk_in * x.enter + dk_out * x.leave, heads)
    return dq, dk, dE, dbeta, dg, dS


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _run(inputs: Inputs, beta: Array, S: Array, scale: float) -> tuple[Array, Array]:
    o, S, _ = _run_chunks(inputs, beta, S, scale)
    return o, S


def _run_chunks(inputs: Inputs, beta: Array, S: Array, scale: float) -> tuple[Array, Array, Array]:
    """Outputs, the final state, and the states that entered each chunk."""

    def body(S: Array, arrays: tuple) -> tuple[Array, tuple]:
        inputs, beta = arrays
        o, S_after = _forward(chunk(inputs, scale), swap(beta).astype(S.dtype), S)
        return S_after, (swap(o).astype(inputs.v.dtype), S)

    S, (o, entered) = scan_chunks(body, S, (inputs, beta))
    return o, S, entered


def _run_forward(inputs: Inputs, beta: Array, S: Array, scale: float) -> tuple[tuple, tuple]:
    o, S, entered = _run_chunks(inputs, beta, S, scale)
    return (o, S), (inputs, beta, entered)


def _run_backward(scale: float, residuals: tuple, cotangents: tuple) -> tuple:
    inputs, beta, entered = residuals
    do, dS_final = cotangents
    heads = inputs.q.shape[3]

    def body(dS_after: Array, arrays: tuple) -> tuple[Array, tuple]:
        inputs, beta, S, do = arrays
        x, strength = chunk(inputs, scale), swap(beta).astype(S.dtype)
        dq, dk, dv, dbeta, dg, dS = _backward(x, heads, strength, S, dS_after, swap(do).astype(S.dtype))
        grads = zip((dq * scale, dk, dv, dg, dbeta), (*inputs[:4], beta))
        return dS, tuple(None if y is None else swap(y).astype(x.dtype) for y, x in grads)

    dS, (*grads, dbeta) = scan_chunks(body, dS_final, (inputs, beta, entered, do), reverse=True)
    return Inputs(*grads, index=None, incoming=None), dbeta, dS


_run.defvjp(_run_forward, _run_backward)
