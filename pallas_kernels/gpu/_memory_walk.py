"""The kernels of `neural_memory`: what of a mini-batch waits for the memory, with one walk for both directions of time.

A block of threads is one warpgroup, which has 64 columns of the states of a head: they do not wait for other columns.
The states, W and S or their cotangents, are in registers in float32, and in shared memory as the matrix instructions
read them. For each mini-batch a walk reads from them, meets, writes what it read to shared memory, and changes them:

    forwards     read    D = 2 lambda (K W - V)                                b * (Q W) + f * (Q S)
                 change  W' = b_C W + f_C S - K^T (gamma * D)                  S' = m_C S - K^T (mu * D)
                 give    O = b * (Q W) + f * (Q S) - A D                       D
    backwards    read    E = -2 lambda (A^T N + gamma * (K dW') + mu * (K dS'))
                 change  dW = b_C dW' + Q^T (b * N) + K^T E                    dS = f_C dW' + m_C dS' + Q^T (f * N)
                 give    E

The rows of a mini-batch are weighted where they have `CHUNK` rows of values, not of keys: those are in registers anyway.
"""

from collections.abc import Callable, Sequence
from functools import partial
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
B, F, GAMMA, MU, ENDS = range(5)  # rows of `weights`
B_END, F_END, M_END = range(3)  # places in the row ENDS: b_C, f_C, m_C


class Walked(NamedTuple):
    """What a walk gives: of every position, the states at the last end of the walk, those between mini-batches.

    values  name -> [b, t, h, v]
    last    [b, h, k, v] float32 each
    states  [b, h, n, k, v] each: the state that a walk came to each mini-batch with; () where not wanted
    """

    values: dict[str, Array]
    last: States
    states: States


def walk(
    q: Array, k: Array, v: Array, A: Array, weights: Array, states: States, *, factor: float, keep: bool
) -> Walked:
    """O and, if `keep`, D and the states that entered. factor: 2 lambda; for shapes see `neural_memory`."""
    has_momentum = len(states) == 2

    def read(here, shown):
        def products(kW, qW, *qS):
            plgpu.wgmma(kW, here.k, shown[0])
            plgpu.wgmma(qW, here.q, shown[0])
            if has_momentum:
                plgpu.wgmma(qS[0], here.q, shown[1])
            return [x[...] for x in (kW, qW, *qS)]

        kW, qW, *qS = accumulate(products, 2 + has_momentum)
        o = _by_row(here, B) * qW
        if has_momentum:
            o = o + _by_row(here, F) * qS[0]
        return o, factor * (kW - _load(here.values))

    def change(here, tiles, found, states):
        o, D = found
        tiles.D[...] = D.astype(v.dtype)
        written = [tiles.to_W, *([tiles.to_S] if has_momentum else [])]
        for row, tile in zip((GAMMA, MU), written):
            tile[...] = (_by_row(here, row) * D).astype(v.dtype)
        plgpu.commit_smem()

        def pairs(AD):
            plgpu.wgmma(AD, here.A, tiles.D)
            return [AD[...]]

        tiles.o[...] = (o - accumulate(pairs, 1)[0]).astype(v.dtype)
        ends = _ends(here)
        changed = []
        for block, (W, *S) in zip(_blocks(k.shape[-1]), zip(*states)):

            def products(*added, block=block):
                for x, tile in zip(added, written):
                    plgpu.wgmma(x, here.k.at[:, block].T, tile)
                return [x[...] for x in added]

            added = accumulate(products, len(written))
            if has_momentum:
                changed.append((ends.b * W + ends.f * S[0] - added[0], ends.m * S[0] - added[1]))
            else:
                changed.append((ends.b * W - added[0],))
        return tuple(zip(*changed))

    return _walk(
        read,
        change,
        {"q": q, "k": k, "values": v, "A": A, "weights": weights},
        states,
        tiles=("D", "o", "to_W", "to_S") if has_momentum else ("D", "o", "to_W"),
        given=("o", "D") if keep else ("o",),
        keep=keep,
    )


def walk_back(
    q: Array, k: Array, do: Array, A: Array, weights: Array, d_states: States, *, factor: float
) -> Walked:
    """E, and the cotangents of the states that left each mini-batch. d_states: of the final ones."""
    has_momentum = len(d_states) == 2

    def read(here, shown):
        def products(AN, kdW, *kdS):
            plgpu.wgmma(AN, here.A.T, here.values)
            plgpu.wgmma(kdW, here.k, shown[0])
            if has_momentum:
                plgpu.wgmma(kdS[0], here.k, shown[1])
            return [x[...] for x in (AN, kdW, *kdS)]

        AN, kdW, *kdS = accumulate(products, 2 + has_momentum)
        dD = AN + _by_row(here, GAMMA) * kdW
        if has_momentum:
            dD = dD + _by_row(here, MU) * kdS[0]
        return -factor * dD

    def change(here, tiles, E, d_states):
        tiles.E[...] = E.astype(do.dtype)
        N = _load(here.values)
        read = [tiles.of_W, *([tiles.of_S] if has_momentum else [])]
        for row, tile in zip((B, F), read):
            tile[...] = (_by_row(here, row) * N).astype(do.dtype)
        plgpu.commit_smem()
        ends = _ends(here)
        changed = []
        for block, (dW, *dS) in zip(_blocks(k.shape[-1]), zip(*d_states)):

            def products(*added, block=block):
                for x, tile in zip(added, read):
                    plgpu.wgmma(x, here.q.at[:, block].T, tile)
                plgpu.wgmma(added[0], here.k.at[:, block].T, tiles.E)
                return [x[...] for x in added]

            added = accumulate(products, len(read))
            of_W = ends.b * dW + added[0]
            changed.append((of_W, ends.f * dW + ends.m * dS[0] + added[1]) if has_momentum else (of_W,))
        return tuple(zip(*changed))

    return _walk(
        read,
        change,
        {"q": q, "k": k, "values": do, "A": A, "weights": weights},
        d_states,
        tiles=("E", "of_W", "of_S") if has_momentum else ("E", "of_W"),
        given=("E",),
        keep=True,
        reverse=True,
    )


def _load(values) -> Array:
    return load(values, MATRIX).astype(jnp.float32)


def _by_row(here, row: int) -> Array:
    """A row of `weights` as a column beside a matrix [C, 64]."""
    return over(load(here.weights.at[row], BY_ROW), 0)


def _ends(here) -> SimpleNamespace:
    return SimpleNamespace(**{name: here.weights[ENDS, n] for name, n in (("b", B_END), ("f", F_END), ("m", M_END))})


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

        for i in range(STAGES):
            pl.when(i < chunks)(partial(fetch, jnp.int32(i)))
        states = tuple(
            tuple(load(x.at[row, head, block, channels], MATRIX, optimized=False) for block in blocks)
            for x in entering
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

    def body(*refs):
        n, m = len(inputs), len(inputs) + count
        made, used = refs[m : m + len(outputs)], refs[m + len(outputs) :]
        kernel(dict(zip(inputs, refs)), refs[n:m], *split(made), SimpleNamespace(**dict(zip(scratch, used))))

    run = plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=list(scratch.values()),
        grid=(batch * heads, value_channels // TILE),
        grid_names=("item", "tile"),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=COMPILER_PARAMS,
    )
    return split(late(run, outputs)(*inputs.values(), *states))
