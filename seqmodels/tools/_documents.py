"""Files that measuring programs write: a section of a markdown file each time, and options that name files."""

import re
from collections.abc import Sequence
from pathlib import Path

from seqmodels.errors import InputError


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column stands on the left, the others on the right."""
    head = [f"| {' | '.join(columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


def put_section(file: Path, name: str, parts: Sequence[str], *, start: str) -> None:
    """Write the parts, paragraphs apart, into a section of the file: in the place of one of this name, or at the end.

    start: what a new file begins with.
    """
    marks = [f"<!-- {name}: {where} -->" for where in ("begin", "end")]
    text = "\n\n".join([marks[0], *parts, marks[1]]) + "\n"
    old = file.read_text() if file.exists() else ""
    if not old.strip():
        old = start
    pattern = ".*?".join(map(re.escape, marks)) + "\n"
    new, count = re.subn(pattern, lambda _: text, old, flags=re.DOTALL)
    file.write_text(new if count else f"{old.rstrip()}\n\n{text}")


def check_writable(option: str, path: Path | None) -> None:
    """Raise InputError where the file cannot be written: before minutes of measuring, not after."""
    if path is None:
        return
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise InputError(f"--{option} {path} cannot be written: {error.strerror}") from error
    if not existed:
        path.unlink()
