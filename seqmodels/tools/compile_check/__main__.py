"""python -m seqmodels.tools.compile_check: the command line."""

import argparse
from pathlib import Path

from seqmodels.errors import run_main

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
    from seqmodels.tools.compile_check.chips import generation_of  # isort: skip
    from seqmodels import config
    from seqmodels.tools._documents import check_writable, put_section
    from seqmodels.tools.compile_check import command

    parser = argparse.ArgumentParser(
        prog="python -m seqmodels.tools.compile_check",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    config.add_arguments(parser)
    parser.add_argument("--topology", required=True, nargs="+", metavar="SLICE", help="slices, as v5p:8x8x8")
    command.add_arguments(parser)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the reports there, as a section")
    rest, overrides = config.split_overrides(argv)
    arguments = parser.parse_args(rest)
    for topology in arguments.topology:
        generation_of(topology)
    check_writable("markdown", arguments.markdown)

    found = command.reports_of(arguments, arguments.config, overrides, arguments.topology)
    if arguments.json is not None:
        command.write_json(arguments.json, found)
    if arguments.markdown is not None:
        from seqmodels.tools.compile_check.report import START, section

        line = " ".join(["python -m seqmodels.tools.compile_check", *argv])
        parts = [f"## {found.name}", f"`{line}`, {found.date}, {found.versions}", *section(found.reports)]
        put_section(arguments.markdown, found.name, parts, start=START)
    return found.exit_code


if __name__ == "__main__":
    run_main(main)
