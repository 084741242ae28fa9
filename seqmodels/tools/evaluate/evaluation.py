"""What a suite is, and what it finds out.

A suite is a module with

    DESCRIPTION              what it measures, for the command's help
    add_arguments(parser)    its own options
    evaluate(run, options)   the `Evaluation` of a `seqmodels.tools._runs.TrainedRun`
"""

from typing import NamedTuple


class Evaluation(NamedTuple):
    """A table of what was measured.

    x: the column that the others are drawn against.
    units: of columns that have one.
    rows: a number or a string by column.
    """

    x: str
    units: dict[str, str]
    rows: list[dict[str, float | int | str]]
