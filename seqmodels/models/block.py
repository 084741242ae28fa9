"""The residual block around a mixer, and the stack of blocks."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels import registry
from seqmodels.errors import InputError, nearest
from seqmodels.layers import Mixer, SwiGLU, make_norm
from seqmodels.layers._mixer import Layout, MixerState, lay_out
from seqmodels.notation import SOWN, Activations, Array, SegmentIds
from seqmodels.ops._exchange import EXCHANGED
from seqmodels.ops._mesh import constrain

MixerName = str | Callable[..., Mixer] | tuple[str | Callable[..., Mixer], ...]
Scales = tuple[float, float]



def _keeping_exchanged(policy: Callable[..., Any]) -> Callable[..., Any]:
    """The policy, but that what shards of the time axis have exchanged is kept in any case: to exchange it again costs
    more than its memory."""
    is_exchanged = jax.checkpoint_policies.save_only_these_names(EXCHANGED)

    def combined(primitive: Any, *arguments: Any, **parameters: Any) -> Any:
        return is_exchanged(primitive, *arguments, **parameters) or policy(primitive, *arguments, **parameters)

    return combined


REMAT_POLICIES: dict[str, Callable[..., Any]] = {
    name: _keeping_exchanged(policy)
    for name, policy in {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.dots_saveable,
        "dots_with_no_batch_dims": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "offload_dots_with_no_batch_dims": jax.checkpoint_policies.offload_dot_with_no_batch_dims(
            "device", "pinned_host"
        ),
    }.items()
}


class ParallelMixers(nn.Module):
    """The mean of what several mixers make of the same x, each normalised and scaled by a learned vector.

        y = 1/n sum_i rmsnorm_i(mixer_i(x))

    (Hymba, Dong et al. 2024, arXiv 2411.13676.) Parameters and states are by the mixers' names, and `<name>_norm`.
    """

    mixers: dict[str, Mixer]
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def initial_state(self, batch_size: int, capacity: int | None = None) -> MixerState:
        """That of each mixer, by name."""
        return {name: mixer.initial_state(batch_size, capacity) for name, mixer in self.mixers.items()}

    @nn.compact
    def __call__(
        self, x: Activations, state: MixerState | None = None, segment_ids: SegmentIds | Layout | None = None
    ) -> tuple[Activations, MixerState]:
        if state and set(state) != set(self.mixers):
            raise InputError(f"ParallelMixers: state is of {sorted(state)}; expected {sorted(self.mixers)}")
        outputs, after = [], {}
        for name, mixer in self.mixers.items():
            y, after[name] = mixer.clone(name=name, parent=self)(x, state[name] if state else None, segment_ids)
            norm = make_norm("rmsnorm", name=f"{name}_norm", dtype=self.dtype, param_dtype=self.param_dtype)
            outputs.append(norm(y))
        return sum(outputs) / len(outputs), after


def mixer_names(mixers: Sequence[str | Callable[..., Mixer]]) -> list[str]:
    """The mixers' names; those of several mixers of one name are numbered from the second on."""
    names = [mixer if isinstance(mixer, str) else getattr(mixer, "__name__", "mixer") for mixer in mixers]
    before = [names[:i].count(name) for i, name in enumerate(names)]
    return [f"{name}_{count + 1}" if count else name for name, count in zip(names, before)]


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)).

    mixer   a name of the registry, or a constructor that takes d_model, layer_index, n_layers, dtype, param_dtype; a
            tuple of these runs side by side: see `ParallelMixers`
    causal  False for an encoder's block
    mlp     constructor of the feed-forward layer; None for a block without one
    norm    name of the norm, see `seqmodels.layers.norms`, and
    norm_eps   its epsilon
    normalized_residual         add to norm(x) instead of x, as MiniMax-01 does (2025, arXiv 2501.08313)
    mixer_scales, mlp_scales    (alpha, beta): alpha x + beta mixer(norm(x)), and the same for the mlp
    """

    d_model: int
    mixer: MixerName
    mlp: Callable[..., nn.Module] | None = SwiGLU
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    normalized_residual: bool = False
    mixer_scales: Scales = (1.0, 1.0)
    mlp_scales: Scales = (1.0, 1.0)
    n_layers: int = 1
    causal: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def make_mixer(self, layer_index: int | Array, **linen: Any) -> Mixer | ParallelMixers:
        """The mixer of this block, or its mixers side by side, at its depth in the stack."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        fields = {"d_model": self.d_model, "layer_index": layer_index, "n_layers": self.n_layers, **dtypes}
        if not self.causal:
            fields["causal"] = False

        def make(mixer: str | Callable[..., Mixer], **linen: Any) -> Mixer:
            return (registry.mixer(mixer) if isinstance(mixer, str) else mixer)(**fields, **linen)

        if isinstance(self.mixer, str) or callable(self.mixer):
            return make(self.mixer, **linen)
        if not self.mixer:
            raise InputError("pattern has an empty tuple; expected the names of mixers to run side by side")
        side_by_side = {name: make(mixer, parent=None) for name, mixer in zip(mixer_names(self.mixer), self.mixer)}
        return ParallelMixers(side_by_side, **dtypes, **linen)

    @nn.compact
    def __call__(
        self,
        x: Activations,
        state: MixerState | None,
        layer_index: int | Array,
        segment_ids: SegmentIds | Layout | None,
    ) -> tuple[Activations, MixerState]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = {"epsilon": self.norm_eps, **dtypes}
        mixer = self.make_mixer(layer_index, name="mixer")
        normed = make_norm(self.norm, name="mixer_norm", **norm)(x)
        y, state = mixer(normed, state, segment_ids)
        x = self._add(x, normed, y, self.mixer_scales)
        if self.mlp is not None:
            mlp = self.mlp(d_model=self.d_model, name="mlp", **dtypes)
            normed = make_norm(self.norm, name="mlp_norm", **norm)(x)
            x = self._add(x, normed, mlp(normed), self.mlp_scales)
        return x, state

    def _add(self, x: Activations, normed: Activations, y: Activations, scales: Scales) -> Activations:
        alpha, beta = scales
        return alpha * (normed if self.normalized_residual else x) + beta * y


