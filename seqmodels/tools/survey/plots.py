"""Pictures of a survey: panels side by side with a line for each mixer."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from seqmodels.errors import InputError
from seqmodels.tools.survey.views import Result

DASHES = ("-", "--", ":")
SUFFIXES = (".png", ".svg", ".pdf")


class Panel(NamedTuple):
    """title: of the vertical axis, which is logarithmic and shows `key` of the points, times `unit`."""

    title: str
    x_title: str
    key: str
    unit: float


def check(file: Path) -> None:
    """Before minutes of measuring, not after."""
    if file.suffix not in SUFFIXES:
        raise InputError(f"--plot {file} ends with {file.suffix!r}; expected one of {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("--plot needs matplotlib; install it with pip install 'seqmodels[plot]'") from error


def draw(
    file: Path, panels: Sequence[Panel], series: Mapping[int, Mapping[str, Sequence[Result]]], *, x: str, log_x: bool
) -> None:
    """series: the lines of each panel by name, as points. A name has one colour and dash in all panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for lines in series.values() for name in lines))
    colours = pyplot.get_cmap("tab10").colors
    looks = dict(zip(names, itertools.cycle((c, dash) for dash in DASHES for c in colours)))
    size = 7 * len(panels), max(4.5, 0.24 * max(map(len, series.values())) + 1)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained")
    for i, (panel, ax) in enumerate(zip(panels, axes)):
        for name, points in series[i].items():
            colour, dash = looks[name]
            at, values = [p[x] for p in points], [p[panel.key] * panel.unit for p in points]
            ax.plot(at, values, dash, color=colour, label=name, marker="." if len(at) < 12 else None)
        ax.set(xlabel=panel.x_title, ylabel=panel.title, yscale="log", xscale="log" if log_x else "linear")
        ax.grid(alpha=0.3)
    alike = all(list(lines) == list(series[0]) for lines in series.values())
    for ax in axes[-1:] if alike else axes:
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    figure.savefig(file, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
