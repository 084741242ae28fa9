"""A tokenised corpus: one long array of ids, in memory or on disk.

The documents of a split stand one after the other with a separator before, between and after them,

    |d d d d|d d|d d d d d d|

and everything that is cut from them is a range of that array. On disk the array lies in blocks of `BLOCK`
ids, each a record of an ArrayRecord file, so that a row is one read or two; the positions of the separators
lie in a file that is mapped into memory. `manifest.json` is written last: a folder with it is whole.

    manifest.json                      what the corpus is, how many, how large each file
    tokenizer.json                     the tokenizer, where it is not bytes
    train-00000.tokens.arrayrecord     the ids, uint16 or uint32, little-endian
    train.separators                   positions of the separators, int64, little-endian
    held_out-...
"""

import dataclasses
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from seqmodels.data.sources import HELD_OUT, TOKENS_SUFFIX, TRAIN, Document, split_documents
from seqmodels.data.tokenizers import Tokenizer
from seqmodels.errors import InputError

BLOCK = 8192
MANIFEST = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
FORMAT = "seqmodels tokens 1"
INCOMPLETE_SUFFIX = ".incomplete"
ENCODE_BYTES = 4 << 20


class Tokens(Protocol):
    """The ids of one split."""

    separators: np.ndarray
    """Positions of the separators, int64 [documents + 1]; the first is 0, the last the end of the array."""

    text_bytes: int
    """UTF-8 bytes of the documents."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids from `start` up to `stop`, both within the array."""

    def checksum(self) -> int:
        """32 bits that are others where the tokens are."""


@dataclasses.dataclass(frozen=True)
class EncodedDocument:
    """A document's ids, without separators."""

    side: str
    ids: np.ndarray
    text_bytes: int
    file_bytes: float


def encode_corpus(
    documents: Iterable[Document], tokenizer: Tokenizer, held_out_fraction: float
) -> Iterator[EncodedDocument]:
    """Split and encode documents, a few megabytes at a time, which a tokenizer may spread over the cores."""
    group: list[tuple[str, Document]] = []

    def encode_group() -> Iterator[EncodedDocument]:
        encoded = tokenizer.encode_documents([document.text for _, document in group])
        for (side, document), ids in zip(group, encoded):
            yield EncodedDocument(side, ids, len(document.text), document.file_bytes)

    group_bytes = 0
    for side, document in split_documents(documents, held_out_fraction):
        group.append((side, document))
        group_bytes += len(document.text)
        if group_bytes >= ENCODE_BYTES:
            yield from encode_group()
            group, group_bytes = [], 0
    yield from encode_group()


