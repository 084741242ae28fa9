"""What a view of the survey is, to the command line: what it measures of a mixer, and how that is shown."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

Result = dict[str, Any]  # numbers, strings and lists of them: what a JSON file can hold


class Progress(Protocol):
    """Told how much of a mixer is done, from 0 to 1, and what is being done."""

    def __call__(self, share: float, doing: str) -> None: ...


class Table(NamedTuple):
    """title: a line above. Cells are text; the first column stands on the left, the others on the right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class View(NamedTuple):
    """One subcommand.

    summary      what it shows, in a line
    description  what exactly is measured, compared with what
    measure      (mixer, options, progress) -> its result; raises InputError, or RuntimeError where a program failed
    tables       results by mixer -> tables
    failures     results by mixer -> a line for each thing that should not be; with one, the exit code is 1
    plot         (results by mixer, file) -> None; None for a view without a picture
    options      name -> (type, default, help) of its own options
    check        options -> None; raises InputError where they make no sense
    """

    summary: str
    description: str
    measure: Callable[[str, Any, Progress], Result]
    tables: Callable[[dict[str, Result], Any], list[Table]]
    failures: Callable[[dict[str, Result]], list[str]]
    plot: Callable[[dict[str, Result], Any], None] | None
    options: dict[str, tuple[type, Any, str]]
    check: Callable[[Any], None]
