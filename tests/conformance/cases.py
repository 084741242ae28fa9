"""What the laws are tried on: an operator with one of its examples, or a layer with some of its fields set.

Both are functions (arrays over a span, state at its start, segment ids) -> (outputs, state at its end) that can
be run in several forms, so most laws are written once for both.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from seqmodels.ops import _dispatch
from seqmodels.ops._op import Example, Inputs, Options, SeqOp, State
from seqmodels.registry import Entry
from tests.conformance.compare import Floats, cast, floats_of
from tests.conformance.layouts import BATCH, CHUNK, DECODE, LENGTH, LONG, SPLITS, THIRDS

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)

# The state that a span starts from is what the tokens before it left: one that can really be reached.
TOKENS_BEFORE = 5

LAYER_WIDTH = 16

# What a layer may break though its operator does not: the rest is left to `pytest -m slow`. The first layer of an
# operator is tried on more laws than the others.
PLAIN_LAYER_LAWS = frozenset({"split", "documents", "state", "start"})
PLAIN_FIRST_LAYER_LAWS = PLAIN_LAYER_LAWS | {"forms", "devices"}
# Laws that take long on these operators and layers, or on these examples. A plain run tries them on other examples, on
# what the layers are made of, and the operators on fewer meshes.
NOT_PLAIN = {
    "aaren, one query": {"more meshes"},
    "delta_rule": {"more meshes"},
    "delta_rule, grouped heads": {"devices"},
    "linear_attention, grouped heads": {"more meshes"},
    "memory_as_context": {"more meshes", "precision"},
    "memory_as_context, two layers, prefix": {"causality", "devices", "forms"},
    "mlstm": {"more meshes"},
    "neural_memory": {"more meshes", "devices"},  # `titans_memory` is tried on eight devices
    "neural_memory, test-time training": {"forms"},
    "neural_memory, two layers": {"forms"},
    "ssd, two groups, skip per channel": {"more meshes"},
    "titans_mac": {"devices", "documents"},
    "titans_mag": {"documents"},
    "titans_mal": {"documents"},
}

# Layers are tested as they are by default, and with those of these fields that they have.
OPTIONAL_FIELDS = {
    "conv_size": 3,
    "window": 5,
    "sinks": 2,
    "num_kv_heads": 2,
    "qk_norm": True,
    "norm": "zero_centered_rmsnorm",
    "rope_fraction": 0.5,
    "qkv_bias": True,
    "out_bias": True,
    "normalize": False,
    "output_norm": True,
    "num_v_heads": 12,
    "allow_neg_eigval": True,
    "use_gate": True,
    "lower_bound": -5.0,
    "feature_map": "hedgehog",
    "head_dim": 8,
    "n_groups": 2,
    "expand_ratio": 4,
    "mini_batch": 4,
    "memory_depth": 1,
    "persistent": 3,
    "segment": 8,
}


class Variant(NamedTuple):
    """A form, the length of its chunks, and how shards of the time axis exchange what they need."""

    form: str
    chunk_size: int | None = None
    exchange: str = "auto"


RECURRENT = Variant("recurrent")


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


class Case:
    """A function with a state, on one set of arguments; compiled once per variant and shape.

    name             of the operator or the layer
    op               the operator, or that of the layer
    time_args        names of the arrays with a time axis
    variants         the forms to try, beside the recurrent one
    exact            dtype of the reference
    low_precisions   dtypes whose errors are measured against it
    tolerance        entry of the table of tolerances for sameness in `exact`
    splits           lengths of the spans into which the split law cuts
    is_extreme       whether gates or scores are at the edge of their range
    splits_heads     whether there are heads for two devices
    plain_laws       names of the laws that a plain run tries, but for `NOT_PLAIN`; the rest is left to
                     `pytest -m slow`. None is all
    finds_starts     whether a document that starts with a span is told from one that goes on. An operator cannot
                     know: the state it is given belongs to the first document of the span
    """

    name: str
    op: SeqOp
    time_args: tuple[str, ...]
    variants: tuple[Variant, ...]
    exact: np.dtype
    low_precisions: tuple[np.dtype, ...]
    tolerance: str
    splits: tuple[tuple[int, ...], ...]
    finds_starts: bool
    is_extreme = False
    splits_heads = True
    plain_laws: frozenset[str] | None = None

    def is_asked(self, law: str) -> bool:
        """Extreme cases are held to agreement and finiteness, not to accuracy; law 11 is for them alone."""
        return {"precision": not self.is_extreme, "extremes": self.is_extreme, "both sides": False}.get(law, True)

    def arrays(self, dtype: np.dtype, length: int, seed: int) -> Inputs:
        raise NotImplementedError

    def fresh(self, arrays: Inputs, capacity: int = TOKENS_BEFORE + LENGTH) -> State:
        """The state before the first token of a document."""
        raise NotImplementedError

    def call(
        self, variant: Variant, arrays: Inputs, state: State, segment_ids: Any
    ) -> tuple[jax.Array, State]:
        """Run it, not compiled."""
        raise NotImplementedError

    def shapes(self, dtype: np.dtype, length: int) -> Inputs:
        """The arrays without their values."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.arrays(dtype, length, seed=0)
        )

    def precisely(self) -> contextlib.AbstractContextManager:
        """Within, arrays of dtype `exact` keep it."""
        return jax.enable_x64(self.exact == FLOAT64)

    @functools.cache  # noqa: B019
    def span(self, dtype: np.dtype, length: int = LENGTH, seed: int = 1) -> Span:
        """Arrays of that dtype and length, and the state that tokens before them left."""
        arrays = self.arrays(dtype, TOKENS_BEFORE + length, seed)
        before, after = self.cut(arrays, slice(TOKENS_BEFORE)), self.cut(arrays, slice(TOKENS_BEFORE, None))
        start = self.fresh(arrays, TOKENS_BEFORE + length)
        _, state = self.forward(RECURRENT)(before, start, None)
        return Span(after, state, None)

    def is_timed(self, name: str, x: Any) -> bool:
        return name in self.time_args and x is not None and x.ndim > 1

    def cut(self, arrays: Inputs, places: Any, rows: Any = slice(None)) -> Inputs:
        """Some rows and places of the arrays that have a time axis."""
        return {name: x[rows][:, places] if self.is_timed(name, x) else x for name, x in arrays.items()}

    @functools.cache  # noqa: B019
    def forward(self, variant: Variant):
        """Compiled (arrays, state, segment_ids) -> (o, state)."""
        return jax.jit(functools.partial(self.call, variant))

    @functools.cache  # noqa: B019
    def differentiated(self, variant: Variant):
        """Compiled; what `outcome` calls."""

        def run(span: Span, output_weights: jax.Array, state_weights: jax.Array) -> Outcome:
            differentiable, replaced = floats_of((span.arrays, span.state))

            def outputs(differentiable: Floats):
                arrays, state = replaced(differentiable)
                found = self.call(variant, arrays, state, span.segment_ids)
                return floats_of(found)[0], found

            floats, backward, (o, state) = jax.vjp(outputs, differentiable, has_aux=True)
            of_output, of_state = cotangents(floats, output_weights), cotangents(floats, state_weights)
            (gradient,) = backward({**of_state, "[0]": of_output["[0]"]})
            return Outcome(o, state, gradient)

        return jax.jit(run)

    def outcome(
        self, variant: Variant, span: Span, output_weights: np.ndarray, state_weights: np.ndarray
    ) -> Outcome:
        """Outputs, final state, and gradients of a sum of both, weighted by random numbers times the weights.

        output_weights: [b, t]; state_weights: [b]. A weight of 0 takes its position, or row, out of the sum.
        Gradients are by path: "[0]['q']" is an array's, "[1]..." the initial state's. All are NumPy arrays, of which
        parts are taken without a compilation for each shape.
        """
        return jax.device_get(self.differentiated(variant)(span, output_weights, state_weights))


