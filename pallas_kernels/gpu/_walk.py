"""The kernel of equations (2) and (3) of `linear_attention`, for any three arrays in the places of q, k, v."""

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
    ENTER,
    LEAVE,
    MATRIX,
    MULTIPROCESSORS,
    SHARED_MEMORY,
    SPAN,
    THROUGH,
    TILE,
    TILED,
    accumulate,
    divide,
    load,
    over,
    pair_weights,
)
from pallas_kernels.late import late

Array = jax.Array

# What a tile of channels of `values` has of its own in shared memory.
_OF_A_TILE = ("values", "written", "state", "out", "probe", "products")


def _warpgroups_and_stages(blocks: int, tiles: int, key_channels: int, reading: bool, probing: bool) -> tuple[int, int]:
    """Warpgroups that share the rows and columns, each with a tile of its own, and chunks in shared memory at once.

    blocks: of threads, if each has one warpgroup
    """

    def fits(groups: int, stages: int) -> bool:
        matrix = 2 * CHUNK * TILE
        wide = 2 * CHUNK * key_channels
        staged = (1 + reading) * wide + groups * (1 + probing) * matrix + 2048
        own = matrix + reading * (wide + matrix) + probing * 1024
        return stages * staged + groups * own + 2048 <= SHARED_MEMORY

    # Two warpgroups read less, but keep each other waiting where there is a multiprocessor for each.
    groups = 2 if tiles % 2 == 0 and 4 * blocks > 5 * MULTIPROCESSORS and fits(2, 2) else 1
    # Three blocks to a multiprocessor are better than a third stage.
    stages = 3 if key_channels > TILE and fits(groups, 3) else 2
    return groups, stages


class Walked(NamedTuple):
    """What a walk gives, None where it is not wanted.

    out       [b, t, hv, v]
    leaving   [b, hv, k, v] float32: the last state; for a walk without rows [b, hv, segments, k, v], one per segment
    products  [b, hv, v // TILE, t] float32: the products of the rows of `out` with those of `probe`, tile by tile
    states    [b, hv, spans - 1, k, v]: the state between each SPAN positions and the next (undefined for a single span)
    """

    out: object = None
    leaving: object = None
    products: object = None
    states: object = None


