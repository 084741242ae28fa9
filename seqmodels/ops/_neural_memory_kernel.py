"""The kernels of `pallas_kernels` as the chunked form of a linear `neural_memory`.

module: the name of one that has the functions of `pallas_kernels.tpu.neural_memory`. It is imported when it is first
asked: a program without kernels need not load Pallas.

A kernel knows mini-batches that start from the weights at which their gradients are taken, R = W. Two of a row may not
be so:

- The first one, where an earlier span began it. Its errors K R - V are (K W) - V' with V' = V + K (W - R): the kernel
  reads targets V' there.
- The last one leaves R as it was where it is not full. The kernel passes over it, and `in_slots` reads it from the
  state that the kernel ends with.
"""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Int

from seqmodels.notation import Array
from seqmodels.ops import _neural_memory_chunked as chunked
from seqmodels.ops import _scan, _tiles
from seqmodels.ops._memory_network import Linear
from seqmodels.ops._neural_memory_chunked import Memory, MiniBatch
from seqmodels.ops._op import Inputs, Options


def supports(arrays: Inputs, options: Options, *, platform: str, module: str) -> str | None:
    if len(arrays["weights"]) != 1 or arrays["weights"][0].c is not None:
        return "the memory has several layers, or a bias; expected one matrix"
    if arrays["norm"] is not None or options["residual"] or arrays["reach"] is not None:
        return "there is a norm, a residual or reach; expected none of them"
    size = {}
    if platform == "cuda":
        if options["documents"]:
            return "segment_ids came in; expected rows of one document"
        # The states of every mini-batch are kept.
        size = {"chunk_size": options["chunk_size"]}
    kernel = importlib.import_module(module)
    return kernel.supports(*(arrays[name] for name in "qkv"), options["mini_batch"], **size)


def in_order(
    inputs: MiniBatch, start: Memory, *, options: Options, chunk_size: int | None, **how: Any
) -> tuple[Array, Memory]:
    """Rows of one document each, which start with a mini-batch: the whole ones by the kernel."""
    length = inputs.q.shape[1]
    whole = length // options["mini_batch"] * options["mini_batch"]
    o, memory = _by_kernel(jax.tree.map(lambda x: x[:, :whole], inputs), start, options, chunk_size=chunk_size, **how)
    if whole == length:
        return o, memory
    rest, memory = chunked.in_order(jax.tree.map(lambda x: x[:, whole:], inputs), memory, None, options, 1)
    return jnp.concatenate([o, rest], axis=1), memory


def in_tiles(
    inputs: MiniBatch,
    start: Memory,
    fresh: Memory | None,
    tiles: _tiles.Tiles,
    *,
    options: Options,
    chunk_size: int | None,
    **how: Any,
) -> tuple[Array, Memory]:
    """Rows of any documents, from any place in a mini-batch. fresh: see `_neural_memory_chunked.in_tiles`."""
    batch, count = tiles.real.shape[:2]
    cut = jax.tree.map(lambda x: _tiles.to_tiles(x, tiles), inputs)
    if fresh is not None:
        how["fresh"] = importlib.import_module(how["module"]).Fresh(tiles.starts, *_matrices(fresh))
        start = _scan.where_row(~tiles.starts[:, 0], start, fresh)
    # 1. All but the last tile of each row.
    last = jnp.max(jnp.arange(count) * tiles.real.any(axis=2), axis=1)
    before = cut if options["fresh"] else cut._replace(v=_moved(cut.v, cut.k, start))
    o, memory = _by_kernel(
        jax.tree.map(lambda x: x.reshape(batch, -1, *x.shape[3:]), before),
        start,
        options,
        token=(tiles.real & (jnp.arange(count) != last[:, None])[..., None]).reshape(batch, -1),
        chunk_size=chunk_size,
        **how,
    )
    # 2. The last one, which in a row of one tile may have been begun before.
    reference = _scan.where_row(last == 0, start.reference, memory.reference)
    of_last = jax.tree.map(lambda x: _pick(x, last), cut)
    rest, memory = chunked.in_slots(
        of_last, _pick(tiles.real, last), memory._replace(reference=reference), None, options
    )
    put = jax.vmap(lambda o, rest, n: jax.lax.dynamic_update_index_in_dim(o, rest, n, axis=0))
    return _tiles.from_tiles(put(o.reshape(cut.v.shape), rest, last), tiles), memory


def _moved(v: Array, k: Array, start: Memory) -> Array:
    """V' of the first tile, and V of the others."""
    between = start.weights[0].A - start.reference[0].A
    by = jnp.einsum("bchk,bhkv->bchv", k[:, 0].astype(between.dtype), between, precision="highest")
    return v.at[:, 0].add(by.astype(v.dtype))


def _pick(x: Array, tile: Int[Array, " b"]) -> Array:
    """[b, n, c, ...] -> [b, c, ...], one tile of each row."""
    return jax.vmap(lambda x, n: jax.lax.dynamic_index_in_dim(x, n, axis=0, keepdims=False))(x, tile)


def _matrices(memory: Memory) -> tuple[Array, Array | None]:
    """W and S of one layer."""
    return memory.weights[0].A, None if memory.momentum is None else memory.momentum[0].A


def _by_kernel(inputs: MiniBatch, start: Memory, options: Options, *, module: str, **how: Any) -> tuple[Array, Memory]:
    """Rows of whole mini-batches, which the kernel reads."""
    kernel = importlib.import_module(module)
    *gated, _ = inputs
    sizes = {"mini_batch": options["mini_batch"], "loss_scale": options["loss_scale"]}
    o, W, S = kernel.neural_memory(*gated, *_matrices(start), **sizes, **how)
    W = (Linear(W),)
    return o, Memory(W, None if S is None else (Linear(S),), W)
