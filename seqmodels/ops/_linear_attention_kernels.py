"""The kernels of `pallas_kernels` as the chunked form of linear attention.

The normaliser is one more value channel, of ones: its state is z, and what a query reads from it is the denominator.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax.numpy as jnp

from seqmodels.notation import Array
from seqmodels.ops import _scan
from seqmodels.ops._linear_attention_chunked import EPSILON
from seqmodels.ops._op import Inputs, Kernel, Options
from seqmodels.ops._scan import Documents


def kernel(platform: str, automatic: bool | Callable[[Inputs], bool] = True) -> Kernel:
    """Of the modules of this platform: `linear_attention`, and `channel_decay` for decay per channel.

    They are imported when they are first asked: a program that names "xla" need not load Pallas.
    """
    package = f"pallas_kernels.{_PACKAGES[platform]}"

    def module_and_function(g: Array | None) -> tuple[ModuleType, Callable]:
        name = "channel_decay" if _by_channel(g) else "linear_attention"
        module = importlib.import_module(f"{package}.{name}")
        return module, getattr(module, name)

    def supports(arrays: Inputs, options: Options) -> str | None:
        q, k, v, g = (arrays[name] for name in "qkvg")
        v = _with_ones(v) if options["normalize"] else v
        module, _ = module_and_function(g)
        # On a GPU the size of a chunk is a part of the kernel.
        size = {"chunk_size": options["chunk_size"]} if platform == "cuda" else {}
        return module.supports(q, k, v, g, **size)

    def call(
        arrays: Inputs, state: Any, docs: Documents | None, *, chunk_size: int | None, options: Options, **how: Any
    ) -> tuple[Array, Any]:
        q, k, v, g = (arrays[name] for name in "qkvg")
        S, index = state, None
        if docs is not None:
            k, g = _scan.zero_at_padding(docs, k, g)
            index = docs.index
        if options["normalize"]:
            S, v = jnp.concatenate([state.S, state.z[..., None]], axis=-1), _with_ones(v)
        how = {"scale": options["scale"], "chunk_size": chunk_size, **how}
        _, function = module_and_function(g)
        o, S = function(q, k, v, g, S, index, **how)
        if options["normalize"]:
            o = o.astype(S.dtype)
            o = (o[..., :-1] / (o[..., -1:] + EPSILON)).astype(v.dtype)
            S = type(state)(S[..., :-1], S[..., -1])
        return o if docs is None else _scan.zero_at_padding(docs, o)[0], S

    return Kernel(platform, supports, call, automatic)


def _by_channel(g: Array | None) -> bool:
    return g is not None and g.ndim == 4


def _with_ones(v: Array) -> Array:
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)


_PACKAGES = {"tpu": "tpu", "cuda": "gpu"}
KERNELS = {
    "pallas_tpu": kernel("tpu"),
    # On a GPU the speed of decay per channel is not known yet.
    "pallas_gpu": kernel("cuda", automatic=lambda arrays: not _by_channel(arrays["g"])),
}
