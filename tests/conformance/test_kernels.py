"""Law 6. Every kernel of the project equals the recurrent form in float64: values, and every gradient.

On a CPU TPU kernels are interpreted. Small shapes run in an interpreter that simulates the memory of a TPU, in which
what nobody has written is NaN and copies that race are found; and the TPU compiler, where it is installed, compiles
each kernel for every generation. Kernels of libraries (splash attention) have tests of their own.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from seqmodels import registry
from seqmodels.errors import InputError
from seqmodels.ops._op import SeqOp
from seqmodels.tools.compile_check.chips import target
from seqmodels.tools.kernel_report.cases import CASES, KERNEL, Request, size
from seqmodels.tools.kernel_report.programs import Built, build
from seqmodels.tools.kernel_report.worker import TOPOLOGIES
from tests.conformance.cases import BFLOAT16, FLOAT32, RECURRENT, OpCase, Outcome, Span
from tests.conformance.compare import assert_close, cast
from tests.tolerances import PRECISION_MULTIPLE, TOLERANCES, precision_floor
from tests.tpu_compiler import needs_tpu_compiler

LIBRARIES = {"softmax_attention"}
# Over two chunks of 128, and a part of a third.
LENGTH, BATCH = 300, 2


class OnTpu(NamedTuple):
    """A `Variant` by the kernel."""

    form: str = "chunked"
    chunk_size: int | None = None
    backend: str = KERNEL


def interpreted(op: SeqOp, how) -> SeqOp:
    kernel = op.kernels[KERNEL]
    kernel = dataclasses.replace(kernel, call=functools.partial(kernel.call, interpret=how))
    return dataclasses.replace(op, kernels={KERNEL: kernel})


class KernelCase(OpCase):
    """An operator on one of its examples, its kernel interpreted."""

    def __init__(self, op: SeqOp, example: str, how=True):
        super().__init__(interpreted(op, how), example)

    def arguments(self, length: int, seed: int = 0):
        return self.op.examples(jax.random.key(seed), BATCH, length)[self.example]

    def reason(self, dtype: np.dtype = FLOAT32) -> str | None:
        """Why the kernel declines the example."""
        arrays, options = self.dispatched(self.arrays(dtype, 4, seed=0))
        return self.op.kernels[KERNEL].supports(arrays, {**options, "chunk_size": None, "documents": True})


def with_kernels() -> list[SeqOp]:
    return [op for op in registry.ops().values() if KERNEL in op.kernels and op.name not in LIBRARIES]


def supported(op: SeqOp) -> list[KernelCase]:
    """The operator's examples that its kernel takes, the richest ordinary one first."""
    cases = [KernelCase(op, example) for example in reversed(op.examples(jax.random.key(0), 1, 2))]
    return sorted((case for case in cases if case.reason() is None), key=lambda case: case.is_extreme)


# The kernel of neural_memory takes none of its operator's examples: it has tests in tests/unit/test_neural_memory.py.
each_operator = pytest.mark.parametrize("op", [op for op in with_kernels() if supported(op)], ids=lambda op: op.name)


def cases() -> list:
    """All of them; of each operator the richest and the extreme ones in a plain run."""
    found = []
    for op in with_kernels():
        for n, case in enumerate(supported(op)):
            marks = [pytest.mark.slow] if n and not case.is_extreme else []
            found.append(pytest.param(case, marks=marks, id=str(case)))
    return found


def _row(*pieces: tuple[int, int]) -> list[int]:
    return [segment for segment, count in pieces for _ in range(count)]


# Documents that end at a chunk's edge and inside one, of one token, over a whole chunk; padding on all sides.
PACKED = np.array(
    [
        _row((5, 128), (2, 1), (9, 100), (4, 71)),
        _row((0, 3), (1, 60), (0, 2), (7, 140), (3, 1), (8, 80), (0, 14)),
    ]
)
LAYOUTS = {"one document": np.ones((BATCH, LENGTH), int), "packed": PACKED}


