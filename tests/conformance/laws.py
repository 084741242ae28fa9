"""The laws, each a function of a case that raises AssertionError where the law is broken.

The recurrent form, `lax.scan` of the operator's definition, is what everything else is held against: in float64
for operators, in float32 for layers.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from seqmodels.notation import MESH_AXES
from seqmodels.ops._kv_cache import KVCache
from seqmodels.ops._scan import Documents
from tests.conformance.cases import (
    BFLOAT16,
    FLOAT32,
    NOT_PLAIN,
    RECURRENT,
    Case,
    EncoderCase,
    LayerCase,
    OpCase,
    Outcome,
    Span,
    Variant,
    cotangents,
    weights,
)
from tests.conformance.compare import (
    Floats,
    assert_close,
    assert_equal,
    assert_zero,
    bytes_of,
    cast,
    floats_of,
    is_float,
)
from tests.conformance.layouts import (
    CHUNK,
    LAYOUTS,
    LENGTH,
    LONG,
    MESHES,
    MORE_MESHES,
    PACKED,
    PADDED,
    THIRDS,
    documents,
    spans,
)
from tests.tolerances import PRECISION_MULTIPLE, TOLERANCES, precision_floor


def check_forms(case: Case) -> None:
    """Law 1. Every form equals the recurrent one: outputs, final state, all gradients, through the state too."""
    with case.precisely():
        span = case.span(case.exact)
        for layout, segment_ids in LAYOUTS.items():
            marked = span._replace(segment_ids=segment_ids)
            expected = case.outcome(RECURRENT, marked, *weights(LENGTH))
            for variant in case.variants:
                found = case.outcome(variant, marked, *weights(LENGTH))
                _assert_same(found, expected, case.tolerance, f"{case}, {variant}, {layout}: ")
    if isinstance(case, OpCase):
        _check_from_none(case)


def _check_from_none(case: OpCase) -> None:
    """Without a state, without segment ids, an operator may run another program: it gives the same."""
    with case.precisely():
        arrays, variant = case.span(case.exact).arrays, case.variants[0]
        for layout, segment_ids in (("one document", None), ("packed", PACKED)):
            expected = case.outcome(RECURRENT, Span(arrays, None, LAYOUTS[layout]), *weights(LENGTH))
            found = case.outcome(variant, Span(arrays, None, segment_ids), *weights(LENGTH))
            _assert_same(found, expected, case.tolerance, f"{case}, {variant}, {layout}, from None: ")
            start, ids = case.fresh(arrays), LAYOUTS[layout]
            expected = case.forward(RECURRENT)(arrays, start, ids)
            found = case.forward(RECURRENT)(arrays, None, ids)
            assert_close(found, expected, TOLERANCES[case.tolerance], f"{case}, {layout}, from None: ")


def _assert_same(found: Outcome, expected: Outcome, tolerance: str, name: str) -> None:
    for part in Outcome._fields:
        assert_close(getattr(found, part), getattr(expected, part), TOLERANCES[tolerance], f"{name}{part}")


def check_split(case: Case) -> None:
    """Law 2. Spans one after the other equal the whole; prefill, then decode, equals the forward pass."""
    with case.precisely():
        span = case.span(case.exact)
        for layout in ("one document", "packed", "padded"):
            segment_ids = LAYOUTS[layout]
            expected = case.forward(RECURRENT)(span.arrays, span.state, segment_ids)
            for form in dict.fromkeys(variant.form for variant in case.variants):
                for lengths in case.splits if form == "chunked" else (THIRDS,):
                    found = _in_spans(case, Variant(form, CHUNK), span, segment_ids, lengths)
                    name = f"{case}, {form}, {layout}, spans of {lengths}: "
                    assert_close(found, expected, TOLERANCES[case.tolerance], name)


def _in_spans(
    case: Case, variant: Variant, span: Span, segment_ids: np.ndarray, lengths: tuple[int, ...]
) -> tuple[jax.Array, Any]:
    """Span by span. An operator is given a fresh state where a document starts with a span; a layer finds out."""
    state, outputs = span.state, []
    fresh, current = case.fresh(span.arrays), np.zeros(len(segment_ids), int)
    for start, end in spans(lengths):
        ids = segment_ids[:, start:end]
        first, last = (np.array([next((i for i in row if i), 0) for row in x]) for x in (ids, ids[:, ::-1]))
        if not case.finds_starts:
            starts = (first != 0) & (current != 0) & (first != current)
            state = jax.tree.map(lambda a, b, s=starts: np.where(_by_row(s, a), a, b), fresh, state)
        o, state = case.forward(variant)(case.cut(span.arrays, slice(start, end)), state, ids)
        current = np.where(last != 0, last, current)
        outputs.append(o)
    return jnp.concatenate(outputs, axis=1), state


def _by_row(rows: np.ndarray, x: Any) -> np.ndarray:
    return rows.reshape(-1, *(1,) * (x.ndim - 1))


def check_summary(case: OpCase) -> None:
    """Law 3. `combine` is associative, and `apply` of a span's summary gives the span's final state."""
    op = case.op
    assert op.summarize and op.combine and op.apply, f"{case}: has no summary"
    with case.precisely():
        span = case.span(case.exact)
        arrays, options = case.dispatched(span.arrays)
        summarize = jax.jit(lambda arrays, docs: op.summarize(arrays, docs, options))
        for layout in ("no segment ids", "packed", "padded"):
            segment_ids = LAYOUTS.get(layout)
            _, expected = case.forward(RECURRENT)(span.arrays, span.state, segment_ids)
            parts = []
            for start, end in spans(THIRDS):
                docs = None if segment_ids is None else _documents_of_span(segment_ids, start, end)
                parts.append(summarize(case.cut(arrays, slice(start, end)), docs))
            a, b, c = parts
            left = op.combine(op.combine(a, b, options), c, options)
            right = op.combine(a, op.combine(b, c, options), options)
            tolerance, name = TOLERANCES[case.tolerance], f"{case}, {layout}: "
            assert_close(left, right, tolerance, f"{name}combine")
            assert_close(op.apply(left, span.state, options), expected, tolerance, f"{name}apply")
            state = span.state
            for part in parts:
                state = op.apply(part, state, options)
            assert_close(state, expected, tolerance, f"{name}apply one by one")


def _documents_of_span(segment_ids: np.ndarray, start: int, end: int) -> Documents:
    """Documents of a span of a row, numbered from that of the last token before the span."""
    index, starts = np.zeros(segment_ids.shape, np.int32), np.zeros(segment_ids.shape, bool)
    for document in documents(segment_ids):
        if not document.first:
            index[document.row, document.places[0] :] += 1
            starts[document.row, document.places[0]] = True
    before = index[:, start - 1 : start] if start else 0
    return Documents(index[:, start:end] - before, segment_ids[:, start:end] != 0, starts[:, start:end])


def check_causality(case: Case) -> None:
    """Law 4. An output does not change with a later input, to the bit, and its gradient by it is 0."""
    with case.precisely():
        span, other = case.span(case.exact), case.span(case.exact, seed=2)
        packed = span._replace(segment_ids=PACKED)
        timed = [name for name, x in span.arrays.items() if case.is_timed(name, x)]
        every, no_state = weights(LENGTH)[0], np.zeros(len(PACKED))
        for variant in (RECURRENT, *case.variants):
            reference = case.outcome(variant, packed, every, no_state)
            for t in range(LENGTH - 1):
                only_t = np.where(np.arange(LENGTH) == t, every, 0)
                gradient = case.outcome(variant, packed, only_t, no_state).gradient
                later = {name: gradient[f"[0]['{name}']"][:, t + 1 :] for name in timed}
                assert_zero(later, f"{case}, {variant}: gradient of output {t} by later ")
                changed = dict(span.arrays)
                for name in timed:
                    changed[name] = np.concatenate(
                        [span.arrays[name][:, : t + 1], other.arrays[name][:, t + 1 :]], axis=1
                    )
                o = case.outcome(variant, packed._replace(arrays=changed), every, no_state).o
                what = f"{case}, {variant}: outputs up to {t}, with other inputs after it"
                assert_equal(o[:, : t + 1], reference.o[:, : t + 1], what)


def check_both_sides(case: EncoderCase) -> None:
    """Without causality an output depends on the tokens beside it in its document, and on no other document's.

    A gradient by a decay may be a difference of sums, so what does not depend has a gradient of rounding errors.
    """
    span = case.span(case.exact)._replace(segment_ids=PACKED)
    every, no_state = weights(LENGTH)[0], np.zeros(len(PACKED))
    for variant in (RECURRENT, *case.variants):
        for t in range(LENGTH):
            only_t = np.where(np.arange(LENGTH) == t, every, 0)
            by_x = np.abs(case.outcome(variant, span, only_t, no_state).gradient["[0]['x']"]).max(axis=-1)
            for document in documents(PACKED):
                if t in document.places:
                    row, tolerance = by_x[document.row], TOLERANCES[case.tolerance]
                    seen = set(np.flatnonzero(row > tolerance * row.max()).tolist())
                    beside = {t - 1, t + 1} & set(document.places)
                    name = f"{case}, {variant}: output {t} of row {document.row} depends on {sorted(seen)}; expected "
                    assert seen <= set(document.places), f"{name}none but {document.places}"
                    assert seen >= beside, f"{name}{sorted(beside)} among them"


def check_documents(case: Case) -> None:
    """Law 5. Packed documents equal the same documents run alone: outputs, final state, gradients."""
    _check_against_alone(case, PACKED, "packed")


def check_padding(case: Case) -> None:
    """Law 8. Padding changes no real token's output, not the final state, no gradient; its own gradient is 0."""
    _check_against_alone(case, PADDED, "padded")


