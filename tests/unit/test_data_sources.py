"""Finding files, reading documents, holding some out."""

import bz2
import gzip
import lzma
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from seqmodels.data.sources import (
    HELD_OUT,
    TRAIN,
    Document,
    find_files,
    read_documents,
    split_documents,
)
from seqmodels.errors import InputError

COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def documents_of(*paths, **kwargs):
    return [(document.name, document.text) for document in read_documents(find_files(list(paths)), **kwargs)]


def write_texts(folder, count=40):
    for index in range(count):
        file = folder / ("a", "b/c")[index % 2] / f"{index:03d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(f"text number {index}, äöü\n".encode() * (index + 1))
    return folder


def test_folder_is_searched_to_any_depth_in_sorted_order(tmp_path):
    write_texts(tmp_path)
    (tmp_path / "notes.xyz").write_text("passed over")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden.txt").write_text("passed over")
    names = [name for name, _ in documents_of(tmp_path)]
    assert names == sorted(names) and len(names) == 40
    assert {"a/000.txt", "b/c/001.txt"} <= set(names)


def test_glob_file_and_folder_agree_and_a_file_counts_once(tmp_path):
    write_texts(tmp_path)
    by_folder = documents_of(tmp_path)
    assert documents_of(f"{tmp_path}/**/*.txt") == by_folder
    assert documents_of(tmp_path, f"{tmp_path}/a/*.txt", tmp_path / "a" / "000.txt") == by_folder


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_equal_plain_ones(tmp_path, suffix):
    plain = write_texts(tmp_path / "plain")
    for file in sorted(plain.rglob("*.txt")):
        packed = tmp_path / "packed" / file.relative_to(plain).with_suffix(".txt" + suffix)
        packed.parent.mkdir(parents=True, exist_ok=True)
        # Two parts one after the other are one file to every one of these programs.
        text = file.read_bytes()
        packed.write_bytes(COMPRESS[suffix](text[:7]) + COMPRESS[suffix](text[7:]))
    assert documents_of(tmp_path / "packed") == documents_of(plain)


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("damage", ["torn", "junk"])
def test_damaged_compressed_file_is_refused(tmp_path, suffix, damage):
    text = random.Random(0).randbytes(5000).hex().encode()
    whole = COMPRESS[suffix](text)
    file = tmp_path / f"x.txt{suffix}"
    file.write_bytes(whole[: len(whole) // 2] if damage == "torn" else b"this is not compressed" * 10)
    with pytest.raises(InputError, match=r"cannot read .*x\.txt"):
        documents_of(file)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()])
def test_parquet_rows_are_documents(tmp_path, kind):
    texts = ["first", "", None, "vierte äöü", *(f"row {row}" for row in range(5000))]
    column = pa.array([text if text is None else text.encode() for text in texts], pa.binary()).cast(kind)
    pq.write_table(pa.table({"body": column, "n": list(range(len(texts)))}), tmp_path / "x.parquet")
    found = documents_of(tmp_path, column="body")
    expected = [(f"x.parquet#{row}", text.encode()) for row, text in enumerate(texts) if text]
    assert found == expected


def test_parquet_bad_inputs(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "number": [1]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"no column 'txt'; did you mean 'text'\?"):
        documents_of(tmp_path, column="txt")
    with pytest.raises(InputError, match="'number' holds int64; expected text"):
        documents_of(tmp_path, column="number")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 but the rest is junk" * 100)
    with pytest.raises(InputError, match="as Parquet"):
        documents_of(tmp_path)


