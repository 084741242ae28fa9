"""Functions of other libraries that compute what our operators do. Each is imported in the process that measures it."""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from seqmodels.tools.benchmark.cases import Inputs


class Peer(NamedTuple):
    """A function of another library, for some cases of one of our operators.

    framework  "torch" or "jax": whose arrays it takes
    load       (inputs) -> a function of the arrays by name that returns the output in our layout; imports the library
    differs    in what it computes something else, at about the cost: its values are then not compared with ours
    """

    op: str
    cases: tuple[str, ...]
    name: str
    framework: str
    load: Callable[[Inputs], Callable[..., Any]]
    differs: str | None = None


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


def _fla_chunk_delta(inputs: Inputs) -> Callable[..., Any]:
    from fla.ops.delta_rule.naive import delta_rule_chunkwise

    def run(q: Any, k: Any, v: Any, beta: Any) -> Any:
        return delta_rule_chunkwise(*(x.transpose(1, 2) for x in (q, k, v, beta)))[0].transpose(1, 2)

    return run


def _fla_chunk_gated_delta(inputs: Inputs) -> Callable[..., Any]:
    from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule

    return lambda q, k, v, g, beta: naive_chunk_gated_delta_rule(q, k, v, g, beta)[0]


def _qwen3_next_gated_delta(inputs: Inputs) -> Callable[..., Any]:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    in_torch = inspect.unwrap(torch_chunk_gated_delta_rule)  # not a kernel of fla, which is preferred where it imports
    return lambda q, k, v, g, beta: in_torch(q, k, v, g, beta)[0]


def _ejkernel_gated_delta(inputs: Inputs) -> Callable[..., Any]:
    from ejkernel.kernels._xla.gated_delta_rule import gated_delta_rule

    def run(q: Any, k: Any, v: Any, beta: Any, g: Any = None) -> Any:
        return gated_delta_rule(q, k, v, beta, g, chunk_size=64, use_qk_l2norm=False)[0]

    return run


def _fla_chunk_kda(inputs: Inputs) -> Callable[..., Any]:
    from fla.ops.kda.naive import naive_chunk_kda

    return lambda q, k, v, g, beta: naive_chunk_kda(q, k, v, g, beta)[0]


def _fla_recurrent_kda(inputs: Inputs) -> Callable[..., Any]:
    from fla.ops.kda.naive import naive_recurrent_kda

    return lambda q, k, v, g, beta: naive_recurrent_kda(q, k, v, g, beta)[0]


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