def _check_against_alone(case: Case, segment_ids: np.ndarray, layout: str) -> None:
    real = segment_ids != 0
    output_weights, state_weights = weights(LENGTH)
    output_weights = output_weights * real
    with case.precisely():
        span = case.span(case.exact)._replace(segment_ids=segment_ids)
        expected = _alone(case, span, output_weights, state_weights)
        for variant in (RECURRENT, *case.variants):
            name = f"{case}, {variant}, {layout}: "
            found = case.outcome(variant, span, output_weights, state_weights)
            o = np.where(real[..., *[None] * (found.o.ndim - 2)], found.o, 0)
            _assert_same(found._replace(o=o), expected, case.tolerance, name)
            by_padding = {path: found.gradient[path][~real] for path in _timed_paths(case, span)}
            assert_zero(by_padding, f"{name}gradient by padding in ")


def _timed_paths(case: Case, span: Span) -> list[str]:
    return [f"[0]['{name}']" for name, x in span.arrays.items() if case.is_timed(name, x)]


def _alone(case: Case, span: Span, output_weights: np.ndarray, state_weights: np.ndarray) -> Outcome:
    """Each document in a run of its own, by the recurrent form; a row's first goes on from the incoming state.

    The outputs, states and gradients of these runs, put where they stand in the packed rows; 0 at padding.
    """
    fresh, timed = case.fresh(span.arrays), _timed_paths(case, span)
    shape = jax.eval_shape(case.forward(RECURRENT), *span._replace(segment_ids=None))[0].shape
    o = np.zeros(shape, case.exact)
    state = jax.tree.map(np.array, span.state)
    gradient = {path: np.zeros(x.shape) for path, x in floats_of((span.arrays, span.state))[0].items()}
    by_fresh = {path: np.zeros_like(x) for path, x in floats_of(state)[0].items()}
    # A row of padding alone hands its state through, and the cotangent of it back.
    empty = ~(span.segment_ids != 0).any(axis=1)
    handed_back = cotangents(floats_of((o, span.state))[0], state_weights)
    for path in gradient:
        if path.startswith("[1]"):
            gradient[path][empty] = handed_back[path][empty]

    for document in documents(span.segment_ids):
        row, places = slice(document.row, document.row + 1), document.places
        start = jax.tree.map(lambda x, row=row: x[row], span.state if document.first else fresh)
        # A layer's state says which document it belongs to; to an operator, one that is alone needs no id.
        ids = span.segment_ids[row, places] if case.finds_starts else None
        own = Span(case.cut(span.arrays, places, row), start, ids)
        result = case.outcome(RECURRENT, own, output_weights[row, places], state_weights[row] * document.last)
        o[row, places] = result.o
        if document.last:
            jax.tree.map(lambda whole, part, row=row: whole.__setitem__(row, part), state, result.state)
        for path, part in result.gradient.items():
            if path in timed:
                gradient[path][row, places] = part
            elif path.startswith("[0]"):
                gradient[path] += part
            elif document.first:
                gradient[path][row] = part
            else:
                by_fresh[path.removeprefix("[1]")][row] += part
    for path, part in _through_fresh(case, span, by_fresh).items():
        gradient[f"[0]{path}"] += part
    return Outcome(o, state, gradient)


