"""What a person sees of a sweep while it runs."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from seqmodels.tools.sweep.folder import PointFolder

# Seconds between lines where no line can change in place.
EVERY = 60.0
_BAR = "{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} updates [{elapsed}<{remaining}{postfix}]"


class Progress:
    """One line over the updates of all points; a line of its own for every point that ends.

    points: all of them with their updates, the finished ones too. metric: what is told of a finished point. to_run: how
    many of them are run.
    """

    def __init__(self, points: Sequence[tuple[PointFolder, int]], metric: str, to_run: int):
        self._folders = {folder.name: folder for folder, _ in points}
        self._total = {folder.name: steps for folder, steps in points}
        self._steps = {name: self._total[name] if self._is_over(name) else self._step(name) for name in self._total}
        self._over = len(points) - to_run
        self._metric = metric
        self._began, self._before = time.monotonic(), sum(self._steps.values())
        self._told = time.monotonic()
        self._bar = tqdm(
            total=sum(self._total.values()),
            initial=self._before,
            file=sys.stdout,
            disable=not sys.stdout.isatty(),
            bar_format=_BAR,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def say(self, line: str) -> None:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def show(self, running: Sequence[Any]) -> None:
        """Look at how far the running points are."""
        for at_work in running:
            self._steps[at_work.folder.name] = self._step(at_work.folder.name)
        done = sum(self._steps.values())
        if not self._bar.disable:
            self._bar.set_postfix_str(", ".join(f"{x.folder.name}: {x.doing}" for x in running), refresh=False)
            self._bar.n = done
            self._bar.refresh()
        elif time.monotonic() - self._told > EVERY:
            self._told = time.monotonic()
            self.say(f"{self._count()}, {done / self._bar_total:.0%} of the updates, {self._left()} left")

    def ended(self, folder: PointFolder, how: str, seconds: float, reason: str) -> None:
        """A point is done, has failed or is stopped."""
        self._over += how != "stopped"
        self._steps[folder.name] = self._total[folder.name] if how != "stopped" else self._step(folder.name)
        about = {"done": _metric(folder, self._metric), "failed": reason, "stopped": reason}[how]
        head = {"done": "done", "failed": "FAILED", "stopped": "stopped"}[how]
        tail = f"; {self._left()} left" if self._bar.disable and how != "stopped" else ""
        self.say(f"{self._count()} {folder.name}: {head} after {seconds:.0f} s{f', {about}' if about else ''}{tail}")

    @property
    def _bar_total(self) -> int:
        return max(1, sum(self._total.values()))

    def _count(self) -> str:
        return f"[{self._over}/{len(self._total)}]"

    def _left(self) -> str:
        """Time, by the updates so far of this start."""
        done = sum(self._steps.values())
        speed = (done - self._before) / max(1e-9, time.monotonic() - self._began)
        return tqdm.format_interval((sum(self._total.values()) - done) / speed) if speed > 0 else "unknown time"

    def _step(self, name: str) -> int:
        return min(self._folders[name].step, self._total[name])

    def _is_over(self, name: str) -> bool:
        folder = self._folders[name]
        return folder.finished is not None or folder.failed is not None


def _metric(folder: PointFolder, name: str) -> str:
    done = folder.finished
    value = done["metrics"].get(f"eval/{name}") if done else None
    return f"{name} {value:.4g}" if isinstance(value, int | float) else ""
