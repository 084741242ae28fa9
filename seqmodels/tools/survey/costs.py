"""The subcommand `table`: what a layer of each mixer costs, as it declares, as the README's rows."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from seqmodels.errors import InputError
from seqmodels.registry import MIXERS, Entry
from seqmodels.tools.survey.views import Table

WIDTH, LENGTH = 512, 2048

DESCRIPTION = f"""\
What a layer of each mixer costs with d_model = {WIDTH} and its other fields by default, as it declares: nothing is run.

  forms        r recurrent, c chunked, p parallel
  state bytes  of one sequence, in float32, with the state of short convolutions and the place in the document
  decode       million FLOPs to decode a token: matrix products and convolutions, element-wise work left out
  train        million FLOPs to train on a token: three times those of a forward pass, in sequences of {LENGTH:,}

A cache that grows is told by the token, and its decode is that of token number {LENGTH:,}. Attention counts the pairs
of the blocks that it visits, masked ones included."""

COLUMNS = ("forms", "state bytes", "decode", "train")


class Cost(NamedTuple):
    """The cells of a mixer's row."""

    forms: str
    state_bytes: str
    decode: str
    train: str


def cost(entry: Entry) -> Cost:
    """Of one layer."""
    layer = entry.layer(d_model=WIDTH)
    short, long = layer.state_bytes(LENGTH), layer.state_bytes(2 * LENGTH)
    forms = dict.fromkeys(["recurrent", *entry.op.forms])
    return Cost(
        " ".join(name[0] for name in forms),
        f"{(long - short) // LENGTH:,} a token" if long != short else f"{short:,}",
        f"{layer.flops_per_token(LENGTH, decoding=True) / 1e6:.2f}",
        f"{3 * layer.flops_per_token(LENGTH) / 1e6:.2f}",
    )


def table(mixers: Sequence[str]) -> Table:
    title = f"d_model = {WIDTH}; MFLOPs a token"
    return Table(title, ("mixer", *COLUMNS), [(name, *cost(MIXERS[name])) for name in mixers])


def update(file: Path, mixers: Sequence[str]) -> list[str]:
    """Put the numbers into the table of a markdown file whose rows begin with a mixer's name and whose titles end with
    those of COLUMNS; what stands in the columns before is kept. A row that has these alone gets the numbers too.

    Returns the mixers that have no row.
    """
    text = file.read_text()
    titles = re.escape(" | ".join(COLUMNS))
    head = re.search(rf"^\| mixer \|.*\| {titles} \|$", text, re.MULTILINE)
    if head is None:
        raise InputError(f"{file} has no table '| mixer | ... | {' | '.join(COLUMNS)} |' to be updated")
    kept = len(_cells(head[0])) - len(COLUMNS)
    missing = []
    for name in mixers:
        row = re.search(rf"^\| `{name}` \|.*\|$", text, re.MULTILINE)
        if row is None or len(_cells(row[0])) not in (kept, kept + len(COLUMNS)):
            missing.append(name)
            continue
        cells = [*_cells(row[0])[:kept], *cost(MIXERS[name])]
        text = text.replace(row[0], f"| {' | '.join(cells)} |", 1)
    file.write_text(text)
    return missing


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]
