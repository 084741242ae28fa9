"""Language-model data: a corpus of text, cut into rows of tokens."""

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import numpy as np

from seqmodels.data.dataset import Dataset, read_ahead
from seqmodels.data.sources import HELD_OUT, TEXT_SUFFIXES, TRAIN, find_files, read_documents
from seqmodels.data.tokenizers import load_tokenizer
from seqmodels.data.tokens import (
    TOKENIZER_FILE,
    Tokens,
    TokensOnDisk,
    encode_corpus,
    is_tokenized,
    load_into_memory,
    read_manifest,
)
from seqmodels.data.transforms import PADDING, next_token_targets
from seqmodels.errors import InputError, nearest

HELD_OUT_FRACTION = 0.05
PACKINGS = ("concatenate", "pack")
PACKING_BINS = 64
EVALUATION_SEED = 0
READER_THREADS = 4


class TextData(Dataset):
    """Text to predict the next token of.

    paths: files, folders, glob patterns (see `seqmodels.data.sources.find_files`), read and tokenised into
        memory when first needed; or the one folder that `seqmodels.tools.tokenize_corpus` wrote, which stays
        on disk and may be of any size. None: the sources of Python's standard library, 11 MB, always there.
    tokenizer: "bytes" (258 ids), or the path of a Hugging Face tokenizer.json. None: that of the tokenised corpus,
        or else bytes.
    packing: "concatenate" cuts the corpus, a separator between documents, every `seq_len` tokens: no padding,
        and rows that begin anywhere. "pack" lays whole documents side by side, with segment ids, and pads
        what stays free; a document longer than a row is cut into several, each a segment of its own.
    held_out_fraction: share of the documents that is kept for evaluation, chosen by the hash of their names.
        None: 0.05, or what the tokenised corpus was made with.
    column: of Parquet files, the one with the text.
    text_suffixes: of the files that are read as text.
    mask_token: whether a tokenizer file without a token to mask with gets one, an id after its own. A model that has
        no room for it can be trained on anything but masked inputs.

    Either way each token of each document, and the separator after it, is a target exactly once in an epoch.
    """

    default_transforms = (next_token_targets,)

    def __init__(
        self,
        paths: str | Sequence[str] | None = None,
        tokenizer: str | None = None,
        packing: str = "concatenate",
        held_out_fraction: float | None = None,
        column: str = "text",
        text_suffixes: Sequence[str] = TEXT_SUFFIXES,
        mask_token: bool = True,
    ):
        if packing not in PACKINGS:
            raise InputError(f"TextData: packing is {packing!r}; {nearest(packing, PACKINGS)}")
        check_held_out_fraction(held_out_fraction)
        self._paths = [paths] if isinstance(paths, str) else paths
        self.packed = packing == "pack"
        self._held_out_fraction = held_out_fraction
        self._column = column
        self._text_suffixes = text_suffixes
        self._tokenized = any(is_tokenized(path) for path in self._paths or ())
        if tokenizer is None:
            own = [Path(path) / TOKENIZER_FILE for path in (self._paths or ()) if self._tokenized]
            tokenizer = next((str(file) for file in own if file.exists()), "bytes")
        self.tokenizer = load_tokenizer(tokenizer, mask_token)
        self.reader_threads = READER_THREADS if self._tokenized else 0

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def bytes_per_token(self) -> float:
        held_out = self.splits[HELD_OUT]
        return held_out.text_bytes / (len(held_out) - 1)

    @property
    def fingerprint(self) -> str:
        tokens = self.splits[TRAIN]
        documents = len(tokens.separators) - 1
        return f"{len(tokens):,} tokens in {documents:,} documents, checksum {tokens.checksum():08x}"

    @functools.cached_property
    def splits(self) -> dict[str, Tokens]:
        """The tokens of "train" and of "held_out", read when first asked for."""
        if self._tokenized:
            return self._open_tokenized()
        files = find_files(self._paths, self._text_suffixes)
        fraction = HELD_OUT_FRACTION if self._held_out_fraction is None else self._held_out_fraction
        encoded = encode_corpus(read_documents(files, self._column), self.tokenizer, fraction)
        return load_into_memory(encoded, self.tokenizer)

    def _open_tokenized(self) -> dict[str, Tokens]:
        if len(self._paths) > 1:
            raise InputError(
                f"a tokenised corpus stands alone, but `paths` has {len(self._paths)}: {self._paths}"
            )
        folder = Path(self._paths[0])
        manifest = read_manifest(folder)
        if manifest["tokenizer"] != self.tokenizer.fingerprint:
            wanted = "bytes" if manifest["tokenizer"] == "bytes" else str(folder / TOKENIZER_FILE)
            raise InputError(
                f"{folder} was tokenised with another tokenizer: set the tokenizer to {wanted!r}"
            )
        made_with = manifest["held_out_fraction"]
        if self._held_out_fraction not in (None, made_with):
            raise InputError(
                f"{folder} was tokenised with held_out_fraction {made_with}, not {self._held_out_fraction};"
                " leave it out, or tokenise again"
            )
        return {side: TokensOnDisk(folder, manifest, side) for side in (TRAIN, HELD_OUT)}

    def training_rows(self, seq_len: int, seed: int) -> grain.MapDataset | grain.IterDataset:
        return self._rows(TRAIN, seq_len, seed)

    def evaluation_rows(self, seq_len: int) -> Iterator[dict[str, np.ndarray]]:
        return iter(self._rows(HELD_OUT, seq_len, EVALUATION_SEED))

    def _rows(self, side: str, seq_len: int, seed: int) -> grain.MapDataset | grain.IterDataset:
        # Grain shuffles epoch e with seed + e: seeds as they come would make one run's epoch another run's.
        order_seed, row_seed = (int(word) for word in np.random.SeedSequence(seed).generate_state(2))
        cut = Pieces if self.packed else Windows
        rows = grain.MapDataset.source(cut(self.splits[side], seq_len)).shuffle(order_seed)
        if side == TRAIN:
            rows = rows.repeat()
        if not self.packed:
            return rows.random_map(self._complete_row, seed=row_seed)
        packed = grain.experimental.FirstFitPackIterDataset(
            rows.to_iter_dataset(read_ahead(self.reader_threads)),
            length_struct={"tokens": seq_len + 1},
            num_packing_bins=PACKING_BINS,
            seed=order_seed,
            padding_struct={"tokens": PADDING},
        )
        return packed.random_map(self._complete_row, seed=row_seed)

    def _complete_row(self, row: dict[str, np.ndarray], random: np.random.Generator) -> dict[str, np.ndarray]:
        """Add what transforms draw on (see `seqmodels.data.transforms`), and drop Grain's names."""
        complete = {
            "tokens": row["tokens"],
            "row_seed": random.integers(np.iinfo(np.int64).max),
            "mask_token": np.int32(self.tokenizer.mask),
        }
        if "tokens_segment_ids" in row:
            complete["segment_ids"] = row["tokens_segment_ids"]
        return complete


