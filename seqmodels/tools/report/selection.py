"""What is compared: for each combination of the compared axes, the best over others, over several seeds."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence

from seqmodels.tools.report.points import FAILED, FINISHED, Label, Point, Sweep
from seqmodels.training.metrics import less_is_better


@dataclasses.dataclass(frozen=True)
class Row:
    """A combination of labels of the compared axes, and its best points.

    axes      those labels
    best      the best value of each axis of `best_of`; {} where no point has finished
    edges     of these, the axes whose best value is the least or the largest that has an outcome: a better one may
              lie beyond
    points    the best ones, one for each seed
    values    the metric of those points
    finished, of, seeds  finished points of the combination, all of them, and how many seeds the sweep has
    """

    axes: dict[str, Label]
    best: dict[str, Label]
    edges: Sequence[str]
    points: Sequence[Point]
    values: Sequence[float]
    finished: int
    of: int
    seeds: int

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def least(self) -> float | None:
        return min(self.values, default=None)

    @property
    def most(self) -> float | None:
        return max(self.values, default=None)

    @property
    def deviation(self) -> float | None:
        """The standard deviation of a sample (n - 1); None of fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def mean_of(self, name: str) -> float | None:
        """The mean of another result over the best points."""
        found = [value for point in self.points if (value := point.result(name)) is not None]
        return statistics.fmean(found) if found else None


def select(sweep: Sweep) -> list[Row]:
    """A row for each combination of the compared axes, in their order."""
    groups: dict[tuple, list[Point]] = {}
    for point in sweep.points:
        groups.setdefault(tuple(point.axes[axis] for axis in sweep.axes), []).append(point)
    return [_row(sweep, dict(zip(sweep.axes, labels)), points) for labels, points in groups.items()]


def _row(sweep: Sweep, axes: dict[str, Label], points: Sequence[Point]) -> Row:
    candidates: dict[tuple, list[Point]] = {}
    for point in points:
        if point.status == FINISHED and _number(point, sweep.metric) is not None:
            candidates.setdefault(tuple(point.axes[axis] for axis in sweep.best_of), []).append(point)
    sign = -1 if less_is_better(sweep.metric) else 1

    def worth(at: tuple) -> tuple[int, float]:
        # A mean over fewer seeds leaves out those that failed.
        return len(candidates[at]), sign * _mean(candidates[at], sweep.metric)

    # The first of equals: dictionaries keep the sweep's order, and max the first.
    chosen = max(candidates, key=worth, default=())
    best = dict(zip(sweep.best_of, chosen))
    taken = candidates.get(chosen, [])
    return Row(
        axes=axes,
        best=best,
        edges=[axis for axis, value in best.items() if _at_edge(axis, value, points, sweep)],
        points=taken,
        values=[_number(point, sweep.metric) for point in taken],
        finished=sum(point.status == FINISHED for point in points),
        of=len(points),
        seeds=len(sweep.order[sweep.seed]) if sweep.seed else 1,
    )


def _number(point: Point, metric: str) -> float | None:
    value = point.result(metric)
    return value if value is not None and math.isfinite(value) else None


def _mean(points: Sequence[Point], metric: str) -> float:
    return statistics.fmean(_number(point, metric) for point in points)


def _at_edge(axis: str, value: Label, points: Sequence[Point], sweep: Sweep) -> bool:
    """Among the numbers that were tried and have an outcome, which a failed point has: it is worse."""
    tried = {point.axes[axis] for point in points if point.status in (FINISHED, FAILED)}
    labels = sweep.order[axis]
    if len(labels) < 2 or any(isinstance(label, str) for label in labels):
        return False
    return value in (min(tried), max(tried))


def panels_of(rows: Sequence[Row], axes: Sequence[str]) -> dict[tuple[Label, ...], list[Row]]:
    """Rows by their labels on some of the axes, in order."""
    found: dict[tuple[Label, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.axes[axis] for axis in axes), []).append(row)
    return found


def conditions(sweep: Sweep) -> list[str]:
    """On what it ran: a line for each source revision, set of versions and machine, with how many starts it had."""
    counts: dict[str, int] = {}
    for start in itertools.chain.from_iterable(point.starts for point in sweep.points):
        line = _condition(start)
        counts[line] = counts.get(line, 0) + 1
    return [f"{line} ({count} {'start' if count == 1 else 'starts'})" for line, count in counts.items()]


def dates(sweep: Sweep) -> str:
    """Of the first and the last start; "" where none is known."""
    found = sorted(start["time"][:10] for point in sweep.points for start in point.starts if "time" in start)
    return " to ".join(dict.fromkeys([found[0], found[-1]])) if found else ""


_PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def _condition(start: dict) -> str:
    source, packages = start.get("source") or {}, start.get("packages") or {}
    revision = str(source.get("revision") or "unknown")[:12]
    changed = " with local changes" if source.get("changed") else ""
    versions = [f"Python {start.get('python', 'unknown')}"]
    versions += [f"{name} {packages[name]}" for name in _PACKAGES if name in packages]
    machine = [start[name] for name in ("devices", "processor") if start.get(name)]
    machine += [f"{start['cores']} cores"] if start.get("cores") else []
    machine += [start["platform"]] if start.get("platform") else []
    return ", ".join([f"seqmodels {revision}{changed}", *versions, *machine])
