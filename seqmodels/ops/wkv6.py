"""WKV, the operator of RWKV-6: a decay per channel, read before the write, with a bonus for the current token.

    o_t = scale q_t (S_{t-1} + diag(u) k_t^T v_t)                                                                 (1)
    S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t                                                                      (2)

(Peng et al. 2024, "Eagle and Finch", arXiv 2404.05892.)

    code    symbol   shape            range, dtype
    q       r        [b, t, h, k]     any float
    k       k        [b, t, h, k]     any float
    v       v        [b, t, h, v]     any float
    g       ln w     [b, t, h, k]     <= 0, natural log, float32
    u       u        [h, k]           any float
    S       wkv      [b, h, k, v]     float32

What token t reads, M_t = S_{t-1}, obeys (2) one token late, so linear attention over keys, values and decays moved by
one position gives it, and no exponent becomes positive; one step of (2) at the end gives the final state:

    M_t = diag(exp(g_{t-1})) M_{t-1} + k_{t-1}^T v_{t-1};   o_t = scale (q_t M_t + (q_t . (u * k_t)) v_t)         (3)
    S_T = diag(exp(g_T)) M_T + k_T^T v_T                                                                          (4)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from seqmodels.errors import InputError
from seqmodels.notation import Array, ChannelDecay, Keys, MatrixState, Queries, SegmentIds, Values
from seqmodels.ops import _dispatch, _scan
from seqmodels.ops._arguments import check_log_decay, check_qkv
from seqmodels.ops._op import Example, Inputs, Options, SeqOp
from seqmodels.ops._scan import Documents
from seqmodels.ops.linear_attention import LINEAR_ATTENTION, linear_attention_flops, zero_state


def wkv6(
    q: Queries,
    k: Keys,
    v: Values,
    g: ChannelDecay,
    u: Float[Array, "h k"],
    *,
    scale: float | None = None,
    initial_state: MatrixState | None = None,
    segment_ids: SegmentIds | Documents | None = None,
    causal: bool = True,
    form: str = "chunked",
    chunk_size: int | None = None,
    backend: str = "auto",
    exchange: str = "auto",
) -> tuple[Values, MatrixState]:
    """Linear attention that reads before it writes, equations (1) and (2).

    Returns o [b, t, h, v] in v's dtype and the final state S [b, h, k, v] float32.

    scale: factor on q; None is k ** -0.5. RWKV-6 itself takes 1.
    initial_state: a final state; it belongs to the document of the first real token.
    segment_ids: [b, t] document numbers; the state is forgotten where they change, 0 is padding.
    causal: False adds the outputs of the reversed span, each document reversed in its place. The state is ().
    form: "recurrent" (`lax.scan` of the definition), "chunked" (training), "parallel" (quadratic).
    chunk_size: positions per chunk; None is 64. It is rounded up to a power of two.

    Raises InputError where shapes disagree, and outside of jit for decays above 0.
    """
    _check(q, k, v, g, u)
    return _dispatch.run(
        WKV6,
        {"q": q, "k": k, "v": v, "g": g.astype(_scan.state_dtype(g)), "u": u},
        {"scale": q.shape[-1] ** -0.5 if scale is None else scale},
        initial_state=initial_state,
        segment_ids=segment_ids,
        form=form,
        chunk_size=chunk_size,
        backend=backend,
        exchange=exchange,
        causal=causal,
    )


def wkv6_flops(
    length: int, *, heads: int, key_dim: int, value_dim: int, decoding: bool = False, **how: Any
) -> float:
    """FLOPs of matrix products for a token: those of linear attention with a decay per channel, and in the chunked form
    those of q * u, which is a product in the program as well, and of its product with k. how: chunk_size as there."""
    sizes = {"heads": heads, "key_dim": key_dim, "value_dim": value_dim}
    read = linear_attention_flops(length, **sizes, decays=key_dim, decoding=decoding, **how)
    return read if decoding else read + 2 * 2 * heads * key_dim


def _check(q: Array, k: Array, v: Array, g: Array, u: Array) -> None:
    check_qkv("wkv6", q, k, v)
    if v.shape[2] != q.shape[2]:
        raise InputError(f"wkv6: v has {v.shape[2]} heads; expected {q.shape[2]} as q has")
    if g.shape != q.shape:
        raise InputError(f"wkv6: g has shape {g.shape}; expected {q.shape} as q has")
    if u.shape != q.shape[2:]:
        raise InputError(f"wkv6: u has shape {u.shape}; expected {q.shape[2:]}, heads and key channels of q")
    check_log_decay("wkv6", g)


def _initial_state(arrays: Inputs, options: Options) -> Array:
    q, v = arrays["q"], arrays["v"]
    return zero_state(q.shape[0], *q.shape[-2:], v.shape[-1]).astype(_scan.state_dtype(*arrays.values()))


def _step(S: Array, arrays: Inputs, options: Options) -> tuple[Array, Array]:
    q, k, v, g, u = (arrays[name].astype(S.dtype) for name in "qkvgu")
    written = k[..., :, None] * v[..., None, :]
    o = jnp.einsum("bhk,bhkv->bhv", options["scale"] * q, S + u[..., None] * written)
    return jnp.exp(g)[..., None] * S + written, o.astype(arrays["v"].dtype)


def _form(name: str) -> Callable[..., tuple[Array, Array]]:
    """A form of linear attention as one of this operator: equations (3) and (4)."""

    def form(
        arrays: Inputs, state: Array, docs: Documents | None, chunk_size: int | None, options: Options
    ) -> tuple[Array, Array]:
        q, k, v, g, u = (arrays[name] for name in "qkvgu")
        late = {"q": q, "k": _moved(k, docs), "v": _moved(v, docs), "g": _moved(g, docs)}
        # A padding position does nothing of its own, but here it does what the position before it has to do.
        every = None if docs is None else docs._replace(real=jnp.ones_like(docs.real))
        o, M = LINEAR_ATTENTION.forms[name](late, state, every, chunk_size, {**options, "normalize": False})
        bonus = options["scale"] * jnp.einsum("bthk,hk,bthk->bth", *(x.astype(M.dtype) for x in (q, u, k)))
        o = o + bonus[..., None] * v
        k_last, v_last = (x[:, -1].astype(M.dtype) for x in (k, v))
        S = jnp.exp(g[:, -1])[..., None] * M + k_last[..., :, None] * v_last[..., None, :]
        if docs is not None:
            o = jnp.where(docs.real[..., None, None], o, 0)
            S = _scan.where_row(docs.real[:, -1], S, M)
        return o.astype(v.dtype), S

    return form


def _moved(x: Array, docs: Documents | None) -> Array:
    """Each position's predecessor; 0 where that is padding, or of an earlier document, or before the span."""
    if docs is not None:
        stays = docs.real & (docs.index == jnp.pad(docs.index[:, 1:], ((0, 0), (0, 1)), constant_values=-1))
        x = jnp.where(stays.reshape(stays.shape + (1,) * (x.ndim - 2)), x, 0)
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0), *[(0, 0)] * (x.ndim - 2)))


