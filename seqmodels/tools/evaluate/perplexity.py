"""The suite `perplexity`: language modelling on the run's held-out text, by the length of what is read."""

import argparse
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from tqdm import tqdm

from seqmodels.data import Dataset
from seqmodels.data.synthetic._task import SyntheticTask
from seqmodels.errors import InputError
from seqmodels.evaluation.spans import SPAN, Reader, make_reader
from seqmodels.tools._runs import TrainedRun
from seqmodels.tools.evaluate._texts import batches_of, perplexity_of, require_positive, require_text, rows_at_once
from seqmodels.tools.evaluate.evaluation import Evaluation, Row
from seqmodels.training.loss import bits_per_byte

DESCRIPTION = f"""\
Perplexity of the run's own held-out text by length, and by position. The same text is read at every length, in windows
that the model begins without knowing what came before; so a model that makes use of more context has less perplexity at
greater lengths, until it is beyond what it can read. Windows go through the model's state in spans of {SPAN:,} tokens:
the memory is that of a span, but for attention without a window, which keeps the keys and values of a window.

  perplexity        of all positions of windows of a length, exp of the mean loss
  perplexity_last   of the second half of each window alone, which has the most context
  bits_per_byte     the loss in a unit that does not depend on the tokeniser
  by position       in the longest windows: of positions 1 to 16, from there to 32, to 64, to 128 ..."""

FACTORS = (1, 2, 4, 8, 16, 32)
TOKENS = 131_072
FIRST_BUCKET = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        metavar="N",
        help="tokens of a window; all divide the longest (default: the training length times "
        f"{', '.join(map(str, FACTORS))}, as far as the held-out text reaches)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=TOKENS,
        metavar="N",
        help=f"held-out tokens to read at every length, at least one longest window (default: {TOKENS:,})",
    )
    parser.add_argument(
        "--last",
        type=int,
        metavar="N",
        help="positions at a window's end that perplexity_last is of (default: half of the window)",
    )
    parser.add_argument("--span", type=int, default=SPAN, metavar="N", help=f"tokens in a span (default: {SPAN:,})")


def evaluate(run: TrainedRun, options: argparse.Namespace) -> dict[str, Evaluation]:
    require_positive(lengths=options.lengths, tokens=options.tokens, last=options.last, span=options.span)
    require_text(run, "perplexity")
    data = run.job.data
    if isinstance(data, SyntheticTask):
        raise InputError(
            f"perplexity is of text, but the run was trained on the task {type(data).__name__}; expected a run on "
            "text, or --suite recall"
        )
    lengths, rows = _windows(data, options.lengths, run.job.seq_len, options.tokens)
    if options.last and options.last > lengths[0]:
        raise InputError(f"--last is {options.last}; expected at most {lengths[0]}, the shortest of --lengths")

    reader, table, at_position = make_reader(run.job.model, span=options.span), [], None
    total = rows["tokens"].size * len(lengths)
    with tqdm(total=total, unit=" tokens", unit_scale=True, leave=False) as bar:
        for length in lengths:
            bar.set_postfix_str(f"length {length:,}")
            windows = {name: array.reshape(-1, length) for name, array in rows.items()}
            at_once = rows_at_once(run, length, len(windows["tokens"]), options.span)
            at_position = nll_by_position(reader, run.params, windows, at_once, bar)
            table.append(_row(length, *at_position, options.last or -(-length // 2), data.bytes_per_token))
    units = {"length": "tokens", "position": "tokens", "loss": "nats"}
    last = f"last {options.last:,} positions" if options.last else "second half"
    notes = [
        f"{int(rows['weights'].sum()):,} held-out tokens, the same ones at every length; perplexity_last is of the "
        f"{last} of each window."
    ]
    if lengths[-1] > run.job.seq_len:
        notes.append(
            f"The model was trained on {run.job.seq_len:,} tokens: beyond, positions and states simply go on, nothing "
            "is rescaled."
        )
    by_position = _by_position(*at_position, data.bytes_per_token)
    return {
        "": Evaluation("length", units, table, notes=notes),
        "_by_position": Evaluation(
            "position", units, by_position, notes=[f"In windows of {lengths[-1]:,} tokens.", *notes[1:]]
        ),
    }


def nll_by_position(
    reader: Reader, params: Any, windows: Mapping[str, np.ndarray], at_once: int, bar: tqdm
) -> tuple[np.ndarray, np.ndarray]:
    """Sums over the windows of the loss, in nats, and of the weight at each position: float64 [length]."""
    nll = np.zeros(windows["tokens"].shape[1])
    for batch in batches_of(windows, at_once):
        done = 0
        for scores in reader(params, batch):
            width = scores.nll.shape[1]
            nll[done : done + width] += scores.nll.sum(axis=0, dtype=np.float64)
            done += width
            bar.update(min(scores.nll.size, bar.total - bar.n))
    return nll, windows["weights"].sum(axis=0, dtype=np.float64)


def _windows(
    data: Dataset, asked: Sequence[int] | None, trained: int, tokens: int
) -> tuple[list[int], dict[str, np.ndarray]]:
    """The lengths, ascending, and held-out rows of the longest one."""
    lengths = sorted(set(asked or (factor * trained for factor in FACTORS)))
    for length in lengths:
        if lengths[-1] % length:
            raise InputError(
                f"--lengths has {length:,}, which does not divide the longest, {lengths[-1]:,}; expected lengths that "
                "do, so that all read the same text"
            )
    while True:
        longest = lengths[-1]
        count = max(1, tokens // longest)
        # One more, for the window at the end of the text, which is not full, to be the one that is left out.
        found = sorted(
            islice(data.evaluation_batches(1, longest), count + 1), key=lambda row: not row["weights"][0, -1]
        )
        rows = {name: np.concatenate([row[name] for row in found[:count]]) for name in (found[0] if found else ())}
        if rows and rows["weights"][:, longest // 2 :].any():
            return lengths, rows
        if asked or len(lengths) == 1:
            raise InputError(
                f"the held-out text has no window of {longest:,} tokens that is more than half full; expected shorter "
                "--lengths, or more --tokens"
            )
        lengths.pop()


def _row(length: int, nll: np.ndarray, weight: np.ndarray, last: int, bytes_per_token: float | None) -> Row:
    ends = perplexity_of(nll[-last:].sum() / weight[-last:].sum()) if weight[-last:].any() else None
    row = {"length": length, **_measures(nll, weight, bytes_per_token)}
    return row if ends is None else row | {"perplexity_last": ends}


def _by_position(nll: np.ndarray, weight: np.ndarray, bytes_per_token: float | None) -> list[Row]:
    """A row for the positions up to 16, from there to 32, to 64 and so on, that have anything to predict."""
    rows, start = [], 0
    while start < len(nll):
        stop = min(max(FIRST_BUCKET, 2 * start), len(nll))
        if weight[start:stop].any():
            measures = _measures(nll[start:stop], weight[start:stop], bytes_per_token)
            rows.append({"position": stop, **measures})
        start = stop
    return rows


def _measures(nll: np.ndarray, weight: np.ndarray, bytes_per_token: float | None) -> dict[str, float]:
    loss = float(nll.sum() / weight.sum())
    measures = {"loss": loss, "perplexity": perplexity_of(loss)}
    return measures | ({"bits_per_byte": bits_per_byte(loss, bytes_per_token)} if bytes_per_token else {})