def write_records(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def test_arrayrecord_records_are_documents(tmp_path):
    write_records(tmp_path / "x.arrayrecord", [b"one", b"", "drei äöü".encode()])
    expected = [("x.arrayrecord#0", b"one"), ("x.arrayrecord#2", "drei äöü".encode())]
    assert documents_of(tmp_path) == expected


def test_arrayrecord_bad_inputs(tmp_path):
    (tmp_path / "x.arrayrecord").write_bytes(b"junk" * 100_000)
    with pytest.raises(InputError, match="as ArrayRecord"):
        documents_of(tmp_path)
    write_records(tmp_path / "x.arrayrecord", [b"zero \0 byte"])
    with pytest.raises(InputError, match="is not text"):
        documents_of(tmp_path)


def test_paths_bad_inputs(tmp_path):
    (tmp_path / "corpus.txt").write_text("text")
    (tmp_path / "data.npz").write_text("text")
    (tmp_path / "binary.txt").write_bytes(b"\x7fELF\0\0\0")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data.npz").write_text("text")
    for path, message in {
        tmp_path / "corpsu.txt": r"no such file or folder: .* \(did you mean 'corpus.txt'\?\)",
        tmp_path / "nowhere" / "x.txt": "is no folder either",
        tmp_path / "data.npz": "unknown suffix '.npz'; readable: .parquet",
        tmp_path / "*.txtt": "matches no file",
        tmp_path / "empty": "nothing to read",
        tmp_path / "other": r"nothing to read: it holds \['.npz'\]",
        tmp_path / "binary.txt": "is not text",
    }.items():
        with pytest.raises(InputError, match=message) as error:
            documents_of(path)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="no paths"):
        documents_of()


def test_text_suffixes_can_be_set_and_a_file_without_one_is_text_when_named(tmp_path):
    (tmp_path / "proof.lean").write_text("theorem")
    (tmp_path / "enwik8").write_text("wiki")
    assert [file.name for file in find_files(str(tmp_path), [".lean"])] == ["proof.lean"]
    assert documents_of(tmp_path / "enwik8") == [("enwik8", b"wiki")]


def test_standard_library_is_the_default():
    names = [file.name for file in find_files(None)]
    assert names == sorted(names, key=lambda name: name.split("/")) and len(names) > 300
    assert {"json/decoder.py", "argparse.py"} <= set(names)
    assert not [
        name for name in names if name.split("/")[0] in ("test", "site-packages") or name.count("/") > 1
    ]
    # Such a file differs from build to build.
    assert not [name for name in names if "sysconfigdata" in name]


# ---- holding out ----


def split_of(names, fraction):
    documents = [Document(name, name.encode(), 1.0) for name in names]
    sides = {TRAIN: [], HELD_OUT: []}
    for side, document in split_documents(documents, fraction):
        sides[side].append(document.name)
    return sides


def test_split_is_the_same_on_every_machine():
    held_out = split_of([f"{index}.txt" for index in range(100)], 0.05)[HELD_OUT]
    assert sorted(held_out) == ["1.txt", "18.txt", "39.txt", "71.txt", "77.txt", "85.txt"]


def test_split_of_a_document_does_not_depend_on_the_others():
    names = [f"folder/{index}.txt" for index in range(2000)]
    whole = split_of(names, 0.1)
    assert len(whole[HELD_OUT]) in range(150, 250)
    assert sorted(whole[TRAIN] + whole[HELD_OUT]) == sorted(names)
    part = split_of(random.Random(0).sample(names, 500), 0.1)
    assert set(part[HELD_OUT]) <= set(whole[HELD_OUT]) and set(part[TRAIN]) <= set(whole[TRAIN])


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_no_side_stays_empty(count, fraction):
    for start in range(50):
        names = [f"{start}-{index}" for index in range(count)]
        sides = split_of(names, fraction)
        assert sides[TRAIN] and sides[HELD_OUT]
        assert sorted(sides[TRAIN] + sides[HELD_OUT]) == sorted(names)


@pytest.mark.parametrize("text", ["line one\nline two\nline three\n" * 20, "äöü" * 50, "ab"])
@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_single_document_is_cut_between_characters(text, fraction):
    encoded = text.encode()
    (first, train), (second, held_out) = split_documents([Document("x", encoded, 10.0)], fraction)
    assert (first, second) == (TRAIN, HELD_OUT)
    assert train.text + held_out.text == encoded
    assert train.text.decode() and held_out.text.decode()
    assert train.file_bytes + held_out.file_bytes == pytest.approx(10.0)
    if "\n" in text:
        assert train.text.endswith(b"\n")


def test_empty_and_tiny_corpora_are_refused(tmp_path):
    with pytest.raises(InputError, match="corpus is empty"):
        split_of([], 0.1)
    with pytest.raises(InputError, match="too small"):
        list(split_documents([Document("x", b"a", 1.0)], 0.5))
