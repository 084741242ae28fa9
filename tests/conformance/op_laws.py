"""The laws of an operator. Each is a function of an `OpCase` that raises AssertionError where the law is broken.

The recurrent form, `lax.scan` of the operator's definition, run in float64, is what everything else is held against.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from seqmodels.ops._scan import Documents
from tests.conformance.compare import assert_close, assert_equal, assert_zero, bytes_of, cast, floats_of, is_float
from tests.conformance.layouts import (
    CHUNK,
    DECODE,
    LAYOUTS,
    LENGTH,
    PACKED,
    PADDED,
    SPLITS,
    WHOLE,
    documents,
    spans,
)
from tests.conformance.op_case import RECURRENT, OpCase, Outcome, Span, Variant, arguments, cotangents, weights
from tests.tolerances import PRECISION_MULTIPLE, TOLERANCES, precision_floor

BFLOAT16 = ml_dtypes.bfloat16


def check_forms(case: OpCase) -> None:
    """Law 1. Every form equals the recurrent one: outputs, final state, and all gradients, through the state too."""
    with jax.enable_x64(True):
        span = case.span()
        for layout, segment_ids in LAYOUTS.items():
            expected = case.outcome(RECURRENT, span._replace(segment_ids=segment_ids), *weights(LENGTH))
            for variant in case.variants:
                found = case.outcome(variant, span._replace(segment_ids=segment_ids), *weights(LENGTH))
                _same(found, expected, "forms", f"{case}, {variant}, {layout}: ")
        expected = case.outcome(RECURRENT, span._replace(segment_ids=WHOLE), *weights(LENGTH))
        for variant in case.variants[:1]:
            found = case.outcome(variant, span, *weights(LENGTH))
            _same(found, expected, "forms", f"{case}, {variant}, no segment ids: ")


def check_split(case: OpCase) -> None:
    """Law 2. Two spans one after the other equal the whole; prefill, then decode, equals the forward pass."""
    with jax.enable_x64(True):
        span = case.span()
        for layout in ("one document", "packed", "padded"):
            segment_ids = LAYOUTS[layout]
            expected = case.forward(RECURRENT)(span.arrays, span.state, segment_ids)
            for lengths in (*SPLITS, DECODE):
                for form in case.op.forms:
                    if form != "chunked" and lengths != SPLITS[2]:
                        continue
                    found = _in_spans(case, Variant(form, CHUNK), span, segment_ids, lengths)
                    name = f"{case}, {form}, {layout}, spans of {lengths}: "
                    assert_close(found, expected, TOLERANCES["forms"], name)


def _in_spans(case: OpCase, variant: Variant, span: Span, segment_ids: np.ndarray, lengths: tuple[int, ...]):
    """Span by span. A row whose next document is another one than the last starts it from a fresh state."""
    state, outputs = span.state, []
    fresh, current = case.fresh(span.arrays), np.zeros(len(segment_ids), int)
    for start, end in spans(lengths):
        ids = segment_ids[:, start:end]
        first = np.array([next((i for i in row if i), 0) for row in ids])
        last = np.array([next((i for i in row[::-1] if i), 0) for row in ids])
        starts = (first != 0) & (current != 0) & (first != current)
        state = _rows(starts, fresh, state)
        o, state = case.forward(variant)(case.cut(span.arrays, slice(start, end)), state, ids)
        current = np.where(last != 0, last, current)
        outputs.append(o)
    return jnp.concatenate(outputs, axis=1), state


def _rows(condition: np.ndarray, if_true, if_false):
    return jax.tree.map(
        lambda a, b: np.where(condition.reshape(-1, *(1,) * (a.ndim - 1)), a, b), if_true, if_false
    )


def check_summary(case: OpCase) -> None:
    """Law 3. `combine` is associative, and `apply` of a span's summary gives the span's final state."""
    op = case.op
    with jax.enable_x64(True):
        span = case.span()
        arrays, options = arguments(op, span.arrays, case.options)
        summarize = jax.jit(lambda arrays, docs: op.summarize(arrays, docs, options))
        for layout in ("none", "packed", "padded"):
            segment_ids = LAYOUTS.get(layout)
            _, expected = case.forward(RECURRENT)(span.arrays, span.state, segment_ids)
            index, real = (None, None) if segment_ids is None else _numbered(segment_ids)
            parts = []
            for start, end in spans(SPLITS[2]):
                docs = None
                if index is not None:
                    before = index[:, start - 1 : start] if start else 0
                    docs = Documents(index[:, start:end] - before, real[:, start:end])
                parts.append(summarize(case.cut(arrays, slice(start, end)), docs))
            a, b, c = parts
            tolerance, name = TOLERANCES["forms"], f"{case}, segment ids {layout}: "
            one, other = (
                op.combine(op.combine(a, b, options), c, options),
                op.combine(a, op.combine(b, c, options), options),
            )
            assert_close(one, other, tolerance, name + "combine")
            assert_close(op.apply(one, span.state, options), expected, tolerance, name + "apply")
            state = span.state
            for part in parts:
                state = op.apply(part, state, options)
            assert_close(state, expected, tolerance, name + "apply one by one")


def _numbered(segment_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of each position's document in its row, from 0; padding belongs to the document before it."""
    index = np.zeros(segment_ids.shape, np.int32)
    for document in documents(segment_ids):
        if not document.first:
            index[document.row, document.places[0] :] += 1
    return index, segment_ids != 0


