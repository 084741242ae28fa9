"""What the pictures of an evaluation and of a report share: how lines look, and what axes are like.

The colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which the colour-blind tell apart, without
the yellow, which is hard to see on white. Lines differ in their markers as well. Maps are in cividis, which looks the
same to the colour-blind, and is ordered without colour.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axis import Axis

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = tuple("os^DvPX")
MAP = "cividis"


def is_wide(values: Iterable[float]) -> bool:
    """Whether they are positive and too far apart for a linear axis, which shares of a whole are not."""
    values = [value for value in values if value == value]
    return bool(values) and min(values) > 0 and max(values) > max(1, 10 * min(values))


def mark_bytes(axis: "Axis", values: Sequence[float], most: int = 5) -> None:
    """Ticks of a logarithmic axis at powers of two bytes among these values, at most so many."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.set_major_locator(FixedLocator(_powers(values, most)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda x, _: bytes_text(x))


def bytes_text(x: float) -> str:
    """Bytes, in the largest unit that they have one of."""
    for name, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if x >= size:
            return f"{x / size:.3g} {name}"
    return f"{x:.3g} B"


def _powers(values: Sequence[float], most: int) -> list[float]:
    """Powers of two among these, or where there are too few, the least and the largest of them."""
    least, largest = min(values), max(values)
    low, high = math.ceil(math.log2(least)), math.floor(math.log2(largest))
    step = max(1, math.ceil((high - low + 1) / most))
    found = [2.0**power for power in range(-(-low // step) * step, high + 1, step)]
    return found if len(found) > 1 else [least, largest] if largest > 1.2 * least else [least]
