"""What operators with a matrix state do with their arrays [b, t, heads, channels] around their kernels."""

import jax
import jax.numpy as jnp

from pallas_kernels.gpu._chunk import CHUNK, TILE

Array = jax.Array

LARGEST = 256  # channels of q and k, and of v


def declined(q: Array, k: Array, v: Array, chunk_size: int | None) -> str | None:
    """Why no kernel here takes these arrays, or None: by shapes, dtypes and the GPU, if any."""
    if reason := out_of_reach(v, q=q):
        return reason
    if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
        return f"q, k and v must be bfloat16, got {q.dtype}, {k.dtype} and {v.dtype}"
    if v.shape[2] % q.shape[2]:
        return f"the heads of v ({v.shape[2]}) are not a multiple of those of q and k ({q.shape[2]})"
    if max(q.shape[-1], v.shape[-1]) > LARGEST:
        return f"q and k have {q.shape[-1]} and v has {v.shape[-1]} channels, at most {LARGEST} are supported"
    return other_chunks(chunk_size)


def out_of_reach(v: Array, **others: Array) -> str | None:
    """That the GPU is another one, arrays are empty, or v [b, t, h, v] has more rows of heads than a grid."""
    if reason := _other_gpu():
        return reason
    if any(0 in x.shape for x in (v, *others.values())):
        return "empty arrays: " + ", ".join(f"{name} {x.shape}" for name, x in {**others, "v": v}.items())
    if v.shape[0] * v.shape[2] > 65535:
        return f"batch times heads is {v.shape[0] * v.shape[2]}, more than the 65535 of a grid"
    return None


def other_chunks(chunk_size: int | None) -> str | None:
    """That the size of a chunk, which is a part of the kernels, is another one."""
    if chunk_size in (None, CHUNK):
        return None
    return f"chunks of {chunk_size} positions are not supported, only of {CHUNK}"


def _other_gpu() -> str | None:
    """That this process has a GPU whose matrix instructions are not Hopper's."""
    if jax.default_backend() != "gpu":
        return None
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "")
    if capability.startswith("9."):
        return None
    return f"the GPU is {device.device_kind}, of compute capability {capability}; expected 9.0, Hopper"


def pad(x: Array, axis: int, multiple: int) -> Array:
    """Zeros at the end of an axis: neutral positions, or channels that are never used."""
    missing = -x.shape[axis] % multiple
    return x if missing == 0 else jnp.pad(x, [(0, missing if n == axis else 0) for n in range(x.ndim)])


def in_chunks_and_tiles(
    q: Array, k: Array, v: Array, state: Array, index: Array | None
) -> tuple[Array, Array, Array, Array, Array | None]:
    """Padded to whole chunks of positions and whole tiles of channels; the state in float32. What is behind the end is
    of the last document.
    """
    q, k, v = (pad(pad(x, 1, CHUNK), 3, TILE) for x in (q, k, v))
    state = pad(pad(state.astype(jnp.float32), 2, TILE), 3, TILE)
    if index is not None:
        index = jnp.pad(index, ((0, 0), (0, -index.shape[1] % CHUNK)), mode="edge")
    return q, k, v, state, index


def group_sum(x: Array, heads: int, axis: int = 2) -> Array:
    """Sum over the heads of v, on this axis, that share one of the `heads` of q and k; the dtype stays."""
    if x.shape[axis] == heads:
        return x
    grouped = x.reshape(*x.shape[:axis], heads, -1, *x.shape[axis + 1 :])
    return jnp.sum(grouped, axis=axis + 1, dtype=jnp.float32).astype(x.dtype)


def spread(x: Array, heads: int, axis: int = 2) -> Array:
    """Of the heads of q and k, on this axis, the one that each of the `heads` of v reads."""
    return x if x.shape[axis] == heads else jnp.repeat(x, heads // x.shape[axis], axis=axis)
