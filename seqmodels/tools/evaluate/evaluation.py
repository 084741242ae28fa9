"""What a suite is, and what it finds out.

A suite is a module with

    DESCRIPTION              what it measures, for the command's help
    add_arguments(parser)    its own options
    evaluate(run, options)   the `Evaluation` of a `seqmodels.tools._runs.TrainedRun`, or several of them by what is
                             added to the suite's name: {"": the main one, "_by_position": another}
"""

from collections.abc import Sequence
from typing import NamedTuple

Row = dict[str, float | int | str]


class Evaluation(NamedTuple):
    """A table of what was measured.

    x: the column that the others are drawn against.
    units: of columns that have one.
    rows: a number or a string by column. First come the keys, which tell the rows apart, then what was measured; a row
        may lack a measurement.
    y: a second key, where what was measured is best seen as a map over both.
    notes: sentences that belong to the table.
    """

    x: str
    units: dict[str, str]
    rows: list[Row]
    y: str | None = None
    notes: Sequence[str] = ()

    @property
    def columns(self) -> list[str]:
        """All of them, those of earlier rows first."""
        return list(dict.fromkeys(column for row in self.rows for column in row))

    @property
    def keys(self) -> list[str]:
        """The columns that tell the rows apart: as few of the first ones as do."""
        columns = self.columns
        for count in range(1, len(columns)):
            if len({tuple(row.get(column) for column in columns[:count]) for row in self.rows}) == len(self.rows):
                return columns[:count]
        return columns