class _Group(nn.Module):
    """One round of the pattern: the body of the scan over layers."""

    blocks: tuple[dict[str, Any], ...]
    remat: str

    @nn.compact
    def __call__(self, x: Activations, inputs: tuple, segment_ids: SegmentIds | Layout | None):
        states, first_index = inputs
        constructor = Block
        if self.remat != "none":
            constructor = nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
        after = []
        for i, fields in enumerate(self.blocks):
            state = None if states is None else states[i]
            x, state = constructor(**fields, name=f"block_{i}")(constrain(x), state, first_index + i, segment_ids)
            after.append(state)
        return x, tuple(after)


class Stack(nn.Module):
    """n_layers blocks whose mixers repeat a pattern: layer i has the mixer pattern[i % len(pattern)].

    causal  False for an encoder: every position sees its whole document, and the states are empty
    mixer_scales    of every block, or one pair for each place in the pattern; the other fields of blocks as in `Block`
    scan    run the rounds of the pattern by `lax.scan`: compile time and program size do not grow with the depth.
            Parameters are then stacked under `rounds`, else numbered `round_0`, `round_1`, ...
    remat   "none", or what the backward pass may keep: "full" recomputes everything in a block, "dots" keeps the
            products, "dots_with_no_batch_dims" keeps those with parameters, and "offload_dots_with_no_batch_dims" keeps
            them in the host's memory

    Where the depth is not a multiple of the pattern's length, the last round is a part of one, `remainder`.
    The state is a tuple with one entry for each place in the pattern, its arrays stacked over the whole rounds, and one
    for each block of the remainder.
    """

    d_model: int
    n_layers: int
    pattern: Sequence[MixerName]
    mlp: Callable[..., nn.Module] | None = SwiGLU
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    normalized_residual: bool = False
    mixer_scales: Sequence[Scales] = ((1.0, 1.0),)
    mlp_scales: Scales = (1.0, 1.0)
    causal: bool = True
    scan: bool = True
    remat: str = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @property
    def round_length(self) -> int:
        """Blocks of a whole round; fewer than the pattern has places where the stack is not as deep."""
        if self.n_layers < 1 or self.d_model < 1:
            raise InputError(f"n_layers = {self.n_layers}, d_model = {self.d_model}; expected at least 1 of each")
        if not self.pattern:
            raise InputError("pattern is empty; expected at least one mixer")
        return min(len(self.pattern), self.n_layers)

    @property
    def rounds(self) -> int:
        """Whole rounds of the pattern."""
        return self.n_layers // self.round_length

    @property
    def remainder(self) -> int:
        """Blocks after the last whole round."""
        return self.n_layers % self.round_length

    def blocks(self) -> tuple[dict[str, Any], ...]:
        """The fields of `Block` for each block of a round."""
        places = len(self.pattern)
        if len(self.mixer_scales) not in (1, places):
            raise InputError(
                f"mixer_scales has {len(self.mixer_scales)} pairs; expected one, or one for each of the {places} "
                "places in the pattern"
            )
        names = ("d_model", "mlp", "norm", "norm_eps", "normalized_residual", "mlp_scales", "n_layers", "causal")
        shared = {name: getattr(self, name) for name in (*names, "dtype", "param_dtype")}
        return tuple(
            {"mixer": mixer, "mixer_scales": tuple(self.mixer_scales[i % len(self.mixer_scales)]), **shared}
            for i, mixer in enumerate(self.pattern[: self.round_length])
        )

    def initial_state(self, batch_size: int, capacity: int | None = None) -> tuple[MixerState, ...]:
        """The state before the first token; `capacity` is the number of tokens to come, where states grow with it."""
        states = tuple(
            Block(**fields, parent=None).make_mixer(0, parent=None).initial_state(batch_size, capacity)
            for fields in self.blocks()
        )
        return jax.tree.map(lambda x: jnp.repeat(x[None], self.rounds, axis=0), states) + states[: self.remainder]

    @nn.compact
    def __call__(
        self, x: Activations, state: tuple[MixerState, ...] | None = None, segment_ids: SegmentIds | None = None
    ) -> tuple[Activations, tuple[MixerState, ...]]:
        if self.remat != "none" and self.remat not in REMAT_POLICIES:
            raise InputError(f"remat = {self.remat!r} does not exist; {nearest(self.remat, ['none', *REMAT_POLICIES])}")
        fields = {"blocks": self.blocks(), "remat": self.remat}
        length, rounds = self.round_length, self.rounds
        first = jnp.arange(rounds) * length
        layout = segment_ids
        if segment_ids is not None and state is None and self.causal:
            layout = lay_out(segment_ids)
        before, last = (None, None) if state is None else (state[:length], state[length:])
        if self.scan:
            scanned = nn.scan(
                _Group,
                variable_axes={"params": 0, SOWN: 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
                length=rounds,
            )
            x, after = scanned(**fields, name="rounds")(x, (before, first), layout)
        else:
            each = []
            for i in range(rounds):
                one = jax.tree.map(lambda leaf, i=i: leaf[i], before)
                x, states = _Group(**fields, name=f"round_{i}")(x, (one, first[i]), layout)
                each.append(states)
            after = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        if self.remainder:
            fields["blocks"] = fields["blocks"][: self.remainder]
            x, states = _Group(**fields, name="remainder")(x, (last, rounds * length), layout)
            after += states
        return x, after
