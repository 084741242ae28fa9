"""The chunked form of Aaren, forward and backward, from the scores on.

Within a chunk of C positions, with (m_0, u_0, w_0) the state that enters:

    m_i  = max(m_0, max_{j <= i} s_j)                                                                             (1)
    P_ij = exp(s_j - m_i),  j <= i          p_i = exp(m_0 - m_i)                                                  (2)
    U = P 1 + p u_0          W = P V + p w_0          O = W / U                                                   (3)

and the last row of (m, U, W) leaves. No exponent is positive. m is a unit of measure: no output depends on it, so the
backward pass holds it fixed. N and r are the cotangents of W and U; their last rows include those of the state that
leaves, which the chunk after it has found:

    N = dO / U                    r_i = -N_i . o_i                                                                (4)
    dV = P^T N                    ds_j = v_j . dV_j + (P^T r)_j                                                   (5)
    dw_0 = p^T N                  du_0 = p^T r                                                                    (6)

(the linear-time gradient of Feng et al. 2024, arXiv 2405.13956, a chunk at a time). One state per chunk is kept, and
the rest is recomputed. What reads the numbers of the final state does depend on its m_T, the largest of all scores:
that score gets the rest of its cotangent, and the incoming m_0 changes the size of what comes with it:

    ds_argmax += dm_T - u_T du_T - w_T . dw_T          dm_0 = u_0 du_0 + w_0 . dw_0                               (7)

Documents and padding are masks on P and p. The equations are written for one chunk of one row of the batch.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqmodels.notation import Array
from seqmodels.ops._chunks import cut, cut_index, joined, scan_chunks, swap
from seqmodels.ops._scan import Documents

DEFAULT_CHUNK = 32


class AarenState(NamedTuple):
    """Sums over the tokens seen, relative to exp(m): m [b, h] the largest score, u [b, h], w [b, h, v]."""

    m: Array
    u: Array
    w: Array


def chunked(
    s: Array, v: Array, state: AarenState, docs: Documents | None, *, chunk_size: int | None
) -> tuple[Array, AarenState]:
    """Outputs [b, t, h, v] in v's dtype and the final state, from scores [b, t, h] and values [b, t, h, v]."""
    batch, length = s.shape[:2]
    size = chunk_of(length, chunk_size)
    real = None
    if docs is not None or length % size:
        real = cut(jnp.ones((batch, length), bool) if docs is None else docs.real, size)
    o, state = _run(_Inputs(cut(s, size), cut(v, size), *cut_index(docs, size), real), state)
    return joined(o, length, docs), state


def chunk_of(length: int, chunk_size: int | None) -> int:
    """Positions per chunk."""
    return min(chunk_size or DEFAULT_CHUNK, length)


class _Inputs(NamedTuple):
    """The arrays in chunks, [b, n, c, ...]; inside a scan those of one chunk of one row, [c, ...].

    index     [b, n, c]: that of `Documents`
    incoming  [b, n]: the document of the state that enters the chunk
    real      [b, n, c] bool: False at padding, that at the end of the last chunk included
    """

    s: Array
    v: Array
    index: Array | None
    incoming: Array | None
    real: Array | None


class _Chunk(NamedTuple):
    """One chunk, heads before time: v [h, c, v], P [h, c, c], p, m and U [h, c] of equations (1) to (3)."""

    v: Array
    P: Array
    p: Array
    m: Array
    U: Array


def _chunk(inputs: _Inputs, state: AarenState) -> _Chunk:
    """Equations (1) and (2), and U of (3). Where nothing was seen yet m is 0, P, p and U are 0."""
    s, v, index, incoming, real = inputs
    s, v = s.T, swap(v).astype(s.dtype)
    visible, enters = jnp.tril(jnp.ones((s.shape[1],) * 2, bool)), (state.u > 0)[:, None]
    if index is not None:
        visible, enters = visible & (index[:, None] == index), enters & (index == incoming)
    if real is not None:
        visible = visible & real
    m = jnp.max(jnp.where(visible, s[:, None], -jnp.inf), axis=-1)
    m = jnp.maximum(m, jnp.where(enters, state.m[:, None], -jnp.inf))
    m = jnp.where(m == -jnp.inf, 0, m)
    P = jnp.where(visible, jnp.exp(jnp.minimum(s[:, None] - m[..., None], 0)), 0)
    p = jnp.where(enters, jnp.exp(jnp.minimum(state.m[:, None] - m, 0)), 0)
    return _Chunk(v, P, p, m, P.sum(axis=-1) + p * state.u[:, None])


