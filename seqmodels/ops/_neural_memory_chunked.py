"""The chunked form of `neural_memory`: a mini-batch at a time, without the weights of its single tokens.

Within a mini-batch all gradients are taken at R. One pass over its keys gives the input rows X_j of every linear layer
and the signals D_j = d loss_j / d Z_j; the gradient by that layer's A is X_j^T D_j. With W, S the weights and the
momentum at its start, equations (2), (3) of `neural_memory` unroll to

    W_t = beta_t W + f_t S - sum_{j <= t} G_tj theta_j u_j            S_t = m_t S - sum_{j <= t} M_tj theta_j u_j   (1)

    N_ti = prod_{i < s <= t} (1 - alpha_s)    M_ij = prod_{j < s <= i} eta_s    G = N M                            (2)
    beta_t = N_t0 (1 - alpha_0)    m_i = M_i0 eta_0    f = N m                                                     (3)

These are products of numbers in [0, 1], in linear space: no gate divides, none is too small. The queries then pass
through the network with inputs Y_t in place of X_j, layer by layer (the dual form, Sun et al. 2024, arXiv 2407.04620):

    Z_t = beta_t (Y_t A + c) + f_t (Y_t A_S + c_S) - sum_{j <= t} G_tj theta_j (Y_t . X_j + 1) D_j                  (4)

where the 1 is that of the bias c. The last row of (1) is the state at the end. With `reach`, Z_t is that of
R + reach_t (W_t - R), linear in W_t as well.

Documents start and go on anywhere: `_tiles` gives each mini-batch a tile. An empty slot has alpha 0, eta 1, theta 0,
and adds no momentum to W: M in (2) and m in (3) have a zero row there.

The backward pass is that of the program, one chunk at a time from the states at their starts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqmodels.notation import Array
from seqmodels.ops import _mesh, _scan, _tiles
from seqmodels.ops._memory_network import Linear, Norm, Weights, linear, loss, network
from seqmodels.ops._op import Options


class MiniBatch(NamedTuple):
    """What a mini-batch reads, [b, n, c, h, ...] each; for one head [c, ...]. Gates may be None."""

    q: Array
    k: Array
    v: Array
    theta: Array
    alpha: Array | None
    eta: Array | None
    reach: Array | None


class Memory(NamedTuple):
    """W, S and R; S is None without momentum, R is None where it is W."""

    weights: Weights
    momentum: Weights | None
    reference: Weights | None


def in_order(
    inputs: MiniBatch, start: Memory, norm: Norm | None, options: Options, group: int
) -> tuple[Array, Memory]:
    """Rows [b, t, h, ...] of one document each, which start with a mini-batch. group: mini-batches per chunk."""
    (batch, length), size = inputs.q.shape[:2], options["mini_batch"]

    def cut(x: Array) -> Array:
        return _scan.pad_time(x, size).reshape(batch, -1, size, *x.shape[2:])

    tile = _tile_with(norm, None, options)
    tiles, real = jax.tree.map(cut, inputs), None
    if length % size:
        real = cut(jnp.ones((batch, length), bool))
    else:
        start = start._replace(reference=None)
    memory, o = _scan_tiles(tile, start, (_heads_first(tiles), real, None), group)
    if memory.reference is None:
        memory = memory._replace(reference=memory.weights)
    return _heads_last(o).reshape(batch, -1, *inputs.v.shape[2:])[:, :length], memory


def in_slots(
    inputs: MiniBatch, real: Array, start: Memory, norm: Norm | None, options: Options
) -> tuple[Array, Memory]:
    """Rows [b, t, h, ...] of whole mini-batches, in whose slots there is a token where real [b, t]."""

    def cut(x: Array) -> Array:
        return x.reshape(x.shape[0], -1, options["mini_batch"], *x.shape[2:])

    tile = _tile_with(norm, None, options)
    memory, o = _scan_tiles(tile, start, (_heads_first(jax.tree.map(cut, inputs)), cut(real), None), 1)
    return _heads_last(o).reshape(*real.shape, *inputs.v.shape[2:]), memory


def in_tiles(
    inputs: MiniBatch,
    start: Memory,
    fresh: Memory | None,
    tiles: _tiles.Tiles,
    norm: Norm | None,
    options: Options,
    group: int,
) -> tuple[Array, Memory]:
    """Rows of any documents, from any place in a mini-batch.

    fresh: where documents start, [h, ...]; None where none does, but for the one that the rows go on with.
    """
    cut = jax.tree.map(lambda x: _tiles.to_tiles(x, tiles), inputs)
    tile = _tile_with(norm, fresh, options)
    starts = None if fresh is None else tiles.starts
    memory, o = _scan_tiles(tile, start, (_heads_first(cut), tiles.real, starts), group)
    return _tiles.from_tiles(_heads_last(o), tiles), memory


def _heads_first(inputs: MiniBatch) -> MiniBatch:
    """[b, n, c, h, ...] -> [b, n, h, c, ...], for products of matrices that lie side by side."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 2, 3), inputs)