def _through_fresh(case: Case, span: Span, by_fresh: Floats) -> Floats:
    """The gradient by the arrays that a fresh state is made from, out of the gradient by that state."""
    floats, replaced = floats_of(span.arrays)
    _, backward = jax.vjp(lambda floats: floats_of(case.fresh(replaced(floats)))[0], floats)
    return backward({path: jnp.asarray(x) for path, x in by_fresh.items()})[0]


def check_state(case: Case) -> None:
    """Law 9. The state is made like the initial one, in float32, of as many bytes however many tokens were seen.

    A cache of inputs may keep them in their dtype.
    """
    for dtype in (FLOAT32, BFLOAT16):
        sizes = set()
        for length in (LENGTH, 2 * LENGTH):
            arrays = case.shapes(dtype, length)
            fresh = jax.eval_shape(lambda x, n=length: case.fresh(x, n), arrays)
            for variant in (RECURRENT, *case.variants):
                _, state = jax.eval_shape(lambda x, v=variant: case.call(v, x, None, None), arrays)
                _assert_state(case, state, fresh, dtype, f"{case}, {variant}, {dtype}, {length} tokens: ")
                sizes.add(bytes_of(state))
        assert case.op.state_grows or len(sizes) == 1, f"{case}: bytes of the state by length: {sizes}"


