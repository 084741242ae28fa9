"""The neural long-term memory of Titans as a mixer of its own (Behrouz, Zhong, Mirrokni 2024, arXiv 2501.00663)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.errors import InputError
from seqmodels.layers._delta_mixer import head_gate, unit
from seqmodels.layers._memory_weights import empty_state, memory_weights
from seqmodels.layers._mixer import MixerState, Stream, merge_heads
from seqmodels.layers._qkv_mixer import QKVMixer
from seqmodels.layers.norms import make_norm
from seqmodels.notation import Activations, Array
from seqmodels.ops._memory_network import Norm
from seqmodels.ops.neural_memory import fresh_start, fresh_state, neural_memory


class TitansMemory(QKVMixer):
    """LMM: y = o_proj(o_norm(o) * silu(g_proj(x))), o what a network per head answers that is trained as it reads.

        q, k, v  = silu(conv(x W)), q and k over their length
        eta      = sigmoid(eta_proj(x))                          momentum
        alpha    = sigmoid(alpha_proj(x))                        forgetting
        theta    = step / mini_batch * (1 - eta) * sigmoid(theta_proj(x))

    The paper's theta is the sigmoid alone. With it the gradients of a mini-batch, all taken at the same weights, add up
    to a step many times too long, and momentum lengthens it by 1 / (1 - eta). The factors take both back: while eta
    stays the same, the steps of a mini-batch add up to at most `step`, and a matrix memory of unit keys is stable for
    `step` <= 1. Every layer of a deep memory adds to the curvature, so `step` is 1 / memory_depth by default.

    num_heads         heads, each with a memory of its own
    memory_depth      linear layers of the memory; 1 is a matrix
    memory_expand     width of its hidden layers, as a multiple of a key's
    memory_residual   M(k) = k + ...
    memory_norm       a norm at the memory's end, whose scale and bias it does not change
    activation        of the memory: "gelu", "gelu_exact", "silu"
    mini_batch        tokens whose gradients are taken at the same weights
    step              largest sum of the steps of a mini-batch; None is 1 / memory_depth
    persistent        learned tokens that every document starts with; the convolutions of the document do not see them
    conv_size         width of the short convolution with silu on q, k and v; None for silu alone
    norm_eps          epsilon of the norms

    At the start alpha is about 0.001, eta and the share of theta 1/2. Alpha starts so low because a deep memory that
    forgets faster than it learns ends with all weights near zero, where its gradients vanish as well, and how it leaves
    from there depends on its inputs without bound: so do the gradients of a training step.
    """

    num_heads: int = 4
    memory_depth: int = 2
    memory_expand: float = 2.0
    memory_residual: bool = False
    memory_norm: bool = False
    activation: str = "gelu"
    mini_batch: int = 32
    step: float | None = None
    persistent: int = 0
    conv_size: int | None = 4
    norm_eps: float = 1e-5

    op = staticmethod(neural_memory)

    @property
    def head_dim(self) -> int:
        return self.divide(self.d_model, self.num_heads, "d_model")

    @property
    def qkv_widths(self) -> tuple[int, int, int]:
        return (self.d_model,) * 3

    @property
    def memory_widths(self) -> tuple[int, ...]:
        """Channels of a key, of the memory's hidden layers, and of a value."""
        hidden = int(self.head_dim * self.memory_expand)
        if self.memory_depth < 1 or hidden < 1:
            raise InputError(
                f"TitansMemory: memory_depth = {self.memory_depth}, memory_expand = {self.memory_expand:g}; expected "
                "at least one layer, and at least one hidden channel"
            )
        return self.head_dim, *(hidden,) * (self.memory_depth - 1), self.head_dim

    def setup(self) -> None:
        super().setup()
        self.g_proj = self.dense(self.d_model)
        self.theta_proj, self.alpha_proj, self.eta_proj = map(self._gate, (0.0, -7.0, 0.0))
        self.o_norm = make_norm("rmsnorm", epsilon=self.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype)
        fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-2, out_axis=-1, batch_axis=0)
        self.memory = memory_weights(self, self.num_heads, self.memory_widths, fan_in, use_bias=False)
        self.inner_norm = None
        if self.memory_norm:
            shape = (self.num_heads, self.head_dim)
            self.inner_norm = Norm(
                self.param("memory_norm_scale", nn.initializers.ones, shape, self.param_dtype),
                self.param("memory_norm_bias", nn.initializers.zeros, shape, self.param_dtype),
            )
        if self.persistent:
            shape, start = (self.persistent, self.d_model), nn.initializers.normal(1.0)
            self.persistent_tokens = self.param("persistent_tokens", start, shape, self.param_dtype)

    def _gate(self, bias: float) -> nn.Dense:
        """x to a number per head, in float32."""
        bias_init = nn.initializers.constant(bias)
        return nn.Dense(self.num_heads, bias_init=bias_init, dtype=jnp.float32, param_dtype=self.param_dtype)

    def project(self, x: Activations, stream: Stream) -> dict:
        weights, momentum = self.memory, None
        if self.persistent:
            tokens = self.persistent_tokens.astype(self.dtype)[None]
            alone = Stream(None, None, *tokens.shape[:2])
            _, state = neural_memory(**self._written(tokens, alone), weights=weights, **self._settings)
            weights, momentum = fresh_start(state)
        fresh = fresh_state(x.shape[0], weights, momentum, has_momentum=True)
        start = {"weights": weights, "momentum": momentum, "fresh": fresh}
        return {**self._written(x, stream), **start, **self._settings}

    @property
    def _settings(self) -> dict:
        return {
            "norm": self.inner_norm,
            "mini_batch": self.mini_batch,
            "activation": self.activation,
            "residual": self.memory_residual,
        }

    def _written(self, x: Activations, stream: Stream) -> dict[str, Array]:
        """q, k, v and the gates."""
        q, k, v = self.qkv(x, stream)
        if not self.conv_size:
            q, k, v = map(jax.nn.silu, (q, k, v))
        share, alpha, eta = (jax.nn.sigmoid(gate(x)) for gate in (self.theta_proj, self.alpha_proj, self.eta_proj))
        step = 1 / self.memory_depth if self.step is None else self.step
        theta = step / self.mini_batch * (1 - eta) * share
        return {"q": unit(q), "k": unit(k), "v": v, "theta": theta, "alpha": alpha, "eta": eta}

    def readout(self, o: Array, x: Activations) -> Activations:
        return self.o_proj(merge_heads(self.o_norm(o) * head_gate(self.g_proj(x), self.num_heads)))

    def initial_state(self, batch_size: int, capacity: int | None = None) -> MixerState:
        memory = empty_state(batch_size, self.num_heads, self.memory_widths, use_bias=False, has_momentum=True)
        return self.state_around(memory, batch_size)
