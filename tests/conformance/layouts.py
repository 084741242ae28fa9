"""The rows that the laws are tried on: how documents and padding lie in a span, and where a span may be cut.

Lengths are chosen around the chunk: documents of 1, C - 1 and C tokens, spans of 1, C - 1, C, 3C + 5 and more.
Few distinct numbers, since each is a compilation.
"""

from typing import NamedTuple

import numpy as np

BATCH = 4
CHUNK = 8
LENGTH = 30
# For errors that may grow with time: more than one chunk of the length that operators choose by themselves.
LONG = 96


def _row(*pieces: tuple[int, int]) -> list[int]:
    """A row of segment ids from (id, number of tokens) pairs."""
    return [segment for segment, count in pieces for _ in range(count)]


# Borders at chunk edges (8, 16) and inside chunks, documents of one token; one id for two documents.
PACKED = np.array(
    [
        _row((5, 8), (2, 8), (9, 7), (5, 7)),
        _row((1, 7), (2, 1), (3, 8), (4, 7), (5, 7)),
        _row((3, 1), (1, 8), (3, 7), (8, 7), (2, 7)),
        _row((1, 7), (2, 7), (3, 8), (4, 8)),
    ]
)
# Padding on the left, on the right, on both sides, between documents; a row of nothing else.
PADDED = np.array(
    [
        _row((0, 5), (4, 8), (6, 7), (0, 10)),
        _row((7, 8), (0, 2), (8, 1), (0, 3), (7, 7), (0, 9)),
        _row((0, 30)),
        _row((0, 22), (1, 8)),
    ]
)
WHOLE = np.ones((BATCH, LENGTH), int)
EVERY_TOKEN = np.tile(np.arange(1, LENGTH + 1), (BATCH, 1))
LAYOUTS = {"one document": WHOLE, "packed": PACKED, "padded": PADDED, "a document per token": EVERY_TOKEN}

# Devices along the axes data, fsdp, seq, tensor. 30 tokens do not divide into 4 or 8 shards.
MESHES = ((1, 1, 8, 1), (1, 2, 2, 2))
MORE_MESHES = ((1, 1, 2, 1), (1, 1, 4, 1), (2, 2, 2, 1), (2, 2, 1, 2))

THIRDS = (10, 10, 10)
SPLITS = ((1, 29), (29, 1), THIRDS, (7, 8, 7, 8))
DECODE = (10, *(1,) * 20)


class Document(NamedTuple):
    """One document of a row: its places, in order, and whether it is the row's first, its last."""

    row: int
    places: list[int]
    first: bool
    last: bool


def documents(segment_ids: np.ndarray) -> list[Document]:
    """The documents of all rows, read off token by token."""
    found = []
    for row, ids in enumerate(segment_ids):
        places: list[list[int]] = []
        current = None
        for place, segment in enumerate(ids):
            if segment != 0:
                if segment != current:
                    places.append([])
                places[-1].append(place)
                current = segment
        found += [Document(row, p, i == 0, i == len(places) - 1) for i, p in enumerate(places)]
    return found


def spans(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """(start, end) of consecutive spans."""
    ends = np.cumsum(lengths).tolist()
    return list(zip([0, *ends], ends))
