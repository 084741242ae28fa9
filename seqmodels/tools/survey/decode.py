"""The view `decode`: a long text, token by token, and what the state of it costs."""

import itertools
import resource
import sys
import time
from typing import Any

import jax
import numpy as np

from seqmodels.errors import InputError
from seqmodels.evaluation.generation import Sampling, generate_with_states
from seqmodels.models import LanguageModel
from seqmodels.models.accounting import tree_bytes
from seqmodels.registry import MIXERS
from seqmodels.tools.survey import plots
from seqmodels.tools.survey.process import in_worker
from seqmodels.tools.survey.views import Progress, Result, Table, View

DESCRIPTION = """\
Lets the quickstart's model with each mixer (random weights, a sequence of one) write --tokens tokens with the
generation that seqmodels.tools.generate uses, in one process and one run. The bytes of the state have to be the same
after the first token and after the last; where they are not, the mixer is marked and the exit code is 1.

A state that grows (a cache of all keys and values) is allocated for the whole text beforehand, so in one run neither
its bytes nor its time would change: they are those of the length it was made for. It is therefore measured in several
runs, each for a text of another length, of which a few tokens are written: what a text of that length costs.

  state bytes    of the whole model, at the start and at the end
  us/token       CPU time of one thread, compilation apart: of a twentieth of the tokens at each end, what a tenth of
                 them stay below, which other processes disturb less than they do the median
  ratio          end over start
  memory MiB     growth of the process's peak between the two; not told of a state that grows"""

FEWEST = 100  # tokens whose time is told as one number
POINTS = 24


def measure(mixer: str, options: Any, progress: Progress) -> Result:
    return in_worker("decode", mixer, {"tokens": options.tokens}, progress) | {
        "declared_to_grow": MIXERS[mixer].op.state_grows
    }


def measure_model(model: LanguageModel, params: Any, tokens: int, progress: Progress) -> Result:
    """Points along a text: position, bytes of the state, microseconds for a token."""
    grows = _declared_bytes(model, 100) != _declared_bytes(model, 10_000)
    points = _in_several_runs(model, params, tokens, progress) if grows else None
    growth = None
    if points is None:
        points, growth = _in_one_run(model, params, tokens, progress)
    return {"grows": grows, "points": points, "memory_growth": growth}


def _in_one_run(model: LanguageModel, params: Any, tokens: int, progress: Progress) -> tuple[list[Result], int]:
    """The first and the last point are each a twentieth of the text; those between lie evenly on a log axis."""
    width = max(FEWEST, tokens // 20)
    inner = np.unique(np.geomspace(2 * width, tokens, POINTS).astype(int)).tolist()
    times, sizes, peaks = [], {}, {}
    progress(0, "compile")
    for position, (_, state) in enumerate(_text(model, params, tokens), start=1):
        times.append(time.process_time())
        if position in (2, tokens) or position in inner:
            sizes[position], peaks[position] = tree_bytes(state), _peak_memory()
            progress(position / tokens, f"token {position:,}")
        if position == width:
            peaks[position] = _peak_memory()
    microseconds = np.diff(times) * 1e6  # [i]: of the token at position i + 2; the first two wait for compilation
    # A window for each point: from the one before, at the end as wide as at the start.
    starts = {2: 3, tokens: tokens - width + 1}
    points = []
    for before, position in itertools.pairwise([0, *sorted(sizes)]):
        first = starts.get(position, max(before, 3))
        window = microseconds[first - 2 : (width if position == 2 else position) - 1]
        points.append({"position": position, "bytes": sizes[position], "us": _typical(window)})
    return points, peaks[tokens] - peaks[width]


def _in_several_runs(model: LanguageModel, params: Any, tokens: int, progress: Progress) -> list[Result]:
    """A run for each length, by factors of four up to the text's."""
    lengths = sorted({tokens, *(tokens // 4**i for i in range(1, 8) if tokens // 4**i >= FEWEST)})
    points = []
    for i, length in enumerate(lengths):
        progress(i / len(lengths), f"a text of {length:,} tokens")
        times = []
        for _, after in itertools.islice(_text(model, params, length), FEWEST):
            state = after
            times.append(time.process_time())
        microseconds = _typical(np.diff(times)[1:] * 1e6)
        points.append({"position": length, "bytes": tree_bytes(state), "us": microseconds})
    return points


def _typical(microseconds: np.ndarray) -> float:
    return float(np.quantile(microseconds, 0.1))


def _text(model: LanguageModel, params: Any, tokens: int):
    return generate_with_states(model, params, [[0]], max_tokens=tokens, sampling=Sampling(temperature=0))


def _declared_bytes(model: LanguageModel, capacity: int) -> int:
    return tree_bytes(jax.eval_shape(lambda: model.initial_state(1, capacity)))


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def failures(results: dict[str, Result]) -> list[str]:
    found = []
    for mixer, x in results.items():
        if x["grows"] and not x["declared_to_grow"]:
            found.append(f"{mixer}: its state is made larger for a longer text, which its operator does not declare")
        elif not x["grows"] and (sizes := {point["bytes"] for point in x["points"]}) and len(sizes) > 1:
            found.append(f"{mixer}: its state does not stay as large as it is: {min(sizes):,} to {max(sizes):,} bytes")
    return found


def tables(results: dict[str, Result], options: Any) -> list[Table]:
    columns = ("mixer", "state bytes", "at the end", "us/token", "at the end", "ratio", "memory MiB", "")
    wrong = failures(results)
    rows = []
    for mixer, x in results.items():
        start, end = x["points"][0], x["points"][-1]
        mark = "grows" if x["grows"] else "constant"
        growth = x["memory_growth"]
        rows.append(
            (
                mixer,
                f"{start['bytes']:,}",
                f"{end['bytes']:,}",
                f"{start['us']:,.0f}",
                f"{end['us']:,.0f}",
                f"{end['us'] / start['us']:.2f}",
                "-" if growth is None else f"{growth / 2**20:.1f}",
                "FAILED" if any(line.startswith(f"{mixer}: ") for line in wrong) else mark,
            )
        )
    lengths = {x["points"][0]["position"] for x in results.values() if x["grows"]}
    more = f"; one that grows is shown for texts of {min(lengths):,} and of {options.tokens:,}" if lengths else ""
    return [Table(f"{options.tokens:,} tokens by the quickstart's model{more}", columns, rows)]


def plot(results: dict[str, Result], file: Any) -> None:
    panels = [
        plots.Panel("state of the model, KiB", "position in the text", "bytes", 1 / 1024),
        plots.Panel("time of a token, CPU microseconds", "position in the text", "us", 1),
    ]
    series = {mixer: x["points"] for mixer, x in results.items()}
    plots.draw(file, panels, dict.fromkeys(range(len(panels)), series), x="position", log_x=True)


def check(options: Any) -> None:
    if options.tokens < 4 * FEWEST:
        raise InputError(f"--tokens is {options.tokens}; expected at least {4 * FEWEST}")


VIEW = View(
    "does it decode in constant memory and time: a long text, token by token",
    DESCRIPTION,
    measure,
    tables,
    failures,
    plot,
    {"tokens": (int, 20_000, "tokens to write")},
    check,
)
