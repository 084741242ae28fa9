"""Finding files, reading documents out of them, and holding some of them out.

A document is a stretch of text that stands on its own: a text file, a row of a Parquet file, a record of an
ArrayRecord file. Whether it is held out depends on its name alone, and its name on where it lies below the
path it was found by: a folder is split alike on every machine, compressed or not, whatever is added to it.
"""

import bz2
import dataclasses
import glob
import gzip
import hashlib
import lzma
import os
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePath

import grain

from seqmodels.data.extras import import_extra
from seqmodels.errors import InputError, nearest

# fmt: off
TEXT_SUFFIXES = (
    ".txt", ".md", ".rst", ".tex", ".html",
    ".py", ".c", ".h", ".cc", ".cpp", ".java", ".js", ".ts", ".go", ".rs", ".sh",
)
# fmt: on
PARQUET_SUFFIX = ".parquet"
ARRAYRECORD_SUFFIX = ".arrayrecord"
TOKENS_SUFFIX = ".tokens" + ARRAYRECORD_SUFFIX

TRAIN, HELD_OUT = "train", "held_out"


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file with documents in it."""

    path: Path
    name: str
    """Relative to the folder or pattern it was found by, with `/`, and without a compression's suffix."""

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.path.stat().st_size


@dataclasses.dataclass(frozen=True)
class Document:
    """A stretch of text that stands on its own."""

    name: str
    text: bytes
    file_bytes: float
    """Its share of the bytes of its file on disk, from which progress is measured."""


# ---- finding files ----


def find_files(
    paths: str | Sequence[str] | None = None, text_suffixes: Sequence[str] = TEXT_SUFFIXES
) -> list[SourceFile]:
    """The files that `paths` name, sorted within each path, each file once.

    paths: files, folders (searched to any depth; hidden files and those with other suffixes are passed over)
        and glob patterns (`**` included). None stands for the standard library of the running Python.
    text_suffixes: of the files that are read as text; any of them may be followed by .gz, .bz2, .xz or .zst.
    """
    if paths is None:
        return _standard_library()
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    found: dict[Path, SourceFile] = {}
    for path in map(os.fspath, paths):
        for file in _files_of(path, text_suffixes):
            found.setdefault(file.path.resolve(), file)
    if not found:
        raise InputError(
            "no paths are given; expected files, folders or glob patterns (or None: Python's own sources)"
        )
    return list(found.values())


def _files_of(path: str, text_suffixes: Sequence[str]) -> list[SourceFile]:
    if os.path.isdir(path):
        root = Path(path)
        every = sorted(member for member in root.rglob("*") if member.is_file() and not _hidden(member, root))
        files = [member for member in every if _kind(member, text_suffixes)]
        if not files:
            seen = sorted({member.suffix for member in every}) or "no files at all"
            raise InputError(
                f"folder {path} has nothing to read: it holds {seen}; {_readable(text_suffixes)}"
            )
        return [_named(file, root) for file in files]
    if glob.has_magic(path):
        matches = sorted(Path(match) for match in glob.glob(path, recursive=True) if os.path.isfile(match))
        if not matches:
            raise InputError(f"pattern {path} matches no file")
        root = Path(*(part for part in _before_pattern(path)))
    elif os.path.isfile(path):
        matches, root = [Path(path)], Path(path).parent
    else:
        parent = Path(path).parent
        siblings = os.listdir(parent) if parent.is_dir() else []
        hint = nearest(Path(path).name, siblings[:100]) if siblings else f"{parent} is no folder either"
        raise InputError(f"no such file or folder: {path} ({hint})")
    for match in matches:
        # A name without a suffix, such as enwik8, is taken for text when it is asked for.
        if not _kind(match, (*text_suffixes, "")):
            raise InputError(f"{match}: unknown suffix {match.suffix!r}; {_readable(text_suffixes)}")
    return [_named(match, root) for match in matches]


def _standard_library() -> list[SourceFile]:
    """The modules of the standard library and those one folder down: about 580 files and 11 MB, no tests."""
    root = Path(sysconfig.get_path("stdlib"))
    # The interpreter's own list leaves out tests, installed packages and what a build or distribution added.
    files = [
        file
        for module in sys.stdlib_module_names
        for file in (root / f"{module}.py", *(root / module).glob("*.py"))
        if file.is_file()
    ]
    if not files:
        raise InputError(
            f"this Python has no sources of its standard library in {root}; name a text with `paths`"
        )
    return [_named(file, root) for file in sorted(files)]


def _named(path: Path, root: Path) -> SourceFile:
    return SourceFile(path, _without_compression(path.relative_to(root)).as_posix())


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _before_pattern(path: str) -> Iterator[str]:
    for part in PurePath(path).parts[:-1]:
        if glob.has_magic(part):
            return
        yield part


def _without_compression(path: PurePath) -> PurePath:
    return path.with_suffix("") if path.suffix in _DECOMPRESS else path


def _kind(path: Path, text_suffixes: Sequence[str]) -> str | None:
    """The suffix that says how to read a file; None for one that is not to be read."""
    if path.suffix in (PARQUET_SUFFIX, ARRAYRECORD_SUFFIX):
        return path.suffix
    return "text" if _without_compression(path).suffix in text_suffixes else None


