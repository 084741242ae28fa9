"""Functions of other libraries that compute on a GPU what our operators do.

As for the CPU (../peers.py), each is imported in the process that measures it. Not here because it is another name for
one that is: fla's chunk_linear_attn without normaliser, chunk_retention and chunk_lightning_attn, which call
chunk_simple_gla with no decay or with slopes of their own.
"""

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from seqmodels.tools.benchmark import peers as on_cpu
from seqmodels.tools.benchmark.cases import Inputs
from seqmodels.tools.benchmark.peers import Peer


def peers(op: str, case: str) -> list[Peer]:
    """The peers of one case, in the order of the table."""
    return [peer for peer in PEERS if peer.op == op and case in peer.cases]


def _chunk_linear(inputs: Inputs) -> Callable[..., Any]:
    from fla.ops.linear_attn import chunk_linear_attn

    return lambda q, k, v: chunk_linear_attn(q, k, v, **inputs.options)[0]


def _chunk_simple(inputs: Inputs) -> Callable[..., Any]:
    from fla.ops.simple_gla import chunk_simple_gla

    return _with_decay(chunk_simple_gla)


def _fused_chunk_simple(inputs: Inputs) -> Callable[..., Any]:
    from fla.ops.simple_gla import fused_chunk_simple_gla

    return _with_decay(fused_chunk_simple_gla)


def _with_decay(call: Callable[..., Any]) -> Callable[..., Any]:
    """A decay per head is a constant to these functions, so there is no gradient of it."""

    def run(q: Any, k: Any, v: Any, g: Any = None) -> Any:
        if g is not None and g.ndim == 1:
            return call(q, k, v, g_gamma=g)[0]
        return call(q, k, v, g)[0]

    return run


def _chunk_gla(inputs: Inputs) -> Callable[..., Any]:
    from fla.ops.gla import chunk_gla

    return lambda q, k, v, g: chunk_gla(q, k, v, g)[0]


def _chunk_delta(inputs: Inputs) -> Callable[..., Any]:
    from fla.ops.delta_rule import chunk_delta_rule

    return lambda q, k, v, beta: chunk_delta_rule(q, k, v, beta)[0]


def _chunk_gated_delta(inputs: Inputs) -> Callable[..., Any]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return lambda q, k, v, g, beta: chunk_gated_delta_rule(q, k, v, g, beta)[0]


def _chunk_kda(inputs: Inputs) -> Callable[..., Any]:
    from fla.ops.kda import chunk_kda

    return lambda q, k, v, g, beta: chunk_kda(q, k, v, g, beta)[0]


def _chunk_rwkv6(inputs: Inputs) -> Callable[..., Any]:
    from fla.ops.rwkv6 import chunk_rwkv6

    return lambda q, k, v, g, u: chunk_rwkv6(q, k, v, g, u, **inputs.options)[0]


def _mamba_chunk_scan(inputs: Inputs) -> Callable[..., Any]:
    """The Triton kernels alone: the package around them imports compiled extensions that they don't need."""
    package = importlib.util.find_spec("mamba_ssm")
    if package is None:
        raise ModuleNotFoundError("No module named 'mamba_ssm'")
    bare = ModuleType("mamba_ssm")
    bare.__spec__, bare.__path__ = package, list(package.submodule_search_locations)
    sys.modules["mamba_ssm"] = bare
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return lambda x, dt, A, B, C, D: mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256, D=D)


