"""An H100 for kernels: the one of this machine, or the compiler for one and an interpreter, which need no GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqmodels.tools.kernel_report.hopper import SHARED_MEMORY, compile_for_hopper, has_compiler, kernels_for_hopper

__all__ = [
    "SHARED_MEMORY",
    "compile_for_hopper",
    "kernels_for_hopper",
    "needs_cuda_compiler",
    "on_gpu_or_interpreted",
]

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
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield
