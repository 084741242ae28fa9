"""The chunked form of linear attention with decay, forward and backward.

Within a chunk of C positions, with b the inclusive cumulative sum of g (zero without decay), S the state that enters
and S' the state that leaves:

    A_ij = sum_k q_ik k_jk exp(b_ik - b_jk),  j <= i                                                              (1)
    O    = A V + (Q * exp(b)) S                                                                                   (2)
    S'   = exp(b_C) S + (K * exp(b_C - b))^T V                                                                    (3)
    D    = A 1 + (Q * exp(b)) z;   z' = exp(b_C) z + (K * exp(b_C - b))^T 1      (normaliser; then O is O / D)    (4)

(Yang et al. 2023, arXiv 2312.06635, section 4; Qin et al. 2024, arXiv 2401.04658 for scalar decay.) Every exponent is
<= 0. One `lax.scan` walks the chunks; the backward pass walks them in reverse, holds one state per chunk, and
recomputes the rest. With dO, dS', dz' the cotangents and N, M those of the numerator and the denominator of (2), (4):

    dA = N V^T + M 1^T          dV = A^T N + (K * exp(b_C - b)) dS'                                                (5)
    dQ = exp(b) * (N S^T + M z^T) + (row side of dA)                                                              (6)
    dK = exp(b_C - b) * (V dS'^T + 1 dz'^T) + (column side of dA)                                                 (7)
    dS = exp(b_C) dS' + (Q * exp(b))^T N                    dz likewise with M                                    (8)
    dg_t = sum_{j < t <= i} dA_ij A_ij + sum_{i >= t} e_i + sum_{j < t} l_j + exp(b_C) (<dS', S> + <dz', z>)       (9)

where e and l are the products of Q * exp(b) and of K * exp(b_C - b) with their cotangents. (9) sums what crosses
position t, each term once: the shorter sum_{i >= t} (q_i dq_i - k_i dk_i) + <dS', S'> is the same but adds and takes
away all that lies on one side of t, which costs digits. Documents are masks on (1) to (3) and need nothing more.

Decay per channel does not factor out of (1), and exp(b_i) exp(-b_j) overflows. So each pair j < i is met halfway: cut
the chunk into blocks of 2, 4, 8, ... positions; at exactly one of these levels i is in the later and j in the earlier
half of one block. With m the first position of the later half,

    Y_t  = (q_t if t is in a later half, else k_t) * exp(-|b_t - b_m|)          A_ij = sum_k Y_ik Y_jk            (10)
    dY   = (dA + dA^T) Y on the pairs of that level, times exp(-|b - b_m|)                                        (11)

is a product of matrices for every level, and dY is dQ in the later halves, dK in the earlier ones. Here the first sum
of (9), a matrix for every channel, is taken as sum_{i >= t} (q_i dq_i - k_i dk_i) over the dQ, dK that come from dA.

The equations are written for one chunk of one row of the batch; `_scan_chunks` takes them to the others.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqmodels.notation import Array
from seqmodels.ops import _scan
from seqmodels.ops._scan import Documents

DEFAULT_CHUNK = 64
SMALLEST_CHUNK = 16
EPSILON = 1e-6


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
    size = chunk_size or min(DEFAULT_CHUNK, -(-length // SMALLEST_CHUNK) * SMALLEST_CHUNK)
    if g is not None and g.ndim == 4:
        size = 1 << (size - 1).bit_length()
    index = incoming = None
    if docs is not None:
        k = jnp.where(docs.real[..., None, None], k, 0)
        if g is not None:
            g = jnp.where(docs.real.reshape(docs.real.shape + (1,) * (g.ndim - 2)), g, 0)
        index = _scan.pad_time(docs.index, size, "edge")
        incoming = jnp.pad(index[:, size - 1 : -1 : size], ((0, 0), (1, 0)))
        index = _cut(index, size)
    g = None if g is None else g.reshape(*g.shape[:3], -1)
    q, k, v, g = (None if x is None else _cut(_scan.pad_time(x, size), size) for x in (q, k, v, g))
    o, S, z = _run(_Inputs(q, k, v, g, index, incoming), S, z, scale)
    o = o.reshape(o.shape[0], -1, *o.shape[3:])[:, :length]
    return o if docs is None else jnp.where(docs.real[..., None, None], o, 0), S, z


def _cut(x: Array, size: int) -> Array:
    """[b, t, ...] -> [b, n, c, ...]."""
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


class _Inputs(NamedTuple):
    """The arrays in chunks, [b, n, c, ...]; inside a scan those of one chunk of one row, [c, ...].

    index     [b, n, c]: that of `Documents`
    incoming  [b, n]: the document of the state that enters the chunk
    """

    q: Array
    k: Array
    v: Array
    g: Array | None
    index: Array | None
    incoming: Array | None


class _Chunk(NamedTuple):
    """One chunk, heads before time, in the accumulation dtype.

    q, k     [hv, c, k]       v  [hv, c, v]
    b        [hv, c, 1 or k]  inclusive cumulative log decay within the chunk, or None
    pairs    [c, c] bool: j <= i and of one document
    enter    weight of the incoming state in a row's output: exp(b_i) where the row is of the incoming document
    leave    weight of a row in the outgoing state: exp(b_C - b_i) where the row is of the last document
    through  weight of the incoming state in the outgoing one: [hv, 1 or k], exp(b_C) where no document started
    """

    q: Array
    k: Array
    v: Array
    b: Array | None
    pairs: Array
    enter: Array | float
    leave: Array | float
    through: Array | float

    @property
    def decays_per_channel(self) -> bool:
        return self.b is not None and self.b.shape[-1] > 1


def _chunk(inputs: _Inputs, scale: float) -> _Chunk:
    """One chunk and its weights."""
    q, k, v, g, index, incoming = inputs
    dtype = _scan.state_dtype(q, k, v, g)
    size, groups = q.shape[0], v.shape[1] // q.shape[1]
    q, k, v = (_swap(x).astype(dtype) for x in (q, k, v))
    q, k = (jnp.repeat(x, groups, axis=0) for x in (q * scale, k))
    pairs, enter, leave, through, b = _triangle(size, bool), 1.0, 1.0, 1.0, None
    if g is not None:
        b = _sum_to(_swap(g).astype(dtype))
        last = b[:, -1:]
        enter, leave, through = jnp.exp(b), jnp.exp(last - b), jnp.exp(last[:, 0])
    if index is not None:
        first, last = (index == incoming)[:, None], (index == index[-1])[:, None]
        pairs = pairs & (index[:, None] == index)
        enter, leave, through = enter * first, leave * last, through * first[-1]
    return _Chunk(q, k, v, b, pairs, enter, leave, through)


def _swap(x: Array) -> Array:
    """Time and heads of a chunk, swapped."""
    return jnp.swapaxes(x, 0, 1)


def _triangle(size: int, dtype: jnp.dtype) -> Array:
    return jnp.tril(jnp.ones((size, size), dtype))


def _sum_to(g: Array) -> Array:
    """Inclusive cumulative sum over the chunk, as a product with a triangle of ones."""
    return jnp.matmul(_triangle(g.shape[-2], g.dtype), g, precision="highest")


def _sum_from(x: Array) -> Array:
    """Sum over the positions from each one to the chunk's end."""
    return jnp.matmul(_triangle(x.shape[-2], x.dtype).T, x, precision="highest")


