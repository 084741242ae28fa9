"""What the programs have in common that compile the step of a config: options, the way to the reports, their file.

Nothing here imports jax before `reports_of` runs, so that a parser is made in a blink.
"""

import argparse
import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from seqmodels.errors import EXIT_DEFECT, EXIT_DONE, InputError

if TYPE_CHECKING:
    from seqmodels.tools.compile_check.check import Report


class Found(NamedTuple):
    """What the compiler says of a config. name: of the config, with its overrides. conditions: what
    `run_directory.environment` says. reports: one for each slice."""

    name: str
    conditions: dict[str, Any]
    reports: list["Report"]

    @property
    def exit_code(self) -> int:
        return EXIT_DONE if all(x.fits for x in self.reports) else EXIT_DEFECT

    @property
    def versions(self) -> str:
        """Of what decides how a step is compiled."""
        return ", ".join(f"{x} {self.conditions['packages'].get(x)}" for x in ("jax", "libtpu"))

    @property
    def date(self) -> str:
        return self.conditions["time"][:10]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the compiler; repeatable"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports there")
    parser.add_argument("--hlo", type=Path, metavar="FOLDER", help="keep the compiled programs there, as text")


def reports_of(
    arguments: argparse.Namespace,
    files: Sequence[str | Path],
    overrides: Sequence[str],
    topologies: Sequence[str],
    slices: int | None = None,
) -> Found:
    """Compile the training step of a config for each topology, and print each report as it is there.

    arguments: those of `add_arguments`. slices: how many of each topology there will be, None for as many as
    `DeviceMesh.slices` of the config says.
    Raises InputError for what is wrong with any of them; a step that does not compile or fit is a report.
    """
    # The chips' module first: jax, which all the others import, is to find its environment set.
    from seqmodels.tools.compile_check.chips import target  # isort: skip
    from seqmodels import config
    from seqmodels.tools._documents import check_writable

    options = dict(_option(text) for text in arguments.option)
    check_writable("json", arguments.json)

    # After the arguments are known to be right: these imports take seconds.
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
    config.parse(files, overrides)
    job = TrainingJob()
    parameter_shapes(job.model, job.seq_len)  # every constructor that a binding may be of has been called
    config.check_all_used()
    if slices not in (None, job.mesh.slices):
        raise InputError(
            f"DeviceMesh.slices is {job.mesh.slices} in the config: expected {slices}, as many as there are"
        )
    found = []
    for topology in topologies:
        found.append(check(job, target(topology, job.mesh.slices), options, keep=arguments.hlo))
        print(reports.text(found[-1]), flush=True)
    return Found(" ".join([Path(files[-1]).stem, *overrides]), conditions, found)


def write_json(file: Path, found: Found, more: dict[str, Any] | None = None) -> None:
    """All that was found, and `more` beside it."""
    from seqmodels.tools.compile_check.report import as_json

    whole = {"environment": found.conditions, "config": found.name, **(more or {})}
    file.write_text(json.dumps({**whole, "reports": [as_json(x) for x in found.reports]}, indent=1) + "\n")


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InputError(f"--option {text!r}: expected NAME=VALUE")
    try:
        return name, ast.literal_eval(value.capitalize() if value in ("true", "false") else value)
    except (SyntaxError, ValueError):
        return name, value