def walk(
    rows: Array | None,
    columns: Array,
    values: Array,
    weights: Array,
    entering: Array | None,
    *,
    wanted: tuple[str, ...],
    scale: float = 1.0,
    segments: int = 1,
    probe: Array | None = None,
    reverse: bool = False,
) -> Walked:
    """(2) and (3) with `rows`, `columns`, `values` in the places of q, k, v; backwards in time if `reverse`.

    rows, columns  [b, t, any divisor of hv, k]
    values, probe  [b, t, any divisor of hv, v]
    entering       [b, hv, segments, k, v] float32: the state that enters each segment in walking order

    Without rows there is no output, the segments start from nothing and only their states are computed.
    """
    batch, heads, chunks = weights.shape[:3]
    key_channels, value_channels = columns.shape[-1], values.shape[-1]
    dtype, length, reading = values.dtype, chunks * CHUNK, rows is not None
    probe = probe if "products" in wanted else None
    if reading:
        segments = entering.shape[2]
    size, spans = -(-chunks // segments), -(-length // SPAN)
    tiles = value_channels // TILE
    groups, stages = _warpgroups_and_stages(
        batch * heads * segments * tiles, tiles, key_channels, reading, probe is not None
    )
    read_row, write_row = (LEAVE, ENTER) if reverse else (ENTER, LEAVE)
    blocks = [pl.ds(n * TILE, TILE) for n in range(key_channels // TILE)]

    def kernel(inputs, outputs, scratch):
        item, segment, group = lax.axis_index("item"), lax.axis_index("segment"), lax.axis_index("warpgroup")
        tile = lax.axis_index("tile") * groups + group
        row, head = divide(item, heads)
        channels = pl.ds(tile * TILE, TILE)
        count = jnp.minimum(size, chunks - segment * size)
        # What every warpgroup reads is in shared memory once, what belongs to a tile once for each warpgroup.
        shared = {name: scratch[name] for name in ("rows", "columns", "weights") if name in scratch}
        own = {name: ref.at[group] for name, ref in scratch.items() if name in _OF_A_TILE}

        def chunk_at(i):
            return segment * size + (count - 1 - i if reverse else i)

        def part(ref, i, columns):
            return ref.at[row, pl.ds(chunk_at(i) * CHUNK, CHUNK), divide(head, heads // ref.shape[2])[0], columns]

        def fetch(i):
            _, slot = divide(i, stages)
            loaded = scratch["loaded"].at[slot]
            plgpu.copy_gmem_to_smem(inputs["weights"].at[row, head, chunk_at(i)], shared["weights"].at[slot], loaded)
            for name in (name for name in ("rows", "columns") if name in inputs):
                plgpu.copy_gmem_to_smem(part(inputs[name], i, pl.ds(0, key_channels)), shared[name].at[slot], loaded)
            for name in (name for name in ("values", "probe") if name in inputs):
                for n in range(groups):
                    columns = pl.ds((lax.axis_index("tile") * groups + n) * TILE, TILE)
                    plgpu.copy_gmem_to_smem(part(inputs[name], i, columns), scratch[name].at[n, slot], loaded)

        def replace(i):
            """Chunk i, which this warpgroup has done with, by the one that comes into its place."""

            @pl.when(i + stages < count)
            def _():
                read = scratch["read"].at[divide(i, stages)[1]] if groups > 1 else None
                if groups > 1:
                    plgpu.barrier_arrive(read)

                @pl.when(group == 0)
                def _():
                    if groups > 1:
                        plgpu.barrier_wait(read)
                    fetch(i + stages)

        def keep(state):
            for block, x in zip(blocks, state):
                own["state"].at[block][...] = x.astype(dtype)

        @pl.when(group == 0)
        def _():
            for i in range(stages):
                pl.when(i < count)(partial(fetch, jnp.int32(i)))

        if reading:
            state = tuple(
                load(inputs["entering"].at[row, head, segment, block, channels], MATRIX, optimized=False)
                for block in blocks
            )
            keep(state)
            plgpu.commit_smem()
        else:
            state = tuple(plgpu.layout_cast(jnp.zeros((TILE, TILE), jnp.float32), MATRIX) for _ in blocks)

        def step(i, state):
            _, slot = divide(i, stages)
            columns, weights, values = shared["columns"].at[slot], shared["weights"].at[slot], own["values"].at[slot]

            def weigh_values():
                write = load(weights.at[write_row], BY_ROW)
                written = load(values, MATRIX).astype(jnp.float32) * over(write, 0)
                own["written"][...] = written.astype(dtype)
                plgpu.commit_smem()

            def read_products(scores, read):
                plgpu.wgmma(scores, shared["rows"].at[slot], columns.T)
                plgpu.wgmma(read, shared["rows"].at[slot], own["state"])
                # What needs neither is done while these products are on their way.
                pairs = scale * pair_weights(weights, reverse)
                weigh_values()
                return scores[...] * pairs, read[...]

            plgpu.barrier_wait(scratch["loaded"].at[slot])
            if reading:
                scores, read = accumulate(read_products, 2)
                scores = scores.astype(dtype)
                read = read * over(load(weights.at[read_row], BY_ROW), 0)
                # What the chunk before has stored has left shared memory, and every warp is done with its state.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            else:
                weigh_values()
            through = weights[THROUGH, 0]
            changed = []
            # The accumulators of more blocks do not fit the registers beside the state.
            for n in range(0, len(blocks), 2):
                outputs_too = reading and n == 0

                def write_products(*accumulators, n=n, outputs_too=outputs_too):
                    if outputs_too:
                        plgpu.wgmma(accumulators[0], scores, values)
                    for block, accumulator in zip(blocks[n : n + 2], accumulators[outputs_too:]):
                        plgpu.wgmma(accumulator, columns.at[:, block].T, own["written"])
                    return [accumulator[...] for accumulator in accumulators]

                products = accumulate(write_products, outputs_too + len(blocks[n : n + 2]))
                if outputs_too:
                    out = products[0] + read
                    own["out"][...] = out.astype(dtype)
                    if "probe" in own:
                        product = out * load(own["probe"].at[slot], MATRIX).astype(jnp.float32)
                        own["products"][...] = product.sum(axis=1)
                changed += [through * x + y for x, y in zip(state[n : n + 2], products[outputs_too:])]
            if reading:
                keep(changed)
            plgpu.commit_smem()
            replace(i)
            if reading:
                store(i)
            return tuple(changed)

        def store(i):
            chunk = chunk_at(i)
            plgpu.copy_smem_to_gmem(own["out"], part(outputs.out, i, channels))
            if outputs.products is not None:
                target = outputs.products.at[row, head, tile, pl.ds(chunk * CHUNK, CHUNK)]
                plgpu.copy_smem_to_gmem(own["products"], target)
            if outputs.states is not None:
                # Of the next span, or backwards in time of this one.
                span, beyond = divide(chunk if reverse else chunk + 1, SPAN // CHUNK)
                pl.when((beyond == 0) & (span > 0) & (span < spans))(
                    lambda: plgpu.copy_smem_to_gmem(own["state"], outputs.states.at[row, head, span - 1, :, channels])
                )

        state = lax.fori_loop(jnp.int32(0), count, step, state)

        def leave(target):
            for block, x in zip(blocks, state):
                target.at[block, channels][...] = x

        if outputs.leaving is not None and reading:
            end = 0 if reverse else segments - 1
            pl.when(segment == end)(lambda: leave(outputs.leaving.at[row, head]))
        elif outputs.leaving is not None:
            leave(outputs.leaving.at[row, head, segment])
        plgpu.wait_smem_to_gmem(0)

    matrix_of = partial(plgpu.SMEM, dtype=dtype, transforms=TILED)
    inputs = {"columns": columns, "values": values, "weights": weights}
    scratch = {
        "columns": matrix_of((stages, CHUNK, key_channels)),
        "values": matrix_of((groups, stages, CHUNK, TILE)),
        "weights": plgpu.SMEM((stages, *weights.shape[3:]), jnp.float32),
        "written": matrix_of((groups, CHUNK, TILE)),
    }
    if reading:
        inputs |= {"rows": rows, "entering": entering}
        scratch |= {
            "rows": matrix_of((stages, CHUNK, key_channels)),
            "state": matrix_of((groups, key_channels, TILE)),
            "out": matrix_of((groups, CHUNK, TILE)),
        }
    if probe is not None:
        inputs["probe"] = probe
        scratch |= {
            "probe": matrix_of((groups, stages, CHUNK, TILE)),
            "products": plgpu.SMEM((groups, CHUNK), jnp.float32),
        }
    copies = sum(groups if name in _OF_A_TILE else 1 for name in inputs if name in scratch)
    scratch["loaded"] = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    if groups > 1:
        scratch["read"] = plgpu.Barrier(num_arrivals=groups, num_barriers=stages)
    types = Walked(
        out=((batch, length, heads, value_channels), dtype),
        leaving=((batch, heads, *([] if reading else [segments]), key_channels, value_channels), jnp.float32),
        products=((batch, heads, tiles, length), jnp.float32),
        states=((batch, heads, max(spans - 1, 1), key_channels, value_channels), dtype),
    )
    names = [name for name in Walked._fields if name in wanted]
    keys = list(inputs)

    def linear_attention_walk(*refs):
        given, made, used = refs[: len(keys)], refs[len(keys) : len(keys) + len(names)], refs[len(keys) + len(names) :]
        kernel(dict(zip(keys, given)), Walked(**dict(zip(names, made))), dict(zip(scratch, used)))

    outputs = [jax.ShapeDtypeStruct(*getattr(types, name)) for name in names]
    run = plgpu.kernel(
        linear_attention_walk,
        out_type=outputs,
        scratch_types=list(scratch.values()),
        grid=(batch * heads, segments, tiles // groups),
        grid_names=("item", "segment", "tile"),
        num_threads=groups,
        thread_name="warpgroup",
        compiler_params=COMPILER_PARAMS,
    )
    results = late(run, outputs)(*inputs.values())
    return Walked(**dict(zip(names, results)))
