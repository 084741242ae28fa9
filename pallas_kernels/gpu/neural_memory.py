"""The linear neural memory on Hopper GPUs, with momentum and forgetting: forward and backward.

    u_t = 2 lambda k_t^T (k_t R - v_t)          S_t = eta_t S_{t-1} - theta_t u_t
    W_t = (1 - alpha_t) W_{t-1} + S_t           o_t = q_t W_t                                                      (1)

(Titans: Behrouz, Zhong, Mirrokni 2024, arXiv 2501.00663), R the weights at the start of a mini-batch. The equations and
their numbers are those of `pallas_kernels.tpu.neural_memory`; `_memory_gates` has (2) to (4), the weights Gamma, gamma,
mu, b, f, m of a mini-batch. With W, S what a mini-batch starts from, W', S' what it leaves, and N, dW', dS' the
cotangents of O, W', S':

    D    = 2 lambda (K W - V)                   A = (Q K^T) * Gamma                                                (5)
    O    = b * (Q W) + f * (Q S) - A D                                                                             (6)
    W'   = b_C W + f_C S - K^T (gamma * D)      S' = m_C S - K^T (mu * D)                                          (7)

    E    = -2 lambda (A^T N + gamma * (K dW') + mu * (K dS'))                   dV = -E                            (8)
    dQ   = b * (N W^T) + f * (N S^T) + P K      P = -(N D^T) * Gamma                                               (9)
    dK   = P^T Q + E W^T - gamma * (D dW'^T) - mu * (D dS'^T)                                                     (10)
    dW   = b_C dW' + Q^T (b * N) + K^T E        dS = f_C dW' + m_C dS' + Q^T (f * N)                              (11)
    db_t = q_t (N W^T)_t                        df_t = q_t (N S^T)_t                                              (12)
    dGamma = -(N D^T) * (Q K^T)                                                                                   (13)
    dgamma_j = -k_j (D dW'^T)_j                 dmu_j = -k_j (D dS'^T)_j                                          (14)
    db_C = <dW', W>                             df_C = <dW', S>              dm_C = <dS', S>                      (15)

What waits for another mini-batch is walked through by one kernel in either direction (`_memory_walk`): (5) to (7)
without A forwards, (8) and (11) backwards. The states that entered a mini-batch, and the cotangents of those that left
it, are written down on the way. All else is products within mini-batches, which XLA takes for all of them at once.

A matrix instruction has 64 rows, and so has a mini-batch in the kernels: shorter ones are filled up with tokens that
have no weight.

    name       symbol   shape             dtype
    q, k       q, k     [b, t, h, k]      bfloat16
    v, o       v, o     [b, t, h, v]      bfloat16
    theta      theta    [b, t, h]         float32
    alpha      alpha    [b, t, h]         float32     or None for 0
    eta        eta      [b, t, h]         float32     or None: no momentum
    weights    W        [b, h, k, v]      float32
    momentum   S        [b, h, k, v]      float32     None without eta
    token               [b, t]            bool        whether there is one at a position, which else leaves W and S as
                                                      they are; None: everywhere
    loss_scale lambda

and in the kernels, of n mini-batches of C = 64 rows,

    q, k, values        [b, n C, h, ...]  bfloat16    values: v forwards, N backwards
    D, E       D, E     [b, n C, h, v]    bfloat16
    A          A        [b, h, n, C, C]   bfloat16
    weights             [b, h, n, 5, C]   float32     rows: b, f, gamma, mu; b_C, f_C, m_C and zeros
    states     W, S     [b, h, n, k, v]   bfloat16    what entered each mini-batch, the cotangents of what left it
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._memory_gates import coefficients
from pallas_kernels.gpu._arrays import out_of_reach, pad
from pallas_kernels.gpu._chunk import CHUNK, TILE
from pallas_kernels.gpu._memory_walk import walk, walk_back
from pallas_kernels.once import differentiated_once

Array = jax.Array
States = tuple[Array, ...]

NAME = "pallas_gpu neural_memory"
MINI_BATCHES = (16, 32, 64)
# Channels. W and S of a tile of columns take a register of each thread per channel of the keys.
MOST_KEYS, MOST_VALUES = 128, 256


def supports(q: Array, k: Array, v: Array, mini_batch: int, *, chunk_size: int | None = None) -> str | None:
    """Why the kernel does not run on these arrays, or None where it does: by shapes, dtypes and the GPU, if any."""
    if reason := out_of_reach(v, q=q):
        return reason
    if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
        return f"q, k and v must be bfloat16, got {q.dtype}, {k.dtype} and {v.dtype}"
    if mini_batch not in MINI_BATCHES:
        return f"mini_batch={mini_batch}; expected one of {MINI_BATCHES}: a matrix instruction has {CHUNK} rows"
    if q.shape[-1] > MOST_KEYS:
        return f"q and k have {q.shape[-1]} channels, at most {MOST_KEYS} are supported: the states are in registers"
    if v.shape[-1] > MOST_VALUES:
        return f"v has {v.shape[-1]} channels, at most {MOST_VALUES} are supported"
    if chunk_size is not None and chunk_size > mini_batch:
        return f"chunk_size={chunk_size}; the states of every mini-batch are kept, of {mini_batch} tokens"
    return None


def neural_memory(
    q: Array,
    k: Array,
    v: Array,
    theta: Array,
    alpha: Array | None,
    eta: Array | None,
    weights: Array,
    momentum: Array | None,
    *,
    mini_batch: int,
    loss_scale: float,
    token: Array | None = None,
    chunk_size: int | None = None,
) -> tuple[Array, Array, Array | None]:
    """Outputs [b, t, h, v] in v's dtype, the final weights and momentum, equation (1).

    Shapes and dtypes are those of the table above; t is a multiple of mini_batch, and the first mini-batch starts with
    the first token. Outputs where there is no token mean nothing. chunk_size: tokens between states that are kept for
    the backward pass, at most mini_batch. Differentiable once, with respect to all arrays of floats.

    Raises ValueError with the reason of `supports`.
    """
    if reason := supports(q, k, v, mini_batch, chunk_size=chunk_size):
        raise ValueError(f"{NAME}: {reason}")
    key_channels, value_channels = q.shape[-1], v.shape[-1]
    gates = _gates(*coefficients(theta, alpha, eta, mini_batch, token), mini_batch)
    given = (weights,) if momentum is None else (weights, momentum)
    states = tuple(pad(pad(x.astype(jnp.float32), 2, TILE), 3, TILE) for x in given)
    q, k, v = (pad(_lay_out(x, mini_batch), 3, TILE) for x in (q, k, v))
    o, states = _remember(2.0 * loss_scale, q, k, v, gates, states)
    o = o.reshape(o.shape[0], -1, CHUNK, *o.shape[2:])[:, :, :mini_batch, :, :value_channels]
    o = o.reshape(o.shape[0], -1, *o.shape[3:])
    W, *S = (x[:, :, :key_channels, :value_channels] for x in states)
    return o, W, S[0] if S else None


def _lay_out(x: Array, size: int) -> Array:
    """[b, t, h, d] in mini-batches of 64 rows, of which the first `size` are tokens."""
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    return pad(x, 2, CHUNK).reshape(x.shape[0], -1, *x.shape[3:])


class Gates(NamedTuple):
    """Of every mini-batch; those of the momentum are None where there is none.

    Gamma [b, h, n, C, C]; b, f, gamma, mu [b, h, n, C]; b_C, f_C, m_C [b, h, n]
    """

    Gamma: Array
    b: Array
    gamma: Array
    b_C: Array
    f: Array | None = None
    mu: Array | None = None
    f_C: Array | None = None
    m_C: Array | None = None


def _gates(pairs: Array, rows: dict[str, Array], size: int) -> Gates:
    """From what `coefficients` gives."""
    pairs = pairs.reshape(*pairs.shape[:3], -1, size).transpose(0, 1, 3, 4, 2)
    rows = {name: x.reshape(*x.shape[:2], -1, size) for name, x in rows.items()}
    found = {name: pad(rows[name], 3, CHUNK) for name in ("b", "f", "mu") if name in rows}
    found |= {f"{name}_C": rows[name][..., -1] for name in ("b", "f", "m") if name in rows}
    gamma = pad(pairs[..., -1, :], 3, CHUNK)
    return Gates(Gamma=pad(pad(pairs, 3, CHUNK), 4, CHUNK), gamma=gamma, **found)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _remember(factor: float, q: Array, k: Array, v: Array, gates: Gates, states: States) -> tuple[Array, States]:
    found = _walk(factor, q, k, v, gates, states, keep=False)
    return found.values["o"], found.last


def _forward(factor, q, k, v, gates, states):
    def forward(q, k, v, gates, states):
        found = _walk(factor, q, k, v, gates, states, keep=True)
        return (found.values["o"], found.last), (q, k, gates, found.values["D"], found.states)

    return differentiated_once(NAME, forward)(q, k, v, gates, states)


def _backward(factor, residuals, cotangents):
    return differentiated_once(NAME, partial(_gradients, factor))(*residuals, *cotangents)


_remember.defvjp(_forward, _backward)


def _walk(factor, q, k, v, gates, states, *, keep):
    A = (_pairs(q, k) * gates.Gamma).astype(v.dtype)
    return walk(q, k, v, A, _table(gates), states, factor=factor, keep=keep)


def _gradients(factor, q, k, gates, D, entered, do, d_last):
    """Cotangents of q, k, v, the gates and the initial states: equations (8) to (15)."""
    dtype, has_momentum = q.dtype, gates.f is not None
    QK, ND = _pairs(q, k), _pairs(do, D)
    A, P = ((x * gates.Gamma).astype(dtype) for x in (QK, -ND))
    found = walk_back(q, k, do, A, _table(gates), d_last, factor=factor)
    E, d_left = found.values["E"], found.states
    Q, K, N, D, E = (x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:]) for x in (q, k, do, D, E))
    N_states = [_product("bnihv,bhnkv->bnihk", N, x) for x in entered]
    D_states = [_product("bnihv,bhnkv->bnihk", D, x) for x in d_left]
    dQ = _product("bhnij,bnjhk->bnihk", P, K)
    dK = _product("bhnij,bnihk->bnjhk", P, Q) + _product("bnihv,bhnkv->bnihk", E, entered[0])
    for x, y, read, written in zip(N_states, D_states, (gates.b, gates.f), (gates.gamma, gates.mu)):
        dQ += _column(read) * x
        dK -= _column(written) * y
    d_gates = Gates(
        Gamma=-ND * QK,
        b=_rows(Q, N_states[0]),
        gamma=-_rows(K, D_states[0]),
        b_C=_inner(d_left[0], entered[0]),
    )
    if has_momentum:
        d_gates = d_gates._replace(
            f=_rows(Q, N_states[1]),
            mu=-_rows(K, D_states[1]),
            f_C=_inner(d_left[0], entered[1]),
            m_C=_inner(d_left[1], entered[1]),
        )
    dQ, dK, dV = (x.astype(dtype).reshape(x.shape[0], -1, *x.shape[3:]) for x in (dQ, dK, -E))
    return dQ, dK, dV, d_gates, found.last


def _product(formula: str, *x: Array) -> Array:
    return jnp.einsum(formula, *x, preferred_element_type=jnp.float32)


def _pairs(x: Array, y: Array) -> Array:
    """X Y^T of every mini-batch, [b, h, n, C, C]."""
    x, y = (z.reshape(z.shape[0], -1, CHUNK, *z.shape[2:]) for z in (x, y))
    return _product("bnihd,bnjhd->bhnij", x, y)


def _rows(x: Array, y: Array) -> Array:
    """The products of the rows of x with those of y, [b, h, n, C]."""
    return jnp.moveaxis(jnp.sum(x.astype(jnp.float32) * y, axis=-1), 3, 1)


def _inner(x: Array, y: Array) -> Array:
    """<X, Y> of every mini-batch, [b, h, n]."""
    return jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32), axis=(-1, -2))


def _column(x: Array) -> Array:
    """Weights [b, h, n, C] beside rows [b, n, C, h, k]."""
    return jnp.moveaxis(x, 1, 3)[..., None]


def _table(gates: Gates) -> Array:
    """The rows B to ENDS of `_memory_walk`, [b, h, n, 5, C]."""
    zero, none = jnp.zeros_like(gates.b), jnp.zeros_like(gates.b_C)
    f, mu = (zero if x is None else x for x in (gates.f, gates.mu))
    ends = [none if x is None else x for x in (gates.b_C, gates.f_C, gates.m_C)]
    ends = pad(jnp.stack(ends, axis=-1), 3, CHUNK)
    return jnp.stack([gates.b, f, gates.gamma, mu, ends], axis=3)