def smallest_dtype(vocab_size: int) -> np.dtype:
    """The unsigned integers that hold every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


# ---- in memory ----


@dataclasses.dataclass(frozen=True)
class TokensInMemory:
    """The ids of one split in an array."""

    ids: np.ndarray
    separators: np.ndarray
    text_bytes: int

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]

    def checksum(self) -> int:
        return zlib.crc32(self.ids)


def load_into_memory(encoded: Iterable[EncodedDocument], tokenizer: Tokenizer) -> dict[str, TokensInMemory]:
    """Both splits of an encoded corpus."""
    separator = np.array([tokenizer.separator], smallest_dtype(tokenizer.vocab_size))
    ids = {side: [separator] for side in (TRAIN, HELD_OUT)}
    lengths: dict[str, list[int]] = {side: [0] for side in ids}
    text_bytes = dict.fromkeys(ids, 0)
    for document in encoded:
        ids[document.side] += [document.ids.astype(separator.dtype), separator]
        lengths[document.side].append(len(document.ids) + 1)
        text_bytes[document.side] += document.text_bytes
    return {
        side: TokensInMemory(np.concatenate(ids[side]), np.cumsum(lengths[side]), text_bytes[side])
        for side in ids
    }


# ---- on disk ----


class TokenWriter:
    """Writes the ids of one split into `folder`; `close()` gives its entry of the manifest."""

    def __init__(self, folder: Path, side: str, tokenizer: Tokenizer, shard_tokens: int):
        self._folder, self._side = folder, side
        self._separator = np.array([tokenizer.separator], smallest_dtype(tokenizer.vocab_size))
        self._blocks_per_shard = max(1, shard_tokens // BLOCK)
        self._files: list[Path] = []
        self._blocks_in_shard = 0
        self._shard: ArrayRecordWriter | None = None
        self._pending = self._separator
        self._position = 0
        self._text_bytes = 0
        self._documents = 0
        self._separators = open(folder / f"{side}.separators", "wb")  # noqa: SIM115 (closed by close())
        self._separators.write(np.int64(0).tobytes())

    def append(self, document: EncodedDocument) -> None:
        """Write a document and the separator after it."""
        ids = np.concatenate([self._pending, document.ids.astype(self._separator.dtype), self._separator])
        self._position += len(document.ids) + 1
        self._separators.write(np.array(self._position, "<i8").tobytes())
        self._text_bytes += document.text_bytes
        self._documents += 1
        whole = len(ids) - len(ids) % BLOCK
        for start in range(0, whole, BLOCK):
            self._write_block(ids[start : start + BLOCK])
        self._pending = ids[whole:]

    def close(self) -> dict[str, Any]:
        """Write what is left, see it safely on the disk, and describe the split."""
        if len(self._pending):
            self._write_block(self._pending)
        self._close_shard()
        self._separators.close()
        files = [*self._files, self._folder / f"{self._side}.separators"]
        for file in files:
            sync_to_disk(file)
        return {
            "tokens": self._position + 1,
            "documents": self._documents,
            "text_bytes": self._text_bytes,
            "files": {file.name: file.stat().st_size for file in files},
        }

    def _write_block(self, ids: np.ndarray) -> None:
        if self._shard is None:
            self._files.append(self._folder / f"{self._side}-{len(self._files):05d}{TOKENS_SUFFIX}")
            # Grain reads one record at a time, so a group of the file holds one.
            self._shard = ArrayRecordWriter(str(self._files[-1]), "group_size:1,zstd:1")
        self._shard.write(ids.tobytes())
        self._blocks_in_shard += 1
        if self._blocks_in_shard == self._blocks_per_shard:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
        self._shard, self._blocks_in_shard = None, 0


def sync_to_disk(path: Path) -> None:
    """Return when the file or folder is on the disk, and would be after a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class TokensOnDisk:
    """The ids of one split in the ArrayRecord shards of `folder`, read as needed, by many threads."""

    def __init__(self, folder: Path, manifest: dict[str, Any], side: str):
        entry = manifest["splits"][side]
        for name, size in entry["files"].items():
            found = (folder / name).stat().st_size if (folder / name).is_file() else "missing"
            if found != size:
                raise InputError(
                    f"{folder / name} is damaged: {found}, expected {size} bytes; tokenise the corpus again"
                )
        shards = [str(folder / name) for name in entry["files"] if name.endswith(TOKENS_SUFFIX)]
        self._folder = folder
        self._length, self.text_bytes = entry["tokens"], entry["text_bytes"]
        self._dtype, self._block = np.dtype(manifest["dtype"]), manifest["block"]
        try:
            self._blocks = grain.sources.ArrayRecordDataSource(shards)
        except RuntimeError as error:
            raise self._damaged(error) from error
        self.separators = np.memmap(folder / f"{side}.separators", "<i8", mode="r")

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int) -> np.ndarray:
        first, last = start // self._block, (stop - 1) // self._block
        try:
            blocks = [np.frombuffer(self._blocks[index], self._dtype) for index in range(first, last + 1)]
        except RuntimeError as error:
            raise self._damaged(error) from error
        offset = first * self._block
        return np.concatenate(blocks)[start - offset : stop - offset]

    def checksum(self) -> int:
        """Of where the documents end, and of the first block: a corpus of any size is not read through."""
        return zlib.crc32(self._blocks[0], zlib.crc32(self.separators))

    def _damaged(self, error: RuntimeError) -> InputError:
        return InputError(f"the tokenised corpus {self._folder} is damaged; tokenise it again: {error}")


def is_tokenized(path: str | Path) -> bool:
    """Whether `path` is a folder that `seqmodels.tools.tokenize_corpus` wrote, or was writing."""
    path = Path(path)
    if not path.exists():
        return Path(f"{path}{INCOMPLETE_SUFFIX}").exists()
    if path.suffix == INCOMPLETE_SUFFIX:
        return True
    return path.is_dir() and ((path / MANIFEST).exists() or any(path.glob(f"*{TOKENS_SUFFIX}")))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a tokenised corpus."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise InputError(
            f"{folder} has no {MANIFEST}: its tokenisation was interrupted;"
            " run seqmodels.tools.tokenize_corpus again"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {folder / MANIFEST}: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{folder / MANIFEST} is not of a tokenised corpus: expected 'format': {FORMAT!r}")
    return manifest
