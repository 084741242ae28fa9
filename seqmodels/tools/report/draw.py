"""How the pictures of a report look.

Of up to 21 lines each is known by its marker alone, and by its colour and its dashes together.
"""

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from seqmodels.errors import InputError
from seqmodels.tools._pictures import COLOURS, MAP, MARKERS, mark_bytes
from seqmodels.tools.report.pictures import HeatMaps, Picture
from seqmodels.tools.report.tables import label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES = ("-", (0, (4, 1.5)), (0, (1.5, 1)), (0, (5, 1.5, 1, 1.5)))
# Filled, then with a white face, then other ones.
FACES = tuple((marker, filled) for filled in (True, False) for marker in MARKERS)
FACES += (*((marker, True) for marker in ("<", ">", "*", "d", "p", "+", "x")),)
# Of a curve with many points, so many get a marker.
MARKED = 7
COLUMNS = 4
DPI = 120


class Look(NamedTuple):
    colour: str
    dashes: Any
    marker: str
    filled: bool


def look(number: int) -> Look:
    """Of the line of this number."""
    dashes = DASHES[number // len(COLOURS) % len(DASHES)]
    return Look(COLOURS[number % len(COLOURS)], dashes, *FACES[number % len(FACES)])


def check() -> None:
    """Raise `InputError` where there is nothing to draw with: before anything is written, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(
            "the pictures need matplotlib: install it with pip install 'seqmodels[plot]', or do without, --no_pictures"
        ) from error


def png(picture: Picture | HeatMaps) -> bytes:
    """The same bytes for the same picture, with the same version of matplotlib."""
    file = io.BytesIO()
    drawn = figure(picture)
    drawn.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    return file.getvalue()


def figure(picture: Picture | HeatMaps) -> "Figure":
    return _maps(picture) if isinstance(picture, HeatMaps) else _panels(picture)


def _panels(picture: Picture) -> "Figure":
    shape, size = _grid(len(picture.panels), width=3.3, height=2.9)
    n_named = sum(of in {line.of for panel in picture.panels for line in panel.lines} for of in picture.lines)
    legend = 0.6 + 0.085 * max(map(len, picture.lines)) if n_named > 1 else 0
    size = size[0] + legend, max(size[1], 0.19 * n_named + 0.5)
    drawn, axes = _figure(shape, size, sharex=not picture.dense, sharey=True)
    looks = {of: look(i) for i, of in enumerate(picture.lines)}
    handles = {}
    for ax, panel in zip(axes, picture.panels):
        for line in panel.lines:
            handles.setdefault(line.of, _line(ax, line, looks[line.of], picture))
        if panel.title:
            ax.set_title(panel.title, fontsize=9)
        ax.grid(alpha=0.3, linewidth=0.6)
    _x_axis(axes, picture)
    _y_axis(axes, picture)
    _outer_labels(axes, shape, len(picture.panels), picture.x_label, picture.y_label)
    if n_named > 1:
        named = [(handles[of], of) for of in picture.lines if of in handles]
        drawn.legend(*zip(*named), loc="outside right upper", fontsize=8, frameon=False, handlelength=3.2)
    return drawn


def _line(ax: "Axes", line: Any, look: Look, picture: Picture) -> Any:
    (drawn,) = ax.plot(
        line.x,
        line.y,
        color=look.colour,
        linestyle="none" if picture.x_scale == "names" else look.dashes,
        linewidth=1.4,
        marker=look.marker,
        markersize=5.5 if look.marker not in "*+x" else 7,
        markeredgewidth=1.2,
        markerfacecolor=look.colour if look.filled else "white",
        # Lines that lie on each other have their markers in other places.
        markevery=_every(len(line.x), picture.lines.index(line.of)) if picture.dense else None,
        label=line.of,
    )
    if list(line.low) != list(line.high):
        if len(line.x) > 1 and picture.x_scale not in ("names", "bytes"):
            ax.fill_between(line.x, line.low, line.high, color=look.colour, alpha=0.15, linewidth=0)
        else:
            lengths = [[y - low for y, low in zip(line.y, line.low)], [high - y for y, high in zip(line.y, line.high)]]
            ax.errorbar(line.x, line.y, yerr=lengths, fmt="none", ecolor=look.colour, elinewidth=1, capsize=2.5)
    return drawn


def _every(points: int, number: int) -> tuple[int, int]:
    step = max(1, points // MARKED)
    return (number * 3) % step, step


def _maps(picture: HeatMaps) -> "Figure":
    first = picture.maps[0]
    width, height = max(2.2, 0.42 * len(first.x) + 1), max(1.9, 0.3 * len(first.y) + 1)
    shape, size = _grid(len(picture.maps), width=width, height=height)
    drawn, axes = _figure(shape, (size[0] + 1, size[1]), sharex=False, sharey=False)
    known = [x for map_ in picture.maps for row in map_.values for x in row if x is not None]
    least, most = _whole(min(known), max(known), picture.value_label)
    for ax, map_ in zip(axes, picture.maps):
        values = [[math.nan if x is None else x for x in row] for row in map_.values]
        shown = ax.imshow(values, cmap=MAP, vmin=least, vmax=most, aspect="auto")
        ax.set_title(map_.title, fontsize=8)
        ax.set_xticks(*_some([_size(x) for x in map_.x], 6), fontsize=8)
        ax.set_yticks(*_some([label(y) for y in map_.y], 8), fontsize=8)
    _outer_labels(axes, shape, len(picture.maps), picture.x_label, picture.y_label)
    bar = min(0.9, 5 / size[1])
    drawn.colorbar(shown, ax=list(axes[: len(picture.maps)]), label=picture.value_label, shrink=bar, aspect=30)
    return drawn


def _whole(least: float, most: float, name: str) -> tuple[float, float]:
    """The range of a scale of colours: of shares all that there is."""
    whole = 100 if name.endswith("(%)") else 1
    return (0, whole) if least >= 0 and most <= whole else (least, most)


def _figure(shape: tuple[int, int], size: tuple[float, float], **share: bool) -> tuple["Figure", list["Axes"]]:
    """A figure of no window, and its axes, row after row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(drawn)
    return drawn, list(drawn.subplots(*shape, squeeze=False, **share).flat)


def _grid(panels: int, *, width: float, height: float) -> tuple[tuple[int, int], tuple[float, float]]:
    """(rows, columns) and (inches across, inches down)."""
    few_empty = min((COLUMNS, COLUMNS - 1), key=lambda columns: -panels % columns)
    columns = min(panels, COLUMNS) if panels <= COLUMNS else few_empty
    rows = math.ceil(panels / columns)
    wide = (5.2, 3.6) if panels == 1 else (width * columns + 0.4, height * rows + 0.3)
    return (rows, columns), wide


def _outer_labels(axes: Sequence["Axes"], shape: tuple[int, int], panels: int, x_label: str, y_label: str) -> None:
    """Titles of axes on the outer sides; axes without a panel go away."""
    for i, ax in enumerate(axes):
        if i >= panels:
            ax.remove()
            continue
        ax.tick_params(labelsize=8)
        if i % shape[1] == 0:
            ax.set_ylabel(y_label, fontsize=9)
        if i + shape[1] >= panels:
            ax.set_xlabel(x_label, fontsize=9)
            ax.tick_params(labelbottom=True)


def _x_axis(axes: Sequence["Axes"], picture: Picture) -> None:
    from matplotlib.ticker import EngFormatter, FixedLocator, MaxNLocator, NullLocator

    at = sorted({x for panel in picture.panels for line in panel.lines for x in line.x}, key=str)
    if picture.x_scale == "names":
        for ax in axes:
            ax.tick_params(axis="x", rotation=40)
            ax.margins(x=0.1)
            for name in ax.get_xticklabels():
                name.set(ha="right", rotation_mode="anchor")
        return
    at = sorted(at)
    if picture.x_scale == "linear":
        for ax in axes:
            ax.xaxis.set_major_locator(MaxNLocator(5))
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        return
    most = 8 if len(picture.panels) == 1 else 6
    room = (max(at) / min(at)) ** 0.06 if max(at) > min(at) else 1.5
    for ax in axes:
        ax.set_xscale("log", base=2)
        ax.set_xlim(min(at) / room, max(at) * room)
        if picture.x_scale == "bytes":
            mark_bytes(ax.xaxis, at)
            continue
        ax.xaxis.set_major_locator(FixedLocator(_apart(at, most)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(lambda x, _: _size(x))


def _y_axis(axes: Sequence["Axes"], picture: Picture) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    in_bytes = picture.y_label.endswith("(bytes)")
    if not picture.y_log and not in_bytes:
        return
    axes[0].set_yscale("log")
    values = sorted(y for panel in picture.panels for line in panel.lines for y in line.y if y > 0)
    steps = (1, 2, 5) if values[-1] < 1e3 * values[0] else (1,)
    for ax in axes:
        if in_bytes:
            mark_bytes(ax.yaxis, values, most=8)
            continue
        ax.yaxis.set_major_locator(LogLocator(subs=steps))
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())


def _apart(at: Sequence[float], most: int) -> list[float]:
    """Those that are far enough from the one before, on a logarithmic axis, for a name below each."""
    least = (max(at) / min(at)) ** (1 / most)
    found = [at[0]]
    for x in at[1:]:
        if x >= 0.999 * found[-1] * least:
            found.append(x)
    return found


def _size(x: Any) -> str:
    """Whole numbers, those of 1,024 with a k."""
    if isinstance(x, str) or x != int(x):
        return label(x)
    for name, size in (("M", 2**20), ("k", 2**10)):
        if x >= size and x % size == 0:
            return f"{int(x) // size}{name}"
    return f"{int(x):,}"


def _some(names: Sequence[str], most: int) -> tuple[list[int], list[str]]:
    """At most so many of them, evenly, with their places."""
    step = math.ceil(len(names) / most)
    at = list(range(0, len(names), step))
    return at, [names[i] for i in at]
