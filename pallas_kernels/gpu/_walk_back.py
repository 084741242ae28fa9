"""The kernel of the gradients of keys and values, (5) to (7) of `linear_attention`, in one walk backwards in time.

Two walks would read q, k, v, dO twice and carry the same state. Here a block of threads holds the whole state of a
head: one warpgroup for each tile of the channels, which computes that tile of dV and of dK and keeps those columns of
dS. dK sums over all columns, so the warpgroups show each other their parts of dS in shared memory.
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
    ENTER,
    LEAVE,
    MATRIX,
    MULTIPROCESSORS,
    SPAN,
    THROUGH,
    TILE,
    TILED,
    accumulate,
    divide,
    load,
    over,
    pair_weights,
    segments_of,
)
from pallas_kernels.late import late

Array = jax.Array

STAGES = 2  # chunks in shared memory at once
MOST_TILES = 2  # of the channels: more do not fit shared memory and the registers


class KeyValueGradients(NamedTuple):
    """What `walk_back` gives; the last two are None where they are not wanted.

    dk, dv    [b, t, hv, k or v]
    leaving   [b, hv, k, v] float32: the cotangent of the initial state
    products  [b, hv, tiles, t] float32: the products of the rows of dk, before they are rounded, with those of k
    states    [b, hv, spans - 1, k, v]: dS between each SPAN positions and the next (undefined for a single span)
    """

    dk: object = None
    dv: object = None
    leaving: object = None
    products: object = None
    states: object = None


def runs_in_one_walk(k: Array, v: Array) -> bool:
    """Whether `walk_back` takes these numbers of channels."""
    return k.shape[-1] == v.shape[-1] <= MOST_TILES * TILE


def segments_back(k: Array, heads: int) -> int:
    """Into how many segments the sequence is cut for `walk_back`: where less than half of the chip had work, so many
    that it fills the chip.
    """
    blocks = k.shape[0] * heads
    together = 2 if k.shape[-1] == TILE else 1
    if 2 * blocks > MULTIPROCESSORS:
        return 1
    return segments_of(k.shape[1] // CHUNK, MULTIPROCESSORS * together // blocks)


def walk_back(
    q: Array, k: Array, v: Array, do: Array, weights: Array, entering: Array, *, scale: float, with_flows: bool
) -> KeyValueGradients:
    """dK, dV and the cotangent of the initial state.

    entering: [b, hv, segments, k, v] float32, the cotangent of the state at the end of each segment
    with_flows: also give `products` and `states`, from which the gradient of the decay comes
    """
    batch, heads, chunks = weights.shape[:3]
    channels, segments, dtype, length = k.shape[-1], entering.shape[2], v.dtype, chunks * CHUNK
    groups = channels // TILE
    size, spans = -(-chunks // segments), -(-length // SPAN)
    inputs = {"q": q, "k": k, "v": v, "do": do}
    names = ["dk", "dv", "leaving", *(("products", "states") if with_flows else ())]

    def kernel(sources, weights_ref, entering_ref, outputs, scratch):
        item, segment, group = lax.axis_index("item"), lax.axis_index("segment"), lax.axis_index("warpgroup")
        row, head = divide(item, heads)
        count = jnp.minimum(size, chunks - segment * size)
        tiles = [pl.ds(n * TILE, TILE) for n in range(groups)]
        own_tile = pl.ds(group * TILE, TILE)
        own_state, written = scratch["state"].at[group], scratch["written"].at[group]
        together = groups > 1

        def chunk_at(i):
            return segment * size + count - 1 - i

        def part(ref, i, columns):
            return ref.at[row, pl.ds(chunk_at(i) * CHUNK, CHUNK), divide(head, heads // ref.shape[2])[0], columns]

        def fetch(i):
            _, slot = divide(i, STAGES)
            loaded = scratch["loaded"].at[slot]
            plgpu.copy_gmem_to_smem(weights_ref.at[row, head, chunk_at(i)], scratch["weights"].at[slot], loaded)
            for name, ref in sources.items():
                for n, tile in enumerate(tiles):
                    plgpu.copy_gmem_to_smem(part(ref, i, tile), scratch[name].at[n, slot], loaded)

        def replace(i):
            """Chunk i, which this warpgroup has done with, by the one that comes into its place."""

            @pl.when(i + STAGES < count)
            def _():
                read = scratch["read"].at[divide(i, STAGES)[1]]
                plgpu.barrier_arrive(read)

                @pl.when(group == 0)
                def _():
                    plgpu.barrier_wait(read)
                    fetch(i + STAGES)

        def show(state):
            """The state in shared memory, for all warpgroups."""
            for n, x in enumerate(state):
                own_state.at[n][...] = x.astype(dtype)
            plgpu.commit_smem()

        @pl.when(group == 0)
        def _():
            for i in range(STAGES):
                pl.when(i < count)(partial(fetch, jnp.int32(i)))

        state = tuple(
            load(entering_ref.at[row, head, segment, tile, own_tile], MATRIX, optimized=False) for tile in tiles
        )
        show(state)
        if together:
            plgpu.barrier_arrive(scratch["shown"])

        def step(i, state):
            _, slot = divide(i, STAGES)
            q, k, v, do = ([scratch[name].at[n, slot] for n in range(groups)] for name in ("q", "k", "v", "do"))
            own = {name: scratch[name].at[group, slot] for name in sources}
            weights = scratch["weights"].at[slot]

            def score_products(scores, d_scores):
                for n in range(groups):
                    plgpu.wgmma(scores, k[n], q[n].T)
                    plgpu.wgmma(d_scores, v[n], do[n].T)
                # What needs neither is done while these products are on their way.
                pairs = scale * pair_weights(weights, True)
                return scores[...] * pairs, d_scores[...] * pairs

            def read_products(dv, dk):
                for n in range(groups):
                    plgpu.wgmma(dv, k[n], own_state.at[n])
                    plgpu.wgmma(dk, v[n], scratch["state"].at[n, group].T)
                enter = load(weights.at[ENTER], BY_ROW)
                weighted = load(own["do"], MATRIX).astype(jnp.float32) * over(enter, 0)
                written[...] = weighted.astype(dtype)
                plgpu.commit_smem()
                leave = over(load(weights.at[LEAVE], BY_ROW), 0)
                return dv[...] * leave, dk[...] * leave

            def pair_product(pairs, values, accumulator):
                plgpu.wgmma(accumulator, pairs, values)
                return [accumulator[...]]

            plgpu.barrier_wait(scratch["loaded"].at[slot])
            scores, d_scores = (x.astype(dtype) for x in accumulate(score_products, 2))
            if together:
                plgpu.barrier_wait(scratch["shown"])
            dv, dk = accumulate(read_products, 2)
            if together:
                plgpu.barrier_arrive(scratch["seen"])
            # What the chunk before has stored has left shared memory.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            # One after the other: the accumulators of both do not fit the registers beside the state.
            dv = dv + accumulate(partial(pair_product, scores, own["do"]), 1)[0]
            scratch["dv"].at[group][...] = dv.astype(dtype)
            dk = dk + accumulate(partial(pair_product, d_scores, own["q"]), 1)[0]

            def updates(*accumulators):
                for n, accumulator in enumerate(accumulators):
                    plgpu.wgmma(accumulator, q[n].T, written)
                scratch["dk"].at[group][...] = dk.astype(dtype)
                if with_flows:
                    product = dk * load(own["k"], MATRIX).astype(jnp.float32)
                    scratch["products"].at[group][...] = product.sum(axis=1)
                return [accumulator[...] for accumulator in accumulators]

            through = weights[THROUGH, 0]
            changed = tuple(through * x + y for x, y in zip(state, accumulate(updates, groups)))
            if together:
                plgpu.barrier_wait(scratch["seen"])
            show(changed)
            if together:
                pl.when(i + 1 < count)(lambda: plgpu.barrier_arrive(scratch["shown"]))
            replace(i)
            store(i)
            return changed

        def store(i):
            chunk = chunk_at(i)
            plgpu.copy_smem_to_gmem(scratch["dv"].at[group], part(outputs.dv, i, own_tile))
            plgpu.copy_smem_to_gmem(scratch["dk"].at[group], part(outputs.dk, i, own_tile))
            if with_flows:
                target = outputs.products.at[row, head, group, pl.ds(chunk * CHUNK, CHUNK)]
                plgpu.copy_smem_to_gmem(scratch["products"].at[group], target)
                span, beyond = divide(chunk, SPAN // CHUNK)

                @pl.when((beyond == 0) & (span > 0))
                def _():
                    for n, tile in enumerate(tiles):
                        plgpu.copy_smem_to_gmem(own_state.at[n], outputs.states.at[row, head, span - 1, tile, own_tile])

        state = lax.fori_loop(jnp.int32(0), count, step, state)

        @pl.when(segment == 0)
        def _():
            for tile, x in zip(tiles, state):
                outputs.leaving.at[row, head, tile, own_tile][...] = x

        plgpu.wait_smem_to_gmem(0)

    matrix = partial(plgpu.SMEM, dtype=dtype, transforms=TILED)
    scratch = {
        **{name: matrix((groups, STAGES, CHUNK, TILE)) for name in inputs},
        **{name: matrix((groups, CHUNK, TILE)) for name in ("written", "dv", "dk")},
        "state": matrix((groups, groups, TILE, TILE)),
        "weights": plgpu.SMEM((STAGES, *weights.shape[3:]), jnp.float32),
        "products": plgpu.SMEM((groups, CHUNK), jnp.float32),
        "loaded": plgpu.Barrier(num_arrivals=len(inputs) * groups + 1, num_barriers=STAGES),
        "read": plgpu.Barrier(num_arrivals=groups, num_barriers=STAGES),
        "shown": plgpu.Barrier(num_arrivals=groups),
        "seen": plgpu.Barrier(num_arrivals=groups),
    }
    gradient = jax.ShapeDtypeStruct((batch, length, heads, channels), dtype)
    types = KeyValueGradients(
        dk=gradient,
        dv=gradient,
        leaving=jax.ShapeDtypeStruct((batch, heads, channels, channels), jnp.float32),
        products=jax.ShapeDtypeStruct((batch, heads, groups, length), jnp.float32),
        states=jax.ShapeDtypeStruct((batch, heads, max(spans - 1, 1), channels, channels), dtype),
    )

    def linear_attention_walk_back(*refs):
        made, used = refs[6 : 6 + len(names)], refs[6 + len(names) :]
        outputs = KeyValueGradients(**dict(zip(names, made)))
        kernel(dict(zip(inputs, refs)), refs[4], refs[5], outputs, dict(zip(scratch, used)))

    outputs = [getattr(types, name) for name in names]
    run = plgpu.kernel(
        linear_attention_walk_back,
        out_type=outputs,
        scratch_types=list(scratch.values()),
        grid=(batch * heads, segments),
        grid_names=("item", "segment"),
        num_threads=groups,
        thread_name="warpgroup",
        compiler_params=COMPILER_PARAMS,
    )
    results = late(run, outputs)(*inputs.values(), weights, entering)
    return KeyValueGradients(**dict(zip(names, results)))
