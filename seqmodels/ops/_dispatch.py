"""The one place that chooses how an operator runs: its form and its backend."""

import functools
import logging
from typing import NamedTuple

import jax

from seqmodels.errors import InputError, nearest
from seqmodels.notation import Array, SegmentIds
from seqmodels.ops import _mesh, _scan, _sequence_parallel
from seqmodels.ops._op import Inputs, Kernel, Options, SeqOp, State
from seqmodels.ops._scan import Documents
from seqmodels.ops._sequence_parallel import flip_documents, read_backwards

logger = logging.getLogger(__name__)


def run(
    op: SeqOp,
    arrays: Inputs,
    options: Options,
    *,
    initial_state: State | None,
    segment_ids: SegmentIds | Documents | None,
    form: str,
    chunk_size: int | None,
    backend: str,
    exchange: str = "auto",
    causal: bool = True,
) -> tuple[Array, State]:
    """Run `op` in one form on one backend.

    form: "recurrent", or one of `op.forms`; a span of one token is always one `step`.
    segment_ids: [b, t] ids, or the `Documents` that a layer works out once for all its operators.
    backend: "xla" or one of `op.kernels`, which run or raise; "auto" takes the first kernel that supports the
    arguments on the platform the program is lowered for, of those that are `automatic`, else "xla". Kernels serve the
    chunked form alone.
    exchange: how shards of the time axis exchange what they need, where a mesh in context splits it: see
    `_sequence_parallel`.
    causal: False lets every position see its whole document: by `op.whole`, or else the span and the reversed span
    run one after the other and their outputs added, as in Vision Mamba (Zhu et al. 2024, arXiv 2401.09417). Nothing
    can follow such a span: its state is (), and a state handed in is an error.
    """
    forms = ("recurrent", *op.forms)
    if form not in forms:
        raise InputError(f"{op.name}: form={form!r} is not a form of it; {nearest(form, forms)}")
    if backend not in ("auto", "xla", *op.kernels):
        valid = ("auto", "xla", *op.kernels)
        raise InputError(f"{op.name}: backend={backend!r} does not exist for it; {nearest(backend, valid)}")
    if chunk_size is not None and chunk_size < 1:
        raise InputError(f"{op.name}: chunk_size={chunk_size}; expected a positive number of tokens")
    _sequence_parallel.check_exchange(op, arrays, options, exchange)
    batch, length = arrays[op.time_args[0]].shape[:2]
    if length == 0:
        raise InputError(f"{op.name}: {op.time_args[0]} has no positions; expected a span of at least one token")
    docs = segment_ids
    if segment_ids is not None and not isinstance(segment_ids, Documents):
        if segment_ids.shape != (batch, length):
            raise InputError(
                f"{op.name}: segment_ids has shape {segment_ids.shape}; expected {(batch, length)} as the inputs have"
            )
        docs = _scan.documents(segment_ids)
    how = _How(form, chunk_size, backend, exchange)
    if not causal:
        if jax.tree.leaves(initial_state):
            raise InputError(f"{op.name}: causal=False has no state to go on from; expected initial_state=None")
        return _whole(op, arrays, docs, options, how), ()
    if initial_state is not None:
        initial_state = _checked_state(op, initial_state, op.initial_state(arrays, options))
    return _spread_out(op, arrays, docs, initial_state, options, how)


class _How(NamedTuple):
    """Arguments of `run`."""

    form: str
    chunk_size: int | None
    backend: str
    exchange: str


def _spread_out(
    op: SeqOp,
    arrays: Inputs,
    docs: Documents | None,
    state: State | None,
    options: Options,
    how: _How,
    **order: bool,
) -> tuple[Array, State]:
    """Over the devices of the mesh in context, or here where there is none. order: as for `_sequence_parallel.run`."""

    def run_here(arrays: Inputs, docs: Documents | None, state: State | None) -> tuple[Array, State]:
        return _run_here(op, arrays, docs, state, options, how)

    mesh = _mesh.view()
    if mesh is not None:
        way = {"chunk_size": how.chunk_size, "exchange": how.exchange, **order}
        return _sequence_parallel.run(op, arrays, docs, state, options, run_here, mesh, **way)
    if order.get("backwards", False):
        return read_backwards(op, run_here, arrays, docs, state)
    return run_here(arrays, docs, state)


