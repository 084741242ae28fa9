"""The walk of a matrix state over chunks, forward and backward, where each chunk comes prepared.

All that does not wait for the state is made before, for all chunks at once. Of a chunk of C = 64 positions, S [k, v] is
the state that enters and S' the one that leaves:

    N  = U - W S                  the values as they are written; without W they are U                             (1)
    O  = R S + P N                                                                                                 (2)
    S' = through * S + E^T N                                                                                       (3)

Decay, scale and documents are in R, E, W, P and `through`, which has one factor for each row of S. Backwards, from dO
and dS', the cotangents of O and S', the walk gives

    dN = E dS' + P^T dO           which is dU, too                                                                 (4)
    dS = through * dS' + R^T dO - W^T dN                                                                           (5)

and all other gradients are products over single chunks, of what both walks write down: N, S, dN and dS'.

    dR = dO S^T     dE = N dS'^T     dW = -dN S^T     dP = dO N^T     dthrough = sum_v (dS' * S)                   (6)

A column of the state is independent of the others, in both directions: a block of threads holds a tile of 64 of them
in its registers, and reads what all tiles need as its neighbours do, through the cache.

    name      shape             dtype
    R, E, W   [b, t, hv, k]     bfloat16   rows that read, write and erase; W may be None
    P         [b, hv, n, C, C]  bfloat16   n = t / C chunks; zeros above the diagonal
    U, O, N   [b, t, hv, v]     bfloat16
    through   [b, hv, n, k]     float32
    S         [b, hv, k, v]     float32    to begin with and at the end; bfloat16 as written down, [b, hv, n, k, v]

k and v are 64, 128, 192 or 256.
"""

from functools import partial
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
    SHARED_MEMORY,
    TILE,
    TILED,
    accumulate,
    divide,
    load,
    over,
)
from pallas_kernels.late import late

Array = jax.Array

WIDE = ("rows", "columns", "erase")  # [C, k] of each chunk, the same for all tiles


class Walked(NamedTuple):
    """Of the walk forwards; N and states, what gradients need, are None where they are not wanted, N without W, too.

    o       [b, t, hv, v]
    final   [b, hv, k, v] float32
    N       [b, t, hv, v]
    states  [b, hv, n, k, v] bfloat16: S of (1), which enters the chunk
    """

    o: Array
    final: Array
    N: Array | None = None
    states: Array | None = None


class WalkedBack(NamedTuple):
    """Of the walk backwards.

    dU        [b, t, hv, v]
    d_state   [b, hv, k, v] float32: the cotangent of the state that entered the first chunk
    d_states  [b, hv, n, k, v] bfloat16: dS' of (4), of the state that leaves the chunk
    """

    dU: Array
    d_state: Array
    d_states: Array


def forward(
    R: Array,
    E: Array,
    W: Array | None,
    P: Array,
    U: Array,
    through: Array,
    state: Array,
    *,
    for_gradients: bool = False,
) -> Walked:
    """(1) to (3), from `state` [b, hv, k, v] float32; with N and the states if they are wanted for gradients."""
    wanted = ["out", "last", *(("states", *(() if W is None else ("written",))) if for_gradients else ())]
    made = _walk(R, E, W, P, U, through, state, wanted=wanted)
    return Walked(made["out"], made["last"], made.get("written"), made.get("states"))


def backward(R: Array, E: Array, W: Array | None, P: Array, do: Array, through: Array, d_final: Array) -> WalkedBack:
    """(4) and (5), from d_final [b, hv, k, v] float32, the cotangent of the final state."""
    made = _walk(E, R, W, P, do, through, d_final, wanted=["out", "last", "states"], reverse=True)
    return WalkedBack(made["out"], made["last"], made["states"])


