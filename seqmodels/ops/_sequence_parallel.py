"""The one driver that runs operators on a mesh: rows over "data" and "fsdp", time over "seq", heads over "tensor".

An operator is written for one device. Under `jax.set_mesh` the driver enters `jax.shard_map`, splits all axes by hand,
so that a kernel sees a plain array, and gives every shard of time what it needs of the others:

    exchange     what travels                                     who                        default for
    "prefix"     the summaries of all shards, once (LASP-2)       operators with a summary   kind "prefix"; see
    "doubling"   one summary, log2(W) times                       the same                   `DOUBLING_ABOVE`
    "hops"       one state, W - 1 times (LASP-1)                  the same
    "halo"       the last positions of the neighbour              what looks back so far     kind "halo", windows
    "ring"       keys and values, W - 1 times (ring attention)    softmax attention          kind "ring"; see
    "gather"     keys and values of all shards, once (LASP-2H)    softmax attention          `RING_ABOVE`
    "ulysses"    all that an operator reads: heads for time       operators with heads       kind "relay", where the
    "relay"      one state, from shard to shard, row after row    all operators              heads divide, and else

Shards are contiguous. A length that they do not divide is filled up with padding, which no operator sees; a span with
fewer tokens than there are shards, a token to decode above all, is not split over time. Where "halo" cannot know that
the neighbour holds enough tokens, because rows have segment ids, it falls back to "doubling".
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from seqmodels.errors import InputError, nearest
from seqmodels.notation import TIME_AXIS, Array
from seqmodels.ops import _exchange, _scan
from seqmodels.ops._exchange import Exchange, Line, Packing
from seqmodels.ops._mesh import MeshView
from seqmodels.ops._op import Inputs, Options, SeqOp, State
from seqmodels.ops._scan import Documents

SUMMARIES = ("prefix", "doubling", "hops")
# "doubling" in place of "prefix" where the summaries of all shards would fill so many bytes of a device.
DOUBLING_ABOVE = 2**28
# "ring" in place of "gather" where the keys and values of all shards would fill so many bytes of a device.
RING_ABOVE = 2**28

RunHere = Callable[[Inputs, Documents | None, State | None], tuple[Array, State]]


def exchanges(op: SeqOp, arrays: Inputs, options: Options) -> tuple[str, ...]:
    """The ways in which shards of this operator can exchange what they need."""
    found = list(SUMMARIES) if op.summary_kind in ("prefix", "halo") else []
    if op.reach is not None and op.reach(arrays, options) is not None:
        found.append("halo")
    if op.across is not None:
        found += ["ring", "gather"]
    if op.head_axes:
        found.append("ulysses")
    return (*found, "relay")


def check_exchange(op: SeqOp, arrays: Inputs, options: Options, exchange: str) -> None:
    """Raise InputError where the operator has no such exchange for these arguments."""
    valid = ("auto", *exchanges(op, arrays, options))
    if exchange not in valid:
        raise InputError(f"{op.name}: exchange={exchange!r} does not exist for it; {nearest(exchange, valid)}")


class Spread:
    """Where the arrays of one call lie: their PartitionSpecs, and how a device finds its own heads."""

    def __init__(self, op: SeqOp, arrays: Inputs, options: Options, mesh: MeshView, over_time: bool):
        self.op, self.mesh = op, mesh
        batch = arrays[op.time_args[0]].shape[0]
        self.rows = mesh.row_axes(batch)
        self.time = TIME_AXIS if over_time else None
        counts = head_counts(op, arrays)
        self.heads = max(counts.values(), default=0)
        self.head_axis = mesh.head_axis if counts else None
        self._grouped = {}
        if self.head_axis:
            self._grouped = check_heads(op, counts, self.heads, mesh.n_heads, "the mesh's tensor")
        self.state_heads = _head_axes_of_state(op, arrays, options)
        # Parts into which the rows and heads of an array are split.
        self.split = (mesh.n_rows if batch % mesh.n_rows == 0 else 1) * (mesh.n_heads if self.head_axis else 1)

    def of_arrays(self, arrays: Inputs) -> Any:
        return {name: jax.tree.map(functools.partial(self._of_array, name), x) for name, x in arrays.items()}

    def _of_array(self, name: str, x: Array) -> PartitionSpec:
        axes: list[Any] = [None] * x.ndim
        if name in self.op.time_args:
            axes[:2] = self.rows, self.time
        if self.head_axis and name in self.op.head_axes and name not in self._grouped:
            axes[self.op.head_axes[name]] = self.head_axis
        return PartitionSpec(*axes)

    @property
    def of_time(self) -> PartitionSpec:
        """[b, t]."""
        return PartitionSpec(self.rows, self.time)

    def of_documents(self, docs: Documents | None) -> PartitionSpec | None:
        return None if docs is None else self.of_time

    @property
    def of_state(self) -> Any:
        def spec(axis: int) -> PartitionSpec:
            return PartitionSpec(self.rows, *[None] * (axis - 1), *([self.head_axis] if axis else []))

        return jax.tree.map(spec, self.state_heads)

    @property
    def of_output(self) -> PartitionSpec:
        return PartitionSpec(self.rows, self.time, self.head_axis)

    @property
    def of_buffer(self) -> PartitionSpec:
        """[W, b, n]: what a device packs is its own business, so n is as good as split over heads."""
        return PartitionSpec(TIME_AXIS, self.rows, self.head_axis)

    def own_heads(self, arrays: Inputs) -> Inputs:
        """Heads that are fewer than the devices over which the others are split: the one that this device needs."""
        if not self._grouped:
            return arrays
        place = jax.lax.axis_index(self.head_axis)
        return pick_heads(self.op, arrays, self._grouped, place, self.mesh.n_heads)

    def shard_map(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        return jax.shard_map(
            function, in_specs=in_specs, out_specs=out_specs, axis_names=self.mesh.names, check_vma=False
        )


def run(
    op: SeqOp,
    arrays: Inputs,
    docs: Documents | None,
    state: State | None,
    options: Options,
    run_here: RunHere,
    mesh: MeshView,
    *,
    chunk_size: int | None,
    exchange: str,
    causal: bool = True,
    backwards: bool = False,
) -> tuple[Array, State]:
    """`run_here` over all devices of the mesh.

    docs: of the whole rows. backwards: the rows are read from their end, outputs stay in the order of time; docs are
    those of the reversed rows, in the order of time. causal: False for an operator with `across`, alone.
    """
    length, shards = arrays[op.time_args[0]].shape[1], mesh.n_time
    if shards == 1 or length < shards:
        return _whole_time(Spread(op, arrays, options, mesh, over_time=False), arrays, docs, state, run_here, backwards)
    full = None if docs is not None else (length - 1) // -(-length // shards)
    if not causal:
        exchange = "auto"  # what was asked for is a way to hand on a state
    if length % shards:
        arrays, docs = _fill_up(op, arrays, docs, shards)
    call = Call(op, arrays, docs, state, options, run_here, chunk_size, Line(shards, backwards), full)
    spread = Spread(op, arrays, options, mesh, over_time=True)
    chosen = _choose(call, spread, causal) if exchange == "auto" else exchange
    if chosen == "halo" and not call.neighbour_is_enough:
        chosen = "doubling"
    if chosen in ("ring", "gather"):
        o, state = op.across.run(call, spread, chosen, causal)
    elif chosen == "ulysses":
        o, state = _ulysses(call, spread)
    elif chosen == "relay":
        o, state = _relay(call, spread)
    else:
        o, state = _from_summaries(call, spread, getattr(_exchange, chosen))
    return o[:, :length], state


class Call(NamedTuple):
    """An operator's call whose time axis is split; see `run`."""

    op: SeqOp
    arrays: Inputs
    docs: Documents | None
    state: State | None
    options: Options
    run_here: RunHere
    chunk_size: int | None
    line: Line
    full: int | None

    @property
    def length(self) -> int:
        """Tokens of a shard."""
        return self.arrays[self.op.time_args[0]].shape[1] // self.line.size

    @property
    def looks_back_one_shard(self) -> bool:
        reach = None if self.op.reach is None else self.op.reach(self.arrays, self.options)
        return reach is not None and reach <= self.length

    @property
    def neighbour_is_enough(self) -> bool:
        return self.full is not None and not self.line.backwards and self.looks_back_one_shard

    @property
    def start(self) -> State:
        return self.op.initial_state(self.arrays, self.options) if self.state is None else self.state

    def local(self, arrays: Inputs, docs: Documents | None) -> tuple[Inputs, Documents | None]:
        """A shard in the order in which it is read, its documents numbered from that of the state which enters it."""
        if self.line.backwards:
            arrays, docs = flip_time(self.op, arrays), flip_documents(docs)
        if docs is not None:
            index = docs.index - docs.index[:, :1] + docs.starts[:, :1]
            docs = docs._replace(index=index)
        return arrays, docs

    def in_time(self, o: Array) -> Array:
        return jnp.flip(o, axis=1) if self.line.backwards else o


