"""python -m seqmodels.tools.compile_check.summary: the reports of many jobs in one table."""

import argparse
import json
from pathlib import Path

from seqmodels.errors import InputError, run_main
from seqmodels.tools._documents import check_writable, markdown_table, put_section

DESCRIPTION = """\
Print the reports in files that --json of seqmodels.tools.compile_check and of `python -m gcp preflight` wrote, as one
table: what fits, or why not."""

COLUMNS = ("config", "slice", "GiB a device", "of", "compiled in s", "date", "jax", "libtpu", "says")
SOURCES = """\
Of files that `python -m gcp preflight JOB.toml --json FILE` and `compile_check --json FILE` wrote, put together by
`python -m seqmodels.tools.compile_check.summary`."""
GIB = 2**30


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m seqmodels.tools.compile_check.summary", description=DESCRIPTION)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the table there, as the section `summary`")
    arguments = parser.parse_args(argv)
    check_writable("markdown", arguments.markdown)
    table = markdown_table(COLUMNS, [row for file in arguments.files for row in rows(file)])
    print(table)
    if arguments.markdown is not None:
        parts = ["## What fits, in short", SOURCES, table]
        put_section(arguments.markdown, "summary", parts, start="")
    return 0


def rows(file: Path) -> list[tuple[str, ...]]:
    """One for each report in a file. Raises InputError."""
    try:
        whole = json.loads(file.read_text())
        config, conditions, reports = (whole[key] for key in ("config", "environment", "reports"))
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file} is no file of reports: expected what --json of compile_check wrote") from error
    versions = [conditions["packages"].get(name, "-") for name in ("jax", "libtpu")]
    found = []
    for x in reports:
        size = f"{x['memory']['total'] / GIB:.2f}" if x["memory"] else "-"
        says = "fits" if x["fits"] else (x["error"] or "too large").replace("|", "\\|")
        numbers = (size, f"{x['capacity'] / GIB:.2f}", f"{x['compile_seconds']:.0f}")
        slices = f"{whole['job']['tpu']}, {x['target']}" if "job" in whole else x["target"]
        found.append((config, slices, *numbers, conditions["time"][:10], *versions, says))
    return found


if __name__ == "__main__":
    run_main(main)