def _sum_before(x: Array) -> Array:
    """Sum over the positions of the chunk before each one."""
    return jnp.matmul(_triangle(x.shape[-2], x.dtype) - jnp.eye(x.shape[-2], dtype=x.dtype), x, precision="highest")


def _scores(x: _Chunk) -> Array:
    """A of equation (1)."""
    if not x.decays_per_channel:
        return jnp.einsum("hik,hjk->hij", x.q, x.k) * _pair_decay(x)
    A = jnp.sum(x.q * x.k, axis=-1, keepdims=True)
    for level in _levels(x):
        A = jnp.where(level.pairs, jnp.einsum("hik,hjk->hij", level.y, level.y), A)
    return jnp.where(x.pairs, A, 0)


def _scores_backward(x: _Chunk, dA: Array) -> tuple[Array, Array]:
    """The sides of dA in (6) and (7)."""
    if not x.decays_per_channel:
        dA = dA * _pair_decay(x)
        return jnp.einsum("hij,hjk->hik", dA, x.k), jnp.einsum("hij,hik->hjk", dA, x.q)
    dA = jnp.where(x.pairs, dA, 0)
    own = jnp.sum(dA * jnp.eye(dA.shape[-1], dtype=dA.dtype), axis=-1, keepdims=True)
    dA = dA + jnp.swapaxes(dA, -1, -2)
    dq, dk = own * x.k, own * x.q
    for level in _levels(x):
        dy = level.decay * jnp.einsum("hij,hjk->hik", jnp.where(level.pairs, dA, 0), level.y)
        dq, dk = dq + jnp.where(level.later, dy, 0), dk + jnp.where(level.later, 0, dy)
    return dq, dk