def random_weights(length: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.normal(size=(BATCH, length)), random.normal(size=BATCH)


@pytest.mark.parametrize("case", cases())
def test_equals_the_recurrent_form(case):
    tolerance = TOLERANCES["extreme" if case.is_extreme else "kernel"]
    whole = case.span(FLOAT32, LENGTH)
    for layout, segment_ids in LAYOUTS.items():
        span = whole._replace(segment_ids=segment_ids)
        with case.precisely():
            expected = case.outcome(RECURRENT, cast(span, case.exact), *random_weights(LENGTH))
        found = case.outcome(OnTpu(), span, *random_weights(LENGTH))
        for part in Outcome._fields:
            assert_close(getattr(found, part), getattr(expected, part), tolerance, f"{case}, {layout}, {part}: ")


@each_operator
def test_low_precision(op):
    """The errors of bfloat16 are those of the recurrent form, or a small multiple."""
    case = supported(op)[0]
    span, random = case.span(BFLOAT16, LENGTH), random_weights(LENGTH)
    by_step, by_kernel = (case.outcome(variant, span, *random) for variant in (RECURRENT, OnTpu()))
    with case.precisely():
        truth = case.outcome(RECURRENT, cast(span, case.exact), *random)
    for what, of_step, of_kernel in _errors(by_step, by_kernel, truth):
        bound = PRECISION_MULTIPLE * of_step + precision_floor(BFLOAT16)
        assert of_kernel <= bound, f"{case}: the error of {what} is {of_kernel:.1e}; expected at most {bound:.1e}"


def _errors(by_step: Outcome, by_kernel: Outcome, truth: Outcome):
    for (path, want), *found in zip(
        jax.tree.leaves_with_path(truth), *(jax.tree.leaves(x) for x in (by_step, by_kernel))
    ):
        want, *found = (np.asarray(x, np.float64) for x in (want, *found))
        scale = np.abs(want).max() or 1
        yield jax.tree_util.keystr(path), *(np.abs(x - want).max() / scale for x in found)


@each_operator
def test_as_a_tpu_would_run_it(op):
    """Copies and steps of the grid in any order that a TPU may take; memory that nobody wrote is NaN."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    interpreter.reset_tpu_interpret_mode_state()
    example = supported(op)[0].example
    found, expected = (
        (case := KernelCase(op, example, how)).outcome(OnTpu(), case.span(FLOAT32, 140), *random_weights(140))
        for how in (pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise"), True)
    )
    assert not interpreter.races.races_found
    assert_close(found, expected, TOLERANCES["jit"], f"{op.name}: ")


def test_the_simulated_memory_finds_what_nobody_wrote():
    def half(x, o):
        o[:4] = x[:4]

    x = jnp.ones((8, 128))
    call = functools.partial(pl.pallas_call, half, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert np.isnan(call(interpret=pltpu.InterpretParams())(x)[4:]).all()


@each_operator
def test_a_wrong_kernel_is_noticed(op):
    case = supported(op)[0]
    span, random = case.span(FLOAT32, LENGTH), random_weights(LENGTH)
    expected = case.outcome(RECURRENT, span, *random)
    found = case.outcome(OnTpu(), span._replace(segment_ids=PACKED), *random)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(found, expected, TOLERANCES["kernel"], "")


@each_operator
def test_a_second_derivative_is_an_error(op):
    case = supported(op)[0]
    span: Span = case.span(FLOAT32, 4)
    name = next(name for name in ("v", "x") if name in span.arrays)

    def loss(x):
        return jnp.sum(case.call(OnTpu(), {**span.arrays, name: x}, span.state, None)[0])

    x = jnp.asarray(span.arrays[name])
    assert np.isfinite(jax.grad(loss)(x)).all()
    with pytest.raises(NotImplementedError, match=r"can be differentiated once.*backend='xla'"):
        jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 2))(x)


def test_a_kernel_says_what_it_declines():
    op = registry.ops()["linear_attention"]
    q = np.ones((1, 4, 2, 4), np.float16)
    with pytest.raises(InputError, match=r"'pallas_tpu' cannot run this: q, k, v are float16.*expected all bfloat16"):
        op.call(q, q, q, backend=KERNEL)


# ----- compiled -----------------------------------------------------------------------------------------------------

SMALL, WHOLE_STEPS = size(512, 256, 2, 128), size(65536, 4096, 16, 128)
# Parts of the kernels of other cases.
PARTS = ("linear_attention, no decay", "delta_rule, no decay", "ssd, one group")


def programs() -> list:
    """Every kernel, forward and backward, in both dtypes: at a small size, and in steps as large as they get.

    In a forward pass alone kernels keep nothing for the gradients: that is left to `pytest -m slow`, and so is `PARTS`.
    """
    names = {op.name for op in with_kernels()}
    return [
        pytest.param(
            Request(name, direction, KERNEL, shape, dtype),
            marks=[] if shape == SMALL and direction == "both" and name not in PARTS else [pytest.mark.slow],
            id=f"{name}, {direction}, {dtype}, {shape.length}",
        )
        for name, direction, dtype, shape in itertools.product(
            CASES, ("forward", "both"), ("bf16", "f32"), (SMALL, WHOLE_STEPS)
        )
        if name.split(",")[0] in names
    ]


@pytest.fixture
def nothing_kept():
    """Programs for a TPU cannot be read back here."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@needs_tpu_compiler
@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("generation", TOPOLOGIES)
@pytest.mark.parametrize("wanted", programs())
def test_compiles_for_every_generation(wanted, generation):
    assert "tpu_custom_call" in compiled_for(generation, wanted.build)


def memory_of_documents() -> Built:
    """The kernel alone: around it the operator has a program for documents that fill too many mini-batches."""
    from pallas_kernels.tpu import neural_memory as kernel

    heads, gates, matrices = ((*SMALL[:3], SMALL.channels), SMALL[:3], (1, SMALL.heads, *(SMALL.channels,) * 2))
    mini_batch = 64

    def run(q, k, v, theta, alpha, eta, W, S, token, starts):
        given = {"token": token, "fresh": kernel.Fresh(starts, W[0], S[0])}
        return kernel.neural_memory(q, k, v, theta, alpha, eta, W, S, mini_batch=mini_batch, loss_scale=1.0, **given)

    floats = [jax.ShapeDtypeStruct(shape, FLOAT32) for shape in (*(heads,) * 3, *(gates,) * 3, *(matrices,) * 2)]
    marks = [jax.ShapeDtypeStruct((SMALL.batch, SMALL.length // n), bool) for n in (1, mini_batch)]
    return build(run, [*floats, *marks], "both")


@needs_tpu_compiler
@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize(
    "generation", ["v5e", *(pytest.param(x, marks=pytest.mark.slow) for x in TOPOLOGIES if x != "v5e")]
)
def test_a_memory_of_documents_compiles_for_every_generation(generation):
    assert "tpu_custom_call" in compiled_for(generation, memory_of_documents)


def compiled_for(generation: str, make: Callable[[], Built]) -> str:
    """The program's text."""
    mesh = jax.sharding.Mesh(target(TOPOLOGIES[generation]).devices[:1], ("device",))
    with jax.set_mesh(mesh):
        built = make()
        replicated = NamedSharding(mesh, PartitionSpec())
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated) for x in built.arguments]
        program = jax.jit(built.function).trace(*shapes).lower(lowering_platforms=("tpu",)).compile()
    return program.as_text()
