"""How shards of the time axis learn the state that enters them.

Every function here takes what a shard's span does to a state, its summary, and gives the state at the shard's start,
and that at the end of all. The size of what travels depends on the state alone, not on the length.

    prefix     all summaries to all, once; each shard applies those before it                  LASP-2
    doubling   log2(W) messages of one summary, to the shard 1, 2, 4, ... places on            Hillis, Steele 1986
    halo       one message to the neighbour: what is further back does not matter              of convolutions, windows
    hops       W - 1 messages one after the other, each a state                                LASP-1

(LASP-1: Sun et al. 2024, arXiv 2404.02882. LASP-2: Sun et al. 2025, arXiv 2502.07563.) With P_r the state that enters
shard r, F_r what its span does to a state, and lambda_r the cotangent of the state that leaves it, `prefix` is

    P_{r+1} = F_r(P_r)                        lambda_{r-1} = dP_r + (dF_r / dP)^T lambda_r                        (1)

and gathers the summaries on the way forward, and dP with what the transposed map reads (its decay, say) on the way
back. The others are differentiated as they stand.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal, Var
from jax.sharding import PartitionSpec

from seqmodels.notation import TIME_AXIS, Array
from seqmodels.ops._op import Options, SeqOp, State, Summary

# What was exchanged is so named: a policy of `jax.checkpoint` that saves it spares the backward pass the exchange.
EXCHANGED = "exchanged"

Buffers = tuple[Array, ...]


class Line(NamedTuple):
    """The shards in the order in which they follow each other: that of time, or backwards."""

    size: int
    backwards: bool = False

    def rank(self) -> Array:
        """The place of this device's shard, from 0."""
        index = jax.lax.axis_index(TIME_AXIS)
        return self.size - 1 - index if self.backwards else index

    def gather(self, x: Array) -> Array:
        """[..] -> [W, ..]."""
        x = jax.lax.all_gather(x, TIME_AXIS)
        return jnp.flip(x, axis=0) if self.backwards else x

    def pass_on(self, tree: Any, places: int = 1) -> Any:
        """What the shard so many places earlier has; zeros where there is none."""
        step = -places if self.backwards else places
        pairs = [(i, i + step) for i in range(self.size) if 0 <= i + step < self.size]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, TIME_AXIS, pairs), tree)

    def from_shard(self, tree: Any, place: int) -> Any:
        """What the shard at `place` has, to all."""
        here = self.rank() == place

        def send(x: Array) -> Array:
            # A sum of truth values is an integer.
            return jax.lax.psum(jnp.where(here, x, jnp.zeros_like(x)), TIME_AXIS).astype(x.dtype)

        return jax.tree.map(send, tree)