def _pair_decay(x: _Chunk) -> Array:
    """exp(b_i - b_j) on the pairs that see each other, 0 elsewhere; for scalar decay or none."""
    if x.b is None:
        return x.pairs.astype(x.q.dtype)
    difference = jnp.minimum(x.b - jnp.swapaxes(x.b, -1, -2), 0)
    return jnp.where(x.pairs, jnp.exp(difference), 0)


class _Level(NamedTuple):
    """One level of (10).

    later  [c, 1] bool: the position is in a later half
    pairs  [c, c] bool: one position in each half of the same block, in either order
    decay  [hv, c, k]: exp(-|b - b_m|)
    y      [hv, c, k]: Y
    """

    later: Array
    pairs: Array
    decay: Array
    y: Array


def _levels(x: _Chunk) -> Iterator[_Level]:
    heads, size, channels = x.b.shape
    position = jnp.arange(size)
    half = 1
    while half < size:
        later = (position & half > 0)[:, None]
        pairs = (position[:, None] ^ position) // half == 1
        blocks = x.b.reshape(heads, -1, 2 * half, channels)
        from_middle = (blocks - blocks[:, :, half : half + 1]).reshape(x.b.shape)
        decay = jnp.exp(-jnp.abs(from_middle))
        yield _Level(later, pairs, decay, jnp.where(later, x.q, x.k) * decay)
        half *= 2


def _forward(x: _Chunk, S: Array, z: Array | None) -> tuple[Array, Array, Array | None]:
    """Equations (1) to (4) for one chunk."""
    A, q_in, k_out = _scores(x), x.q * x.enter, x.k * x.leave
    o = A @ x.v + q_in @ S
    through = jnp.asarray(x.through)
    if z is not None:
        o = o / _denominator(A, q_in, z)
        z = through * z + k_out.sum(axis=-2)
    return o, through[..., None] * S + jnp.einsum("hck,hcv->hkv", k_out, x.v), z


def _denominator(A: Array, q_in: Array, z: Array) -> Array:
    return (A.sum(axis=-1) + jnp.einsum("hck,hk->hc", q_in, z) + EPSILON)[..., None]


def _backward(x: _Chunk, S: Array, z: Array | None, d_after: tuple, o: Array | None, do: Array):
    """Equations (5) to (9) for one chunk: cotangents of q (scaled), k, v, g and of the state that entered."""
    dS_after, dz_after = d_after
    A, q_in, k_out = _scores(x), x.q * x.enter, x.k * x.leave
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
    dq, dk = _scores_backward(x, dA)
    dg = None
    if x.b is not None:
        kept = jnp.sum(dS_after * S, axis=-1)
        if z is not None:
            kept = kept + dz_after * z
        dg = [q_in * dq_in, k_out * dk_out, (through * kept)[:, None]]
        if not x.decays_per_channel:
            dg = [y.sum(axis=-1, keepdims=True) for y in dg]
        dg = _sum_from(dg[0]) + _sum_before(dg[1]) + dg[2]
        if x.decays_per_channel:
            dg = dg + _sum_from(x.q * dq - x.k * dk)
        else:
            dg = dg + _across(dA * A)
    return dq + dq_in * x.enter, dk + dk_out * x.leave, dv, dg, dS, dz