def read_backwards(
    op: SeqOp, run: RunHere, arrays: Inputs, docs: Documents | None, state: State | None
) -> tuple[Array, State]:
    """`run` over the reversed span; outputs in the order of time."""
    o, state = run(flip_time(op, arrays), flip_documents(docs), state)
    return jnp.flip(o, axis=1), state


def flip_time(op: SeqOp, arrays: Inputs) -> Inputs:
    return {
        name: jnp.flip(x, axis=1) if name in op.time_args and x is not None else x for name, x in arrays.items()
    }


def flip_documents(docs: Documents | None) -> Documents | None:
    return None if docs is None else Documents(*(jnp.flip(x, axis=1) for x in docs))


def _fill_up(op: SeqOp, arrays: Inputs, docs: Documents | None, shards: int) -> tuple[Inputs, Documents]:
    """Padding at the end, up to a multiple of `shards`."""
    shape = arrays[op.time_args[0]].shape[:2]
    if docs is None:
        docs = Documents(jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool), jnp.zeros(shape, bool))
    arrays = {
        name: _scan.pad_time(x, shards) if name in op.time_args and x is not None else x for name, x in arrays.items()
    }
    return arrays, Documents(
        _scan.pad_time(docs.index, shards, "edge"),
        _scan.pad_time(docs.real, shards),
        _scan.pad_time(docs.starts, shards),
    )