def _heads_last(o: Array) -> Array:
    return jnp.swapaxes(o, 2, 3)


def _scan_tiles(tile: Callable, start: Memory, tiles: Any, group: int) -> tuple[Memory, Array]:
    """Scan over the tiles of every row, [b, n, ...]; the states that are kept are those before every `group` tiles.

    Rows run side by side, except on a CPU, whose cache holds the memory of one row: there it is one row after another.
    Rows that a mesh may have spread over devices stay side by side.
    """
    batch, count = jax.tree.leaves(tiles)[0].shape[:2]
    whole = count // group * group

    @partial(jax.checkpoint, prevent_cse=False)
    def chunk(memory: Memory, tiles: Any) -> tuple[Memory, Array]:
        return tile(memory, tiles) if group == 1 else jax.lax.scan(tile, memory, tiles)

    def row(memory: Memory, tiles: Any) -> tuple[Memory, Array]:
        if group == 1:
            return jax.lax.scan(chunk, memory, tiles)
        chunks = jax.tree.map(lambda x: x[:whole].reshape(-1, group, *x.shape[1:]), tiles)
        memory, o = jax.lax.scan(chunk, memory, chunks)
        o = o.reshape(-1, *o.shape[2:])
        if whole == count:
            return memory, o
        memory, rest = chunk(memory, jax.tree.map(lambda x: x[whole:], tiles))
        return memory, jnp.concatenate([o, rest])

    def in_turn(start: Memory, tiles: Any) -> tuple[Memory, Array]:
        return jax.lax.map(lambda args: row(*args), (start, tiles))

    if batch == 1 or _mesh.is_spread():
        return jax.vmap(row)(start, tiles)
    return jax.lax.platform_dependent(start, tiles, cpu=in_turn, default=jax.vmap(row))


def _tile_with(norm: Norm | None, fresh: Memory | None, options: Options) -> Callable:
    """`_tile` with what all tiles share. Each token has the norm's parameters to itself, [h, v] -> [h, c, v], so that
    their gradients are summed up over tokens once at the end, and not in every tile."""
    norm = jax.tree.map(lambda x: jnp.repeat(x[:, None], options["mini_batch"], axis=1), norm)
    return partial(_tile, norm=norm, fresh=fresh, options=options)


def _tile(
    memory: Memory, tile: tuple, *, norm: Norm | None, fresh: Memory | None, options: Options
) -> tuple[Memory, Array]:
    """One tile of one row, all heads. real [c] is None where every slot is filled, start [] where none is a start."""
    inputs, real, start = tile
    if start is not None:
        memory = jax.tree.map(partial(jnp.where, start), fresh, memory)
    return jax.vmap(partial(_mini_batch, real=real, options=options))(memory, inputs, norm)


def _mini_batch(
    memory: Memory, x: MiniBatch, norm: Norm | None, real: Array | None, options: Options
) -> tuple[Memory, Array]:
    """One mini-batch of one head."""
    W, S, R = memory
    dtype = W[0].A.dtype
    q, k, v = (y.astype(dtype) for y in (x.q, x.k, x.v))
    norm = jax.tree.map(lambda y: y.astype(dtype), norm)
    # 1. The inputs and signals of the keys, at R.
    inputs, signals = _signals(W if R is None else R, k, v, norm, options)
    # 2. The weights of (1), row by row, and at the end.
    rows, M = _unrolled(x, real, S is not None)
    end = _last(rows)
    if x.reach is not None:
        filled = True if real is None else real[-1]
        rows = _reaching(rows, x.reach[:, None], R is None)
        end = _reaching(end, jnp.where(filled, x.reach[-1], 1), R is None)
    # 3. The queries, equation (4).
    sources = [Memory(*layer) for layer in zip(W, S or W, R or W, strict=True)]
    layers = [partial(_read, rows, *parts) for parts in zip(sources, inputs, signals, strict=True)]
    o = network(q, layers, norm, options)
    # 4. The last row of (1).
    W_end = tuple(_write(end, *parts) for parts in zip(sources, inputs, signals, strict=True))
    if S is not None:
        S = tuple(_write(M, *parts) for parts in zip(sources, inputs, signals, strict=True))
    if R is not None:
        R = W_end if real is None else jax.tree.map(partial(jnp.where, real[-1]), W_end, R)
    return Memory(W_end, S, R), o.astype(x.v.dtype)