def _readable(text_suffixes: Sequence[str]) -> str:
    return (
        f"readable: {PARQUET_SUFFIX}, {ARRAYRECORD_SUFFIX}, {', '.join(text_suffixes)}"
        f" (set by text_suffixes; also with {', '.join(_DECOMPRESS)})"
    )


# ---- reading documents ----


def read_documents(files: Iterable[SourceFile], column: str = "text") -> Iterator[Document]:
    """The documents of `files` that have any text, in order, one file open at a time.

    column: of the Parquet files, the one with the text.
    """
    for file in files:
        if file.path.suffix == PARQUET_SUFFIX:
            documents = _read_parquet(file, column)
        elif file.path.suffix == ARRAYRECORD_SUFFIX:
            documents = _read_arrayrecord(file)
        else:
            documents = _read_text(file)
        for document in documents:
            if b"\0" in document.text:
                raise InputError(f"{file.path}: {document.name} is not text: it has a zero byte")
            if document.text:
                yield document


def _read_text(file: SourceFile) -> Iterator[Document]:
    decompress = _DECOMPRESS.get(file.path.suffix, bytes)
    try:
        text = decompress(file.path.read_bytes())
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:  # ValueError: torn bzip2
        raise InputError(f"cannot read {file.path}: {error}") from error
    yield Document(file.name, text, file.size)


def _decompress_zstandard(compressed: bytes) -> bytes:
    zstandard = import_extra("zstandard", "reading a .zst file")
    decompressor, frames = zstandard.ZstdDecompressor(), []
    while compressed:
        frame = decompressor.decompressobj()
        try:
            frames.append(frame.decompress(compressed))
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from error
        if not frame.eof:
            raise EOFError("the file ends before its last frame does")
        compressed = frame.unused_data
    return b"".join(frames)


_DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zst": _decompress_zstandard,
}


def _read_parquet(file: SourceFile, column: str) -> Iterator[Document]:
    arrow = import_extra("pyarrow", "reading Parquet")
    parquet = import_extra("pyarrow.parquet", "reading Parquet")
    try:
        table = parquet.ParquetFile(file.path)
        if column not in table.schema_arrow.names:
            raise InputError(
                f"{file.path} has no column {column!r}; {nearest(column, table.schema_arrow.names)}"
            )
        kind = table.schema_arrow.field(column).type
        if kind not in (arrow.string(), arrow.large_string(), arrow.binary(), arrow.large_binary()):
            raise InputError(f"{file.path}: column {column!r} holds {kind}; expected text")
        share = file.size / max(1, table.metadata.num_rows)
        rows = (row for batch in table.iter_batches(columns=[column]) for row in batch.column(0).to_pylist())
        for index, row in enumerate(rows):
            text = row.encode() if isinstance(row, str) else row or b""
            yield Document(f"{file.name}#{index}", text, share)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file.path} as Parquet: {error}") from error


def _read_arrayrecord(file: SourceFile) -> Iterator[Document]:
    if file.path.name.endswith(TOKENS_SUFFIX):
        raise InputError(
            f"{file.path} is a shard of a tokenised corpus; give its folder {file.path.parent}, alone"
        )
    try:
        records = grain.sources.ArrayRecordDataSource([str(file.path)])
        for index in range(len(records)):
            yield Document(f"{file.name}#{index}", records[index], file.size / len(records))
    except (RuntimeError, OSError) as error:
        raise InputError(f"cannot read {file.path} as ArrayRecord: {error}") from error


# ---- holding out ----


def split_documents(
    documents: Iterable[Document], held_out_fraction: float
) -> Iterator[tuple[str, Document]]:
    """Each document with its side, TRAIN or HELD_OUT, in one pass that keeps one document in memory.

    A document is held out where the hash of its name, taken as a fraction of all hashes, is below
    `held_out_fraction`. Neither side stays empty: of few documents the one with the smallest hash goes where
    one is missing, and a single document is cut in two, its end held out.
    """
    withheld: Document | None = None
    smallest = 1.0
    sides_seen = set()
    for document in documents:
        place = _place(document.name)
        if withheld is None or place < smallest:
            document, withheld = withheld, document
            place, smallest = smallest, place
        if document is not None:
            side = HELD_OUT if place < held_out_fraction else TRAIN
            sides_seen.add(side)
            yield side, document
    if withheld is None:
        raise InputError("the corpus is empty: no file has any text in it")
    if not sides_seen:
        yield from _cut(withheld, held_out_fraction)
    elif HELD_OUT not in sides_seen or (TRAIN in sides_seen and smallest < held_out_fraction):
        yield HELD_OUT, withheld
    else:
        yield TRAIN, withheld


def _place(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def _cut(document: Document, held_out_fraction: float) -> Iterator[tuple[str, Document]]:
    text = document.text
    cut = int(len(text) * (1 - held_out_fraction))
    line_end = text.find(b"\n", cut, len(text) - 1)
    if line_end >= 0:
        cut = line_end + 1
    while cut < len(text) and text[cut] & 0xC0 == 0x80:  # not inside a character
        cut += 1
    if not 0 < cut < len(text):
        raise InputError(f"the corpus is too small: {len(text)} bytes in one document cannot be cut in two")
    for side, part in ((TRAIN, text[:cut]), (HELD_OUT, text[cut:])):
        yield side, Document(document.name, part, document.file_bytes * len(part) / len(text))
