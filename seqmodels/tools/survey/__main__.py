"""python -m seqmodels.tools.survey: the command line."""

import argparse
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

from seqmodels.errors import EXIT_DEFECT, EXIT_DONE, InputError, nearest, run_main
from seqmodels.registry import MIXERS
from seqmodels.tools._documents import check_writable, put_section
from seqmodels.tools.benchmark.report import heading, load
from seqmodels.tools.survey import costs, decode, plots, precision, quickstart, report, train
from seqmodels.tools.survey.views import View
from seqmodels.training.run_directory import environment

VIEWS = {"train": train.VIEW, "decode": decode.VIEW, "precision": precision.VIEW}

DESCRIPTION = """\
Measure every mixer of the registry beside the others, on this machine's CPU: whether it trains, whether it decodes in
constant memory, how precise it is; and print what a layer of it costs. Everything that is measured runs in a process of
its own."""

EPILOG = """\
examples:
  python -m seqmodels.tools.survey train --markdown docs/survey.md
  python -m seqmodels.tools.survey decode --mixers retention mamba2 --plot decode.png
  python -m seqmodels.tools.survey table --update README.md

exit codes:
  0   done
  1   a mixer does not do what it should (it is marked in the table), or a defect
  2   an input is wrong; one line says which"""


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    for name in options.mixers or []:
        if name not in MIXERS:
            raise InputError(f"--mixers has {name!r}, which does not exist; {nearest(name, MIXERS)}")
    mixers = list(dict.fromkeys(options.mixers or MIXERS))
    if options.view == "table":
        return _print_costs(mixers, options.update)

    view = VIEWS[options.view]
    view.check(options)
    quickstart.check_checkout()
    for name in ("json", "markdown", "plot"):
        check_writable(name, getattr(options, name, None))
    if getattr(options, "plot", None) is not None:
        plots.check(options.plot)
    return _measure(view, mixers, options, argv)


def _measure(view: View, mixers: list[str], options: argparse.Namespace, argv: list[str]) -> int:
    conditions = environment()
    began = heading(conditions)
    print(began)
    results, broken = {}, []
    shape = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=len(mixers), file=sys.stderr, bar_format=shape) as bar:
        for i, mixer in enumerate(mixers):

            def progress(share: float, doing: str, i: int = i, mixer: str = mixer) -> None:
                bar.set_postfix_str(f"{mixer}: {doing}", refresh=False)
                bar.update(i + share - bar.n)

            progress(0, "start")
            try:
                results[mixer] = view.measure(mixer, options, progress)
            except RuntimeError as error:  # a program of this mixer failed: the others are measured all the same
                broken.append(f"{mixer}: {str(error).splitlines()[-1]}")
                tqdm.write(f"{mixer}: {error}", file=sys.stderr)
            progress(1, "done")
            if options.json is not None:
                wrong = broken + view.failures(results)
                whole = {"view": options.view, "environment": conditions, "results": results, "failures": wrong}
                options.json.write_text(json.dumps(whole, indent=1) + "\n")
    tables, wrong = view.tables(results, options), broken + view.failures(results)
    for table in tables:
        print(f"\n{report.as_text(table)}")
    print(f"\nload average at the end {load()}")
    plot = getattr(options, "plot", None)
    if plot is not None and results:
        view.plot(results, plot)
    if options.markdown is not None:
        command = " ".join(["python -m seqmodels.tools.survey", *argv])
        link = "" if plot is None else os.path.relpath(plot, options.markdown.parent)
        parts = report.section(options.view, command, began, view.description, tables, wrong, link)
        put_section(options.markdown, options.view, parts, start=report.START)
    for line in wrong:
        print(f"FAILED {line}")
    return EXIT_DEFECT if wrong else EXIT_DONE


def _print_costs(mixers: list[str], file: Path | None) -> int:
    if file is None:
        print(report.as_text(costs.table(mixers)))
        return EXIT_DONE
    if not file.is_file():
        raise InputError(f"--update {file} is not a file")
    for mixer in costs.update(file, mixers):
        print(f"{file} has no row of {mixer}")
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m seqmodels.tools.survey", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw
    )
    named = parser.add_subparsers(dest="view", required=True, metavar="{train,decode,precision,table}")
    for name, view in VIEWS.items():
        sub = named.add_parser(name, help=view.summary, description=view.description, formatter_class=raw)
        _add_mixers(sub)
        for option, (kind, default, what) in view.options.items():
            sub.add_argument(
                f"--{option}", type=kind, default=default, metavar="N", help=f"{what} (default: {default:,})"
            )
        sub.add_argument("--json", type=Path, metavar="FILE", help="write all results, after each mixer")
        sub.add_argument("--markdown", type=Path, metavar="FILE", help="put the tables into a section of this file")
        if view.plot is not None:
            sub.add_argument("--plot", type=Path, metavar="FILE", help="draw a picture (.png, .svg, .pdf)")
    more = {"description": costs.DESCRIPTION, "formatter_class": raw}
    sub = named.add_parser("table", help="what a layer of each mixer costs, counted in shapes", **more)
    _add_mixers(sub)
    sub.add_argument("--update", type=Path, metavar="FILE", help="put the numbers into this markdown file's table")
    return parser


def _add_mixers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mixers", nargs="+", metavar="NAME", help="names of the registry (default: all)")


if __name__ == "__main__":
    run_main(main)