def _signals(
    R: Weights, k: Array, v: Array, norm: Norm | None, options: Options
) -> tuple[list[Array], list[Array]]:
    """X and D of every layer, [c, i] and [c, o]: D is the gradient by something added to Z."""

    def loss_of(added: list[Array]) -> tuple[Array, list[Array]]:
        inputs = []

        def layer(place: int, x: Array) -> Array:
            inputs.append(x)
            return linear(R[place], x) + added[place]

        out = network(k, [partial(layer, place) for place in range(len(R))], norm, options)
        return loss(out, v, options), inputs

    added = [jnp.zeros((k.shape[0], layer.A.shape[1]), layer.A.dtype) for layer in R]
    signals, inputs = jax.grad(loss_of, has_aux=True)(added)
    return inputs, signals


class Rows(NamedTuple):
    """Weights of W, S, R and of the gradients -u_j in what some rows read, [c, 1], [c, c]; of one row [], [c].

    None is a weight of 0, and 1.0 stands for ones.
    """

    weights: Array | float | None
    momentum: Array | None
    reference: Array | None
    written: Array


def _unrolled(x: MiniBatch, real: Array | None, has_momentum: bool) -> tuple[Rows, Rows]:
    """Equations (2) and (3): the rows of W_t, and the last one of S_t."""

    def marked(gate: Array | None, empty: float) -> Array | None:
        return gate if gate is None or real is None else jnp.where(real, gate, empty)

    theta, keep = marked(x.theta, 0), marked(None if x.alpha is None else 1 - x.alpha, 1)
    N = jnp.tril(jnp.ones((theta.shape[0],) * 2, theta.dtype)) if keep is None else _products(keep)
    beta = 1.0 if keep is None else (N[:, :1] * keep[0])
    if not has_momentum:
        return Rows(beta, None, None, N * theta), Rows(None, None, None, theta)
    eta = marked(x.eta, 1)
    M = _products(eta)
    m = M[:, :1] * eta[0]
    added = jnp.concatenate([m, M], axis=1)
    if real is not None:
        added = jnp.where(real[:, None], added, 0)
    f, G = jnp.split(jnp.matmul(N, added, precision="highest"), [1], axis=1)
    return Rows(beta, f, None, G * theta), Rows(None, m[-1, 0], None, M[-1] * theta)


def _products(x: Array) -> Array:
    """[c] -> [c, c]: the product of x_s over i < s <= t at (t, i), 0 where i > t; by doubling the number of factors."""
    size = x.shape[0]
    factors = jnp.where(jnp.tril(jnp.ones((size, size), bool), -1), x[:, None], 1)
    stride = 1
    while stride < size:
        before = jnp.pad(factors[:-stride], ((stride, 0), (0, 0)), constant_values=1)
        factors = factors * before
        stride *= 2
    return jnp.tril(factors)


def _last(rows: Rows) -> Rows:
    """The last row alone."""
    weights = rows.weights if isinstance(rows.weights, float) else rows.weights[-1, 0]
    momentum = None if rows.momentum is None else rows.momentum[-1, 0]
    return Rows(weights, momentum, None, rows.written[-1])


def _reaching(rows: Rows, reach: Array, at_reference: bool) -> Rows:
    """Rows of R + reach (W_t - R); at_reference: R is W."""
    weights, momentum, _, written = rows
    momentum = None if momentum is None else reach * momentum
    if not at_reference:
        return Rows(reach * weights, momentum, 1 - reach, reach * written)
    weights = weights if isinstance(weights, float) else 1 - reach + reach * weights
    return Rows(weights, momentum, None, reach * written)


def _read(rows: Rows, layer: Memory, X: Array, D: Array, Y: Array) -> Array:
    """Equation (4) for one linear layer."""
    pairs = Y @ X.T
    if layer.weights.c is not None:
        pairs = pairs + 1
    Z = -(pairs * rows.written) @ D
    for weight, part in zip(rows, layer):
        if weight is not None:
            Z = Z + weight * linear(part, Y)
    return Z


def _write(row: Rows, layer: Memory, X: Array, D: Array) -> Linear:
    """One row of equation (1) for one linear layer."""
    D = row.written[:, None] * D
    change = Linear(X.T @ D, None if layer.weights.c is None else D.sum(axis=0))
    out = jax.tree.map(jnp.negative, change)
    for weight, part in zip(row, layer):
        if weight is not None:
            out = jax.tree.map(lambda y, x, weight=weight: y + weight * x, out, part)
    return out
