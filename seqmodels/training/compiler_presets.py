"""Options of XLA that a job may ask for by the name of a preset; by default there are none.

A preset says what it is for, and the options for each kind of device that needs any: on others it changes nothing.
Options come and go with versions of the compiler, and a stale one is refused when the step is compiled; all of these
are compiled in the tests.
"""

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

_ASYNC_GATHERS = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}

PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    # All-gathers run beside compute. The compiler does so unasked for v5e.
    "async_gathers": {"TPU v4": _ASYNC_GATHERS, "TPU v5": _ASYNC_GATHERS, "TPU v6 lite": _ASYNC_GATHERS},
}


def compiler_options(preset: str | None, mesh: Mesh) -> dict[str, Any]:
    """The options of a preset, None for none, on the devices of a mesh."""
    return {} if preset is None else dict(PRESETS[preset].get(mesh.devices.flat[0].device_kind, {}))
