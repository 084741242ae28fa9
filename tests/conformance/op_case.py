"""One operator on one of its examples, ready to be run in any form, span, dtype and layout."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.ops import _dispatch
from seqmodels.ops._op import Inputs, Options, SeqOp, State
from tests.conformance.compare import Floats, cast, floats_of
from tests.conformance.layouts import BATCH, CHUNK, LENGTH

# The state that a span starts from is what the tokens before it left: one that the operator can really reach.
TOKENS_BEFORE = 5


class Variant(NamedTuple):
    """A form and the length of its chunks."""

    form: str
    chunk_size: int | None = None


class Span(NamedTuple):
    """The arguments of one run. State and segment ids may be None."""

    arrays: Inputs
    state: State
    segment_ids: np.ndarray | None


class Outcome(NamedTuple):
    """What a run gives: outputs, final state, and the gradients of a weighted sum of both."""

    o: jax.Array
    state: State
    gradient: Floats


RECURRENT = Variant("recurrent")


@contextlib.contextmanager
def described_by(op: SeqOp) -> Iterator[None]:
    """Within, the public function runs by this description of its operator: that of a test may be an altered one."""
    run = _dispatch.run

    def run_described(own: SeqOp, *args: Any, **kwargs: Any):
        return run(op if own.name == op.name else own, *args, **kwargs)

    with mock.patch.object(_dispatch, "run", run_described):
        yield


def arguments(op: SeqOp, arrays: Inputs, options: Options) -> tuple[Inputs, Options]:
    """Arrays and options in the shape in which the public function hands them to the operator's parts."""

    class Reached(Exception):
        pass

    def stop(own: SeqOp, arrays: Inputs, options: Options, **kwargs: Any):
        raise Reached(arrays, options)

    with mock.patch.object(_dispatch, "run", stop):
        try:
            op.call(**arrays, **options)
        except Reached as reached:
            return reached.args
    raise AssertionError(f"{op.name}: the public function does not go through _dispatch.run")


class OpCase:
    """An operator on one example. Programs are compiled once per variant and shape, whichever law asks."""

    def __init__(self, op: SeqOp, example: str):
        self.op = op
        self.example_name = example
        example_of = op.examples(jax.random.key(0), BATCH, TOKENS_BEFORE + LENGTH)[example]
        self.options, self.is_extreme = example_of.options, example_of.extreme

    def __repr__(self) -> str:
        return f"{self.op.name}, {self.example_name}"

    @property
    def variants(self) -> list[Variant]:
        """Every form but the recurrent; the chunked one in small chunks and in those of its own choice."""
        found = []
        for form in self.op.forms:
            found += [Variant(form, CHUNK), Variant(form)] if form == "chunked" else [Variant(form)]
        return found

    @functools.cache  # noqa: B019
    def span(self, dtype: Any = np.float64, length: int = LENGTH, seed: int = 1) -> Span:
        """Arrays of that length and dtype, and the state that tokens before them left. Log decays stay float32."""
        examples = self.op.examples(jax.random.key(seed), BATCH, TOKENS_BEFORE + length)
        exact = cast(examples[self.example_name].arrays, np.float32)
        arrays = {name: x if name == "g" else cast(x, dtype) for name, x in exact.items()}
        if dtype == np.float64:
            arrays = cast(arrays, dtype)
        before, after = (self.cut(arrays, part) for part in (slice(TOKENS_BEFORE), slice(TOKENS_BEFORE, None)))
        _, state = self.forward(RECURRENT)(before, None, None)
        return Span(after, state, None)

    def fresh(self, arrays: Inputs) -> State:
        """The state before the first token of a document."""
        return self.op.initial_state(*arguments(self.op, arrays, self.options))

    def is_timed(self, name: str, x: Any) -> bool:
        return name in self.op.time_args and x is not None and x.ndim > 1

    def cut(self, arrays: Inputs, places: Any, rows: Any = slice(None)) -> Inputs:
        """Some rows and places of the arrays that have a time axis."""
        return {name: x[rows][:, places] if self.is_timed(name, x) else x for name, x in arrays.items()}

    def call(self, variant: Variant, arrays: Inputs, state: State, segment_ids: Any) -> tuple[jax.Array, State]:
        """The public function, not compiled."""
        with described_by(self.op):
            return self.op.call(
                **arrays,
                **self.options,
                initial_state=state,
                segment_ids=segment_ids,
                form=variant.form,
                chunk_size=variant.chunk_size,
            )

    @functools.cache  # noqa: B019
    def forward(self, variant: Variant):
        """Compiled (arrays, state, segment_ids) -> (o, state)."""
        return jax.jit(functools.partial(self.call, variant))

    @functools.cache  # noqa: B019
    def _differentiated(self, variant: Variant):
        def run(span: Span, output_weights: jax.Array, state_weights: jax.Array) -> Outcome:
            differentiable, replaced = floats_of((span.arrays, span.state))

            def outputs(differentiable: Floats):
                arrays, state = replaced(differentiable)
                found = self.call(variant, arrays, state, span.segment_ids)
                return floats_of(found)[0], found

            floats, backward, (o, state) = jax.vjp(outputs, differentiable, has_aux=True)
            by_output, by_state = cotangents(floats, output_weights), cotangents(floats, state_weights)
            (gradient,) = backward({path: (by_output if path == "[0]" else by_state)[path] for path in floats})
            return Outcome(o, state, gradient)

        return jax.jit(run)

    def outcome(
        self, variant: Variant, span: Span, output_weights: np.ndarray, state_weights: np.ndarray
    ) -> Outcome:
        """Outputs, final state and gradients. A weight of 0 takes a position, or a row's final state, out of the sum.

        output_weights: [b, t]; state_weights: [b].
        """
        return self._differentiated(variant)(span, output_weights, state_weights)


def cotangents(floats: Floats, weights: jax.Array) -> Floats:
    """Different for every element, and 0 where the weight of its row (and position) is."""

    def cotangent(x: jax.Array, seed: int) -> jax.Array:
        if x.shape[: weights.ndim] != weights.shape:
            return jnp.zeros_like(x)
        w = weights.astype(jnp.result_type(jnp.float32, x.dtype))[..., None]
        angles = w * jnp.arange(seed + 1, seed + 1 + x.size // weights.size)
        return (w * jnp.cos(angles)).reshape(x.shape).astype(x.dtype)

    return {path: cotangent(x, seed) for seed, (path, x) in enumerate(floats.items())}


def weights(length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random weights of outputs and final state."""
    random = np.random.default_rng(seed)
    return random.normal(size=(BATCH, length)), random.normal(size=BATCH)
