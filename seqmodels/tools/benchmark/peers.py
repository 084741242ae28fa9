"""Functions of other libraries that compute what our operators do. Each is imported in the process that measures it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from seqmodels.tools.benchmark.cases import Inputs


class Peer(NamedTuple):
    """A function of another library, for some cases of one of our operators.

    framework: "torch" or "jax": whose arrays it takes
    load:      (inputs) -> a function of the arrays by name that returns the output in our layout; imports the library
    """

    op: str
    cases: tuple[str, ...]
    name: str
    framework: str
    load: Callable[[Inputs], Callable[..., Any]]


def peers(op: str, case: str) -> list[Peer]:
    """The peers of one case, in the order of the table."""
    return [peer for peer in PEERS if peer.op == op and case in peer.cases]


def _fla_chunk_linear(inputs: Inputs) -> Callable[..., Any]:
    from fla.ops.linear_attn.naive import naive_chunk_linear_attn

    return lambda q, k, v: naive_chunk_linear_attn(q, k, v, **inputs.options)


def _fla_recurrent_linear(inputs: Inputs) -> Callable[..., Any]:
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn

    return lambda q, k, v: naive_recurrent_linear_attn(q, k, v, **inputs.options)[0]


def _fla_chunk_scalar(inputs: Inputs) -> Callable[..., Any]:
    from fla.ops.simple_gla.naive import naive_chunk_simple_gla

    return lambda q, k, v, g: naive_chunk_simple_gla(q, k, v, _per_token(q, g))[0]


def _fla_recurrent_scalar(inputs: Inputs) -> Callable[..., Any]:
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    return lambda q, k, v, g: naive_recurrent_simple_gla(q, k, v, _per_token(q, g))[0]


def _per_token(q: Any, g: Any) -> Any:
    """A decay per head as one per token and head, [b, t, h]."""
    return g.expand(q.shape[:3])


def _fla_recurrent_channel(inputs: Inputs) -> Callable[..., Any]:
    from fla.ops.gla.naive import naive_recurrent_gla

    return lambda q, k, v, g: naive_recurrent_gla(q, k, v, g)[0]


def _minimax_lightning(inputs: Inputs) -> Callable[..., Any]:
    """The recurrence of the module alone: projections, norm and gate are replaced by ones that change nothing.

    Its decay is a constant, so there is no gradient of g.
    """
    import torch
    from transformers.models.minimax.configuration_minimax import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    class OpenGate(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.new_full((), torch.inf)

    heads, dim = inputs.arrays["q"].shape[2:]
    sizes = {
        "hidden_size": heads * dim,
        "head_dim": dim,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }
    module = MiniMaxLightningAttention(MiniMaxConfig(**sizes, num_hidden_layers=2), layer_idx=0)
    module.slope_rate = torch.from_numpy(-inputs.arrays["g"])[:, None, None]
    module.query_decay, module.key_decay, module.diagonal_decay = module.decay_factors(module.slope_rate)
    module.qkv_proj = module.act_fn = module.norm = module.out_proj = torch.nn.Identity()
    module.output_gate = OpenGate()

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        packed = torch.cat([q * dim**-0.5, k, v], dim=-1).flatten(2)
        return module(packed, None, None)[0].unflatten(-1, (heads, dim))

    return run


def _mamba2_chunk_scan(inputs: Inputs) -> Callable[..., Any]:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    return lambda x, dt, A, B, C, D: mamba2_chunk_scan(x, dt, A, B, C, chunk_size=256, D=D)


def _fla_chunk_wkv6(inputs: Inputs) -> Callable[..., Any]:
    from fla.ops.rwkv6.chunk_naive import naive_chunk_rwkv6

    return _heads_first(naive_chunk_rwkv6)


def _fla_recurrent_wkv6(inputs: Inputs) -> Callable[..., Any]:
    from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6

    return _heads_first(lambda *args: naive_recurrent_rwkv6(*args, **inputs.options)[0])


def _heads_first(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function of [b, h, t, channels] as one of our layout."""

    def run(q: Any, k: Any, v: Any, g: Any, u: Any) -> Any:
        return call(*(x.transpose(1, 2) for x in (q, k, v, g)), u).transpose(1, 2)

    return run


def _torch_attention(inputs: Inputs) -> Callable[..., Any]:
    from torch.nn.functional import scaled_dot_product_attention

    def run(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return run


def _jax_attention(inputs: Inputs) -> Callable[..., Any]:
    from jax.nn import dot_product_attention

    window = inputs.options.get("window")
    local = None if window is None else (window - 1, 0)
    return lambda q, k, v: dot_product_attention(q, k, v, is_causal=True, local_window_size=local)


PEERS: tuple[Peer, ...] = (
    Peer("linear_attention", ("none", "normalized"), "fla naive_chunk_linear_attn", "torch", _fla_chunk_linear),
    Peer(
        "linear_attention",
        ("none", "normalized"),
        "fla naive_recurrent_linear_attn",
        "torch",
        _fla_recurrent_linear,
    ),
    Peer("linear_attention", ("head", "scalar"), "fla naive_chunk_simple_gla", "torch", _fla_chunk_scalar),
    Peer(
        "linear_attention",
        ("head", "scalar"),
        "fla naive_recurrent_simple_gla",
        "torch",
        _fla_recurrent_scalar,
    ),
    Peer("linear_attention", ("head",), "transformers MiniMaxLightningAttention", "torch", _minimax_lightning),
    Peer("linear_attention", ("channel",), "fla naive_recurrent_gla", "torch", _fla_recurrent_channel),
    Peer("ssd", ("one_group",), "transformers mamba2_chunk_scan", "torch", _mamba2_chunk_scan),
    Peer("wkv6", ("channel",), "fla naive_chunk_rwkv6", "torch", _fla_chunk_wkv6),
    Peer("wkv6", ("channel",), "fla naive_recurrent_rwkv6", "torch", _fla_recurrent_wkv6),
    Peer("softmax_attention", ("causal",), "torch scaled_dot_product_attention", "torch", _torch_attention),
    Peer("softmax_attention", ("causal", "window"), "jax.nn.dot_product_attention", "jax", _jax_attention),
)
