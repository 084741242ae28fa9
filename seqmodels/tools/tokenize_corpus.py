"""Tokenise a corpus once, for every run after it: any text files in, sharded ArrayRecord out."""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from seqmodels.data.sources import HELD_OUT, TEXT_SUFFIXES, TRAIN, find_files, read_documents
from seqmodels.data.text import HELD_OUT_FRACTION, check_held_out_fraction
from seqmodels.data.tokenizers import Tokenizer, load_tokenizer
from seqmodels.data.tokens import (
    BLOCK,
    FORMAT,
    INCOMPLETE_SUFFIX,
    MANIFEST,
    TOKENIZER_FILE,
    TokenWriter,
    encode_corpus,
    smallest_dtype,
    sync_to_disk,
)
from seqmodels.errors import InputError, run_main


def tokenize_corpus(
    inputs: Sequence[str],
    output: str,
    tokenizer: str = "bytes",
    held_out_fraction: float = HELD_OUT_FRACTION,
    column: str = "text",
    text_suffixes: Sequence[str] = TEXT_SUFFIXES,
    shard_tokens: int = 1 << 28,
) -> dict:
    """Write the folder `output`, which `TextData(paths=output)` reads, and return its manifest.

    Everything is written under another name, the manifest last, and renamed when it is whole: `output` exists
    finished or not at all. What an interrupted run left is removed by the next one.
    """
    check_held_out_fraction(held_out_fraction)
    if shard_tokens < 1:
        raise InputError(f"shard_tokens is {shard_tokens}; expected at least 1 token in a file")
    loaded = load_tokenizer(tokenizer)
    files = find_files(inputs, text_suffixes)
    target = Path(output)
    if target.exists():
        raise InputError(
            f"{target} exists already and is not overwritten; name another output, or remove it first"
        )
    folder = target.with_name(target.name + INCOMPLETE_SUFFIX)
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        manifest = _write_splits(files, folder, loaded, held_out_fraction, column, shard_tokens)
        if tokenizer != "bytes":
            shutil.copyfile(tokenizer, folder / TOKENIZER_FILE)
            sync_to_disk(folder / TOKENIZER_FILE)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        sync_to_disk(folder / MANIFEST)
        sync_to_disk(folder)
        folder.rename(target)
        sync_to_disk(target.parent)
    except (OSError, RuntimeError) as error:  # ArrayRecord reports a full disk by the latter
        raise InputError(f"cannot write {target}: {error}") from error
    return manifest


def _write_splits(
    files: Sequence,
    folder: Path,
    tokenizer: Tokenizer,
    held_out_fraction: float,
    column: str,
    shard_tokens: int,
) -> dict:
    writers = {side: TokenWriter(folder, side, tokenizer, shard_tokens) for side in (TRAIN, HELD_OUT)}
    size = sum(file.size for file in files)
    with tqdm(
        total=size, unit="B", unit_scale=True, unit_divisor=1000, desc="tokenising", file=sys.stderr
    ) as progress:
        for document in encode_corpus(read_documents(files, column), tokenizer, held_out_fraction):
            writers[document.side].append(document)
            progress.update(document.file_bytes)
    return {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "dtype": smallest_dtype(tokenizer.vocab_size).str,
        "block": BLOCK,
        "held_out_fraction": held_out_fraction,
        "splits": {side: writer.close() for side, writer in writers.items()},
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m seqmodels.tools.tokenize_corpus",
        description="Tokenise a corpus to sharded ArrayRecord. Give the output folder to TextData as paths.",
        epilog="An interrupted run leaves no output, and the same command starts anew."
        " A finished output is never overwritten.",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders (searched to any depth) or quoted glob patterns: text, also .gz .bz2 .xz .zst;"
        " .parquet; .arrayrecord with a text per record",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to make; it must not exist")
    parser.add_argument(
        "--tokenizer",
        default="bytes",
        metavar="bytes|FILE",
        help="'bytes' (the default) or a Hugging Face tokenizer.json",
    )
    parser.add_argument(
        "--held-out-fraction",
        type=float,
        default=HELD_OUT_FRACTION,
        metavar="F",
        help="share of the documents kept for evaluation, by the hash of their names (default: %(default)s)",
    )
    parser.add_argument(
        "--column", default="text", metavar="NAME", help="text column of Parquet files (default: %(default)s)"
    )
    parser.add_argument(
        "--text-suffixes",
        nargs="+",
        default=TEXT_SUFFIXES,
        metavar="SUFFIX",
        help=f"suffixes of the files to read as text (default: {' '.join(TEXT_SUFFIXES)})",
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=1 << 28,
        metavar="N",
        help="tokens per output file, rounded down to whole blocks (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    manifest = tokenize_corpus(
        arguments.input,
        arguments.output,
        arguments.tokenizer,
        arguments.held_out_fraction,
        arguments.column,
        arguments.text_suffixes,
        arguments.shard_tokens,
    )
    for side, split in manifest["splits"].items():
        print(
            f"{side}: {split['documents']} documents, {split['text_bytes']} bytes, {split['tokens']} tokens"
        )
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    run_main(main)