def check_causality(case: OpCase) -> None:
    """Law 4. An output neither changes with a later input, to the bit, nor has a gradient by it other than 0."""
    with jax.enable_x64(True):
        span, other = case.span(), case.span(seed=2)
        state_weights = np.zeros(len(PACKED))
        for variant in (RECURRENT, *case.variants):
            name = f"{case}, {variant}: "
            packed = span._replace(segment_ids=PACKED)
            all_weights = weights(LENGTH)[0]
            reference = case.outcome(variant, packed, all_weights, state_weights)
            for t in range(LENGTH - 1):
                only_t = np.where(np.arange(LENGTH) == t, all_weights, 0)
                gradient = case.outcome(variant, packed, only_t, state_weights).gradient
                for array in case.op.time_args:
                    path = f"[0]['{array}']"
                    if path in gradient and case.is_timed(array, span.arrays[array]):
                        later = gradient[path][:, t + 1 :]
                        assert_zero(later, f"{name}gradient of output {t} by later {array}")
                changed = {
                    k: np.where(_after(t, x), other.arrays[k], x) if case.is_timed(k, x) else x
                    for k, x in span.arrays.items()
                }
                o = case.outcome(variant, packed._replace(arrays=changed), all_weights, state_weights).o
                assert_equal(o[:, : t + 1], reference.o[:, : t + 1], f"{name}outputs up to {t}, changed after")


def _after(t: int, x: np.ndarray) -> np.ndarray:
    return (np.arange(x.shape[1]) > t).reshape(1, -1, *(1,) * (x.ndim - 2))


def check_documents(case: OpCase) -> None:
    """Law 5. Packed documents equal the same documents run alone: outputs, final state, gradients."""
    _check_against_alone(case, PACKED, "packed")


def check_padding(case: OpCase) -> None:
    """Law 8. Padding changes nothing: not the outputs of real tokens, the final state, or any gradient; its own are 0."""
    _check_against_alone(case, PADDED, "padded")