def check_start(case: LayerCase) -> None:
    """A stream that starts from None equals one that starts from `initial_state`.

    Not to the bit: from None a program may leave out an empty state, and adds in another order.
    """
    span, start = case.span(FLOAT32), case.fresh(case.span(FLOAT32).arrays, LENGTH)
    found, expected = (case.forward(case.variants[0])(span.arrays, x, PACKED) for x in (None, start))
    assert_close(found, expected, TOLERANCES["jit"], f"{case}: from None instead of initial_state: ")


def _assert_state(case: Case, state: Any, fresh: Any, dtype: np.dtype, name: str) -> None:
    made, expected = (
        {jax.tree_util.keystr(path): (x.shape, str(x.dtype)) for path, x in jax.tree.leaves_with_path(tree)}
        for tree in (state, fresh)
    )
    same = jax.tree.structure(state) == jax.tree.structure(fresh) and made == expected
    assert same, f"{name}the final state is {made}, the initial {expected}"
    for path, part in jax.tree.leaves_with_path(state, is_leaf=lambda x: isinstance(x, KVCache)):
        allowed = {FLOAT32, dtype} if isinstance(part, KVCache) else {FLOAT32}
        where = f"{name}state{jax.tree_util.keystr(path)}"
        for x in jax.tree.leaves(part):
            assert not is_float(x) or x.dtype in allowed, f"{where} is {x.dtype}"


def check_precision(case: Case) -> None:
    """Law 10. A form's error in low precision is at most a small multiple of the recurrent's, early and late."""
    if not case.is_asked("precision"):
        return
    chunked, random = Variant("chunked"), weights(LONG)
    for dtype in case.low_precisions:
        span = case.span(dtype, LONG)
        by_recurrent, by_chunks = (case.outcome(variant, span, *random) for variant in (RECURRENT, chunked))
        with case.precisely():
            exact = cast(span, case.exact)
            truth = case.outcome(RECURRENT, exact, *random)
        recurrent_error = _errors(by_recurrent, truth)
        for what, error in _errors(by_chunks, truth).items():
            bound = PRECISION_MULTIPLE * recurrent_error[what] + precision_floor(dtype)
            assert error <= bound, (
                f"{case}, chunked, {dtype}: the error of {what} is {error:.1e}, that of the recurrent form "
                f"{recurrent_error[what]:.1e}; expected at most {bound:.1e}"
            )


