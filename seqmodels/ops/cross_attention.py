"""Cross-attention: the tokens of a sequence read another one, the context.

    o_i = sum_j w_ij v_j [/ sum_j w_ij],     j over the tokens of the context that token i sees                    (1)

    softmax    w_ij = exp(scale q_i . k_j), with the quotient            (Vaswani et al. 2017, arXiv 1706.03762)
    linear     w_ij = scale q_i . k_j, so that o_i = scale q_i S with S = sum_j k_j v_j^T, of fixed size; with
               `normalize` the quotient, whose divisor is scale q_i . z + 1e-6 with z = sum_j k_j
               (Katharopoulos, Vyas, Pappas, Fleuret 2020, arXiv 2006.16236)

A token sees the context's tokens that have its segment id; where either side comes without ids, all of them. Padding,
id 0, is not seen and sees nothing: its output is 0.

Decays and delta rules have no such form: their weights depend on what lies between two tokens of one sequence.

Both operators return what they remember of the context, to be handed in for the tokens that follow, in place of it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from seqmodels.errors import InputError
from seqmodels.notation import Array, Keys, Queries, SegmentIds, Values
from seqmodels.ops import _scan
from seqmodels.ops._blockwise_attention import Reach, blockwise_attention
from seqmodels.ops.linear_attention import EPSILON, LinearState, NormalizedState, linear_attention
from seqmodels.ops.softmax_attention import BLOCK


class Context(NamedTuple):
    """The tokens of a context, by their keys and values. segment_ids: None where all of them are seen."""

    k: Float[Array, "b s hk k"]
    v: Float[Array, "b s hk v"]
    segment_ids: Int[Array, "b s"] | None


def softmax_cross_attention(
    q: Queries,
    k: Keys | None = None,
    v: Values | None = None,
    *,
    memory: Context | None = None,
    scale: float | None = None,
    segment_ids: SegmentIds | None = None,
    context_segment_ids: SegmentIds | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "b t h v"], Context]:
    """Equation (1) with softmax weights, in blocks of `chunk_size` (128) tokens: its memory is linear in t and in s.

    q [b, t, h, k]; k, v [b, s, hk, k or v] with hk a divisor of h; or, in place of k and v, `memory`: what an earlier
    call returned. scale: None is k ** -0.5. Returns the outputs in q's dtype, and what to hand in as `memory`.

    Raises InputError where shapes disagree.
    """
    memory = _remembered("softmax_cross_attention", q, k, v, memory, context_segment_ids)
    k, v, ids = memory
    batch, length = q.shape[:2]
    real = jnp.ones((batch, length), bool) if segment_ids is None else segment_ids != 0
    key = jnp.broadcast_to(jnp.arange(k.shape[1], dtype=jnp.int32), k.shape[:2])
    first, last = jnp.zeros((batch, length), jnp.int32), jnp.full((batch, length), k.shape[1] - 1, jnp.int32)
    if ids is not None and segment_ids is None:
        key = jnp.where(ids != 0, key, -1)
    elif ids is not None:
        # In the order of the ids what a token sees is a range.
        order = jnp.argsort(ids, axis=1, stable=True)
        k, v = (jnp.take_along_axis(x, order[:, :, None, None], axis=1) for x in (k, v))
        ids = jnp.take_along_axis(ids, order, axis=1)
        ends = (jax.vmap(partial(jnp.searchsorted, side=side))(ids, segment_ids) for side in ("left", "right"))
        first, end = (x.astype(jnp.int32) for x in ends)
        last = end - 1
    query = Reach(jnp.where(real, first, 0), jnp.where(real, last, -1))
    how = {"window": None, "sinks": 0, "block": chunk_size or BLOCK}
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    o = blockwise_attention(grouped, k, v, query, key, scale=scale, **how)
    return o.reshape(*q.shape[:3], -1), memory


def linear_cross_attention(
    q: Queries,
    k: Keys | None = None,
    v: Values | None = None,
    *,
    memory: LinearState | Context | None = None,
    scale: float | None = None,
    normalize: bool = False,
    segment_ids: SegmentIds | None = None,
    context_segment_ids: SegmentIds | None = None,
) -> tuple[Float[Array, "b t hv v"], LinearState | Context]:
    """Equation (1) with linear weights, in time linear in t and in s.

    q [b, t, h, k]; k [b, s, h, k]; v [b, s, hv, v] with hv a multiple of h; or, in place of k and v, `memory`: what
    an earlier call returned. scale: None is k ** -0.5. Returns the outputs in the values' dtype (q's, where there is
    only a memory), and what to hand in as `memory`: S, or S and z, as `linear_attention` has them; the context itself
    where both sides have ids.

    Raises InputError where shapes disagree.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    both = segment_ids is not None and context_segment_ids is not None
    if isinstance(memory, Context) or (memory is None and both):
        memory = _remembered("linear_cross_attention", q, k, v, memory, context_segment_ids)
        return _by_document(q, memory, segment_ids, scale, normalize), memory
    dtype = q.dtype
    if memory is None:
        k, v, ids = _remembered("linear_cross_attention", q, k, v, None, context_segment_ids)
        memory, dtype = _summed(k, v, ids, normalize), v.dtype
    S, z = memory if normalize else (memory, None)
    q = jnp.repeat(q.astype(S.dtype) * scale, S.shape[1] // q.shape[2], axis=2)
    o = jnp.einsum("bthk,bhkv->bthv", q, S)
    if z is not None:
        o = o / (jnp.einsum("bthk,bhk->bth", q, z) + EPSILON)[..., None]
    if segment_ids is not None:
        o = jnp.where((segment_ids != 0)[..., None, None], o, 0)
    return o.astype(dtype), memory


def _summed(k: Array, v: Array, ids: Array | None, normalize: bool) -> LinearState:
    """S, and z."""
    k = jnp.repeat(k.astype(_scan.state_dtype(k, v)), v.shape[2] // k.shape[2], axis=2)
    if ids is not None:
        k = jnp.where((ids != 0)[..., None, None], k, 0)
    S = jnp.einsum("bshk,bshv->bhkv", k, v.astype(k.dtype))
    return NormalizedState(S, k.sum(axis=1)) if normalize else S


def _by_document(q: Array, context: Context, segment_ids: Array | None, scale: float, normalize: bool) -> Array:
    """Causal linear attention over both sequences in the order of their ids, each document's context before it.

    The context asks nothing, q = 0, and the rest writes nothing, k = v = 0.
    """
    if segment_ids is None:
        raise InputError(
            "linear_cross_attention: memory holds documents by their ids; expected segment_ids [batch, time]"
        )
    k, v, ids = context
    length = k.shape[1]
    order = jnp.argsort(jnp.concatenate([ids, segment_ids], axis=1), axis=1, stable=True)

    def ordered(of_context: Array, of_rest: Array) -> Array:
        both = jnp.concatenate([of_context, of_rest], axis=1)
        return jnp.take_along_axis(both, order.reshape(*order.shape, *(1,) * (both.ndim - 2)), axis=1)

    no_q, no_k = jnp.zeros_like(k, q.dtype), jnp.zeros_like(q, k.dtype)
    no_v = jnp.zeros((*q.shape[:2], *v.shape[2:]), v.dtype)
    arrays = ordered(no_q, q), ordered(k, no_k), ordered(v, no_v)
    o, _ = linear_attention(*arrays, scale=scale, normalize=normalize, segment_ids=ordered(ids, segment_ids))
    return jnp.take_along_axis(o, jnp.argsort(order, axis=1)[:, length:, None, None], axis=1)


def _remembered(
    op: str, q: Array, k: Array | None, v: Array | None, memory: Any, context_segment_ids: Array | None
) -> Context:
    """The context that is handed in, in either way, with its shapes compared to q's."""
    if memory is not None:
        if k is not None or v is not None:
            raise InputError(f"{op}: both a context and a memory of one are given; expected one of them")
        k, v, context_segment_ids = memory
    if k is None or v is None:
        raise InputError(f"{op}: no context is given; expected k and v, or memory")
    batch, _, heads, key_dim = q.shape
    if k.ndim != 4 or k.shape[0] != batch or k.shape[3] != key_dim:
        raise InputError(f"{op}: k has shape {k.shape}; expected {(batch, 'context', 'heads', key_dim)}")
    linear = op.startswith("linear")
    if not (k.shape[2] == heads if linear else heads % k.shape[2] == 0):
        many = f"{heads}" if linear else f"a divisor of {heads}"
        raise InputError(f"{op}: k has {k.shape[2]} heads; expected {many} as q has")
    if v.ndim != 4 or v.shape[:2] != k.shape[:2] or v.shape[2] % k.shape[2] or not (linear or v.shape[2] == k.shape[2]):
        raise InputError(
            f"{op}: v has shape {v.shape}; expected "
            f"{(*k.shape[:2], f'a multiple of {k.shape[2]}' if linear else k.shape[2], 'channels')} for k"
        )
    if context_segment_ids is not None and context_segment_ids.shape != k.shape[:2]:
        raise InputError(
            f"{op}: context_segment_ids has shape {context_segment_ids.shape}; expected {k.shape[:2]} as k has"
        )
    return Context(k, v, context_segment_ids)