def _run_here(
    op: SeqOp, arrays: Inputs, docs: Documents | None, state: State | None, options: Options, how: _How
) -> tuple[Array, State]:
    """On one device."""
    form, chunk_size, backend, _ = how
    options = {**options, "fresh": state is None}
    fresh = op.initial_state(arrays, options)
    state = fresh if state is None else state
    if form == "recurrent" or (arrays[op.time_args[0]].shape[1] == 1 and form == "chunked"):
        return _scan.recurrent(op.step, fresh, arrays, op.time_args, state, docs, options)
    implementation = functools.partial(op.forms[form], chunk_size=chunk_size, options=options)
    if form != "chunked" or backend == "xla" or not op.kernels:
        return implementation(arrays, state, docs)
    asked = {**options, "chunk_size": chunk_size, "documents": docs is not None}
    if backend != "auto":
        reason = _why_not(op.kernels[backend], arrays, asked)
        if reason:
            raise InputError(f"{op.name}: backend {backend!r} cannot run this: {reason}")
        return op.kernels[backend].call(arrays, state, docs, chunk_size=chunk_size, options=options)
    chosen = {}
    for name, kernel in op.kernels.items():
        if kernel.is_automatic(arrays) and kernel.platform not in chosen and _why_not(kernel, arrays, asked) is None:
            _log_once(f"{op.name}: backend {name} where it is lowered for {kernel.platform}")
            chosen[kernel.platform] = functools.partial(kernel.call, chunk_size=chunk_size, options=options)
    return jax.lax.platform_dependent(arrays, state, docs, default=implementation, **chosen)


def _why_not(kernel: Kernel, arrays: Inputs, asked: Options) -> str | None:
    """The partitioner cannot split a kernel: it sees whole arrays."""
    if _mesh.is_spread():
        return "the arrays may be spread over a mesh; expected one device, or the inside of jax.shard_map"
    return kernel.supports(arrays, asked)


def _whole(op: SeqOp, arrays: Inputs, docs: Documents | None, options: Options, how: _How) -> Array:
    """Outputs that see what comes before and what comes after."""

    def both_ways(arrays: Inputs, options: Options) -> Array:
        back = None
        if docs is not None:
            back = flip_documents(_scan.backwards(docs))
        forward, _ = _spread_out(op, arrays, docs, None, options, how)
        backward, _ = _spread_out(op, arrays, back, None, options, how, backwards=True)
        return forward + backward

    if op.whole is None:
        return both_ways(arrays, options)
    mesh = _mesh.view()
    if op.across is not None and mesh is not None and mesh.n_time > 1:
        return _spread_out(op, arrays, docs, None, options, how, causal=False)[0]
    return op.whole(arrays, docs, how.chunk_size, options, both_ways)


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)


def _checked_state(op: SeqOp, state: State, fresh: State) -> State:
    """The state a caller hands in, with its structure, shapes and dtypes compared to the operator's own."""
    expected, found = (jax.tree.structure(x) for x in (fresh, state))
    if found != expected:
        raise InputError(f"{op.name}: initial_state has the structure {found}; expected {expected}")
    if not op.state_grows:
        for (path, want), have in zip(jax.tree.leaves_with_path(fresh), jax.tree.leaves(state)):
            if want.shape != have.shape:
                where = jax.tree_util.keystr(path)
                raise InputError(
                    f"{op.name}: initial_state{where} has shape {have.shape}; expected {want.shape} for these inputs"
                )
    return jax.tree.map(lambda want, have: have.astype(want.dtype), fresh, state)