def _choose(call: Call, spread: Spread, causal: bool) -> str:
    """The table above."""
    op = call.op
    if op.summary_kind == "prefix":
        summary = jax.eval_shape(lambda x, docs: op.summarize(x, docs, call.options), call.arrays, call.docs)
        return "doubling" if call.line.size * bytes_of(summary) / spread.split > DOUBLING_ABOVE else "prefix"
    if op.summary_kind == "halo" or (causal and call.looks_back_one_shard):
        return "halo"
    if op.summary_kind == "ring":
        keys_and_values = bytes_of([call.arrays[name] for name in op.across.gathered])
        return "ring" if keys_and_values / spread.split > RING_ABOVE else "gather"
    heads = spread.heads // (spread.mesh.n_heads if spread.head_axis else 1)
    return "ulysses" if heads and heads % call.line.size == 0 else "relay"


def bytes_of(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _whole_time(
    spread: Spread,
    arrays: Inputs,
    docs: Documents | None,
    state: State | None,
    run_here: RunHere,
    backwards: bool,
) -> tuple[Array, State]:
    """Rows and heads are split, time is not."""

    def shard(arrays: Inputs, docs: Documents | None, state: State | None) -> tuple[Array, State]:
        run = functools.partial(read_backwards, spread.op, run_here) if backwards else run_here
        return run(spread.own_heads(arrays), docs, state)

    specs = spread.of_arrays(arrays), spread.of_documents(docs), None if state is None else spread.of_state
    return spread.shard_map(shard, specs, (spread.of_output, spread.of_state))(arrays, docs, state)


def _from_summaries(call: Call, spread: Spread, exchange: Callable) -> tuple[Array, State]:
    """Summaries of the shards, the states that enter them, and then every shard on its own."""
    summaries, options = Packing(), {**call.options, "fresh": False}

    def summarize(arrays: Inputs, docs: Documents | None) -> _exchange.Buffers:
        arrays, docs = call.local(spread.own_heads(arrays), docs)
        return tuple(x[None] for x in summaries.pack(call.op.summarize(arrays, docs, options)))

    specs = spread.of_arrays(call.arrays), spread.of_documents(call.docs)
    buffers = spread.shard_map(summarize, specs, spread.of_buffer)(call.arrays, call.docs)
    layout = spread.shard_map, spread.of_buffer, spread.of_state
    how = Exchange(call.op, options, call.line, summaries, *layout, call.length, call.full)
    starts, states, end = exchange(how, buffers, call.start)

    def shard(arrays: Inputs, docs: Documents | None, starts: _exchange.Buffers) -> Array:
        arrays, docs = call.local(spread.own_heads(arrays), docs)
        o, _ = call.run_here(arrays, docs, states.unpack(tuple(x[0] for x in starts)))
        return call.in_time(o)

    o = spread.shard_map(shard, (*specs, spread.of_buffer), spread.of_output)(call.arrays, call.docs, starts)
    return o, end


def _relay(call: Call, spread: Spread) -> tuple[Array, State]:
    """Row after row through a pipeline of shards: in step i shard r runs row i - r, and hands its state on."""
    line = call.line

    def shard(arrays: Inputs, docs: Documents | None, start: State) -> tuple[Array, State]:
        arrays, docs = call.local(spread.own_heads(arrays), docs)
        rank, rows = line.rank(), arrays[call.op.time_args[0]].shape[0]

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def run_row(row: Array, came: State) -> tuple[Array, State]:
            def take(x: Array) -> Array:
                return jax.lax.dynamic_slice_in_dim(x, row, 1, axis=0)

            timed = {name: take(x) for name, x in arrays.items() if name in call.op.time_args and x is not None}
            own = jax.tree.map(take, start)
            state = jax.tree.map(lambda x, y: jnp.where(rank == 0, x, y), own, came)
            return call.run_here({**arrays, **timed}, jax.tree.map(take, docs), state)

        def step(came: State, i: Array) -> tuple[State, tuple[Array, State]]:
            o, state = run_row(jnp.clip(i - rank, 0, rows - 1), came)
            return line.pass_on(state), (o[0], jax.tree.map(lambda x: x[0], state))

        nothing = jax.tree.map(lambda x: jnp.zeros_like(x[:1]), start)
        _, outcome = jax.lax.scan(step, nothing, jnp.arange(rows + line.size - 1))
        o, states = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, rank, rows, axis=0), outcome)
        return call.in_time(o), line.from_shard(states, line.size - 1)

    specs = spread.of_arrays(call.arrays), spread.of_documents(call.docs), spread.of_state
    outs = spread.of_output, spread.of_state
    return spread.shard_map(shard, specs, outs)(call.arrays, call.docs, call.start)


