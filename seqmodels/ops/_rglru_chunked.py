"""The chunked form of the real-gated linear recurrent unit, forward and backward.

Within a chunk of C positions, with a = exp(g), beta = sqrt(1 - a^2), and h_0 the state that enters:

    A_t = a_1 ... a_t        H_t = sum_{s <= t} a_{s+1} ... a_t beta_s x_s        h_t = A_t h_0 + H_t              (1)

(A, H) is the running composition of the maps h -> a_t h + beta_t x_t. It is found in log2(C) rounds: a round with
stride r composes the map that ends at t with the one that ends at t - r, both of r steps, and then r is doubled
(Hillis, Steele 1986). Products of decays stay in linear space and never grow. With dh the cotangents of the outputs,

    delta_t = dh_t + a_{t+1} delta_{t+1}                                                                          (2)
    dx_t = beta_t delta_t        dg_t = a_t h_{t-1} delta_t - (a_t^2 / beta_t) x_t delta_t                        (3)

where (2) is (1) backwards in time. The backward pass keeps the outputs, which are the states, and nothing else.

The equations are written for one chunk of one row of the batch; `scan_chunks` takes them to the others.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqmodels.notation import Array
from seqmodels.ops import _scan
from seqmodels.ops._chunks import cut, scan_chunks
from seqmodels.ops._scan import Documents

DEFAULT_CHUNK = 16
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


def chunked(
    x: Array, g: Array, h: Array, docs: Documents | None, *, chunk_size: int | None
) -> tuple[Array, Array]:
    """Outputs [b, t, d] in x's dtype and the final h [b, d], from x, g [b, t, d] and h [b, d]."""
    length = x.shape[1]
    size = min(chunk_size or DEFAULT_CHUNK, length)
    resets = None
    if docs is not None:
        # At padding the decay is 1 and the input 0; where a document starts, what was before is forgotten.
        x, g = (jnp.where(docs.real[..., None], y, 0) for y in (x, g))
        resets = cut(_scan.starts(docs), size)
    o, h = _run(_Inputs(cut(x, size), cut(g, size), resets), h)
    o = o.reshape(o.shape[0], -1, o.shape[-1])[:, :length]
    return o if docs is None else jnp.where(docs.real[..., None], o, 0), h


class _Inputs(NamedTuple):
    """The arrays in chunks: x, g [b, n, c, d] and resets [b, n, c] bool; inside a scan without b, n.

    At the end of the last chunk x and g are 0: the state passes through.
    """

    x: Array
    g: Array
    resets: Array | None


def _decay(inputs: _Inputs) -> Array:
    a = jnp.exp(inputs.g)
    return a if inputs.resets is None else jnp.where(inputs.resets[:, None], 0, a)


def _compose(a: Array, x: Array) -> tuple[Array, Array]:
    """(A, H) of equation (1) from a and beta x, [c, d] each."""
    stride = 1
    while stride < a.shape[0]:
        x = x + a * _delayed(x, stride, 0)
        a = a * _delayed(a, stride, 1)
        stride *= 2
    return a, x


def _delayed(x: Array, by: int, fill: float) -> Array:
    """x[t - by] at t, `fill` before the start."""
    return jnp.pad(x[:-by], ((by, 0), (0, 0)), constant_values=fill)


@jax.custom_vjp
def _run(inputs: _Inputs, h: Array) -> tuple[Array, Array]:
    """Outputs in chunks, and the final state."""

    def body(h: Array, inputs: _Inputs) -> tuple[Array, Array]:
        A, H = _compose(_decay(inputs), input_factor(inputs.g) * inputs.x)
        h = A * h + H
        return h[-1], h.astype(inputs.x.dtype)

    h, o = scan_chunks(body, h, inputs)
    return o, h


def _run_forward(inputs: _Inputs, h: Array) -> tuple[tuple[Array, Array], tuple]:
    o, final = _run(inputs, h)
    return (o, final), (inputs, h, o)


def _run_backward(residuals: tuple, cotangents: tuple) -> tuple[_Inputs, Array]:
    inputs, h, o = residuals
    entered = jnp.concatenate([h[:, None], o[:, :-1, -1].astype(h.dtype)], axis=1)

    def body(carried: Array, arrays: tuple[_Inputs, Array, Array, Array]) -> tuple[Array, Any]:
        """`carried` is a_{t+1} delta_{t+1} at the chunk's last t."""
        inputs, entered, o, do = arrays
        x, g, _ = inputs
        a, beta = _decay(inputs), input_factor(g)
        before = jnp.concatenate([entered[None], o[:-1].astype(a.dtype)])
        # 1. Equation (2): (1) on the reversed chunk, each decay one step later.
        following = jnp.concatenate([a[1:], jnp.ones_like(a[:1])])
        A, delta = _compose(following[::-1], do.astype(a.dtype)[::-1])
        delta = (A * carried + delta)[::-1]
        # 2. Equation (3).
        dg = delta * (a * before + _slope(g, beta) * x)
        return a[0] * delta[0], ((beta * delta).astype(x.dtype), dg.astype(g.dtype))

    do, dh = cotangents
    dh, (dx, dg) = scan_chunks(body, dh, (inputs, entered, o, do), reverse=True)
    return _Inputs(dx, dg, None), dh


_run.defvjp(_run_forward, _run_backward)
