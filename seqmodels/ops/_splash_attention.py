"""Softmax attention on TPU by splash attention, the kernel that comes with jax (jax.experimental.pallas.ops.tpu).

It reads a span from its start, so it trains and prefills; spans that continue a cache are `_blockwise_attention`'s.
"""

import jax
import jax.numpy as jnp

from seqmodels.notation import Array
from seqmodels.ops._op import Inputs, Options
from seqmodels.ops._scan import Documents

LANES = 128
LARGEST_BLOCK = 512


def supports(arrays: Inputs, options: Options) -> str | None:
    """Why splash attention cannot compute this, or None."""
    if reason := not_from_the_start(arrays, options):
        return reason
    q, k, v = (arrays[name] for name in "qkv")
    if q.shape[1] % LANES:
        return f"the length is {q.shape[1]}; expected a multiple of {LANES}"
    if not {x.dtype for x in (q, k, v)} <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        return f"q is {q.dtype}; expected float32 or bfloat16"
    return None


def not_from_the_start(arrays: Inputs, options: Options) -> str | None:
    """What a span reads beside its own tokens, or None."""
    if not options.get("fresh", False):
        return "a cache came in; expected none"
    if arrays.get("prefix_k") is not None:
        return "prefix_k came in; expected none"
    if options.get("sinks", 0):
        return f"sinks={options['sinks']}; expected 0"
    return None


def attend(
    arrays: Inputs, docs: Documents | None, chunk_size: int | None, options: Options, interpret: bool = False
) -> Array:
    """Outputs [b, t, h, v]; those of padding have no meaning. `chunk_size` bounds the blocks, of at least 128."""
    # Imported here: the module is slow to load and of use on TPU alone.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    q, k, v = (jnp.swapaxes(arrays[name], 1, 2) for name in "qkv")
    heads, length = q.shape[1:3]
    scale, window = options.get("scale"), options.get("window")
    q = (q * (q.shape[-1] ** -0.5 if scale is None else scale)).astype(q.dtype)
    size = _block(length, chunk_size or LARGEST_BLOCK)
    mask = masks.CausalMask((length, length))
    if window is not None and window < length:
        mask = masks.LocalMask((length, length), window_size=(window - 1, 0), offset=0)
    names = ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**{f"block_{name}": size for name in names}),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    if docs is None:
        o = jax.vmap(kernel)(q, k, v)
    else:
        # Nobody sees padding: it is a document of its own.
        index = jnp.where(docs.real, docs.index, -1)
        o = jax.vmap(kernel)(q, k, v, splash.SegmentIds(index, index))
    return jnp.swapaxes(o, 1, 2)


def _block(length: int, wanted: int) -> int:
    """The largest divisor of the length that is a multiple of 128 and at most `wanted`, or 128."""
    sizes = [size for size in range(LANES, wanted + 1, LANES) if length % size == 0]
    return max(sizes, default=LANES)
