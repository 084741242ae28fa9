"""Options of XLA that a job may ask for by the name of a preset; by default there are none.

A preset says what it is for, and the options for each kind of device that needs any: on others it changes nothing.
Options come and go with versions of the compiler, and a stale one is refused when the step is compiled; all of these
are compiled in the tests.
"""

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

# Gathers as programs of the SparseCores, which run beside the TensorCores.
_GATHERS_ON_SPARSE_CORES = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
    "xla_tpu_use_tc_device_shape_on_sc": True,
    "xla_sc_disable_megacore_partitioning": True,
}

PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    # All-gathers run beside compute. The compiler does so unasked for v5e; for v5p these options do it from libtpu
    # 0.0.50 on. Gathers fused with products, as it makes them for v5e, are made for others too by older versions that
    # are asked to; newer ones refuse, for wrong results.
    "async_gathers": {
        "TPU v4": {"xla_enable_async_all_gather": True, "xla_tpu_enable_async_collective_fusion": False},
        "TPU v5": _GATHERS_ON_SPARSE_CORES,
        "TPU v6 lite": _GATHERS_ON_SPARSE_CORES,
    },
}


def compiler_options(preset: str | None, mesh: Mesh) -> dict[str, Any]:
    """The options of a preset, None for none, on the devices of a mesh."""
    return {} if preset is None else dict(PRESETS[preset].get(mesh.devices.flat[0].device_kind, {}))