def cotangents(floats: Floats, weights: jax.Array) -> Floats:
    """Different for every element, and 0 where the weight of its row (and position) is."""

    def cotangent(x: jax.Array, seed: int) -> jax.Array:
        if x.shape[: weights.ndim] != weights.shape:
            return jnp.zeros_like(x)
        w = weights.astype(jnp.result_type(jnp.float32, x.dtype))[..., None]
        angles = w * jnp.arange(seed + 1, seed + 1 + x.size // weights.size)
        return (w * jnp.cos(angles)).reshape(x.shape).astype(x.dtype)

    return {path: cotangent(floats[path], seed) for seed, path in enumerate(sorted(floats))}


def weights(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Random weights of the outputs and of the final state."""
    random = np.random.default_rng(0)
    return random.normal(size=(BATCH, length)), random.normal(size=BATCH)


@contextlib.contextmanager
def described_by(op: SeqOp) -> Iterator[None]:
    """Within, the public function runs by this description of its operator, which a test may have altered."""
    run = _dispatch.run

    def run_described(own: SeqOp, *args: Any, **kwargs: Any):
        return run(op if own.name == op.name else own, *args, **kwargs)

    with mock.patch.object(_dispatch, "run", run_described):
        yield


class OpCase(Case):
    """An operator on one of its examples, in float64."""

    exact, low_precisions, tolerance = FLOAT64, (FLOAT32, BFLOAT16), "forms"
    splits, finds_starts = (*SPLITS, DECODE), False

    def __init__(self, op: SeqOp, example: str, plain_laws: frozenset[str] | None = None):
        self.name, self.op, self.example = op.name, op, example
        self.time_args, self.plain_laws = op.time_args, plain_laws
        small_chunks = (Variant("chunked", CHUNK),) if "chunked" in op.forms else ()
        self.variants = (*small_chunks, *map(Variant, op.forms))

    def __repr__(self) -> str:
        return f"{self.op.name}, {self.example}"

    def arguments(self, length: int, seed: int = 0) -> Example:
        return self.op.examples(jax.random.key(seed), BATCH, length)[self.example]

    @functools.cached_property
    def options(self) -> Options:
        return self.arguments(TOKENS_BEFORE + LONG).options  # caches with room for the longest span

    @functools.cached_property
    def is_extreme(self) -> bool:
        return self.op.examples(jax.random.key(0), 1, 2)[self.example].extreme

    def arrays(self, dtype: np.dtype, length: int, seed: int) -> Inputs:
        arrays = cast(self.arguments(length, seed).arrays, FLOAT32)
        return {name: cast(x, argument_dtype(name, dtype)) for name, x in arrays.items()}

    def dispatched(self, arrays: Inputs) -> tuple[Inputs, Options]:
        """Arrays and options in the shape in which the public function hands them to the operator's parts."""

        class Reached(Exception):
            pass

        def stop(own: SeqOp, arrays: Inputs, options: Options, **kwargs: Any):
            raise Reached(arrays, options)

        with mock.patch.object(_dispatch, "run", stop):
            try:
                self.op.call(**arrays, **self.options)
            except Reached as reached:
                return reached.args
        raise AssertionError(f"{self.op.name}: the public function does not go through _dispatch.run")

    def fresh(self, arrays: Inputs, capacity: int = TOKENS_BEFORE + LENGTH) -> State:
        return self.op.initial_state(*self.dispatched(arrays))

    def call(
        self, variant: Variant, arrays: Inputs, state: State, segment_ids: Any
    ) -> tuple[jax.Array, State]:
        with described_by(self.op):
            return self.op.call(
                **arrays,
                **self.options,
                initial_state=state,
                segment_ids=segment_ids,
                **variant._asdict(),
            )


def argument_dtype(name: str, dtype: np.dtype) -> np.dtype:
    """Log decays are float32 whatever the dtype of the rest."""
    return max(dtype, FLOAT32, key=lambda x: x.itemsize) if name == "g" else dtype


class LayerCase(Case):
    """A layer with random parameters, in float32 (its gates and statistics are float32 in any case)."""

    exact, low_precisions, tolerance = FLOAT32, (BFLOAT16,), "layer"
    splits, finds_starts = (THIRDS, DECODE), True
    time_args, variants = ("x",), (Variant("chunked", CHUNK),)

    def __init__(
        self, name: str, entry: Entry, fields: Mapping[str, Any], plain_laws: frozenset[str] = frozenset()
    ):
        self.name, self.op, self.constructor, self.fields = name, entry.op, entry.layer, dict(fields)
        self.plain_laws = plain_laws

    def __repr__(self) -> str:
        return ", ".join([self.name, *(f"{name}={value}" for name, value in self.fields.items())])

    @functools.cached_property
    def splits_heads(self) -> bool:
        return getattr(self.layer(), "num_heads", 2) % 2 == 0

    def layer(self, **fields: Any):
        return self.constructor(d_model=LAYER_WIDTH, **{**self.fields, **fields})

    def arrays(self, dtype: np.dtype, length: int, seed: int) -> Inputs:
        x = jax.random.normal(jax.random.key(seed), (BATCH, length, LAYER_WIDTH))
        return {"x": cast(x, dtype), "variables": self.variables}

    @functools.cached_property
    def variables(self) -> dict[str, Any]:
        return cast(jax.jit(self.layer().init)(jax.random.key(0), jnp.zeros((1, 1, LAYER_WIDTH))), FLOAT32)

    def fresh(self, arrays: Inputs, capacity: int = TOKENS_BEFORE + LENGTH) -> State:
        x = arrays["x"]
        return self.layer(dtype=x.dtype).initial_state(x.shape[0], capacity)

    def call(
        self, variant: Variant, arrays: Inputs, state: State, segment_ids: Any
    ) -> tuple[jax.Array, State]:
        x = arrays["x"]
        layer = self.layer(dtype=x.dtype, **variant._asdict())
        return layer.apply(arrays["variables"], x, state, segment_ids)


class EncoderCase(LayerCase):
    """A layer that sees both sides of a token. It has no state."""

    def __init__(self, name: str, entry: Entry):
        super().__init__(name, entry, {"causal": False})

    def is_asked(self, law: str) -> bool:
        asked = ("forms", "documents", "padding", "both sides", "precision", "jit", "devices", "more meshes")
        return law in asked

    def fresh(self, arrays: Inputs, capacity: int = TOKENS_BEFORE + LENGTH) -> State:
        return {}


def op_cases(ops: Mapping[str, SeqOp]) -> list[OpCase]:
    """Every operator on each of its examples. A plain run tries all laws on the last ordinary one, by custom the
    richest, and on the others the law that they are there for."""
    found = []
    for op in ops.values():
        examples = op.examples(jax.random.key(0), 1, 2)
        ordinary = [name for name, example in examples.items() if not example.extreme]
        for name, example in examples.items():
            laws = frozenset({"extremes" if example.extreme else "forms"})
            case = OpCase(op, name, None if name == ordinary[-1] else laws)
            case.is_extreme = example.extreme  # known here: it need not make the examples again
            found.append(case)
    return found


def layer_cases(mixers: Mapping[str, Entry]) -> list[LayerCase]:
    """Every layer as it is by default, with its optional parts, and as an encoder's."""
    found, seen = [], set()
    for name, entry in mixers.items():
        laws = PLAIN_LAYER_LAWS if entry.op.name in seen else PLAIN_FIRST_LAYER_LAWS
        seen.add(entry.op.name)
        found.append(LayerCase(name, entry, {}, laws))
        fields = {field: value for field, value in OPTIONAL_FIELDS.items() if field in entry.layer.__dataclass_fields__}
        if fields:
            found.append(LayerCase(name, entry, fields))
        found.append(EncoderCase(name, entry))
    return found
