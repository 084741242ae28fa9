"""Compiles programs for one TPU generation in a process of its own, as the compiler reads its flags once and ends its
process at an error of its own. Started by `processes`."""

import dataclasses
import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from seqmodels.errors import EXIT_INPUT, InputError
from seqmodels.tools.compile_check.chips import target
from seqmodels.tools.kernel_report.llo import STAGES

# One chip, or the smallest slice that there is.
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def main(argv: list[str]) -> None:
    task = json.loads(argv[0])
    folder = Path(task["folder"])
    own = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([own, *flags(folder, task["simulate"])])
    import jax

    from seqmodels.tools.kernel_report.figures import Device

    jax.config.update("jax_enable_compilation_cache", False)  # what is not compiled is not written down either
    slice_ = target(TOPOLOGIES[task["generation"]])
    device = Device(task["generation"], slice_.chip, getattr(slice_.devices[0], "num_cores", 1) or 1)
    for request in map(_request, task["requests"]):
        # The dumps of what libtpu compiles when it starts, and of the last program.
        for old in folder.iterdir():
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        print("result", json.dumps(_compile(request, slice_.devices[0], device, folder)), flush=True)


def flags(folder: Path, simulate: bool) -> list[str]:
    """Of libtpu, to write schedules into a folder."""
    found = [
        f"--xla_jf_dump_to={folder}",
        "--xla_jf_dump_llo_text=true",
        f"--xla_jf_dump_llo_pass_label_regex=.*({'|'.join(STAGES)}).*",
    ]
    if simulate:
        # Its own check of types ends the process at kernels of bfloat16.
        found += [f"--xla_jf_dump_static_llo_profile_to={folder}", "--xla_tpu_check_llo_types=false"]
    return found


def _request(fields: dict) -> Any:
    from seqmodels.tools.kernel_report import cases, programs

    if "function" in fields:
        return programs.FunctionRequest(**fields)
    return cases.Request(**{**fields, "size": cases.Size(*fields["size"])})


def _compile(request: Any, where: Any, device: Any, folder: Path) -> dict:
    """What the compiler says of a program, or {"error": one line, "message": all of it}."""
    import jax

    from seqmodels.tools.compile_check.check import reason
    from seqmodels.tools.kernel_report import figures
    from seqmodels.tools.kernel_report.llo import Dumps
    from seqmodels.tools.kernel_report.pallas_calls import operations, pallas_calls
    from seqmodels.tools.kernel_report.programs import array_bytes

    try:
        # A mesh of one device: a kernel asks it which generation it is for.
        mesh = jax.sharding.Mesh([where], ("device",))
        with jax.set_mesh(mesh), request.trying():
            built = request.build()
            sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in built.arguments]
            traced = jax.jit(built.function).trace(*shapes)
            lowered = traced.lower(lowering_platforms=("tpu",))
        began = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - began
    except InputError as error:
        return {"error": str(error), "message": str(error), "input_error": True}
    except jax.errors.JaxRuntimeError as error:
        return {"error": reason(str(error)), "message": str(error)}
    except Exception as error:  # whatever a function that is being written raises is what its author wants to see
        line = (str(error).strip() or "no message").splitlines()[0]
        return {"error": f"{type(error).__name__}: {line}", "message": traceback.format_exc()}
    jaxpr = traced.jaxpr.jaxpr
    dumps = Dumps(folder, device.timing.delay_slots)
    program = figures.program(compiled.as_text(), list(pallas_calls(jaxpr)), dumps, device)
    needed = operations(jaxpr) if built.operations is None else built.operations
    moved = array_bytes([x.aval for x in (*jaxpr.invars, *jaxpr.outvars)]) if built.bytes is None else built.bytes
    bound = figures.bound(needed, moved, device)
    return {"compile_seconds": seconds, "bound": bound._asdict(), "program": dataclasses.asdict(program)}


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_INPUT)