def _walk(
    rows: Array,
    columns: Array,
    erase: Array | None,
    pairs: Array,
    values: Array,
    through: Array,
    state: Array,
    *,
    wanted: list[str],
    reverse: bool = False,
) -> dict[str, Array]:
    """(1) to (3) with `rows`, `columns`, `erase`, `pairs`, `values` for R, E, W, P, U, or if `reverse` (4) and (5) with
    them for E, R, W, P, dO and the cotangents of states for states: what is `wanted`, by name.

    out      [b, t, hv, v]: O, or dN
    last     [b, hv, k, v] float32: the state after the last step
    written  [b, t, hv, v]: N
    states   [b, hv, n, k, v]: the state before the step of each chunk
    """
    batch, heads, chunks = pairs.shape[:3]
    key_channels, value_channels, dtype = rows.shape[-1], values.shape[-1], values.dtype
    blocks = [pl.ds(n * TILE, TILE) for n in range(key_channels // TILE)]
    inputs = {"rows": rows, "columns": columns, "erase": erase, "pairs": pairs, "values": values, "through": through}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    wide, erasing = [name for name in WIDE if name in inputs], erase is not None
    stages = _stages(key_channels, len(wide), erasing)
    # Blocks that change together: their accumulators fit the registers beside the state, and at the first group beside
    # that of `out`, which is alone where the state is large.
    groups = [blocks[n : n + 2] for n in range(0, len(blocks), 2)]
    if len(blocks) > 3:
        groups = [[], *([block] for block in blocks)]

    def kernel(inputs, initial, outputs, scratch):
        item, channels = lax.axis_index("item"), pl.ds(lax.axis_index("tile") * TILE, TILE)
        row, head = divide(item, heads)
        state_ref, written_ref, out_ref = (scratch.get(name) for name in ("state", "written", "out"))

        def chunk_at(i):
            return chunks - 1 - i if reverse else i

        def part(ref, i, columns):
            return ref.at[row, pl.ds(chunk_at(i) * CHUNK, CHUNK), head, columns]

        def fetch(i):
            _, slot = divide(i, stages)
            loaded = scratch["loaded"].at[slot]
            for name in wide:
                plgpu.copy_gmem_to_smem(part(inputs[name], i, pl.ds(0, key_channels)), scratch[name].at[slot], loaded)
            plgpu.copy_gmem_to_smem(part(inputs["values"], i, channels), scratch["values"].at[slot], loaded)
            for name in ("pairs", "through"):
                plgpu.copy_gmem_to_smem(inputs[name].at[row, head, chunk_at(i)], scratch[name].at[slot], loaded)

        def store_state(i):
            """The one that step i starts from."""
            if "states" in outputs:
                target = outputs["states"].at[row, head, chunk_at(i), :, channels]
                pl.when(i < chunks)(lambda: plgpu.copy_smem_to_gmem(state_ref, target))

        for i in range(stages):
            if i < chunks:
                fetch(jnp.int32(i))
        state = tuple(load(initial.at[row, head, block, channels], MATRIX, optimized=False) for block in blocks)
        for block, x in zip(blocks, state):
            state_ref.at[block][...] = x.astype(dtype)
        plgpu.commit_smem()
        store_state(jnp.int32(0))

        def step(i, state):
            _, slot = divide(i, stages)
            rows, columns, pairs, values = (scratch[name].at[slot] for name in ("rows", "columns", "pairs", "values"))
            erase = scratch["erase"].at[slot] if erasing else None
            through = scratch["through"].at[slot]

            def stored():
                # What the step before has stored has left shared memory, and every warp is done with its products.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def put_written(x):
                written_ref[...] = x.astype(dtype)
                plgpu.commit_smem()

            def erased(accumulator):
                plgpu.wgmma(accumulator, erase, state_ref)
                return accumulator[...]

            def products(group, first, written, *accumulators):
                """What the blocks of a group change by; and `out`, at the first group."""
                changes = accumulators[first:]
                if first:
                    plgpu.wgmma(accumulators[0], rows, state_ref)
                    plgpu.wgmma(accumulators[0], pairs.T if reverse else pairs, written)
                for block, change in zip(group, changes):
                    plgpu.wgmma(change, columns.at[:, block].T, written)
                if first:
                    out = accumulators[0][...]
                    stored()
                    out_ref[...] = out.astype(dtype)
                    if erasing and reverse:
                        put_written(-out)
                if erasing and reverse:
                    for block, change in zip(group, changes):
                        plgpu.wgmma(change, erase.at[:, block].T, written_ref)
                return [change[...] for change in changes]

            plgpu.barrier_wait(scratch["loaded"].at[slot])
            written = values
            if erasing and not reverse:
                N = load(values, MATRIX).astype(jnp.float32) - accumulate(erased, 1)
                stored()
                put_written(N)
                written = written_ref
            changed = []
            for n, group in enumerate(groups):
                changes = accumulate(partial(products, group, n == 0, written), (n == 0) + len(group))
                for block, x, change in zip(group, state[len(changed) :], changes):
                    changed.append(over(load(through.at[block], BY_ROW), 0) * x + change)
                    state_ref.at[block][...] = changed[-1].astype(dtype)
            plgpu.commit_smem()
            pl.when(i + stages < chunks)(lambda: fetch(i + stages))
            plgpu.copy_smem_to_gmem(out_ref, part(outputs["out"], i, channels))
            if "written" in outputs:
                plgpu.copy_smem_to_gmem(written_ref, part(outputs["written"], i, channels))
            store_state(i + 1)
            return tuple(changed)

        state = lax.fori_loop(jnp.int32(0), jnp.int32(chunks), step, state)
        for block, x in zip(blocks, state):
            outputs["last"].at[row, head, block, channels][...] = x
        plgpu.wait_smem_to_gmem(0)

    matrix = partial(plgpu.SMEM, dtype=dtype, transforms=TILED)
    scratch = {"state": matrix((key_channels, TILE)), "out": matrix((CHUNK, TILE))}
    if erasing:
        scratch["written"] = matrix((CHUNK, TILE))
    scratch |= {name: matrix((stages, CHUNK, key_channels)) for name in wide}
    scratch |= {name: matrix((stages, CHUNK, TILE)) for name in ("pairs", "values")}
    scratch["through"] = plgpu.SMEM((stages, key_channels), jnp.float32)
    scratch["loaded"] = plgpu.Barrier(num_arrivals=len(inputs), num_barriers=stages)
    types = {
        "out": (values.shape, dtype),
        "last": (state.shape, jnp.float32),
        "written": (values.shape, dtype),
        "states": ((batch, heads, chunks, key_channels, value_channels), dtype),
    }
    outputs = [jax.ShapeDtypeStruct(*types[name]) for name in wanted]

    def prepared_walk(*refs):
        count = len(inputs)
        made, used = refs[count + 1 : count + 1 + len(wanted)], refs[count + 1 + len(wanted) :]
        kernel(dict(zip(inputs, refs)), refs[count], dict(zip(wanted, made)), dict(zip(scratch, used)))

    run = plgpu.kernel(
        prepared_walk,
        out_type=outputs,
        scratch_types=list(scratch.values()),
        grid=(batch * heads, value_channels // TILE),
        grid_names=("item", "tile"),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=COMPILER_PARAMS,
    )
    return dict(zip(wanted, late(run, outputs)(*inputs.values(), state)))


def _stages(key_channels: int, wide: int, erasing: bool) -> int:
    """Chunks in shared memory at once."""
    matrix, row = 2 * CHUNK * TILE, 2 * CHUNK * key_channels
    staged = wide * row + 2 * matrix + 4 * key_channels
    own = row + (1 + erasing) * matrix + 2048
    return 2 if own + 2 * staged <= SHARED_MEMORY else 1