def _across(pairs: Array) -> Array:
    """Sum of `pairs` [hv, i, j] over j < t <= i, for every t: [hv, t, 1]."""
    before = jnp.tril(jnp.ones(pairs.shape[-2:], bool), -1)
    return jnp.sum(jnp.where(before, _sum_from(pairs), 0), axis=-1, keepdims=True)


def _scan_chunks(body: Callable, states: Any, arrays: Any, reverse: bool = False) -> tuple[Any, Any]:
    """Scan `body(state, chunk) -> (state, outputs)` over the chunks of every row of `arrays`, [b, n, ...] each.

    Rows run side by side, except on a CPU, whose cache holds the chunk of one row: there it is one row after another.
    Rows that a mesh may have spread over devices stay side by side.
    """
    batch, count = jax.tree.leaves(arrays)[0].shape[:2]

    def take(arrays: Any, n: Array, axis: int) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, n, axis, keepdims=False), arrays)

    def side_by_side(states: Any, arrays: Any) -> tuple[Any, Any]:
        def step(states: Any, n: Array) -> tuple[Any, Any]:
            return jax.vmap(body)(states, take(arrays, n, axis=1))

        states, outputs = jax.lax.scan(step, states, jnp.arange(count), reverse=reverse)
        return states, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), outputs)

    def in_turn(states: Any, arrays: Any) -> tuple[Any, Any]:
        end_to_end = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), arrays)

        first = count - 1 if reverse else 0

        def step(carry: tuple, n: Array) -> tuple[tuple, Any]:
            state, final = carry
            row = n // count
            start = take(states, row, axis=0)
            state = jax.tree.map(partial(jnp.where, n % count == first), start, state)
            state, outputs = body(state, take(end_to_end, n, axis=0))
            put = partial(jax.lax.dynamic_update_index_in_dim, index=row, axis=0)
            return (state, jax.tree.map(put, final, state)), outputs

        carry = take(states, 0, axis=0), states
        (_, final), outputs = jax.lax.scan(step, carry, jnp.arange(batch * count), reverse=reverse)
        return final, jax.tree.map(lambda x: x.reshape(batch, count, *x.shape[1:]), outputs)

    if batch == 1 or _scan.spread_over_devices():
        return side_by_side(states, arrays)
    return jax.lax.platform_dependent(states, arrays, cpu=in_turn, default=side_by_side)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _run(inputs: _Inputs, S: Array, z: Array | None, scale: float):
    o, (S, z), _ = _run_chunks(inputs, (S, z), scale)
    return o, S, z


def _run_chunks(inputs: _Inputs, state: tuple, scale: float):
    """Outputs, the final state, and the states that entered each chunk."""

    def body(state: tuple, inputs: _Inputs):
        o, *after = _forward(_chunk(inputs, scale), *state)
        return tuple(after), (_swap(o).astype(inputs.v.dtype), state)

    state, (o, entered) = _scan_chunks(body, state, inputs)
    return o, state, entered


def _run_forward(inputs: _Inputs, S: Array, z: Array | None, scale: float):
    o, final, entered = _run_chunks(inputs, (S, z), scale)
    kept = o if z is not None else None
    return (o, *final), (inputs, entered, kept)


def _run_backward(scale: float, residuals: tuple, cotangents: tuple):
    inputs, entered, o = residuals
    do, *d_final = cotangents
    groups = inputs.v.shape[3] // inputs.q.shape[3]

    def body(d_after: tuple, chunk: tuple):
        inputs, state, o, do = chunk
        x = _chunk(inputs, scale)
        o, do = (None if y is None else _swap(y).astype(x.q.dtype) for y in (o, do))
        dq, dk, dv, dg, *d_state = _backward(x, *state, d_after, o, do)
        dq, dk = (y.reshape(-1, groups, *y.shape[1:]).sum(axis=1) for y in (dq * scale, dk))
        grads = zip((dq, dk, dv, dg), inputs)
        return tuple(d_state), tuple(None if y is None else _swap(y).astype(x.dtype) for y, x in grads)

    d_state, grads = _scan_chunks(body, tuple(d_final), (inputs, entered, o, do), reverse=True)
    return _Inputs(*grads, index=None, incoming=None), *d_state


_run.defvjp(_run_forward, _run_backward)
