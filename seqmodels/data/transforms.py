"""Functions from batch to batch. What makes rows of tokens into something to learn from is a list of these.

A batch of text enters the list as

    tokens        int32  [B, T + 1]   `PADDING` where the row has ended
    segment_ids   int32  [B, T + 1]   only where documents are packed
    row_seed      int64  [B]          from the run's seed and the row's place in the stream: randomness comes
                                      from it alone, so a resumed run draws what an uninterrupted one would
    mask_token    int32  [B]          the id that stands for a hidden token

and leaves it with the keys of `seqmodels.data.dataset`; other keys are dropped at the end.
"""

import zlib
from collections.abc import Callable

import numpy as np

from seqmodels.errors import InputError

Batch = dict[str, np.ndarray]
Transform = Callable[[Batch], Batch]

PADDING = -1


def next_token_targets(batch: Batch) -> Batch:
    """Cut rows of T + 1 tokens into T inputs and, one ahead of them, T targets.

    A target counts (weight 1) unless it is padding or belongs to another document than its input.
    """
    if "targets" in batch:
        raise InputError(
            "next_token_targets: this batch has targets already; it comes first, once, and for text only"
        )
    inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    counted = targets != PADDING
    made = {"tokens": np.maximum(inputs, 0), "targets": np.maximum(targets, 0)}
    if "segment_ids" in batch:
        segment_ids = batch["segment_ids"]
        counted &= segment_ids[:, :-1] == segment_ids[:, 1:]
        made["segment_ids"] = segment_ids[:, :-1]
    return batch | made | {"weights": counted.astype(np.float32)}


def mask_inputs(fraction: float = 0.15) -> Transform:
    """Hide each input token with probability `fraction` behind the mask token; the targets stay as they were.

    Mask-enhanced autoregressive prediction (MEAP), Zhuang et al. 2025, arXiv 2502.07490. It comes after
    `next_token_targets`. It is for training: evaluate without it.
    """
    if isinstance(fraction, dict):
        raise InputError("mask_inputs makes a transform and is none itself: write @mask_inputs() in the config")
    if not 0.0 <= fraction <= 1.0:
        raise InputError(f"mask_inputs: fraction is {fraction}; expected 0 to 1")
    # Another random transform of the same row draws from another stream.
    purpose = zlib.crc32(b"mask_inputs")

    def transform(batch: Batch) -> Batch:
        if "targets" not in batch:
            raise InputError(
                "mask_inputs comes after next_token_targets: or the targets would be masked as well"
            )
        if "mask_token" not in batch or (batch["mask_token"] < 0).any():
            raise InputError("mask_inputs: this data set has no mask token; text has one unless mask_token is False")
        tokens = batch["tokens"]
        draws = [
            np.random.default_rng((int(row_seed), purpose)).random(tokens.shape[1], dtype=np.float32)
            for row_seed in batch["row_seed"]
        ]
        hidden = np.stack(draws) < fraction
        return batch | {"tokens": np.where(hidden, batch["mask_token"][:, None], tokens)}

    return transform
