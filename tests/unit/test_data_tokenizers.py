"""Bytes and tokenizer files."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from seqmodels.data.tokenizers import FileTokenizer, load_tokenizer
from seqmodels.errors import InputError

TEXT = "The naïve café: 日本語, emoji 👩‍🚀🚀, and plain words, plain words.\n"


def train_bpe(path, special_tokens=(), **limits):
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special_tokens),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(["plain words and the words of the cafe"] * 20, trainer)
    if limits:
        model.enable_truncation(4)
        model.enable_padding(length=4)
    model.save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory):
    return train_bpe(tmp_path_factory.mktemp("bpe") / "tokenizer.json")


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe_file):
    return load_tokenizer("bytes" if request.param == "bytes" else bpe_file)


def test_decode_inverts_encode(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32 and ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == TEXT
    assert [list(row) for row in tokenizer.encode_documents([TEXT.encode(), b""])] == [list(ids), []]


def test_stream_gives_whole_characters_and_joins_to_decode(tokenizer):
    ids = tokenizer.encode(TEXT)
    pieces = list(tokenizer.decode_stream(iter(ids)))
    assert "".join(pieces) == TEXT and len(pieces) > len(TEXT) // 4
    assert not [piece for piece in pieces if "\ufffd" in piece]
    for cut in range(len(ids)):  # where a character may be left unfinished
        assert "".join(tokenizer.decode_stream(ids[:cut])) == tokenizer.decode(ids[:cut])


def test_stream_gives_text_before_the_ids_end(tokenizer):
    endless = itertools.cycle(tokenizer.encode("plain words "))
    assert len("".join(itertools.islice(tokenizer.decode_stream(endless), 20))) >= 20


def test_random_ids_decode_as_streamed(tokenizer):
    ids = np.random.default_rng(0).integers(tokenizer.vocab_size, size=2000)
    assert "".join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids)


def test_separator_and_mask_stand_for_no_text(tokenizer):
    special = [tokenizer.separator, tokenizer.mask]
    assert sorted(special)[-1] == tokenizer.vocab_size - 1 and len(set(special)) == 2
    ids = [special[0], *tokenizer.encode("plain"), special[1], special[0]]
    assert tokenizer.decode(ids) == "plain" == "".join(tokenizer.decode_stream(ids))
    assert not set(special) & set(tokenizer.encode(TEXT).tolist())


def test_special_tokens_of_the_file_are_used(tmp_path):
    path = train_bpe(tmp_path / "tokenizer.json", ["<pad>", "<|endoftext|>", "<mask>"])
    tokenizer = FileTokenizer(path)
    assert (tokenizer.separator, tokenizer.mask) == (1, 2)
    assert tokenizer.vocab_size == tokenizers.Tokenizer.from_file(path).get_vocab_size()
    assert tokenizer.decode([1, *tokenizer.encode("words"), 2]) == "words"


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path, bpe_file):
    limited = FileTokenizer(train_bpe(tmp_path / "tokenizer.json", limits=True))
    assert list(limited.encode(TEXT)) == list(load_tokenizer(bpe_file).encode(TEXT))
    assert list(limited.encode("a")) == list(load_tokenizer(bpe_file).encode("a"))


def test_fingerprint_follows_the_content(tmp_path, bpe_file):
    copy = tmp_path / "copy.json"
    copy.write_bytes(Path(bpe_file).read_bytes())
    other = train_bpe(tmp_path / "other.json", ["<mask>"])
    prints = [load_tokenizer(name).fingerprint for name in (bpe_file, str(copy), other, "bytes")]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_bad_tokenizers_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"'byte' is no file; .*did you mean 'bytes'\?"):
        load_tokenizer("byte")
    with pytest.raises(InputError, match="expected 'bytes' or the path"):
        load_tokenizer(str(tmp_path / "missing.json"))
    (tmp_path / "junk.json").write_text("{}")
    with pytest.raises(InputError, match=r"is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "junk.json"))