def _of_linear_attention(part: Callable) -> Callable:
    """The state changes as in linear attention, and so does the summary of a span."""

    def run(first: Inputs, second: object, options: Options) -> object:
        return part(first, second, {**options, "normalize": False})

    return run


def _examples(key: Array, batch: int, length: int) -> dict[str, Example]:
    keys = jax.random.split(key, 5)
    heads, key_dim, value_dim = 2, 4, 3
    q, k, w = (jax.random.normal(x, (batch, length, heads, key_dim)) for x in keys[:3])
    v = jax.random.normal(keys[3], (batch, length, heads, value_dim))
    arrays = {"q": q, "k": k, "v": v, "g": -jnp.exp(w), "u": jax.random.normal(keys[4], (heads, key_dim))}
    return {
        "scale 1": Example(arrays, {"scale": 1.0}),
        "strong decay": Example({**arrays, "g": jnp.full_like(w, -50.0)}, {}, extreme=True),
        "weak decay": Example({**arrays, "g": jnp.full_like(w, -1e-6)}, {}, extreme=True),
    }


WKV6 = SeqOp(
    name="wkv6",
    call=wkv6,
    time_args=("q", "k", "v", "g"),
    step=_step,
    initial_state=_initial_state,
    forms={name: _form(name) for name in LINEAR_ATTENTION.forms},
    summarize=_of_linear_attention(LINEAR_ATTENTION.summarize),
    combine=_of_linear_attention(LINEAR_ATTENTION.combine),
    apply=_of_linear_attention(LINEAR_ATTENTION.apply),
    summary_kind="prefix",
    head_axes={"q": 2, "k": 2, "v": 2, "g": 2, "u": 0},
    examples=_examples,
)
