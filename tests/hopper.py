"""An H100 for kernels: the one of this machine, or the compiler for one and an interpreter, which need no GPU."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import _memory_walk, _prepared_walk, _walk, _walk_back, aaren
from seqmodels.tools.kernel_report.hopper import SHARED_MEMORY, compile_for_hopper, has_compiler, kernels_for_hopper

__all__ = [
    "SHARED_MEMORY",
    "compile_for_hopper",
    "errors_against",
    "in_float64",
    "kernels_for_hopper",
    "needs_cuda_compiler",
    "on_gpu_or_interpreted",
    "results_and_gradients",
]

WITH_KERNELS = (_memory_walk, _prepared_walk, _walk, _walk_back, aaren)

needs_cuda_compiler = pytest.mark.skipif(
    not has_compiler(),
    reason="compiling for a GPU needs JAX's CUDA plugin (pip install 'jax[cuda13-local]'), not the GPU",
)


def gpu() -> jax.Device | None:
    try:
        return jax.devices("cuda")[0]
    except RuntimeError:
        return None


def wgmma_in_interpreter(multiply: Callable) -> Callable:
    """The interpreter takes a left operand from shared memory only: one in registers is put there."""

    def wgmma(accumulator, left, right):
        if not isinstance(left, jax.Array):
            return multiply(accumulator, left, right)

        def with_space(space):
            space = space.at[lax.axis_index("warpgroup")]
            space[...] = left
            plgpu.commit_smem()
            multiply(accumulator, space, right)

        space = plgpu.SMEM((2, *left.shape), left.dtype)
        return pl.run_scoped(with_space, space, collective_axes="warpgroup")

    return wgmma


@contextmanager
def on_gpu_or_interpreted() -> Iterator[None]:
    """Places arrays on the GPU if there is one. The interpreter also looks for races between warpgroups and copies."""
    if device := gpu():
        with jax.default_device(device):
            yield
        return
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip(f"no GPU, and jax {jax.__version__} has no interpreter for GPU kernels: it came with jax 0.11")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plgpu, "wgmma", wgmma_in_interpreter(plgpu.wgmma))
        for module in WITH_KERNELS:
            # The interpreter's effects are ordered, which jit has to see.
            patch.setattr(module, "late", lambda kernel, outputs: kernel)
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield


def results_and_gradients(function: Callable[..., tuple], inputs: Sequence[jax.Array | None]) -> tuple:
    """What `function` gives, and the gradients of its inputs for cotangents that do not depend on what is compared."""

    @jax.jit
    def both(*inputs):
        results, pullback = jax.vjp(function, *inputs)
        random = np.random.default_rng(1)
        cotangents = tuple(
            jnp.asarray(random.normal(size=x.shape), jnp.bfloat16 if n == 0 else jnp.float32).astype(x.dtype)
            for n, x in enumerate(results)
        )
        return *results, *pullback(cotangents)

    return tuple(x if x is None else np.asarray(x, np.float64) for x in both(*inputs))


def in_float64(function: Callable[..., tuple], inputs: Sequence[jax.Array | None]) -> tuple:
    """The same in float64, on the CPU."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        exact = [x if x is None else jnp.asarray(np.asarray(x, np.float64)) for x in inputs]
        return results_and_gradients(function, exact)


def errors_against(definition: Callable, kernel: Callable, arrays: tuple, exact: tuple | None = None) -> list[float]:
    """Of a kernel's results and gradients: the norm of the difference to the definition's, over the norm of these.

    The last of the arrays has no gradient. exact: what the definition gets, by default the same. A gradient that there
    is not has the error 0.
    """
    *inputs, index = arrays
    with on_gpu_or_interpreted():
        found = results_and_gradients(lambda *inputs: kernel(*inputs, index), inputs)
    *inputs, index = arrays if exact is None else exact
    expected = in_float64(lambda *inputs: definition(*inputs, index), inputs)
    return [
        0.0 if y is None else float(np.linalg.norm(x - y) / np.linalg.norm(y))
        for x, y in zip(found, expected, strict=True)
    ]
