"""Softmax attention on NVIDIA GPUs by cuDNN, through `jax.nn.dot_product_attention`.

Like splash attention it reads a span from its start; of rows that hold one document each.
"""

import jax
import jax.numpy as jnp

from seqmodels.notation import Array
from seqmodels.ops import _splash_attention
from seqmodels.ops._op import Inputs, Options
from seqmodels.ops._scan import Documents

LARGEST = 128  # channels of a head
IMPLEMENTATION = "cudnn"


def supports(arrays: Inputs, options: Options) -> str | None:
    """Why cuDNN cannot compute this, or None. It is asked at once what it can do, so that there has to be a GPU."""
    if reason := _splash_attention.not_from_the_start(arrays, options):
        return reason
    if options["documents"]:
        return "segment_ids came in; expected rows of one document"
    q, k, v = (arrays[name] for name in "qkv")
    if len({x.dtype for x in (q, k, v)}) > 1 or q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; expected all bfloat16 or all float16"
    if k.shape[-1] != v.shape[-1] or k.shape[-1] > LARGEST or k.shape[-1] % 8:
        return (
            f"the heads of k and v have {k.shape[-1]} and {v.shape[-1]} channels; expected the same multiple of 8, at"
            f" most {LARGEST}"
        )
    device = jax.devices()[0].device_kind
    if "NVIDIA" not in device:
        return f"this process has no NVIDIA GPU, but {device}"
    return None


def attend(arrays: Inputs, docs: Documents | None, chunk_size: int | None, options: Options) -> Array:
    """Outputs [b, t, h, v]. cuDNN has blocks of its own: `chunk_size` is not used."""
    window = options.get("window")
    return jax.nn.dot_product_attention(
        *(arrays[name] for name in "qkv"),
        scale=options.get("scale"),
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=IMPLEMENTATION,
    )