class Windows:
    """The corpus cut every `seq_len` tokens, with one token of the next window: int32 [seq_len + 1]."""

    def __init__(self, tokens: Tokens, seq_len: int):
        self._tokens, self._seq_len = tokens, seq_len

    def __len__(self) -> int:
        return math.ceil((len(self._tokens) - 1) / self._seq_len)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = index * self._seq_len
        ids = self._tokens.read(start, min(start + self._seq_len + 1, len(self._tokens)))
        window = np.full(self._seq_len + 1, PADDING, np.int32)
        window[: len(ids)] = ids
        return {"tokens": window}


class Pieces:
    """The documents, each between its separators, cut like `Windows`: int32 [2 .. seq_len + 1]."""

    def __init__(self, tokens: Tokens, seq_len: int):
        self._tokens, self._seq_len = tokens, seq_len
        # Neighbouring pieces share a token: the last target of one is the first input of the next.
        self._last_piece = np.cumsum(-(-np.diff(tokens.separators) // seq_len))

    def __len__(self) -> int:
        return int(self._last_piece[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        document = int(np.searchsorted(self._last_piece, index, side="right"))
        piece = index - (int(self._last_piece[document - 1]) if document else 0)
        start = int(self._tokens.separators[document]) + piece * self._seq_len
        stop = min(start + self._seq_len + 1, int(self._tokens.separators[document + 1]) + 1)
        return {"tokens": self._tokens.read(start, stop).astype(np.int32)}


def check_held_out_fraction(fraction: float | None) -> None:
    """Refuse what is no fraction, or leaves nothing to train on."""
    if fraction is not None and not 0.0 < fraction < 1.0:
        raise InputError(f"held_out_fraction is {fraction}; expected more than 0 and less than 1")