def _check_against_alone(case: OpCase, segment_ids: np.ndarray, layout: str) -> None:
    with jax.enable_x64(True):
        span = case.span()
        expected = _alone(case, span, segment_ids, *weights(LENGTH))
        padding = segment_ids == 0
        for variant in (RECURRENT, *case.variants):
            name = f"{case}, {variant}, {layout}: "
            found = case.outcome(variant, span._replace(segment_ids=segment_ids), *weights(LENGTH))
            _same(found, expected, "forms", name)
            timed = {
                k: found.gradient[f"[0]['{k}']"][padding] for k, x in span.arrays.items() if case.is_timed(k, x)
            }
            assert_zero((found.o[padding], timed), f"{name}outputs and gradients of padding")


def _alone(
    case: OpCase, span: Span, segment_ids: np.ndarray, output_weights: np.ndarray, state_weights: np.ndarray
) -> Outcome:
    """Each document in a run of its own, by the recurrent form; a row's first one goes on from the incoming state."""
    fresh = case.fresh(span.arrays)
    whole = jax.eval_shape(lambda: case.call(RECURRENT, span.arrays, span.state, None))[0]
    o = np.zeros(whole.shape)
    # A row of padding alone hands its state through, and the cotangent back.
    state = jax.tree.map(np.array, span.state)
    handed_back = cotangents(floats_of((o, span.state))[0], state_weights)
    empty = ~(segment_ids != 0).any(axis=1)
    gradient = {path: np.zeros(x.shape) for path, x in floats_of((span.arrays, span.state))[0].items()}
    for path in gradient:
        if path.startswith("[1]"):
            gradient[path][empty] = handed_back[path][empty]
    for document in documents(segment_ids):
        row, places = slice(document.row, document.row + 1), document.places
        start = span.state if document.first else fresh
        own = Span(case.cut(span.arrays, places, row), jax.tree.map(lambda x, row=row: x[row], start), None)
        result = case.outcome(
            RECURRENT, own, output_weights[row, places], state_weights[row] * float(document.last)
        )
        o[row, places] = result.o
        if document.last:
            jax.tree.map(lambda whole, own, row=row: whole.__setitem__(row, own), state, result.state)
        for path, x in result.gradient.items():
            name = path.removeprefix("[0]['").removesuffix("']")
            if path.startswith("[1]"):
                if document.first:
                    gradient[path][row] = x
            elif case.is_timed(name, span.arrays[name]):
                gradient[path][row, places] = x
            else:
                gradient[path] += x
    return Outcome(o, state, gradient)


def check_state(case: OpCase) -> None:
    """Law 9. The state has the structure, shapes and dtypes of the initial one; float32; its bytes constant in T.

    A state that grows is a cache of inputs and may keep them in their dtype.
    """
    for dtype in (np.float32, BFLOAT16):
        allowed = {np.dtype(np.float32), np.dtype(dtype)} if case.op.state_grows else {np.dtype(np.float32)}
        sizes = set()
        for length in (1, LENGTH, 2 * LENGTH):
            examples = jax.eval_shape(lambda n=length: _arrays(case, n))
            arrays = {name: _retyped(name, x, dtype) for name, x in examples.items()}
            fresh = jax.eval_shape(case.fresh, arrays)
            for variant in (RECURRENT, *case.variants):
                _, state = jax.eval_shape(lambda a, v=variant: case.call(v, a, None, None), arrays)
                name = f"{case}, {variant}, {np.dtype(dtype)}, {length} tokens: "
                assert state == fresh, f"{name}the final state {state} is not made like the initial one {fresh}"
                for path, leaf in jax.tree.leaves_with_path(state):
                    where = f"{name}state{jax.tree_util.keystr(path)}"
                    assert not is_float(leaf) or leaf.dtype in allowed, f"{where} is {leaf.dtype}"
                sizes.add(bytes_of(state))
        assert case.op.state_grows or len(sizes) == 1, f"{case}: the state's bytes depend on the length: {sizes}"


def _arrays(case: OpCase, length: int) -> dict:
    return case.op.examples(jax.random.key(0), 2, length)[case.example_name].arrays


def _retyped(name: str, x, dtype):
    if x is None or name == "g" or not is_float(x):
        return x
    return jax.ShapeDtypeStruct(x.shape, dtype)


