"""What it would cost to send the states of shards in bfloat16: errors against float64."""

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from seqmodels.tools.long_context.views import View, use_cpu_devices

DESCRIPTION = """\
Operators on a sequence of --length tokens, decays between e^-0.1 and e^-0.0001, which eight virtual CPU devices split
by "prefix": errors of the outputs and of the gradients of q, k and v (of the sum of the outputs' sines), relative to
`lax.scan` of the definition in float64, by norm.

  one device       float32, not split
  float32          split, the states sent in float32: what this package does
  bfloat16         split, the states sent in bfloat16
  inputs bfloat16  split, the states sent in float32, of inputs in bfloat16, which is what a model in bfloat16 has"""

COLUMNS = ("operator", "of", "one device", "float32", "bfloat16", "inputs bfloat16")


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--length", type=int, default=8192, metavar="N", help="tokens (default: 8,192)")


def measure(options: argparse.Namespace) -> list[Sequence[str]]:
    use_cpu_devices(8)
    import jax
    import jax.numpy as jnp
    import numpy as np

    from seqmodels.ops.delta_rule import delta_rule
    from seqmodels.ops.linear_attention import linear_attention
    from seqmodels.parallel.mesh import make_mesh

    mesh, rng = make_mesh(data=1, seq=8), np.random.default_rng(0)
    batch, heads, channels = 1, 4, 64
    arrays = {name: rng.normal(size=(batch, options.length, heads, channels)) for name in "qkv"}
    arrays["k"] /= np.linalg.norm(arrays["k"], axis=-1, keepdims=True)
    beta = rng.uniform(size=(batch, options.length, heads))

    def decay(*more: int) -> np.ndarray:
        return -np.exp(rng.uniform(np.log(1e-4), np.log(1e-1), (batch, options.length, heads, *more)))

    per_head = decay()
    operators: dict[str, tuple[Callable, dict[str, np.ndarray]]] = {
        "linear attention, no decay": (linear_attention, {}),
        "linear attention, decay per head": (linear_attention, {"g": per_head}),
        "linear attention, decay per channel": (linear_attention, {"g": decay(channels)}),
        "gated delta rule": (delta_rule, {"g": per_head, "beta": beta}),
    }

    def run(name: str, dtype: Any, **how: Any) -> list[np.ndarray]:
        operator, gates = operators[name]
        gates = {gate: jnp.asarray(x, jnp.promote_types(dtype, jnp.float32)) for gate, x in gates.items()}

        def loss(arrays):
            o, _ = operator(**arrays, **gates, **how)
            return jnp.sum(jnp.sin(o)), o

        given = {array: jnp.asarray(x, dtype) for array, x in arrays.items()}
        gradients, o = jax.jit(jax.grad(loss, has_aux=True))(given)
        return [np.asarray(x, np.float64) for x in (o, *gradients.values())]

    rows: list[Sequence[str]] = [COLUMNS]
    for name in operators:
        with jax.enable_x64(True):
            exact = run(name, jnp.float64, form="recurrent")
        found = [run(name, jnp.float32)]
        with jax.set_mesh(mesh):
            found.append(run(name, jnp.float32, exchange="prefix"))
            with _sent_in(jnp.bfloat16):
                found.append(run(name, jnp.float32, exchange="prefix"))
            found.append(run(name, jnp.bfloat16, exchange="prefix"))
        for i, of in enumerate(("outputs", "gradients")):
            part = slice(0, 1) if i == 0 else slice(1, None)
            rows.append((name, of, *(f"{_error(x[part], exact[part]):.1e}" for x in found)))
        print("  ".join(rows[-2]), "  ".join(rows[-1][1:]), flush=True)
    return rows


def _error(found: Sequence[Any], exact: Sequence[Any]) -> float:
    """The largest of the arrays' relative errors."""
    import numpy as np

    return max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in zip(found, exact))


@contextlib.contextmanager
def _sent_in(dtype: Any) -> Iterator[None]:
    """What shards gather is rounded to this dtype while the context is open."""
    from seqmodels.ops._exchange import Line

    gather = Line.gather
    Line.gather = lambda self, x: gather(self, x.astype(dtype)).astype(x.dtype)
    try:
        yield
    finally:
        Line.gather = gather


VIEW = View("errors of the states' dtype on the way", DESCRIPTION, _add, measure)
