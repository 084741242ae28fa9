"""python -m seqmodels.tools.long_context: the command line."""

import argparse
import os
from pathlib import Path

from seqmodels.errors import EXIT_DONE, run_main
from seqmodels.tools._documents import check_writable, markdown_table, put_section
from seqmodels.tools.long_context import exchanges, memory, payload
from seqmodels.tools.long_context.views import View
from seqmodels.tools.survey import plots
from seqmodels.tools.survey.report import as_text
from seqmodels.tools.survey.views import Table

VIEWS: dict[str, View] = {"exchanges": exchanges.VIEW, "payload": payload.VIEW, "memory": memory.VIEW}

DESCRIPTION = """\
What sequences too long for one device cost when devices share them: what travels and how long a step takes at least, by
the compiler; how exact the exchange is; and the memory of a device, on this machine's CPU."""

EPILOG = """\
examples:
  python -m seqmodels.tools.long_context exchanges --markdown docs/long_context.md --plot docs/long_context.png
  python -m seqmodels.tools.long_context payload --length 4096

exit codes:
  0   done
  1   a defect
  2   an input is wrong; one line says which"""

START = "# Long sequences on many devices\n\nWritten by `python -m seqmodels.tools.long_context`.\n"


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    view = VIEWS[options.view]
    for name in ("markdown", "plot", "json"):
        check_writable(name, getattr(options, name, None))
    plot = getattr(options, "plot", None)
    if plot is not None:
        plots.check(plot)
    rows = view.measure(options)
    print(as_text(Table(view.summary, rows[0], rows[1:])))
    if plot is not None:
        view.draw(rows, plot)
    if options.markdown is not None:
        _write(view, options, argv, rows, plot)
    return EXIT_DONE


def _write(view: View, options: argparse.Namespace, argv: list[str], rows: list, plot: Path | None) -> None:
    # After the measurement: what it imports is to see its own settings first.
    from seqmodels.tools.benchmark.report import heading
    from seqmodels.training.run_directory import environment

    parts = [
        f"## {options.view}",
        f"`{' '.join(['python -m seqmodels.tools.long_context', *argv])}`:",
        f"```\n{heading(environment())}\n```",
        f"```\n{view.description}\n```",
        markdown_table(rows[0], rows[1:]),
    ]
    if plot is not None:
        parts.append(f"![{options.view}]({os.path.relpath(plot, options.markdown.parent)})")
    put_section(options.markdown, options.view, parts, start=START)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m seqmodels.tools.long_context", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw
    )
    named = parser.add_subparsers(dest="view", required=True, metavar=f"{{{','.join(VIEWS)}}}")
    for name, view in VIEWS.items():
        sub = named.add_parser(name, help=view.summary, description=view.description, formatter_class=raw)
        view.add(sub)
        sub.add_argument("--markdown", type=Path, metavar="FILE", help="put the table into a section of this file")
        if view.draw is not None:
            sub.add_argument("--plot", type=Path, metavar="FILE", help="draw a picture (.png, .svg, .pdf)")
    return parser


if __name__ == "__main__":
    run_main(main)
