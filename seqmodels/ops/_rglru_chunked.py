"""The chunked form of the real-gated linear recurrent unit, forward and backward.

With a = exp(g), beta = sqrt(1 - a^2), b = beta x, within a chunk of C positions, h_0 the state that enters:

    A_t = a_1 ... a_t        H_t = sum_{s <= t} a_{s+1} ... a_t b_s        h_t = A_t h_0 + H_t                     (1)

(A, H) is the running composition of the maps h -> a_t h + b_t. It is found in log2(C) rounds: a round with stride r
composes the map that ends at t with the one that ends at t - r, both of r steps, and then r is doubled (Hillis, Steele
1986). Products of decays stay in linear space and never grow. On a CPU a chunk is one position, and (1) the recurrence:
its vectors are short, and a row of channels fills them. With dh the cotangents of the outputs,

    delta_t = dh_t + a_{t+1} delta_{t+1}                                                                          (2)
    dx_t = beta_t delta_t        dg_t = a_t h_{t-1} delta_t - (a_t^2 / beta_t) x_t delta_t                        (3)

where (2) is (1) backwards in time. The backward pass keeps the outputs, which are the states, and nothing else.
"""

from functools import partial

import jax
import jax.numpy as jnp

from seqmodels.notation import Array
from seqmodels.ops import _scan
from seqmodels.ops._chunks import cut, scan_chunks
from seqmodels.ops._scan import Documents

DEFAULT_CHUNK = 64
CPU_CHUNK = 1
STEEPEST = 2000  # the largest 1 / beta in (3)


@jax.custom_jvp
def input_factor(g: Array) -> Array:
    """beta = sqrt(1 - exp(2 g)), without cancellation for small g, its slope bounded."""
    return jnp.sqrt(-jnp.expm1(2 * g))


@input_factor.defjvp
def _input_factor_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (g,), (dg,) = primals, tangents
    beta = input_factor(g)
    return beta, _slope(g, beta) * dg


def _slope(g: Array, beta: Array) -> Array:
    """The derivative of beta by g."""
    return -jnp.exp(2 * g) / jnp.maximum(beta, 1 / STEEPEST)


def chunked(x: Array, g: Array, h: Array, docs: Documents | None, *, chunk_size: int | None) -> tuple[Array, Array]:
    """Outputs [b, t, d] in x's dtype and the final h [b, d], from x, g [b, t, d] and h [b, d]."""
    if docs is None:
        return _run(x, g, None, h, chunk_size)
    # At padding the decay is 1 and the input 0: the state passes through.
    x, g = (jnp.where(docs.real[..., None], y, 0) for y in (x, g))
    o, h = _run(x, g, _scan.starts(docs), h, chunk_size)
    return jnp.where(docs.real[..., None], o, 0), h


def _decay(g: Array, resets: Array | None) -> Array:
    """a, which is 0 where a document starts."""
    a = jnp.exp(g)
    return a if resets is None else jnp.where(resets[..., None], 0, a)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _run(x: Array, g: Array, resets: Array | None, h: Array, size: int | None) -> tuple[Array, Array]:
    """Outputs and the final state; resets [b, t] bool, or None."""
    states = _states(_decay(g, resets), input_factor(g) * x, h, size)
    return states.astype(x.dtype), states[:, -1]


def _run_forward(x: Array, g: Array, resets: Array | None, h: Array, size: int | None):
    o, final = _run(x, g, resets, h, size)
    return (o, final), (x, g, resets, h, o)


def _run_backward(size: int | None, residuals: tuple, cotangents: tuple):
    x, g, resets, h, o = residuals
    do, dh = cotangents
    a, beta = _decay(g, resets), input_factor(g)
    # 1. Equation (2), from the cotangent of the final state, which no decay follows.
    following = jnp.concatenate([a[:, 1:], jnp.ones_like(a[:, :1])], axis=1)
    delta = _states(following, do.astype(h.dtype), dh, size, reverse=True)
    # 2. Equation (3).
    before = jnp.concatenate([h[:, None], o[:, :-1].astype(h.dtype)], axis=1)
    dg = delta * (a * before + _slope(g, beta) * x)
    return (beta * delta).astype(x.dtype), dg.astype(g.dtype), None, a[:, 0] * delta[:, 0]


_run.defvjp(_run_forward, _run_backward)


def _states(a: Array, b: Array, h: Array, size: int | None, *, reverse: bool = False) -> Array:
    """h_t = a_t h_{t-1} + b_t for all t, from a, b [b, t, d] and h [b, d]; with `reverse` from the last t to the first.

    size: positions per chunk; None is what suits the platform.
    """
    if size is None:
        by_platform = {"cpu": CPU_CHUNK, "default": DEFAULT_CHUNK}
        branches = {name: partial(_states, size=count, reverse=reverse) for name, count in by_platform.items()}
        return jax.lax.platform_dependent(a, b, h, **branches)
    length = a.shape[1]
    size = min(size, length)
    at_the_end = ((0, 0), (0, -length % size), (0, 0))
    a = jnp.pad(a, at_the_end, constant_values=1)

    def body(h: Array, chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        a, b = chunk
        if reverse:
            a, b = a[::-1], b[::-1]
        A, H = _compose(a, b)
        h = A * h + H
        return h[-1], h[::-1] if reverse else h

    _, states = scan_chunks(body, h, (cut(a, size), cut(b, size)), reverse=reverse)
    return states.reshape(a.shape)[:, :length]


def _compose(a: Array, b: Array) -> tuple[Array, Array]:
    """(A, H) of equation (1) over a chunk, [c, d] each."""
    stride = 1
    while stride < a.shape[0]:
        b = b + a * _delayed(b, stride, 0)
        a = a * _delayed(a, stride, 1)
        stride *= 2
    return a, b


def _delayed(x: Array, by: int, fill: float) -> Array:
    """x[t - by] at t, `fill` before the start."""
    return jnp.pad(x[:-by], ((by, 0), (0, 0)), constant_values=fill)
