"""The view `precision`: how errors of low precision develop over a long sequence."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.errors import InputError
from seqmodels.layers._mixer import Mixer
from seqmodels.ops._op import SeqOp
from seqmodels.registry import MIXERS
from seqmodels.tools.survey import plots
from seqmodels.tools.survey.process import in_worker
from seqmodels.tools.survey.views import Progress, Result, Table, View

DESCRIPTION = """\
Errors over a sequence of --length tokens, by tenths of it: in each the largest |a - b| over the largest |b|.

  float32 against float64   of operators, since layers keep gates and statistics in float32 whatever comes in. a: the
                            chunked form in float32; b: the definition token by token in float64 on the same numbers
                            (the chunked form in float64 where the state grows with the tokens). On every example of
                            the operator whose gates are ordinary.
  bfloat16 against float32  of layers with the fields of configs/mixers and random parameters. a: activations in
                            bfloat16; b: in float32. Inputs are random, and numbers of bfloat16 in both."""

TENTHS = 10


def measure(mixer: str, options: Any, progress: Progress) -> Result:
    sizes = {"length": options.length}
    layer = in_worker("layer precision", mixer, sizes, lambda share, doing: progress(share / 2, doing))
    op = MIXERS[mixer].op.name
    return {"op": op, "op_errors": _of_op(op, options.length, progress), "layer_errors": layer["errors"]}


_MEASURED: dict[tuple[str, int], Result] = {}


def _of_op(op: str, length: int, progress: Progress) -> Result:
    """Several mixers share an operator: it is measured once."""
    if (op, length) not in _MEASURED:
        _MEASURED[op, length] = in_worker(
            "operator precision", op, {"length": length}, lambda share, doing: progress(0.5 + share / 2, doing)
        )
    return _MEASURED[op, length]


def op_errors(op: SeqOp, length: int, progress: Progress) -> Result:
    """Errors by tenths, for each ordinary example."""
    examples = {
        name: example for name, example in op.examples(jax.random.key(0), 1, length).items() if not example.extreme
    }
    found = {}
    for i, (name, example) in enumerate(examples.items()):
        progress(i / len(examples), f"{op.name}, {name}: float32 against float64")
        arrays = _cast(example.arrays, np.float32)

        def run(arrays: Any, form: str, options: Any = example.options) -> jax.Array:
            return op.call(**arrays, **options, form=form)[0]

        compiled = jax.jit(run, static_argnames="form")
        by_chunks = np.asarray(compiled(arrays, "chunked"), np.float64)
        with jax.enable_x64(True):
            truth = np.asarray(compiled(_cast(arrays, np.float64), "chunked" if op.state_grows else "recurrent"))
        if truth.dtype != np.float64:
            raise RuntimeError(f"{op.name}: float64 arguments gave {truth.dtype}")
        found[name] = by_tenths(by_chunks, truth)
    return found


def layer_errors(constructor: type[Mixer], width: int, length: int, progress: Progress) -> Result:
    """Errors by tenths of a layer in bfloat16."""
    progress(0, "bfloat16 against float32")
    x = jax.random.normal(jax.random.key(0), (1, length, width)).astype(jnp.bfloat16).astype(jnp.float32)
    exact, rough = (constructor(d_model=width, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    variables = jax.jit(exact.init)(jax.random.key(1), x[:, :1])
    truth, found = (
        np.asarray(jax.jit(lambda v, x, layer=layer: layer.apply(v, x)[0])(variables, x), np.float64)
        for layer in (exact, rough)
    )
    return {"errors": by_tenths(found, truth)}


def _cast(arrays: Any, dtype: type) -> Any:
    """Floating-point arrays in that dtype; of the same values where it is the wider."""
    return jax.tree.map(
        lambda x: np.asarray(x, dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype), arrays
    )


def by_tenths(found: np.ndarray, truth: np.ndarray) -> list[float]:
    """found, truth: [b, t, ...]."""
    pairs = zip(np.array_split(found, TENTHS, axis=1), np.array_split(truth, TENTHS, axis=1))
    return [float(np.abs(have - want).max() / (np.abs(want).max() or 1)) for have, want in pairs]


def _ops(results: dict[str, Result]) -> dict[str, Sequence[float]]:
    """Errors by "operator, example"."""
    return {
        f"{x['op']}, {example}": errors for x in results.values() for example, errors in x["op_errors"].items()
    }


def _layers(results: dict[str, Result]) -> dict[str, Sequence[float]]:
    return {mixer: x["layer_errors"] for mixer, x in results.items()}


def failures(results: dict[str, Result]) -> list[str]:
    lines = _ops(results) | _layers(results)
    return [f"{name}: an error is not finite" for name, errors in lines.items() if not np.isfinite(errors).all()]


def tables(results: dict[str, Result], options: Any) -> list[Table]:
    tenths = tuple(f"{i}/{TENTHS}" for i in range(1, TENTHS + 1))
    return [
        Table(
            f"{what}, {options.length:,} tokens, by tenths",
            (subject, *tenths),
            [(name, *(f"{error:.0e}" for error in errors)) for name, errors in lines.items()],
        )
        for what, subject, lines in (
            ("float32 against float64", "operator, example", _ops(results)),
            ("bfloat16 against float32", "mixer", _layers(results)),
        )
    ]


def plot(results: dict[str, Result], file: Any) -> None:
    """Of an operator the worst of its examples."""
    worst = {x["op"]: np.max(list(x["op_errors"].values()), axis=0).tolist() for x in results.values()}
    panels = [
        plots.Panel("float32 against float64, operators", "tenth of the sequence", "error", 1),
        plots.Panel("bfloat16 against float32, layers", "tenth of the sequence", "error", 1),
    ]
    series = {
        i: {name: [{"tenth": n, "error": e} for n, e in enumerate(errors, start=1)] for name, errors in lines.items()}
        for i, lines in enumerate((worst, _layers(results)))
    }
    plots.draw(file, panels, series, x="tenth", log_x=False)


def check(options: Any) -> None:
    if options.length < TENTHS:
        raise InputError(f"--length is {options.length}; expected at least {TENTHS}")


VIEW = View(
    "is it precise: float32 against float64, bfloat16 against float32, over a long sequence",
    DESCRIPTION,
    measure,
    tables,
    failures,
    plot,
    {"length": (int, 16_384, "tokens of the sequence")},
    check,
)
