"""How large a kernel's steps are on each generation of TPU, from what its compiler says of them.

The table was chosen from what this prints; figures of what was chosen are in docs/kernels.md:

    python -m seqmodels.tools.kernel_report --cases linear_attention --lengths 8192 --sizes 128:512 128:1024 256:512 \
        256:1024 256:2048 512:2048
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax


class Sizes(NamedTuple):
    """
    chunk        positions per chunk: the sides of the square products within it
    step_bytes   bytes of one operand that one step of the grid reads, all its heads and positions together. Chunks
                 and heads of a step do not wait for each other, so that long steps keep the matrix units busy
    memory       bytes of VMEM that a kernel may take
    cores        that share the steps of different heads and rows
    wide_units   whether matrix units are of 256 x 256, or of 128 x 128
    """

    chunk: int
    step_bytes: int
    memory: int
    cores: int
    wide_units: bool

    def at_most(self, step_bytes: int) -> "Sizes":
        """With steps that read no more than this of an operand."""
        return self._replace(step_bytes=min(self.step_bytes, step_bytes))


MIB = 1 << 20
# By the device's kind, as jax names it.
SIZES = {
    "TPU v4": Sizes(128, MIB // 2, 15 * MIB, 2, False),
    "TPU v5 lite": Sizes(128, MIB, 64 * MIB, 1, False),
    "TPU v5": Sizes(128, MIB, 56 * MIB, 2, False),
    "TPU v6 lite": Sizes(256, MIB, 64 * MIB, 1, True),
    "TPU7x": Sizes(256, MIB, 56 * MIB, 1, True),
}
# Where nothing says what the program is for: fits all of them.
UNKNOWN = SIZES["TPU v4"]


def sizes() -> Sizes:
    """For the devices of the mesh in context, or else for those of this process."""
    return SIZES.get(_device_kind(), UNKNOWN)


@contextlib.contextmanager
def trying(chunk: int, step_bytes: int) -> Iterator[None]:
    """Within, these instead of those of the table."""
    kind = _device_kind()
    old = SIZES[kind]
    SIZES[kind] = old._replace(chunk=chunk, step_bytes=step_bytes)
    try:
        yield
    finally:
        SIZES[kind] = old


def _device_kind() -> str | None:
    mesh = jax.sharding.get_abstract_mesh()
    device = getattr(mesh, "abstract_device", None)
    if device is not None:
        return device.device_kind
    return jax.devices()[0].device_kind if jax.default_backend() == "tpu" else None