def _errors(found: Outcome, truth: Outcome) -> dict[str, float]:
    """Relative errors: of the outputs by time decile, of each part of the final state, of each gradient."""
    length = truth.o.shape[1]
    pairs = {}
    for decile in range(10):
        part = slice(decile * length // 10, (decile + 1) * length // 10)
        pairs[f"outputs in decile {decile}"] = found.o[:, part], truth.o[:, part]
    states = zip(jax.tree.leaves_with_path(found.state), jax.tree.leaves(truth.state))
    pairs |= {f"state{jax.tree_util.keystr(path)}": (have, want) for (path, have), want in states}
    pairs |= {f"gradient{path}": (found.gradient[path], want) for path, want in truth.gradient.items()}
    floats = {what: tuple(np.asarray(x, np.float64) for x in pair) for what, pair in pairs.items()}
    return {
        what: np.abs(have - want).max() / (np.abs(want).max() or 1) for what, (have, want) in floats.items()
    }


def check_extremes(case: OpCase) -> None:
    """Law 11. Finite, and equal to the recurrent form in float64, at extreme gates and scores, in float32.

    Spans of 1, C - 1, C and 3 C + 5 tokens; in one document, and in one for each token.
    """
    if not case.is_asked("extremes"):
        return
    whole = case.span(FLOAT32)
    for length in (1, CHUNK - 1, CHUNK, 3 * CHUNK + 5):
        arrays, random = case.cut(whole.arrays, slice(length)), weights(length)
        for layout in ("one document", "a document per token"):
            span = Span(arrays, whole.state, LAYOUTS[layout][:, :length])
            with case.precisely():
                expected = case.outcome(RECURRENT, cast(span, case.exact), *random)
            for form in case.op.forms:
                found = case.outcome(Variant(form, CHUNK), span, *random)
                _assert_same(found, expected, "extreme", f"{case}, {form}, {length} tokens, {layout}: ")


def check_jit(case: Case) -> None:
    """Law 12. Compiled as one program, and run operation by operation: the same."""
    span = case.span(FLOAT32)
    for form in dict.fromkeys(variant.form for variant in case.variants):
        variant = Variant(form, CHUNK)
        compiled = case.forward(variant)(span.arrays, span.state, PACKED)
        eager = case.call(variant, *jax.tree.map(jnp.asarray, span._replace(segment_ids=PACKED)))
        assert_close(eager, compiled, TOLERANCES["jit"], f"{case}, {variant}: ")


def check_devices(case: Case, meshes: Iterable[tuple[int, ...]] = MESHES, exchange: str = "auto") -> None:
    """Law 7. On a mesh of devices, whatever its axes: the same outputs, final state and gradients as on one device."""
    with case.precisely():
        span, variant = case.span(case.exact), Variant("chunked", CHUNK, exchange)
        starts = {"no segment ids": None, "packed": span.state, "padded": span.state}
        for layout, state in starts.items():
            marked = Span(span.arrays, state, LAYOUTS.get(layout))
            expected = case.outcome(RECURRENT, marked, *weights(LENGTH))
            for sizes in meshes:
                sizes = sizes if case.splits_heads else (*sizes[:3], 1)
                mesh = jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
                with jax.set_mesh(mesh):
                    on_devices = case.differentiated(variant)(marked, *weights(LENGTH))
                name = f"{case}, {variant}, {layout}, on {dict(mesh.shape)}: "
                assert on_devices.o.sharding.num_devices == mesh.size, f"{name}the outputs are on one device"
                _assert_same(jax.device_get(on_devices), expected, case.tolerance, name)


def check_more_devices(case: Case) -> None:
    """Law 7 on other meshes."""
    check_devices(case, MORE_MESHES)


# Kernels (law 6) have a suite of their own.
OP_LAWS: dict[str, Callable[[OpCase], None]] = {
    "forms": check_forms,
    "split": check_split,
    "summary": check_summary,
    "causality": check_causality,
    "documents": check_documents,
    "padding": check_padding,
    "state": check_state,
    "precision": check_precision,
    "extremes": check_extremes,
    "jit": check_jit,
    "devices": check_devices,
    "more meshes": check_more_devices,
}
LAYER_LAWS: dict[str, Callable[[LayerCase], None]] = {
    "forms": check_forms,
    "split": check_split,
    "causality": check_causality,
    "both sides": check_both_sides,
    "documents": check_documents,
    "padding": check_padding,
    "state": check_state,
    "start": check_start,
    "precision": check_precision,
    "jit": check_jit,
    "devices": check_devices,
    "more meshes": check_more_devices,
}


def each_law_on_each_case(laws: dict[str, Callable], cases: Iterable[Case]) -> pytest.MarkDecorator:
    """Parametrises a test with `law` and `case`, but for laws that the operator says it cannot keep, and for those
    that are not asked of a case."""
    pairs = [
        (law, case)
        for case in cases
        for law in laws
        if law not in case.op.known_gaps and case.is_asked(law)
    ]

    def marks(law: str, case: Case) -> list[pytest.MarkDecorator]:
        long = {*NOT_PLAIN.get(case.name, ()), *NOT_PLAIN.get(str(case), ())}
        slow = (case.plain_laws is not None and law not in case.plain_laws) or law in long
        return [pytest.mark.xdist_group(str(case)), *([pytest.mark.slow] if slow else [])]

    return pytest.mark.parametrize(
        ("law", "case"),
        [pytest.param(laws[law], case, id=f"{case}: {law}", marks=marks(law, case)) for law, case in pairs],
    )