def _simple_as_state_space(inputs: Inputs) -> Callable[..., Any]:
    """Equation (3) of ops/ssd.py. It has no groups: B and C are repeated for all heads."""
    from fla.ops.simple_gla import chunk_simple_gla

    def run(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any) -> Any:
        B, C = (y.repeat_interleave(x.shape[2] // y.shape[2], dim=2) for y in (B, C))
        o = chunk_simple_gla(C, B, (dt[..., None] * x).to(x.dtype), dt * A, scale=1.0)[0]
        return (o + D[:, None] * x).to(x.dtype)

    return run


def _parallel_attention(inputs: Inputs) -> Callable[..., Any]:
    from fla.ops.attn import parallel_attn

    return lambda q, k, v: parallel_attn(q, k, v, window_size=inputs.options.get("window"))


def _causal_convolution(inputs: Inputs) -> Callable[..., Any]:
    from fla.modules.convolution import causal_conv1d

    return lambda x, kernel, bias: causal_conv1d(x, kernel.T.contiguous(), bias)[0]


def _recurrent_hgrn(inputs: Inputs) -> Callable[..., Any]:
    """The recurrence of Griffin once its inputs have their factor."""
    import torch
    from fla.ops.hgrn import fused_recurrent_hgrn

    def run(x: Any, g: Any) -> Any:
        driven = (torch.sqrt(-torch.expm1(2 * g)) * x).to(x.dtype)
        return fused_recurrent_hgrn(driven, g)[0]

    return run


def _triton_mlstm(inputs: Inputs) -> Callable[..., Any]:
    from mlstm_kernels.torch.chunkwise.triton_xl_chunk import mlstm_chunkwise__xl_chunk

    return on_cpu._as_mlstm(mlstm_chunkwise__xl_chunk)


def _chunk_ttt_linear(inputs: Inputs) -> Callable[..., Any]:
    from fla.ops.ttt import chunk_ttt_linear

    def run(q: Any, k: Any, v: Any, theta: Any, reach: Any, weights: Any, norm: Any) -> Any:
        (layer,), rate = weights, (theta * reach)[..., None]
        start = {"initial_state": layer.A[None], "initial_state_bias": layer.c[None, :, None]}
        start = {name: x.float().expand(len(q), *x.shape[1:]) for name, x in start.items()}
        return chunk_ttt_linear(q, k, v, *norm, rate, scale=1.0, chunk_size=16, **start)[0]

    return run


PEERS: tuple[Peer, ...] = (
    Peer("linear_attention", ("none", "head", "scalar"), "fla chunk_simple_gla", "torch", _chunk_simple),
    Peer("linear_attention", ("none", "head", "scalar"), "fla fused_chunk_simple_gla", "torch", _fused_chunk_simple),
    Peer("linear_attention", ("normalized",), "fla chunk_linear_attn", "torch", _chunk_linear),
    Peer("linear_attention", ("channel",), "fla chunk_gla", "torch", _chunk_gla),
    Peer("delta_rule", ("none",), "fla chunk_delta_rule", "torch", _chunk_delta),
    Peer("delta_rule", ("scalar",), "fla chunk_gated_delta_rule", "torch", _chunk_gated_delta),
    Peer("delta_rule", ("channel",), "fla chunk_kda", "torch", _chunk_kda),
    Peer("ssd", ("one_group",), "mamba_ssm mamba_chunk_scan_combined", "torch", _mamba_chunk_scan),
    Peer("ssd", ("one_group",), "fla chunk_simple_gla", "torch", _simple_as_state_space),
    Peer("wkv6", ("channel",), "fla chunk_rwkv6", "torch", _chunk_rwkv6),
    Peer("softmax_attention", ("causal",), "torch scaled_dot_product_attention", "torch", on_cpu._torch_attention),
    Peer("softmax_attention", ("causal", "window"), "fla parallel_attn", "torch", _parallel_attention),
    Peer("short_conv", ("width_4",), "fla causal_conv1d", "torch", _causal_convolution),
    Peer("aaren", ("learned_query",), "torch scaled_dot_product_attention", "torch", on_cpu._repeated_query),
    Peer("aaren", ("learned_query",), "jax.lax.associative_scan", "jax", on_cpu._associative_scan),
    Peer("rglru", ("griffin",), "fla fused_recurrent_hgrn", "torch", _recurrent_hgrn),
    Peer(
        "mlstm",
        ("gated",),
        "mlstm_kernels xl_chunk",
        "torch",
        _triton_mlstm,
        "its backward pass takes the normaliser as a constant",
    ),
    Peer(
        "neural_memory",
        ("ttt_linear",),
        "fla chunk_ttt_linear",
        "torch",
        _chunk_ttt_linear,
        "the step is that of the token that reads, and queries are not added to what is read",
    ),
)
