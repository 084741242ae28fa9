"""The contract of an operator: what it promises, in a form that tests and drivers can read.

An operator maps (inputs over a span, state at its start) to (outputs over the span, state at its end), and running
two adjacent spans one after the other equals running them as one. `SeqOp` describes one such operator. The public
function users call (`linear_attention(q, k, v, ...)`) and the description (`LINEAR_ATTENTION`) live in the same file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from seqmodels.notation import Array

State = Any
Summary = Any
Inputs = dict[str, Array | None]
Options = Mapping[str, Any]


class Example(NamedTuple):
    """Arguments that exercise an operator: what the conformance suite feeds it.

    arrays: the operator's array arguments by name. options: its static keyword arguments.
    extreme: gates or scores at the edge of their range; checked for finiteness and agreement, not for accuracy.
    """

    arrays: Inputs
    options: Options
    extreme: bool = False


@dataclass(frozen=True)
class Kernel:
    """A hand-written kernel: `call` has the signature of a form; `supports` (arrays, options) returns why not, or None.

    The options of `supports` have "chunk_size" and "documents", whether there are any, too.

    platform: what the kernel is lowered for, in the vocabulary of `jax.lax.platform_dependent` ("tpu", "cuda").
    automatic: whether backend="auto" may take it, or what says so of the arrays. False for a kernel whose speed is not
    known yet, neither from the hardware nor from a compiler's schedule: it runs where it is asked for by name.
    """

    platform: str
    supports: Callable[..., str | None]
    call: Callable[..., tuple[Array, State]]
    automatic: bool | Callable[[Inputs], bool] = True

    def is_automatic(self, arrays: Inputs) -> bool:
        return self.automatic(arrays) if callable(self.automatic) else self.automatic


@dataclass(frozen=True)
class Across:
    """How an operator without a summary of fixed size reads shards of the time axis.

    gathered: the arrays of which every shard needs those of all others. run: (call, spread, exchange, causal) ->
    (o, state), see `_sequence_parallel`; exchange is "ring" or "gather".
    """

    gathered: tuple[str, ...]
    run: Callable[..., tuple[Array, State]]


@dataclass(frozen=True)
class SeqOp:
    """One operator with a state.

    name            the public function's name
    call            the public function: `call(**arrays, **options, initial_state=..., segment_ids=..., form=...)`
    time_args       names of the array arguments that have a time axis (axis 1); the others hold for the whole span
    step            (state, arrays of one position without the time axis, options) -> (state, output): the definition
    initial_state   (arrays, options) -> the state before the first token
    forms           form name -> implementation (arrays, state, documents, chunk_size, options) -> (o, state).
                    "recurrent" is not listed: it is `lax.scan` of `step`, the same for every operator
    kernels         backend name -> Kernel, for the chunked form
    whole           the operator without causality, where it has a form of its own: (arrays, documents, chunk_size,
                    options, both_ways) -> o. `both_ways` (arrays, options) -> o is the form of all others: the
                    operator over the span plus the operator over the reversed span
    summarize       (arrays, documents, options) -> what the span does to any state
    combine         (earlier summary, later summary, options) -> summary of both spans
    apply           (summary, state, options) -> state after the span
                    The three are None where what a span does to a state has no summary of fixed size ("relay"): law
                    3, "summary", is then a known gap
                    options are the static keyword arguments, and `fresh`: True where no state was handed in, so that
                    a form may leave out the reading of an empty one
    summary_kind    how a shard of a longer sequence gets what it needs: "prefix" one all-gather of fixed-size
                    summaries, "halo" the last positions of its neighbour, "ring" keys and values of all shards,
                    "relay" the exact state, handed on
    head_axes       array argument -> its axis of heads, or of channels that do not mix, so that a device may have some
                    of them; those that are missing have none. (Of a tree: the axis of every array in it)
    reach           (arrays, options) -> how many positions the state looks back, None where it grows with them; None
                    for operators that have no limit in any case
    advance         (state, n) -> the state after n tokens at which nothing will look back, but which it counts
    across          "ring": what the operator does in place of summaries
    examples        (key, batch, length) -> examples by name
    state_grows     whether the state's bytes depend on the number of tokens seen
    known_gaps      law -> reason, for laws that the mathematics of this operator cannot keep
    """

    name: str
    call: Callable[..., tuple[Array, State]]
    time_args: tuple[str, ...]
    step: Callable[[State, Inputs, Options], tuple[State, Array]]
    initial_state: Callable[[Inputs, Options], State]
    forms: Mapping[str, Callable[..., tuple[Array, State]]]
    summary_kind: Literal["prefix", "halo", "ring", "relay"]
    examples: Callable[[Array, int, int], dict[str, Example]]
    summarize: Callable[..., Summary] | None = None
    combine: Callable[..., Summary] | None = None
    apply: Callable[..., State] | None = None
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    whole: Callable[..., Array] | None = None
    head_axes: Mapping[str, int] = field(default_factory=dict)
    reach: Callable[[Inputs, Options], int | None] | None = None
    advance: Callable[[State, Array], State] = lambda state, n: state
    across: Across | None = None
    state_grows: bool = False
    known_gaps: Mapping[str, str] = field(default_factory=dict)
