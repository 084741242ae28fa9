"""python -m seqmodels.tools.report: the command line."""

import argparse
import os
from pathlib import Path

from seqmodels.errors import EXIT_DONE, run_main
from seqmodels.tools.report.points import read_sweep
from seqmodels.tools.report.report import Report, choose, section, write

DESCRIPTION = """\
Tables and pictures of a sweep, of its points' run directories alone. Into a folder it writes

  report.html    all of it on one page, which needs no other file and no network; a click on a title sorts a table
  report.md      the summary, with links to the pictures
  summary.csv    the best point of each combination of the compared axes, its spread over seeds
  results.csv    every point: its axes, results and costs
  points.csv     the same, and how long it took
  *.png          the pictures

The best value of an axis of `sweep.best_of` is that with the best mean over seeds; a value that is the least or the
largest tried is marked as an edge: a better one may lie beyond. Points that have not finished are listed and count
for nothing. summary.csv and results.csv have no times: they are the same, byte for byte, for a sweep that was killed
and gone on with and for one that was not."""

EPILOG = """\
examples:
  python -m seqmodels.tools.report sweeps/mqar
  python -m seqmodels.tools.report sweeps/mqar --markdown docs/mqar.md --pictures accuracy_by_state_bytes

exit codes:
  0   done, whether or not all points have finished
  2   an input is wrong; one line says which"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m seqmodels.tools.report",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="the --sweep_dir of seqmodels.tools.sweep, or gs://BUCKET/FOLDER")
    parser.add_argument("--out", metavar="DIR", help="where the report goes (default: the folder `report` in DIR)")
    parser.add_argument("--metric", metavar="NAME", help="compare this key of the evaluations, not sweep.metric")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the summary into a section of this file")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--pictures", nargs="+", metavar="NAME", help="only these, as *.png are called (default: all)")
    choice.add_argument("--no_pictures", action="store_true", help="tables alone, which need no matplotlib")
    options = parser.parse_args(argv)

    from seqmodels.tools._documents import check_writable

    check_writable("markdown", options.markdown)
    report = Report.of(read_sweep(options.folder, options.metric))
    report = choose(report, [] if options.no_pictures else options.pictures)
    out = options.out or os.path.join(options.folder, "report")
    pictures = write(report, out)
    print(report.text())
    print(f"\nreport: {os.path.join(out, 'report.html')}, {len(pictures)} pictures")
    if options.markdown is not None:
        section(report, pictures, options.markdown)
        print(f"section `{report.sweep.name}` of {options.markdown}")
    return EXIT_DONE


if __name__ == "__main__":
    run_main(main)
