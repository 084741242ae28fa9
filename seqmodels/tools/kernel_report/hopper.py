"""What the compiler says of our kernels for Hopper GPUs, without a GPU: registers, spills, shared memory.

Pallas' Mosaic GPU writes down what it makes of each kernel where MOSAIC_GPU_DUMP_TO names a folder: the assembler's
remarks in NAME.ptxas, the kernel in PTX in NAME.ptx, its own passes in NAME.mlir-passes.log. It does so once for a
kernel in a process, so every program is compiled in a process of its own.

This imports jax alone.
"""

import multiprocessing
import os
import re
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
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

GENERATION = "h100"
SHARED_MEMORY = 227 << 10  # bytes that a block can have
_OF_MULTIPROCESSOR = {"registers": 65536, "threads": 2048, "blocks": 32, "shared_memory": 228 << 10}
_RESERVED = 1 << 10  # bytes of shared memory that every block takes beside its own
_WARP, _REGISTERS_AT_A_TIME = 32, 256  # a warp's registers are given out in such pieces


class Kernel(NamedTuple):
    """A kernel of a program.

    registers       of a thread
    spills          bytes that a thread writes to memory and reads back for want of registers, in all its code
    shared_memory   bytes of a block
    threads         of a block
    """

    name: str
    registers: int
    spills: int
    shared_memory: int
    threads: int

    @property
    def blocks(self) -> int:
        """How many fit on a multiprocessor at a time."""
        has, warps = _OF_MULTIPROCESSOR, -(-self.threads // _WARP)
        of_warp = -(-self.registers * _WARP // _REGISTERS_AT_A_TIME) * _REGISTERS_AT_A_TIME
        return min(
            has["blocks"],
            has["threads"] // (warps * _WARP),
            has["registers"] // (of_warp * warps),
            has["shared_memory"] // (self.shared_memory + _RESERVED),
        )


def has_compiler() -> bool:
    return any(find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin"))


def compile_for_hopper(function: Callable[..., Any], shapes: Any) -> jax.stages.Compiled:
    """The program of `function` for an H100, of arguments with these shapes. Fails where a kernel needs too much shared
    memory or a layout that the hardware does not have.
    """
    target = topologies.get_topology_desc("h100", platform="cuda", target_config=H100, topology="1x1x1")
    everywhere = NamedSharding(topologies.make_mesh(target, (1,), ("one",)), PartitionSpec())

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

    with _nothing_kept():
        return jax.jit(function).lower(*jax.tree.map(placed, shapes)).compile()


@contextmanager
def _nothing_kept():
    """A program for a device that is not there cannot be read back from the folder of compiled programs."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def kernels_for_hopper(function: Callable[..., Any], shapes: Any) -> list[Kernel]:
    """The kernels in the program of `function`, in the order in which they are compiled, without repetitions.

    function: one that another process can import by its module and name.

    Raises what compiling raises.
    """
    return kernels_of(_pair, function, shapes)


def _pair(function: Callable[..., Any], shapes: Any) -> tuple:
    return function, shapes


def kernels_of(make: Callable[..., tuple], *arguments: Any) -> list[Kernel]:
    """The same of the function and shapes that `make(*arguments)` gives, in the other process."""
    with tempfile.TemporaryDirectory(prefix="kernel-report-") as folder:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            try:
                process.submit(_compile, folder, make, arguments).result()
            except BrokenProcessPool as error:
                said = Path(folder) / "said"
                last = said.read_text().strip().splitlines()[-12:] if said.exists() else []
                raise RuntimeError("\n".join(["the compiler's process ended", *last])) from error
        return read(Path(folder))


def _compile(folder: str, make: Callable[..., tuple], arguments: tuple) -> None:
    # The compiler misses a disassembler, and says so for every kernel.
    os.dup2(os.open(Path(folder) / "said", os.O_WRONLY | os.O_CREAT), 2)
    os.environ["MOSAIC_GPU_DUMP_TO"] = folder
    compile_for_hopper(*make(*arguments))


def read(folder: Path) -> list[Kernel]:
    """What the compiler has written down of kernels."""
    files = sorted(folder.glob("*.ptxas"), key=lambda file: int(file.stem.rpartition("_")[2]))
    return [_kernel(file) for file in files]


def _kernel(remarks: Path) -> Kernel:
    said, ptx = remarks.read_text(), remarks.with_suffix(".ptx").read_text()
    spilled = [_number(rf"(\d+) bytes spill {what}", said) for what in ("stores", "loads")]
    return Kernel(
        name=re.search(r"entry function '(\w+?)(?:_mosaic_gpu_kernel)?'", said)[1],
        registers=_number(r"Used (\d+) registers", said),
        spills=sum(spilled),
        shared_memory=_shared_memory(remarks.with_suffix(".mlir-passes.log")),
        threads=_number(r"\.(?:max|req)ntid (\d+)", ptx),
    )


def _number(pattern: str, text: str) -> int:
    return int(re.search(pattern, text)[1])


def _shared_memory(passes: Path) -> int:
    """Of the kernel's launch, where it is first written: all passes together can be a hundred times as long."""
    constants = {}
    with passes.open() as lines:
        for line in lines:
            if constant := re.match(r"\s*(%\w+) = arith\.constant (\d+) : i32", line):
                constants[constant[1]] = int(constant[2])
            if launch := re.search(r"gpu\.launch .*dynamic_shared_memory_size (%\w+)", line):
                return constants[launch[1]]
    raise ValueError(f"{passes.name}: no kernel is launched")
