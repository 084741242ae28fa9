"""An H100 for kernels: the one of this machine, or the compiler for one and an interpreter, which need no GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import jax
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import NamedSharding, PartitionSpec

# What the compiler asks of an H100, which it would otherwise read off the device.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

needs_cuda_compiler = pytest.mark.skipif(
    not any(find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin")),
    reason="compiling for a GPU needs JAX's CUDA plugin (pip install 'jax[cuda13]'), not the GPU",
)


def compile_for_hopper(function: Callable[..., Any], shapes: Any) -> jax.stages.Compiled:
    """The program of `function` for an H100, of arguments with these shapes. Fails where a kernel needs too much shared
    memory or a layout that the hardware does not have.
    """
    target = topologies.get_topology_desc("h100", platform="cuda", target_config=H100, topology="1x1x1")
    everywhere = NamedSharding(topologies.make_mesh(target, (1,), ("one",)), PartitionSpec())

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

    return jax.jit(function).lower(*jax.tree.map(placed, shapes)).compile()


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
