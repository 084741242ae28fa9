"""The kernel of what waits for the memory: equations (5) to (8) and (11) of `neural_memory`, without A.

A block of threads is one warpgroup and has 64 columns of the states of a head, which do not wait for other columns. The
states, W and S or their cotangents, are in registers in float32, and in shared memory as matrix instructions read them.
At each mini-batch a walk reads from them, writes what it read to shared memory, and changes them:

    forwards     read      D = 2 lambda (K W - V)
                 change    W' = b_C W + f_C S - K^T (gamma * D)               S' = m_C S - K^T (mu * D)
                 give      O = b * (Q W) + f * (Q S) - A D                    D
    backwards    read      E = -2 lambda (A^T N + gamma * (K dW') + mu * (K dS'))
                 change    dW = b_C dW' + Q^T (b * N) + K^T E                 dS = f_C dW' + m_C dS' + Q^T (f * N)
                 give      E

The weights of rows multiply D, N and products in registers, rather than keys and queries, which would be more numbers.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import add
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu._chunk import (
    BY_ROW,
    CHUNK,
    COMPILER_PARAMS,
    MATRIX,
    TILE,
    TILED,
    accumulate,
    divide,
    load,
    over,
)
from pallas_kernels.late import late

Array = jax.Array
States = tuple[Array, ...]  # W and S, or W alone where there is no momentum

STAGES = 2  # mini-batches in shared memory at once
B, F, GAMMA, MU, ENDS = range(5)  # rows of `weights`; those of the ends are b_C, f_C, m_C and zeros


class Walked(NamedTuple):
    """What a walk gives.

    values  name -> [b, t, h, v]
    last    [b, h, k, v] float32: each state at the walk's end
    states  [b, h, n, k, v]: each state as the walk came to every mini-batch with it; none where that is not wanted
    """

    values: dict[str, Array]
    last: States
    states: States


def walk(
    q: Array, k: Array, v: Array, A: Array, weights: Array, states: States, *, factor: float, keep: bool
) -> Walked:
    """O and the final states; if `keep`, D and the states that entered too. factor: 2 lambda."""
    dtype, has_momentum = v.dtype, len(states) == 2
    written = ("to_W", "to_S") if has_momentum else ("to_W",)

    def read(here, shown):
        kW, *read = _multiply([(here.k, shown[0])], *([(here.q, state)] for state in shown))
        D = factor * (kW - load(here.values, MATRIX).astype(jnp.float32))
        return _weighted(here, (B, F), read), D

    def change(here, tiles, found, states):
        o, D = found
        tiles.D[...] = D.astype(dtype)
        for row, name in zip((GAMMA, MU), written):
            getattr(tiles, name)[...] = (_by_row(here, row) * D).astype(dtype)
        plgpu.commit_smem()
        (pairs,) = _multiply([(here.A, tiles.D)])
        tiles.o[...] = (o - pairs).astype(dtype)
        b, f, m = (here.weights[ENDS, n] for n in range(3))
        changed = []
        for rows, (W, *S) in zip(_blocks(k.shape[-1]), zip(*states)):
            added = _multiply(*([(here.k.at[:, rows].T, getattr(tiles, name))] for name in written))
            if has_momentum:
                changed.append((b * W + f * S[0] - added[0], m * S[0] - added[1]))
            else:
                changed.append((b * W - added[0],))
        return tuple(zip(*changed))

    inputs = {"q": q, "k": k, "values": v, "A": A, "weights": weights}
    given = ("o", "D") if keep else ("o",)
    return _walk(read, change, inputs, states, tiles=("o", "D", *written), given=given, keep=keep)


def walk_back(q: Array, k: Array, do: Array, A: Array, weights: Array, d_states: States, *, factor: float) -> Walked:
    """E, the cotangents of the initial states, and of those that left each mini-batch. d_states: of the final ones."""
    dtype, has_momentum = do.dtype, len(d_states) == 2
    reading = ("from_W", "from_S") if has_momentum else ("from_W",)

    def read(here, shown):
        pairs, *read = _multiply([(here.A.T, here.values)], *([(here.k, d_state)] for d_state in shown))
        return -factor * (pairs + _weighted(here, (GAMMA, MU), read))

    def change(here, tiles, E, d_states):
        tiles.E[...] = E.astype(dtype)
        N = load(here.values, MATRIX).astype(jnp.float32)
        for row, name in zip((B, F), reading):
            getattr(tiles, name)[...] = (_by_row(here, row) * N).astype(dtype)
        plgpu.commit_smem()
        b, f, m = (here.weights[ENDS, n] for n in range(3))
        changed = []
        for rows, (dW, *dS) in zip(_blocks(k.shape[-1]), zip(*d_states)):
            products = [[(here.q.at[:, rows].T, getattr(tiles, name))] for name in reading]
            products[0].append((here.k.at[:, rows].T, tiles.E))
            added = _multiply(*products)
            if has_momentum:
                changed.append((b * dW + added[0], f * dW + m * dS[0] + added[1]))
            else:
                changed.append((b * dW + added[0],))
        return tuple(zip(*changed))

    inputs = {"q": q, "k": k, "values": do, "A": A, "weights": weights}
    return _walk(read, change, inputs, d_states, tiles=("E", *reading), given=("E",), keep=True, reverse=True)


def _multiply(*sums: Sequence[tuple]) -> list[Array]:
    """Of each sequence of matrices in shared memory, left and right, the sum of the products [C, 64]."""

    def products(*accumulators):
        for x, pairs in zip(accumulators, sums):
            for left, right in pairs:
                plgpu.wgmma(x, left, right)
        return [x[...] for x in accumulators]

    return accumulate(products, len(sums))


def _by_row(here, row: int) -> Array:
    """A row of `weights` as a column beside a matrix [C, 64]."""
    return over(load(here.weights.at[row], BY_ROW), 0)


def _weighted(here, rows: Sequence[int], products: Sequence[Array]) -> Array:
    """The sum of the products, the rows of each weighted by a row of `weights`."""
    return reduce(add, (_by_row(here, row) * x for row, x in zip(rows, products)))


def _blocks(channels: int) -> list:
    return [pl.ds(n * TILE, TILE) for n in range(channels // TILE)]


def _walk(
    read: Callable,
    change: Callable,
    inputs: dict[str, Array],
    states: States,
    *,
    tiles: Sequence[str],
    given: Sequence[str],
    keep: bool,
    reverse: bool = False,
) -> Walked:
    """The walk of one warpgroup over the mini-batches.

    read    (inputs of a mini-batch, states, both in shared memory) -> found, in registers
    change  (inputs of a mini-batch, tiles, found, states in registers) -> the states after it
    tiles   names of what `change` writes to shared memory, [C, 64] each; those that are `given` leave it as results
    """
    values, weights = inputs["values"], inputs["weights"]
    batch, heads, chunks = weights.shape[:3]
    key_channels, value_channels = states[0].shape[-2:]
    dtype, count = values.dtype, len(states)
    blocks = _blocks(key_channels)
    wide = ("q", "k")

    def kernel(sources, entering, results, last, kept, scratch):
        item, tile = lax.axis_index("item"), lax.axis_index("tile")
        row, head = divide(item, heads)
        channels = pl.ds(tile * TILE, TILE)
        shown = [scratch.states.at[n] for n in range(count)]

        def chunk_at(i):
            return chunks - 1 - i if reverse else i

        def part(ref, i, columns):
            return ref.at[row, pl.ds(chunk_at(i) * CHUNK, CHUNK), head, columns]

        def fetch(i):
            _, slot = divide(i, STAGES)
            for name, ref in sources.items():
                if name in ("A", "weights"):
                    source = ref.at[row, head, chunk_at(i)]
                else:
                    source = part(ref, i, pl.ds(0, key_channels) if name in wide else channels)
                plgpu.copy_gmem_to_smem(source, getattr(scratch, name).at[slot], scratch.loaded.at[slot])

        def show(states):
            for target, state in zip(shown, states):
                for block, x in zip(blocks, state):
                    target.at[block][...] = x.astype(dtype)
            plgpu.commit_smem()

        def store_states(i):
            """Those with which the walk comes to mini-batch i."""
            for source, target in zip(shown, kept):
                plgpu.copy_smem_to_gmem(source, target.at[row, head, chunk_at(i), :, channels])

        for i in range(min(STAGES, chunks)):
            fetch(jnp.int32(i))
        states = tuple(
            tuple(load(x.at[row, head, block, channels], MATRIX, optimized=False) for block in blocks) for x in entering
        )
        show(states)
        store_states(jnp.int32(0))

        def step(i, states):
            _, slot = divide(i, STAGES)
            here = SimpleNamespace(**{name: getattr(scratch, name).at[slot] for name in sources})
            plgpu.barrier_wait(scratch.loaded.at[slot])
            found = read(here, shown)
            # What the mini-batch before has stored has left shared memory, and every warp is done with its states.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            states = change(here, scratch, found, states)
            show(states)
            pl.when(i + STAGES < chunks)(lambda: fetch(i + STAGES))
            for name in given:
                plgpu.copy_smem_to_gmem(getattr(scratch, name), part(results[name], i, channels))
            pl.when(i + 1 < chunks)(lambda: store_states(i + 1))
            return states

        states = lax.fori_loop(jnp.int32(0), jnp.int32(chunks), step, states)
        for target, state in zip(last, states):
            for block, x in zip(blocks, state):
                target.at[row, head, block, channels][...] = x
        plgpu.wait_smem_to_gmem(0)

    matrix = partial(plgpu.SMEM, dtype=dtype, transforms=TILED)
    scratch = {
        **{name: matrix((STAGES, CHUNK, key_channels)) for name in wide},
        **{name: matrix((STAGES, CHUNK, TILE)) for name in ("values", "A")},
        "weights": plgpu.SMEM((STAGES, *weights.shape[3:]), jnp.float32),
        "states": matrix((count, key_channels, TILE)),
        **{name: matrix((CHUNK, TILE)) for name in tiles},
        "loaded": plgpu.Barrier(num_arrivals=len(inputs), num_barriers=STAGES),
    }
    of_state = jax.ShapeDtypeStruct((batch, heads, key_channels, value_channels), jnp.float32)
    of_states = jax.ShapeDtypeStruct((batch, heads, chunks, key_channels, value_channels), dtype)
    outputs = [jax.ShapeDtypeStruct(values.shape, dtype)] * len(given) + [of_state] * count
    outputs += [of_states] * count * keep

    def split(x: Sequence) -> Walked:
        n = len(given)
        return Walked(dict(zip(given, x)), tuple(x[n : n + count]), tuple(x[n + count :]))

    def memory_walk(*refs):
        n, m = len(inputs), len(inputs) + count
        made, used = refs[m : m + len(outputs)], refs[m + len(outputs) :]
        kernel(dict(zip(inputs, refs)), refs[n:m], *split(made), SimpleNamespace(**dict(zip(scratch, used))))

    run = plgpu.kernel(
        memory_walk,
        out_type=outputs,
        scratch_types=list(scratch.values()),
        grid=(batch * heads, value_channels // TILE),
        grid_names=("item", "tile"),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=COMPILER_PARAMS,
    )
    return split(late(run, outputs)(*inputs.values(), *states))