def _sums(x: _Chunk, state: AarenState) -> tuple[Array, Array]:
    """W and O of equation (3), [h, c, v]."""
    W = x.P @ x.v + x.p[..., None] * state.w[:, None]
    return W, W * _inverse(x.U)


def _inverse(U: Array) -> Array:
    """1 / U, and 0 where nothing was seen."""
    return jnp.where(U > 0, 1 / jnp.where(U > 0, U, 1), 0)[..., None]


@jax.custom_vjp
def _run(inputs: _Inputs, state: AarenState) -> tuple[Array, AarenState]:
    """Outputs in chunks, and the final state."""
    o, state, _ = _run_chunks(inputs, state)
    return o, state


def _run_chunks(inputs: _Inputs, state: AarenState) -> tuple[Array, AarenState, AarenState]:
    """Outputs, the final state, and the states that entered each chunk."""

    def body(state: AarenState, inputs: _Inputs) -> tuple[AarenState, Any]:
        x = _chunk(inputs, state)
        W, o = _sums(x, state)
        return AarenState(x.m[:, -1], x.U[:, -1], W[:, -1]), (swap(o).astype(inputs.v.dtype), state)

    state, (o, entered) = scan_chunks(body, state, inputs)
    return o, state, entered


def _run_forward(inputs: _Inputs, state: AarenState) -> tuple[tuple[Array, AarenState], tuple]:
    o, final, entered = _run_chunks(inputs, state)
    return (o, final), (inputs, entered, final)


def _run_backward(residuals: tuple, cotangents: tuple) -> tuple[_Inputs, AarenState]:
    inputs, entered, final = residuals
    do, d_final = cotangents

    def body(d_after: tuple[Array, Array], arrays: tuple[_Inputs, AarenState, Array]) -> tuple[Any, Any]:
        inputs, state, do = arrays
        x = _chunk(inputs, state)
        _, o = _sums(x, state)
        # 1. Equation (4).
        N = swap(do).astype(o.dtype) * _inverse(x.U)
        r = -jnp.sum(N * o, axis=-1)
        du, dw = d_after
        N, r = N.at[:, -1].add(dw), r.at[:, -1].add(du)
        # 2. Equations (5) and (6).
        dv = jnp.einsum("hij,hiv->hjv", x.P, N)
        ds = jnp.sum(x.v * dv, axis=-1) + jnp.einsum("hij,hi->hj", x.P, r)
        d_state = jnp.sum(x.p * r, axis=-1), jnp.einsum("hi,hiv->hv", x.p, N)
        return d_state, (ds.T, swap(dv).astype(inputs.v.dtype))

    (du, dw), (ds, dv) = scan_chunks(body, (d_final.u, d_final.w), (inputs, entered, do), reverse=True)
    # 3. Equation (7).
    first = jax.tree.map(lambda x: x[:, 0], entered)
    rest = d_final.m - final.u * d_final.u - jnp.sum(final.w * d_final.w, axis=-1)
    of_token, of_state = _largest(inputs, first, final)
    share = rest / jnp.maximum(of_token.sum(axis=(1, 2)) + of_state, 1)
    ds = ds + jnp.where(of_token, share[:, None, None], 0)
    dm = first.u * du + jnp.sum(first.w * dw, axis=-1) + jnp.where(of_state, share, 0)
    return _Inputs(ds, dv, None, None, None), AarenState(dm, du, dw)


def _largest(inputs: _Inputs, first: AarenState, final: AarenState) -> tuple[Array, Array]:
    """Which scores [b, n, c, h], or the incoming m [b, h], are the final m: more than one where they are equal."""
    of_token = inputs.s == final.m[:, None, None]
    of_state = (first.m == final.m) & (first.u > 0)
    if inputs.real is not None:
        of_token = of_token & inputs.real[..., None]
    if inputs.index is not None:
        last = inputs.index[:, -1, -1]
        of_token = of_token & (inputs.index == last[:, None, None])[..., None]
        of_state = of_state & (last == 0)[:, None]
    return of_token, of_state


_run.defvjp(_run_forward, _run_backward)