def check_precision(case: OpCase) -> None:
    """Law 10. In low precision a form's error is at most a small multiple of the recurrent form's, early and late."""
    if case.is_extreme:
        return
    length = 160
    for dtype in (np.float32, BFLOAT16):
        span = case.span(dtype, length)
        random = weights(length)
        results = {variant: case.outcome(variant, span, *random) for variant in (RECURRENT, Variant("chunked"))}
        with jax.enable_x64(True):
            truth = case.outcome(RECURRENT, Span(*cast((span.arrays, span.state), np.float64), None), *random)
        recurrent = _errors(results[RECURRENT], truth)
        for what, error in _errors(results[Variant("chunked")], truth).items():
            bound = PRECISION_MULTIPLE * recurrent[what] + precision_floor(dtype)
            assert error <= bound, (
                f"{case}, chunked, {np.dtype(dtype)}: error of {what} is {error:.1e}, that of the recurrent form "
                f"{recurrent[what]:.1e}; expected at most {bound:.1e}"
            )


def _errors(found: Outcome, truth: Outcome) -> dict[str, float]:
    """Relative errors of the outputs by time decile, of each part of the final state and of each gradient."""
    pairs = {}
    for decile in range(10):
        part = slice(decile * truth.o.shape[1] // 10, (decile + 1) * truth.o.shape[1] // 10)
        pairs[f"outputs in decile {decile}"] = found.o[:, part], truth.o[:, part]
    for path, want in jax.tree.leaves_with_path(truth.state):
        have = dict(jax.tree.leaves_with_path(found.state))[path]
        pairs[f"state{jax.tree_util.keystr(path)}"] = have, want
    for path, want in truth.gradient.items():
        pairs[f"gradient{path}"] = found.gradient[path], want
    pairs = {what: tuple(np.asarray(x, np.float64) for x in pair) for what, pair in pairs.items()}
    return {what: np.abs(a - b).max() / (np.abs(b).max() or 1) for what, (a, b) in pairs.items()}


def check_extremes(case: OpCase) -> None:
    """Law 11. Finite, and equal to the recurrent form in float64, at extreme gates and lengths, in float32.

    Spans of 1, C - 1, C and 3 C + 5 tokens, in one document and in one for each token.
    """
    if not case.is_extreme:
        return
    for length in (1, CHUNK - 1, CHUNK, 3 * CHUNK + 5):
        span = case.span(np.float32, LENGTH)
        span = span._replace(arrays=case.cut(span.arrays, slice(length)))
        random = weights(length)
        for layout in ("one document", "a document per token"):
            segment_ids = LAYOUTS[layout][:, :length]
            with jax.enable_x64(True):
                exact = Span(*cast((span.arrays, span.state), np.float64), segment_ids)
                expected = case.outcome(RECURRENT, exact, *random)
            for form in case.op.forms:
                found = case.outcome(Variant(form, CHUNK), span._replace(segment_ids=segment_ids), *random)
                _same(found, expected, "extreme", f"{case}, {form}, {length} tokens, {layout}: ")


def check_jit(case: OpCase) -> None:
    """Law 12. Compiled as one program, and run operation by operation: the same."""
    span = case.span(np.float32)
    for variant in (RECURRENT, *case.variants):
        compiled = case.forward(variant)(span.arrays, span.state, PACKED)
        eager = case.call(variant, span.arrays, span.state, jnp.asarray(PACKED))
        assert_close(eager, compiled, TOLERANCES["jit"], f"{case}, {variant}: ")


def _same(found: Outcome, expected: Outcome, tolerance: str, name: str) -> None:
    for part in Outcome._fields:
        assert_close(getattr(found, part), getattr(expected, part), TOLERANCES[tolerance], f"{name}{part}")


# Numbered as in the design: 6 (kernels) and 7 (devices) have their own suites.
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
}