class Packing:
    """Trees of arrays [b, ..] as one row of numbers [b, n] per dtype, so that one message carries all of them.

    Truth values travel as numbers. `pack` notes the layout that `unpack` goes by: the first is to be traced before.
    """

    def pack(self, tree: Any) -> Buffers:
        leaves, self._structure = jax.tree.flatten(tree)
        floats = [x.dtype for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
        carrier = jnp.result_type(*floats) if floats else jnp.dtype(jnp.float32)
        self._leaves = [(x.shape[1:], x.dtype) for x in leaves]
        self._carriers = [carrier if x.dtype == bool else x.dtype for x in leaves]
        self.dtypes = tuple(dict.fromkeys(self._carriers))
        rows = [x.astype(dtype).reshape(x.shape[0], -1) for x, dtype in zip(leaves, self._carriers)]
        return tuple(
            jnp.concatenate([row for row in rows if row.dtype == dtype], axis=1) for dtype in self.dtypes
        )

    def unpack(self, buffers: Buffers) -> Any:
        places, leaves = dict.fromkeys(self.dtypes, 0), []
        for (shape, dtype), carrier in zip(self._leaves, self._carriers):
            buffer, start = buffers[self.dtypes.index(carrier)], places[carrier]
            size = math.prod(shape)
            places[carrier] = start + size
            x = buffer[:, start : start + size].reshape(buffer.shape[0], *shape)
            leaves.append(x if dtype == carrier else x > 0.5)
        return jax.tree.unflatten(self._structure, leaves)


class Exchange(NamedTuple):
    """What all the ways of exchanging are given.

    summaries   the layout of `buffers`, the shards' summaries [W, b, n]
    shard_map   (function of one shard, in_specs, out_specs) -> function of whole arrays
    of_buffer   PartitionSpec of a buffer, of_state those of a state
    length      tokens of a shard
    full        every shard up to this place is full of tokens, where that is known before the program runs
    """

    op: SeqOp
    options: Options
    line: Line
    summaries: Packing
    shard_map: Callable[..., Callable]
    of_buffer: PartitionSpec
    of_state: Any
    length: int
    full: int | None

    def apply(self, buffers: Buffers, state: State) -> State:
        return self.op.apply(self.summaries.unpack(buffers), state, self.options)

    def combine(self, earlier: Summary, later: Summary) -> Summary:
        return self.op.combine(earlier, later, self.options)


def prefix(how: Exchange, buffers: Buffers, state: State) -> tuple[Buffers, Packing, State]:
    """Equation (1). Returns the state at each shard's start [W, b, m], its layout, and the state at the end."""
    line, states = how.line, Packing()

    def forward_shard(buffers: Buffers, state: State) -> tuple[Buffers, State]:
        gathered = tuple(line.gather(x[0]) for x in buffers)

        def after(j: Array, state: State) -> State:
            return how.apply(tuple(x[j] for x in gathered), state)

        start = jax.lax.fori_loop(0, line.rank(), after, state)
        end = jax.lax.fori_loop(line.rank(), line.size, after, start)
        return _stacked(states.pack(start)), end

    def backward_shard(buffers: Buffers, starts: Buffers, d_starts: Buffers, d_end: State) -> tuple[Buffers, State]:
        buffers, start, d_start = _alone(buffers), states.unpack(_alone(starts)), states.unpack(_alone(d_starts))
        leaves, structure = jax.tree.flatten((how.summaries.unpack(buffers), start))

        def pull(leaves: Sequence[Array], d_after: State) -> State:
            summary, start = jax.tree.unflatten(structure, leaves)
            return jax.vjp(lambda state: how.op.apply(summary, state, how.options), start)[1](d_after)[0]

        is_read, message = _is_read(pull, leaves, d_end), Packing()
        sent = [x for x, read in zip(leaves, is_read) if read]
        gathered = tuple(line.gather(x) for x in message.pack((sent, d_start)))

        def before(i: Array, d_after: State) -> State:
            """From the cotangent of the state that leaves shard j to that of the one that enters it."""
            j = line.size - 1 - i
            sent, d_start = message.unpack(tuple(x[j] for x in gathered))
            read = iter(sent)
            of_shard = [next(read) if is_used else jnp.zeros_like(x) for x, is_used in zip(leaves, is_read)]
            return jax.tree.map(jnp.add, d_start, pull(of_shard, d_after))

        later = line.size - 1 - line.rank()
        d_after = jax.lax.fori_loop(0, later, before, d_end)
        d_state = jax.lax.fori_loop(later, line.size, before, d_after)
        (d_buffers,) = jax.vjp(lambda buffers: how.apply(buffers, start), buffers)[1](d_after)
        return _stacked(d_buffers), d_state

    specs = how.of_buffer, how.of_state
    run_forward = how.shard_map(forward_shard, specs, specs)
    run_backward = how.shard_map(backward_shard, (*(how.of_buffer,) * 3, how.of_state), specs)

    @jax.custom_vjp
    def run(buffers: Buffers, state: State) -> tuple[Buffers, State]:
        return run_forward(buffers, state)

    def forward(buffers: Buffers, state: State) -> tuple:
        starts, end = run_forward(buffers, state)
        buffers, starts = checkpoint_name((buffers, starts), EXCHANGED)
        return (starts, end), (buffers, starts)

    run.defvjp(forward, lambda kept, cotangents: run_backward(*kept, *cotangents))
    starts, end = run(buffers, state)
    return starts, states, end


def doubling(how: Exchange, buffers: Buffers, state: State) -> tuple[Buffers, Packing, State]:
    """log2(W) messages; returns what `prefix` does."""
    line, states = how.line, Packing()

    def shard(buffers: Buffers, state: State) -> tuple[Buffers, State]:
        span, places, rank = how.summaries.unpack(_alone(buffers)), 1, line.rank()
        while places < line.size:
            longer = how.combine(line.pass_on(span, places), span)
            span = jax.tree.map(lambda x, y, has=rank >= places: jnp.where(has, x, y), longer, span)
            places *= 2
        start = how.op.apply(line.pass_on(span), state, how.options)
        start = jax.tree.map(lambda x, y: jnp.where(rank > 0, x, y), start, state)
        end = how.op.apply(line.from_shard(span, line.size - 1), state, how.options)
        return _stacked(states.pack(start)), end

    starts, end = _run(how, shard, buffers, state)
    return starts, states, end


def halo(how: Exchange, buffers: Buffers, state: State) -> tuple[Buffers, Packing, State]:
    """One message. For shards up to `how.full` that are longer than the operator looks back."""
    line, states = how.line, Packing()

    def shard(buffers: Buffers, state: State) -> tuple[Buffers, State]:
        span, rank = how.summaries.unpack(_alone(buffers)), line.rank()
        counted = how.op.advance(state, jnp.maximum(rank - 1, 0) * how.length)
        start = how.op.apply(line.pass_on(span), counted, how.options)
        start = jax.tree.map(lambda x, y: jnp.where(rank > 0, x, y), start, state)
        end = line.from_shard(how.op.apply(span, start, how.options), how.full)
        return _stacked(states.pack(start)), end

    starts, end = _run(how, shard, buffers, state)
    return starts, states, end


def hops(how: Exchange, buffers: Buffers, state: State) -> tuple[Buffers, Packing, State]:
    """One shard after the other: what LASP-2 is compared with."""
    line, states = how.line, Packing()

    def shard(buffers: Buffers, state: State) -> tuple[Buffers, State]:
        rank = line.rank()

        def hop(state: State, place: Array) -> tuple[State, None]:
            came = line.pass_on(how.apply(_alone(buffers), state))
            return jax.tree.map(lambda x, y: jnp.where(rank == place, x, y), came, state), None

        start, _ = jax.lax.scan(hop, state, jnp.arange(1, line.size))
        end = line.from_shard(how.apply(_alone(buffers), start), line.size - 1)
        return _stacked(states.pack(start)), end

    starts, end = _run(how, shard, buffers, state)
    return starts, states, end


def _run(how: Exchange, shard: Callable, buffers: Buffers, state: State) -> tuple[Buffers, State]:
    specs = how.of_buffer, how.of_state
    starts, end = how.shard_map(shard, specs, specs)(buffers, state)
    return checkpoint_name(starts, EXCHANGED), end


def _stacked(buffers: Buffers) -> Buffers:
    """A shard's part of an array over shards."""
    return tuple(x[None] for x in buffers)


def _alone(buffers: Buffers) -> Buffers:
    return tuple(x[0] for x in buffers)


def _is_read(function: Callable, leaves: Sequence[Array], *rest: Any) -> list[bool]:
    """Which of `leaves` the outputs of function(leaves, *rest) depend on."""
    jaxpr = jax.make_jaxpr(function)(leaves, *rest).jaxpr
    needed: set[Var] = {x for x in jaxpr.outvars if not isinstance(x, Literal)}
    for equation in reversed(jaxpr.eqns):
        if needed & set(equation.outvars):
            needed |= {x for x in equation.invars if not isinstance(x, Literal)}
    return [x in needed for x in jaxpr.invars[: len(leaves)]]
