"""The chunked form of the real-gated linear recurrent unit, forward and backward.

With a = exp(g), beta = sqrt(1 - a^2), b = beta x, within a chunk of C positions, h_0 the state that enters:

    A_t = a_1 ... a_t        H_t = sum_{s <= t} a_{s+1} ... a_t b_s        h_t = A_t h_0 + H_t                     (1)

(A, H) is the running composition of the maps h -> a_t h + b_t. It is found in log2(C) rounds: a round with stride r
composes the map that ends at t with the one that ends at t - r, both of r steps, and then r is doubled (Hillis, Steele
1986). Products of decays stay in linear space and never grow. On a CPU, whose vectors a row of channels fills, a chunk
is walked position by position instead. With dh the cotangents of the outputs, and e those of the state, backwards,

    delta_t = dh_t + e_{t+1}        e_t = a_t delta_t                                                             (2)
    dx_t = beta_t delta_t        dg_t = a_t h_{t-1} delta_t - (a_t^2 / beta_t) x_t delta_t                        (3)

The backward pass keeps the outputs, which are the states, and nothing else: a and beta are found again, chunk by chunk.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqmodels.notation import Array
from seqmodels.ops._chunks import cut, scan_chunks
from seqmodels.ops._scan import Documents

DEFAULT_CHUNK = 64
STEEPEST = 2000  # the largest 1 / beta in (3)


@jax.custom_jvp
def input_factor(g: Array) -> Array:
    """beta = sqrt(1 - exp(2 g)), without cancellation for small g, its slope bounded."""
    t = jnp.tanh(g)  # 1 - exp(2 g) = -2 t / (1 - t), at half the cost of expm1 on a CPU
    return jnp.sqrt(-2 * t / (1 - t))


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
    length = x.shape[1]
    size = min(chunk_size or DEFAULT_CHUNK, length)
    resets = None
    # At padding the decay is 1 and the input 0: the state passes through. So it does at the end of the last chunk.
    if docs is not None:
        x, g = (jnp.where(docs.real[..., None], y, 0) for y in (x, g))
        resets = cut(docs.starts[..., None], size)
    o, h = _run(_Inputs(cut(x, size), cut(g, size), resets), h)
    o = o.reshape(o.shape[0], -1, o.shape[-1])[:, :length]
    return o if docs is None else jnp.where(docs.real[..., None], o, 0), h


class _Inputs(NamedTuple):
    """The arrays in chunks: x, g [b, n, c, d], resets [b, n, c, 1] bool or None; inside a scan those of one chunk."""

    x: Array
    g: Array
    resets: Array | None


def _decay(inputs: _Inputs) -> Array:
    """a, which is 0 where a document starts."""
    a = jnp.exp(inputs.g)
    return a if inputs.resets is None else jnp.where(inputs.resets, 0, a)


@jax.custom_vjp
def _run(inputs: _Inputs, h: Array) -> tuple[Array, Array]:
    """Outputs in chunks and the final state."""

    def body(h: Array, inputs: _Inputs) -> tuple[Array, Array]:
        written = input_factor(inputs.g) * inputs.x
        states = _states(_decay(inputs), written.astype(h.dtype), h)
        return states[-1], states.astype(inputs.x.dtype)

    h, o = scan_chunks(body, h, inputs)
    return o, h


def _run_forward(inputs: _Inputs, h: Array) -> tuple[tuple[Array, Array], tuple]:
    o, final = _run(inputs, h)
    return (o, final), (inputs, h, o)


def _run_backward(residuals: tuple, cotangents: tuple) -> tuple[_Inputs, Array]:
    inputs, h, o = residuals
    do, dh = cotangents
    entered = jnp.concatenate([h[:, None], o[:, :-1, -1].astype(h.dtype)], axis=1)

    def body(e: Array, arrays: tuple) -> tuple[Array, tuple[Array, Array]]:
        inputs, h, o, do = arrays
        a, beta = _decay(inputs), input_factor(inputs.g)
        # 1. Equation (2), in which a row's decay acts on what the row before it gets.
        following = jnp.concatenate([a[1:], jnp.ones_like(a[:1])])
        delta = _states(following, do.astype(e.dtype), e, reverse=True)
        # 2. Equation (3).
        before = jnp.concatenate([h[None], o[:-1].astype(h.dtype)])
        dg = delta * (a * before + _slope(inputs.g, beta) * inputs.x)
        return a[0] * delta[0], ((beta * delta).astype(inputs.x.dtype), dg.astype(inputs.g.dtype))

    dh, (dx, dg) = scan_chunks(body, dh, (inputs, entered, o, do), reverse=True)
    return _Inputs(dx, dg, None), dh


_run.defvjp(_run_forward, _run_backward)


def _states(a: Array, b: Array, h: Array, *, reverse: bool = False) -> Array:
    """h_t = a_t h_{t-1} + b_t for all t of a chunk, from a, b [c, d] and h [d]; with `reverse` from the last t on."""
    walk, compose = (partial(how, reverse=reverse) for how in (_walked, _composed))
    return jax.lax.platform_dependent(a, b, h, cpu=walk, default=compose)


def _walked(a: Array, b: Array, h: Array, reverse: bool) -> Array:
    def step(h: Array, position: tuple[Array, Array]) -> tuple[Array, Array]:
        a, b = position
        h = a * h + b
        return h, h

    return jax.lax.scan(step, h, (a, b), reverse=reverse)[1]


def _composed(a: Array, b: Array, h: Array, reverse: bool) -> Array:
    """By equation (1)."""
    if reverse:
        a, b = a[::-1], b[::-1]
    stride = 1
    while stride < a.shape[0]:
        b = b + a * _delayed(b, stride, 0)
        a = a * _delayed(a, stride, 1)
        stride *= 2
    h = a * h + b
    return h[::-1] if reverse else h


def _delayed(x: Array, by: int, fill: float) -> Array:
    """x[t - by] at t, `fill` before the start."""
    return jnp.pad(x[:-by], ((by, 0), (0, 0)), constant_values=fill)
