"""What every mixer layer shares: one call that trains, prefills, decodes and streams.

    y, state = layer.apply(variables, x, state, segment_ids)          x, y: [b, t, d_model]

The author of a layer writes `setup` (the parameters), `project` (x to the operator's arguments), `readout` (the
operator's outputs to y), `initial_state`, and what the layer costs (`state_bytes`, `flops_per_token`), and names the
operator. Where y needs more of what was projected than the operator takes, a gate say, the author writes `mix` in place
of `project` and `readout`. Forms, documents and state are this file's matter.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.errors import InputError
from seqmodels.notation import Activations, Array, SegmentIds
from seqmodels.ops import _scan
from seqmodels.ops.short_conv import short_conv

MixerState = dict[str, Any]

FLOAT32 = 4  # bytes
CURSOR_BYTES = 8


class Cursor(NamedTuple):
    """Where a stream is.

    segment_id   [b] int32, id of the current document; 0 before the first document that has an id
    position     [b] int32, tokens of the current document seen so far
    """

    segment_id: Array
    position: Array


class Layout(NamedTuple):
    """The documents of a span, worked out once for all layers of a stack.

    documents   as operators take them
    places      [b, t] int32, the place of each token in its document; those of padding have no meaning
    """

    segment_ids: SegmentIds
    documents: _scan.Documents
    places: Array


def lay_out(segment_ids: SegmentIds, cursor: Cursor | None = None) -> Layout:
    """The layout of a span that goes on from `cursor`; None for a new stream."""
    if cursor is None:
        cursor = start_cursor(segment_ids.shape[0])
    docs = _scan.documents(segment_ids, cursor.segment_id)
    return Layout(segment_ids, docs, _scan.places(docs, cursor.position))


class Stream:
    """One span of a stream: hands every operator its state at the start, and keeps its state at the end.

    positions   [b, t] int32, the place of each token in its document; those of padding have no meaning
    """

    def __init__(
        self,
        state: MixerState | None,
        segment_ids: SegmentIds | Layout | None,
        batch: int,
        length: int,
        causal: bool = True,
    ):
        self._before = state or {}
        self._how = {} if causal else {"causal": False}
        self._after: MixerState = {}
        cursor = self._cursor = self._before.get("cursor", start_cursor(batch))
        if segment_ids is None:
            self.documents = None
            self.positions = cursor.position[:, None] + jnp.arange(length)
            self._after["cursor"] = Cursor(cursor.segment_id, cursor.position + length)
            return
        layout = segment_ids if isinstance(segment_ids, Layout) else lay_out(segment_ids, cursor)
        segment_ids, docs, self.positions = layout
        self.documents = docs
        last = jnp.argmax(jnp.where(docs.real, jnp.arange(length), -1), axis=1)
        last_id = jnp.take_along_axis(segment_ids, last[:, None], axis=1)[:, 0]
        self._after["cursor"] = Cursor(
            jnp.where(docs.real.any(axis=1), last_id, cursor.segment_id).astype(jnp.int32), self.positions[:, -1] + 1
        )

    def __call__(
        self, name: str, op: Callable[..., tuple[Array, Any]], *args: Any, fresh: Any = None, **options: Any
    ) -> Array:
        """Run `op` over the span. `name` is the operator's key in the layer's state.

        fresh: the operator's state before the first token of a document, where that depends on parameters: it stands in
        for what `initial_state`, which has none, gave a row that no token was read of.
        """
        state = self._before.get(name)
        if fresh is not None and state is not None:
            found, expected = jax.tree.structure(state), jax.tree.structure(fresh)
            if found != expected:
                raise InputError(f"state[{name!r}] has the structure {found}; expected {expected}")
            state = _scan.where_row(self._cursor.position == 0, fresh, state)
        o, self._after[name] = op(*args, initial_state=state, segment_ids=self.documents, **self._how, **options)
        return o

    def end(self) -> MixerState:
        """The state after the span."""
        return self._after


class Mixer(nn.Module):
    """Base class of the layers that mix over time.

    d_model       width of x and y
    layer_index   place of this layer in its stack, from 0, and
    n_layers      the number of layers: for mixers whose decay depends on the depth
    dtype         of activations; parameters are kept in `param_dtype`; gates and states are float32 in any case
    form, chunk_size, backend, exchange   handed to the operator
    causal        False makes it an encoder's layer: every position sees its whole document

    How a layer sees both sides is one of two things. Where its operator weighs all pairs alike (`sees_whole`: softmax
    and linear attention without decay, aaren) all that mixes over time runs with causal=False, each pair counted once
    and convolutions centred. Every other layer reads the span and the reversed span, documents reversed in their place,
    with the same parameters, and adds the two: all its parts, convolutions and token shifts too, then look the same way
    (Schiff et al. 2024, Caduceus, arXiv 2403.03234). Nothing can follow such a span: its state is {}.

    Called with x [b, t, d_model], the state that an earlier call returned (None: a new stream), and segment_ids [b, t]
    (None: one document; 0 is padding). Returns y [b, t, d_model] and the state after the span. A document that goes on
    in the next span keeps its id; a new id starts afresh. At the start of a stream the `Layout` of the ids, which a
    stack works out once, may stand for them.

    With context [b, s, d_model] it is a layer of cross-attention, where its operator has one (`cross`): queries are
    those of x, keys and values those of the context, and every token sees the whole context, or with
    context_segment_ids [b, s] what of it has its own id; `seqmodels.ops.cross_attention` has the rules. The state then
    holds what was read of the context and stands in for it in the calls that follow.
    """

    d_model: int
    layer_index: int | Array = 0
    n_layers: int = 1
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    form: str = "chunked"
    chunk_size: int | None = None
    backend: str = "auto"
    exchange: str = "auto"
    causal: bool = True

    sees_whole: ClassVar[bool] = False
    cross: ClassVar[Callable[..., tuple[Array, Any]] | None] = None
    op: ClassVar[Callable[..., tuple[Array, Any]]]

    def project(self, x: Activations, stream: Stream) -> dict[str, Any]:
        """The operator's keyword arguments."""
        raise NotImplementedError

    def project_across(self, x: Activations, stream: Stream) -> dict[str, Any]:
        """The arguments of `cross`, of which q is used for x, k and v for the context."""
        return self.project(x, stream)

    def check_across(self) -> None:
        """Raise InputError for a field that cross-attention has no use for."""

    def readout(self, o: Array, x: Activations) -> Activations:
        """y from the operator's outputs."""
        raise NotImplementedError

    def mix(self, x: Activations, stream: Stream) -> Activations:
        """y over the span."""
        return self.readout(self.operate(stream, **self.project(x, stream)), x)

    def operate(self, stream: Stream, **arguments: Any) -> Array:
        """What the operator puts out, in this layer's form."""
        names = ("form", "chunk_size", "backend", "exchange")
        how = {name: getattr(self, name) for name in names}
        return stream("memory", type(self).op, **arguments, **how)

    def initial_state(self, batch_size: int, capacity: int | None = None) -> MixerState:
        """The state before the first token; `capacity` is the number of tokens to come, where states grow with it."""
        raise NotImplementedError

    def state_bytes(self, length: int = 0) -> int:
        """Bytes of the state of one sequence after `length` tokens, declared: a formula of the layer's fields.

        The whole state of a decoder's layer: what `initial_state(1, length)` takes, its cursor (`CURSOR_BYTES`) and the
        inputs of short convolutions (`convolution_bytes`) included.
        """
        raise self._undeclared("state_bytes", "the bytes of `initial_state(1, length)`")

    def flops_per_token(self, length: int, *, decoding: bool = False) -> float:
        """FLOPs of the matrix products for one token of one sequence, declared: a formula of the layer's fields.

        A multiply and an add are 2. Forward, of a decoder's layer in its chunked form over documents of `length` tokens
        (a training step takes three times that); with `decoding` in the step that reads token number `length`. The
        projections (`dense_flops`) and the operator's own, declared beside it; those of a call that all its tokens
        share count in parts. Element-wise work does not count, as is usual for utilisation figures: norms, gates,
        depthwise convolutions, decays and outer products that are added to a state.
        """
        raise self._undeclared("flops_per_token", "the FLOPs of its matrix products for a token")

    def _undeclared(self, method: str, what: str) -> InputError:
        name = type(self).__name__
        return InputError(f"{name}: {method} is not declared; expected a method {name}.{method} that returns {what}")

    def __call__(
        self,
        x: Activations,
        state: MixerState | None = None,
        segment_ids: SegmentIds | Layout | None = None,
        context: Activations | None = None,
        context_segment_ids: SegmentIds | None = None,
    ) -> tuple[Activations, MixerState]:
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            raise InputError(f"{type(self).__name__}: x has shape {x.shape}; expected [batch, time, {self.d_model}]")
        x = x.astype(self.dtype)
        if context is not None or (state and "context" in state):
            return self._read_context(x, state, segment_ids, context, context_segment_ids)
        if self.causal:
            self._check_batch(state, x.shape[0])
            stream = Stream(state, segment_ids, *x.shape[:2])
            y, after = self.mix(x, stream), stream.end()
            if state and set(state) != set(after):
                raise InputError(
                    f"{type(self).__name__}: state has {sorted(state)}; expected {sorted(after)}, what an earlier call "
                    "returned or `initial_state`"
                )
            return y, after
        if state:
            raise InputError(f"{type(self).__name__}: causal=False has no state to go on from; expected state=None")
        if self.sees_whole:
            return self.mix(x, Stream(None, segment_ids, *x.shape[:2], causal=False)), {}
        backwards = None if segment_ids is None else jnp.flip(segment_ids, axis=1)
        y = self.mix(x, Stream(None, segment_ids, *x.shape[:2]))
        return y + jnp.flip(self.mix(jnp.flip(x, axis=1), Stream(None, backwards, *x.shape[:2])), axis=1), {}

    def _check_batch(self, state: MixerState | None, batch: int) -> None:
        rows = state["cursor"].position.shape if state and "cursor" in state else (batch,)
        if rows != (batch,):
            raise InputError(f"{type(self).__name__}: state has {rows[0]} rows; expected {batch} as x has")

    def _read_context(
        self,
        x: Activations,
        state: MixerState | None,
        segment_ids: SegmentIds | None,
        context: Activations | None,
        context_segment_ids: SegmentIds | None,
    ) -> tuple[Activations, MixerState]:
        """Cross-attention. Neither side is a stream: a query's weights do not depend on its place."""
        name = type(self).__name__
        if self.cross is None:
            raise InputError(
                f"{name}: has no cross-attention, its weights depend on what lies between two tokens; expected no "
                "context, or a layer of linear attention without decay (LinearAttention, Based) or SoftmaxAttention"
            )
        self.check_across()
        arguments = self.project_across(x, Stream(None, None, *x.shape[:2]))
        if context is None:
            del arguments["k"], arguments["v"]
            arguments["memory"] = state["context"]
        else:
            if state:
                raise InputError(f"{name}: a context and a state are given; expected a context in the first call alone")
            if context.ndim != 3 or (context.shape[0], context.shape[2]) != (x.shape[0], self.d_model):
                expected = f"[{x.shape[0]}, context, {self.d_model}]"
                raise InputError(f"{name}: context has shape {context.shape}; expected {expected}")
            written = self.project_across(context.astype(self.dtype), Stream(None, None, *context.shape[:2]))
            arguments |= {"k": written["k"], "v": written["v"], "context_segment_ids": context_segment_ids}
        o, memory = type(self).cross(**arguments, segment_ids=segment_ids)
        return self.readout(o, x), {"context": memory}

    def dense(self, features: int, *, use_bias: bool = False) -> nn.Dense:
        """A projection in this layer's dtypes."""
        return nn.Dense(features, use_bias=use_bias, dtype=self.dtype, param_dtype=self.param_dtype)

    def divide(self, width: int, parts: int, what: str) -> int:
        """width / parts, or an error that says which of `what` does not divide."""
        if parts < 1:
            raise InputError(f"{type(self).__name__}: the number of heads is {parts}; expected at least 1")
        if width < parts or width % parts:
            raise InputError(f"{type(self).__name__}: {what} = {width} is not divisible by {parts} heads")
        return width // parts

    def heads_of(self, channels: int, width: int, what: str) -> int:
        """The number of heads that have so many channels each; one, where `what` = width is narrower than a head."""
        if channels < 1 or (width > channels and width % channels):
            raise InputError(f"{type(self).__name__}: {what} = {width} does not make heads of {channels} channels")
        return max(1, width // channels)


def start_cursor(batch_size: int) -> Cursor:
    """The cursor before the first token."""
    return Cursor(jnp.zeros(batch_size, jnp.int32), jnp.zeros(batch_size, jnp.int32))


def dense_flops(*widths: int) -> float:
    """FLOPs of linear layers for one token, from widths[0] channels to widths[1] and so on."""
    return 2.0 * sum(i * o for i, o in pairwise(widths))


def convolution_bytes(width: int, channels: int) -> int:
    """Bytes of the inputs that a short convolution remembers of one sequence."""
    return FLOAT32 * (width - 1) * channels


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over `width` tokens, then `activation`: "silu", or None for none.

    Parameters `kernel` [width, features], whose last row multiplies the current token, and with `use_bias` `bias`
    [features].
    """

    features: int
    width: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    use_bias: bool = False
    activation: str | None = "silu"
    kernel_init: Callable[..., Array] = nn.initializers.variance_scaling(
        1 / 3, "fan_in", "uniform", in_axis=0, out_axis=()
    )

    @nn.compact
    def __call__(self, x: Array, stream: Stream) -> Array:
        kernel = self.param("kernel", self.kernel_init, (self.width, self.features), self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype).astype(self.dtype)
        return stream(self.name, short_conv, x, kernel.astype(self.dtype), bias, activation=self.activation)


def split_heads(x: Array, heads: int) -> Array:
    """[b, t, heads * d] -> [b, t, heads, d]."""
    return x.reshape(*x.shape[:2], heads, -1)


def merge_heads(x: Array) -> Array:
    """[b, t, heads, d] -> [b, t, heads * d]."""
    return x.reshape(*x.shape[:2], -1)
