"""Linear attention on TPU, without decay or with one for each head and step: forward and backward.

    S_t = exp(g_t) S_{t-1} + k_t^T v_t;   o_t = scale q_t S_t                                                      (1)

(Katharopoulos et al. 2020, arXiv 2006.16236; with decay Sun et al. 2023, 2307.08621, Qin et al. 2024, 2401.04658, and
Dao, Gu 2024, 2405.21060, whose heads share keys and queries.) In a chunk of C positions, with b the inclusive
cumulative sum of g, S the state that enters and S' the one that leaves:

    A_ij = (q_i k_j) exp(b_i - b_j),  j <= i                                                                       (2)
    O    = scale (A V + exp(b) * (Q S))                                                                            (3)
    S'   = exp(b_C) S + K^T (exp(b_C - b) * V)                                                                     (4)

Only (4), and in it only a sum and a product with a number, waits for the chunk before. So a step of the grid holds
several chunks of several heads, and their products run one after the other without a pause.

The backward pass walks the steps from the end. It keeps one state per step from the forward pass and finds those of
the chunks from it by (4). With N = scale dO, dO and dS' the cotangents of O and S', and D_ij = exp(b_i - b_j), j <= i:

    A^T  = (K Q^T) * D^T        dA^T = (V N^T) * D^T                                                               (5)
    dQ   = dA K + exp(b) * (N S^T)                                                                                 (6)
    dK   = dA^T Q + exp(b_C - b) * (V dS'^T)                                                                       (7)
    dV   = A^T N + exp(b_C - b) * (K dS')                                                                          (8)
    dS   = exp(b_C) dS' + Q^T (exp(b) * N)                                                                         (9)
    dg_t = sum_{i >= t} (q_i dq_i - k_i dk^A_i) + sum_{j < t} k_j dk^S_j + exp(b_C) <dS', S>                     (10)

where dk^A and dk^S are the two terms of (7). Every exponent is <= 0 where it is used. Documents are masks on (2) to
(4). (10) sums what crosses position t; sum_{i >= t} (q_i dq_i - k_i dk_i) + <dS', S'> is shorter and the same, but it
takes away what lies behind t from much larger sums, whose products were rounded in different places.

    code     symbol   shape          dtype
    q, k     q, k     [b, t, h, k]   bfloat16 or float32
    v, o     v, o     [b, t, hv, v]  as q; head j reads q, k of head j // (hv / h)
    g        g        [b, t, hv]     float32, natural log, <= 0; or None
    initial  S_0      [b, hv, k, v]  float32
    index             [b, t]         int32, number of documents that started since the beginning; or None
"""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.tpu import _matrix_state, _tiles
from pallas_kernels.tpu._generations import sizes
from pallas_kernels.tpu._matrix_state import KeyGradients, Operator
from pallas_kernels.tpu._scalar_decay import DecayGradient, pair_decay, sums, times, weights
from pallas_kernels.tpu._tiles import Grid, chunks, product, product_nt, product_tn


def supports(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array | None) -> str | None:
    """Why the kernel cannot compute this, or None."""
    if g is not None and g.ndim == 4:
        return "g is a decay per channel; expected one per head or none"
    return _tiles.declined(g, q=q, k=k, v=v)


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array | None,
    initial: jax.Array,
    index: jax.Array | None,
    *,
    scale: float,
    chunk_size: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Outputs [b, t, hv, v] in v's dtype and the final state, equation (1).

    Positions of padding come with k = 0 and g = 0. chunk_size: rounded up to a multiple of 128; None is the choice for
    the generation. interpret: as for `pallas_call`.
    """
    plan = _tiles.grid(q.shape, v.shape, q.dtype.itemsize, sizes(), chunk_size)
    arrays = {"q": q, "k": k, "v": v, "g": g, "index": index}
    return _matrix_state.run(OPERATOR, plan, arrays, initial, scale=scale, interpret=interpret)


def _forward_step(plan: Grid, scale: float, refs: SimpleNamespace) -> None:
    """Equations (2) to (4)."""
    of_step = chunks(refs, plan)
    b = sums(refs, plan, of_step)
    for head in range(plan.step_heads):
        keys, values = plan.key_lanes(head), plan.value_lanes(head)
        S = refs.S[head]
        for chunk in of_step:
            at, w = chunk.at, weights(b, chunk, head)
            q, k, v = refs.q[0, at, keys], refs.k[0, at, keys], refs.v[0, at, values]
            A = product_nt(q, k) * pair_decay(w, chunk.marks, transposed=False)
            o = product(A.astype(v.dtype), v) + times(product(q, S.astype(q.dtype)), w.enter)
            refs.o[0, at, values] = (scale * o).astype(refs.o.dtype)
            S = times(S, w.through) + product_tn(k, times(v, w.leave).astype(v.dtype))
        refs.S[head] = S


def _backward_step(plan: Grid, scale: float, refs: SimpleNamespace) -> None:
    """Equations (5) to (10)."""
    of_step = chunks(refs, plan)
    b = sums(refs, plan, of_step)
    key_gradients, decay_gradient = KeyGradients(plan, refs), DecayGradient()
    for head in range(plan.step_heads):
        keys, values = plan.key_lanes(head), plan.value_lanes(head)
        of_head = [weights(b, chunk, head) for chunk in of_step]
        states = [refs.entered[0, 0, head]]
        for chunk, w in zip(of_step, of_head):
            k, v = refs.k[0, chunk.at, keys], refs.v[0, chunk.at, values]
            states.append(times(states[-1], w.through) + product_tn(k, times(v, w.leave).astype(v.dtype)))
        dS = refs.dS[head]
        for chunk, w, S in zip(of_step[::-1], of_head[::-1], states[-2::-1]):
            at = chunk.at
            q, k = refs.q[0, at, keys], refs.k[0, at, keys]
            v, do = refs.v[0, at, values], refs.do[0, at, values]
            D = pair_decay(w, chunk.marks, transposed=True)
            A = (product_nt(k, q) * D).astype(v.dtype)
            dA = (product_nt(v, do) * D).astype(v.dtype)
            S_before, dS_after = S.astype(v.dtype), dS.astype(v.dtype)
            # Products within the chunk first: in another order more values wait in VMEM, and a step is a tenth longer.
            dk, dv = scale * product(dA, q), scale * product(A, do)
            dq = scale * (product_tn(dA, k) + times(product_nt(do, S_before), w.enter))
            dk_out = times(product_nt(v, dS_after), w.leave)
            dv += times(product(k, dS_after), w.leave)
            refs.dv[0, at, values] = dv.astype(refs.dv.dtype)
            if refs.g is not None:
                q_wide, k_wide = q.astype(jnp.float32), k.astype(jnp.float32)
                from_here = jnp.sum(q_wide * dq - k_wide * dk, axis=1, keepdims=True)
                up_to_here = jnp.sum(k_wide * dk_out, axis=1, keepdims=True)
                decay_gradient.put(chunk.units[head], from_here, up_to_here, times(dS, w.through) * S)
            key_gradients.add(head, at, dq, dk + dk_out)
            dS = times(dS, w.through) + product_tn(q, (scale * times(do, w.enter)).astype(do.dtype))
        refs.dS[head] = dS
    if refs.g is not None:
        decay_gradient.write(refs, plan, of_step)


OPERATOR = Operator("linear_attention", _forward_step, _backward_step)
