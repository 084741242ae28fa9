"""python -m seqmodels.tools.compile_check: the command line."""

import argparse
import ast
import json
from pathlib import Path
from typing import Any

from seqmodels.errors import EXIT_DEFECT, EXIT_DONE, InputError, run_main

DESCRIPTION = """\
Compile the training step of a config for a TPU slice, on any Linux machine and without a TPU: whether it fits the
memory of a chip, what travels between chips and whether it overlaps compute, which kernels are used, and bounds on the
time of a step. The data of the config is not read. Needs the compiler: pip install -e '.[tpu]'."""

EPILOG = """\
examples:
  python -m seqmodels.tools.compile_check --config configs/pretraining/mamba2_1b.gin --topology v5e:16x16
  python -m seqmodels.tools.compile_check --config configs/pretraining/mamba2_7b.gin --topology v5p:4x4x4 v6e:16x16 \\
      --gin.DeviceMesh.seq=4 --json report.json

A slice is given by generation (v4, v5e, v5p, v6e, tpu7x) and shape in chips: v5e-256 is v5e:16x16, and v5p-128, which
counts cores, is v5p:4x4x4. DeviceMesh.slices of the config says how many slices there are.

exit codes:
  0   compiles and fits on every slice
  1   does not fit on one of them, or the compiler refuses it; or a defect
  2   an input is wrong; one line says which"""


def main(argv: list[str]) -> int:
    # The chips' module first: jax, which all the others import, is to find its environment set.
    from seqmodels.tools.compile_check.chips import generation_of, target  # isort: skip
    from seqmodels import config

    parser = argparse.ArgumentParser(
        prog="python -m seqmodels.tools.compile_check",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    config.add_arguments(parser)
    parser.add_argument("--topology", required=True, nargs="+", metavar="SLICE", help="slices, as v5p:8x8x8")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the compiler; repeatable"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the reports there, as a section")
    parser.add_argument("--hlo", type=Path, metavar="FOLDER", help="keep the compiled programs there, as text")
    rest, overrides = config.split_overrides(argv)
    arguments = parser.parse_args(rest)
    options = dict(_option(text) for text in arguments.option)

    # After the command line is known to be right: these imports take seconds.
    from seqmodels.tools._documents import check_writable, put_section

    for topology in arguments.topology:
        generation_of(topology)
    for name in ("json", "markdown"):
        check_writable(name, getattr(arguments, name))

    import jax

    from seqmodels.constructors import register_constructors
    from seqmodels.start_up import prepare_jax
    from seqmodels.tools.compile_check import report as reports
    from seqmodels.tools.compile_check.check import check
    from seqmodels.training import TrainingJob, parameter_shapes
    from seqmodels.training.run_directory import environment

    prepare_jax()
    jax.config.update("jax_enable_compilation_cache", False)  # or the time to compile would be that to read
    conditions = environment()
    register_constructors()
    config.parse(arguments.config, overrides)
    job = TrainingJob()
    parameter_shapes(job.model, job.seq_len)  # every constructor that a binding may be of has been called
    config.check_all_used()
    found = []
    for topology in arguments.topology:
        found.append(check(job, target(topology, job.mesh.slices), options, keep=arguments.hlo))
        print(reports.text(found[-1]), flush=True)
    command = ["python -m seqmodels.tools.compile_check", *argv]
    if arguments.json is not None:
        whole = {"environment": conditions, "reports": [reports.as_json(x) for x in found]}
        arguments.json.write_text(json.dumps(whole, indent=1) + "\n")
    if arguments.markdown is not None:
        name = " ".join([Path(arguments.config[-1]).stem, *overrides])
        versions = ", ".join(f"{x} {conditions['packages'].get(x)}" for x in ("jax", "libtpu"))
        parts = [f"## {name}", f"`{' '.join(command)}`, {conditions['time'][:10]}, {versions}", *reports.section(found)]
        start = f"# What the TPU compiler says of the shipped configs\n\n{reports.NOTES}\n"
        put_section(arguments.markdown, name, parts, start=start)
    return EXIT_DONE if all(x.fits for x in found) else EXIT_DEFECT


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InputError(f"--option {text!r}: expected NAME=VALUE")
    try:
        return name, ast.literal_eval(value.capitalize() if value in ("true", "false") else value)
    except (SyntaxError, ValueError):
        return name, value


if __name__ == "__main__":
    run_main(main)