def _ulysses(call: Call, spread: Spread) -> tuple[Array, State]:
    """All of time for some of the heads, by an all-to-all before and one after (Jacobs et al. 2023, 2309.14509)."""
    op, shards, split = call.op, call.line.size, spread.mesh.n_heads if spread.head_axis else 1
    counts = {name: max(n // split, 1) for name, n in head_counts(op, call.arrays).items()}
    grouped = check_heads(op, counts, spread.heads // split, shards, "exchange='ulysses' over the mesh's seq")

    def all_time(x: Array) -> Array:
        return jax.lax.all_gather(x, TIME_AXIS, axis=1, tiled=True)

    def some_heads(x: Array, axis: int, place: Array) -> Array:
        size = x.shape[axis] // shards
        return jax.lax.dynamic_slice_in_dim(x, place * size, size, axis=axis)

    def shard(arrays: Inputs, docs: Documents | None, start: State | None) -> tuple[Array, State]:
        place, found = jax.lax.axis_index(TIME_AXIS), {}
        for name, x in spread.own_heads(arrays).items():
            timed, axis = name in op.time_args, op.head_axes.get(name)
            if axis is not None and name not in grouped:
                if timed:
                    x = jax.tree.map(
                        lambda x, axis=axis: jax.lax.all_to_all(x, TIME_AXIS, axis, 1, tiled=True), x
                    )
                else:
                    x = jax.tree.map(lambda x, axis=axis: some_heads(x, axis, place), x)
            elif timed:
                x = jax.tree.map(all_time, x)
            found[name] = x
        arrays, docs = pick_heads(op, found, grouped, place, shards), jax.tree.map(all_time, docs)
        if start is not None:
            start = jax.tree.map(lambda x, axis: some_heads(x, axis, place) if axis else x, start, spread.state_heads)
        run = functools.partial(read_backwards, op, call.run_here) if call.line.backwards else call.run_here
        o, state = run(arrays, docs, start)
        state = jax.tree.map(
            lambda x, axis: jax.lax.all_gather(x, TIME_AXIS, axis=axis, tiled=True) if axis else x,
            state,
            spread.state_heads,
        )
        return jax.lax.all_to_all(o, TIME_AXIS, 1, 2, tiled=True), state

    of_start = None if call.state is None else spread.of_state
    specs = spread.of_arrays(call.arrays), spread.of_documents(call.docs), of_start
    return spread.shard_map(shard, specs, (spread.of_output, spread.of_state))(call.arrays, call.docs, call.state)


def head_counts(op: SeqOp, arrays: Inputs) -> dict[str, int]:
    """Heads of every array that has an axis of them."""
    return {
        name: jax.tree.leaves(arrays[name])[0].shape[axis]
        for name, axis in op.head_axes.items()
        if jax.tree.leaves(arrays.get(name))
    }


def check_heads(op: SeqOp, counts: dict[str, int], heads: int, parts: int, what: str) -> dict[str, int]:
    """The names, with their heads, of arrays with fewer heads than parts; each part needs one of those."""
    if heads % parts:
        raise InputError(f"{op.name}: {what} = {parts} does not split heads: {heads}; expected a multiple of {parts}")
    grouped = {name: n for name, n in counts.items() if n % parts}
    for name, n in grouped.items():
        if parts % n:
            raise InputError(
                f"{op.name}: {what} = {parts} does not split the heads of {name}: {n}; expected a multiple or a "
                f"divisor of {parts}"
            )
    return grouped


def pick_heads(op: SeqOp, arrays: Inputs, grouped: dict[str, int], place: Array, parts: int) -> Inputs:
    def pick(name: str, x: Array) -> Array:
        n = grouped[name]
        return jax.lax.dynamic_slice_in_dim(x, place * n // parts, 1, axis=op.head_axes[name])

    return {name: pick(name, x) if name in grouped and x is not None else x for name, x in arrays.items()}


def _head_axes_of_state(op: SeqOp, arrays: Inputs, options: Options) -> Any:
    """The axis of heads of every array of the state, 0 where it has none: the one that grows with the heads."""

    def widened(name: str, x: Array) -> jax.ShapeDtypeStruct:
        shape = list(x.shape)
        if name in op.head_axes:
            shape[op.head_axes[name]] *= 2
        return jax.ShapeDtypeStruct(tuple(shape), x.dtype)

    twice = {name: jax.tree.map(functools.partial(widened, name), x) for name, x in arrays.items()}
    once, twice = (jax.eval_shape(lambda x: op.initial_state(x, options), x) for x in (arrays, twice))

    def axis(once: jax.ShapeDtypeStruct, twice: jax.ShapeDtypeStruct) -> int:
        return next((i for i, (a, b) in enumerate(zip(once.shape, twice.shape)) if a != b), 0)

    return jax.tree.map(axis, once, twice)