def _ssd_minimal(inputs: Inputs) -> Callable[..., Any]:
    """The listing of the paper, from its file alone: the package around it imports kernels that want a GPU."""
    package = importlib.util.find_spec("mamba_ssm")
    if package is None:
        raise ModuleNotFoundError("No module named 'mamba_ssm'")
    kernels = ModuleType("mamba_ssm.ops.triton.ssd_combined")
    kernels.mamba_chunk_scan_combined = None  # imported by the file, to compare with
    sys.modules.setdefault(kernels.__name__, kernels)
    file = Path(package.submodule_search_locations[0]) / "modules" / "ssd_minimal.py"
    spec = importlib.util.spec_from_file_location("ssd_minimal", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any) -> Any:
        B, C = (y.repeat_interleave(x.shape[2] // y.shape[2], dim=2) for y in (B, C))
        return module.ssd_minimal_discrete(x * dt[..., None], A * dt, B, C, block_len=64)[0] + D[:, None] * x

    return run


def _ejkernel_state_space(inputs: Inputs) -> Callable[..., Any]:
    from ejkernel.kernels._xla.state_space_v2 import state_space_v2

    return lambda x, dt, A, B, C, D: state_space_v2(x, A, B, C, D, dt)[0].reshape(x.shape)


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


def _repeated_query(inputs: Inputs) -> Callable[..., Any]:
    """Attention that is given the one query at every position: quadratic, the way without a recurrence."""
    from torch.nn.functional import scaled_dot_product_attention

    def run(k: Any, v: Any, query: Any) -> Any:
        k, v = (x.transpose(1, 2) for x in (k, v))
        q = query[None, :, None].expand(k.shape)
        return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return run


def _associative_scan(inputs: Inputs) -> Callable[..., Any]:
    """Softmax over the prefix as a tree of (maximum, normaliser, weighted sum), differentiated by JAX."""
    import jax
    import jax.numpy as jnp

    def combine(a: tuple, b: tuple) -> tuple:
        m = jnp.maximum(a[0], b[0])
        left, right = jnp.exp(a[0] - m), jnp.exp(b[0] - m)
        return m, a[1] * left + b[1] * right, a[2] * left[..., None] + b[2] * right[..., None]

    def run(k: Any, v: Any, query: Any) -> Any:
        scores = jnp.einsum("bthd,hd->bth", k, query) / query.shape[-1] ** 0.5
        _, u, w = jax.lax.associative_scan(combine, (scores, jnp.ones_like(scores), v), axis=1)
        return w / u[..., None]

    return run


def _titans_memory(inputs: Inputs) -> Callable[..., Any]:
    """The memory of the module alone: keys, values, queries and gates are handed through it, projections left out."""
    import torch
    from titans_pytorch import MemoryMLP, NeuralMemory

    heads, dim = inputs.arrays["q"].shape[2:]
    layers, mini_batch = inputs.arrays["weights"], inputs.options["mini_batch"]
    module = NeuralMemory(
        dim=heads * dim,
        heads=heads,
        dim_head=dim,
        chunk_size=mini_batch,
        batch_size=mini_batch,
        model=MemoryMLP(dim, len(layers), expansion_factor=layers[0].A.shape[-1] / dim),
        mem_model_norm_add_residual=False,
        pre_rmsnorm=False,
        adaptive_step_transform=lambda theta: theta,
    )

    class Part(torch.nn.Module):
        """Some of the channels that come in."""

        def __init__(self, start: int, width: int):
            super().__init__()
            self.channels = slice(start, start + width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[..., self.channels]

    n, names = heads * dim, module.memory_model_parameter_names
    module.to_queries, module.to_keys, module.to_values = (Part(i * n, n) for i in range(3))
    for i, gate in enumerate((module.to_adaptive_step, module.to_decay_factor, module.to_momentum)):
        gate[0] = Part(3 * n + i * heads, heads)
    module.retrieve_gate, module.combine_heads = None, torch.nn.Identity()

    def run(q, k, v, theta, alpha, eta, weights) -> torch.Tensor:
        module.init_weights = lambda batch: {
            name: layer.A.expand(batch, *layer.A.shape).flatten(0, 1) for name, layer in zip(names, weights)
        }
        # The module's loss is the mean over channels, and it takes forgetting and momentum as arguments of a sigmoid.
        parts = [*(x.flatten(2) for x in (q, k, v)), theta * dim, torch.logit(alpha), torch.logit(eta)]
        return module(torch.cat(parts, dim=-1))[0].unflatten(-1, (heads, dim))

    return run


def _fla_ttt_linear(inputs: Inputs) -> Callable[..., Any]:
    from fla.ops.ttt.naive import chunk_ttt_linear_ref

    def run(q, k, v, theta, reach, weights, norm) -> Any:
        (layer,), rate = weights, (theta * reach)[..., None]
        start = {"initial_state": layer.A[None], "initial_state_bias": layer.c[None, :, None]}
        # It scales the queries in place.
        return chunk_ttt_linear_ref(q.clone(), k, v, *norm, rate, scale=1.0, mini_batch_size=16, **start)[0]

    return run


def _recurrentgemma_scan(inputs: Inputs) -> Callable[..., Any]:
    """The scan that the library takes on a CPU, and the factor of its inputs as its layer works it out.

    The layer unrolls 128 steps, which takes a CPU many times as long as the scan by itself.
    """
    import jax.numpy as jnp
    from recurrentgemma.jax.scan import linear_scan

    return lambda x, g: linear_scan(x=jnp.sqrt(1 - jnp.exp(2 * g)) * x, a=jnp.exp(g))[0]


def _transformers_rglru(inputs: Inputs) -> Callable[..., Any]:
    """The loop of the module, which needs nothing of the module itself."""
    import torch
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    def run(x: Any, g: Any) -> Any:
        no_reset = torch.zeros_like(g, dtype=torch.bool)
        driven = torch.sqrt(1 - torch.exp(2 * g)) * x
        return RecurrentGemmaRglru._rnn_scan(None, driven, torch.exp(g), no_reset, None)[0]

    return run


def _transformers_mlstm(inputs: Inputs) -> Callable[..., Any]:
    from transformers.models.xlstm.modeling_xlstm import mlstm_chunkwise_native_autograd

    return _as_mlstm(mlstm_chunkwise_native_autograd)


def _native_mlstm(inputs: Inputs) -> Callable[..., Any]:
    from mlstm_kernels.torch.chunkwise.native import mlstm_chunkwise__native_autograd

    return _as_mlstm(mlstm_chunkwise__native_autograd)


def _native_mlstm_own_backward(inputs: Inputs) -> Callable[..., Any]:
    from mlstm_kernels.torch.chunkwise.native import mlstm_chunkwise__native_custbw

    return _as_mlstm(mlstm_chunkwise__native_custbw)


def _as_mlstm(call: Callable[..., Any]) -> Callable[..., Any]:
    """A head-first function that takes the forget gate as the argument of its sigmoid, as one of our layout."""
    import torch

    def run(q: Any, k: Any, v: Any, g: Any, i: Any) -> Any:
        q, k, v, i, f = (x.transpose(1, 2) for x in (q, k, v, i, g - torch.log(-torch.expm1(g))))
        return call(q, k, v, i, f).transpose(1, 2)

    return run


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
    Peer("delta_rule", ("none",), "fla delta_rule_chunkwise", "torch", _fla_chunk_delta),
    Peer("delta_rule", ("scalar",), "fla naive_chunk_gated_delta_rule", "torch", _fla_chunk_gated_delta),
    Peer(
        "delta_rule",
        ("scalar",),
        "transformers torch_chunk_gated_delta_rule",
        "torch",
        _qwen3_next_gated_delta,
    ),
    Peer("delta_rule", ("none", "scalar"), "ejkernel gated_delta_rule", "jax", _ejkernel_gated_delta),
    Peer("delta_rule", ("channel",), "fla naive_chunk_kda", "torch", _fla_chunk_kda),
    Peer("delta_rule", ("channel",), "fla naive_recurrent_kda", "torch", _fla_recurrent_kda),
    Peer("ssd", ("one_group",), "transformers mamba2_chunk_scan", "torch", _mamba2_chunk_scan),
    Peer("ssd", ("one_group",), "mamba_ssm ssd_minimal_discrete", "torch", _ssd_minimal),
    Peer("ssd", ("one_group",), "ejkernel state_space_v2", "jax", _ejkernel_state_space),
    Peer("wkv6", ("channel",), "fla naive_chunk_rwkv6", "torch", _fla_chunk_wkv6),
    Peer("wkv6", ("channel",), "fla naive_recurrent_rwkv6", "torch", _fla_recurrent_wkv6),
    Peer("softmax_attention", ("causal",), "torch scaled_dot_product_attention", "torch", _torch_attention),
    Peer("softmax_attention", ("causal", "window"), "jax.nn.dot_product_attention", "jax", _jax_attention),
    Peer("aaren", ("learned_query",), "torch scaled_dot_product_attention", "torch", _repeated_query),
    Peer("aaren", ("learned_query",), "jax.lax.associative_scan", "jax", _associative_scan),
    Peer("rglru", ("griffin",), "recurrentgemma linear_scan", "jax", _recurrentgemma_scan),
    Peer("rglru", ("griffin",), "transformers RecurrentGemmaRglru", "torch", _transformers_rglru),
    Peer("mlstm", ("gated",), "transformers mlstm_chunkwise", "torch", _transformers_mlstm),
    Peer("mlstm", ("gated",), "mlstm_kernels native_autograd", "torch", _native_mlstm),
    Peer("mlstm", ("gated",), "mlstm_kernels native_custbw", "torch", _native_mlstm_own_backward),
    Peer(
        "neural_memory",
        ("matrix", "mlp"),
        "titans-pytorch NeuralMemory",
        "torch",
        _titans_memory,
        "momentum and forgetting act once a mini-batch, and a token reads what the mini-batch before it left",
    ),
    Peer(
        "neural_memory",
        ("ttt_linear",),
        "fla chunk_ttt_linear_ref",
        "torch",
        _fla_ttt_linear,
        "the step is that of the token that reads, and queries are not added to what is read",
    ),
)
