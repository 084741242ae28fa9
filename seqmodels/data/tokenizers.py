"""Text to ids and back: bytes, or a tokenizer file of the Hugging Face `tokenizers` library.

Every tokenizer has two ids that stand for no text: `separator`, which stands before the first document and
after every one, and `mask`, which hides an input token in masked training. `vocab_size` counts both.
"""

import abc
import codecs
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from seqmodels.data.extras import import_extra
from seqmodels.errors import InputError, nearest

# Special tokens under which published tokenizers end a document or hide a token, looked for in this order.
SEPARATOR_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
MASK_TOKENS = ("<mask>", "[MASK]", "<|mask|>")


class Tokenizer(abc.ABC):
    """Text to ids and back."""

    vocab_size: int
    separator: int
    mask: int
    fingerprint: str
    """Equal for two tokenizers that give the same ids, on any machine."""

    @abc.abstractmethod
    def encode_documents(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of each text (UTF-8), integer arrays of one axis, without separators."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Separator and mask give nothing; bytes that are no UTF-8 give U+FFFD."""

    @abc.abstractmethod
    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of `ids` in pieces, as they arrive, of whole characters; joined they are `decode(ids)`."""

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, int32, without separators."""
        return self.encode_documents([text.encode(errors="surrogateescape")])[0].astype(np.int32)


class ByteTokenizer(Tokenizer):
    """Each byte of the UTF-8 text is its own id; 256 separates documents and 257 masks. 258 ids in all."""

    vocab_size = 258
    separator = 256
    mask = 257
    fingerprint = "bytes"

    def encode_documents(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(index for index in ids if index < 256).decode(errors="replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for index in ids:
            if index < 256 and (text := decoder.decode(bytes([index]))):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text


class FileTokenizer(Tokenizer):
    """A `tokenizer.json` of the Hugging Face `tokenizers` library.

    A special token of the file that ends documents (`SEPARATOR_TOKENS`) or masks (`MASK_TOKENS`) is used as
    such; where the file has none, an id is added after its own. `add_mask=False` adds none to mask with: `mask` is -1.
    """

    def __init__(self, path: str | Path, add_mask: bool = True):
        library = import_extra("tokenizers", "a tokenizer file")
        content = Path(path).read_bytes()
        try:
            self._tokenizer = library.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises the bare class
            raise InputError(
                f"{path} is not a tokenizer.json of the Hugging Face tokenizers: {error}"
            ) from error
        # Files are often saved with the truncation and padding of the model they were made for.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        decoders = import_extra("tokenizers.decoders", "a tokenizer file")
        self._new_stream = functools.partial(decoders.DecodeStream, skip_special_tokens=True)
        self._text_ids = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.vocab_size = self._text_ids
        self.separator = self._special_id(SEPARATOR_TOKENS)
        self.mask = self._special_id(MASK_TOKENS, add=add_mask)
        self.fingerprint = "sha256:" + hashlib.sha256(content).hexdigest()

    def _special_id(self, names: Sequence[str], add: bool = True) -> int:
        known = (self._tokenizer.token_to_id(name) for name in names)
        found = next((index for index in known if index is not None), None)
        if found is None and not add:
            return -1
        if found is None:
            found, self.vocab_size = self.vocab_size, self.vocab_size + 1
        return found

    def encode_documents(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        decoded = [text.decode(errors="replace") for text in texts]
        encodings = self._tokenizer.encode_batch_fast(decoded, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(
            [index for index in ids if self._has_text(index)], skip_special_tokens=True
        )

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        stream, seen, given = self._new_stream(), [], 0
        for index in map(int, ids):
            if self._has_text(index):
                seen.append(index)
                if text := stream.step(self._tokenizer, index):
                    given += len(text)
                    yield text
        # What the stream held back in the hope of completing a character.
        if rest := self.decode(seen)[given:]:
            yield rest

    def _has_text(self, index: int) -> bool:
        return index < self._text_ids and index not in (self.separator, self.mask)


def load_tokenizer(name: str, add_mask: bool = True) -> Tokenizer:
    """`"bytes"`, or the path of a Hugging Face `tokenizer.json`; for `add_mask` see `FileTokenizer`."""
    if name == "bytes":
        return ByteTokenizer()
    if Path(name).is_file():
        return FileTokenizer(name, add_mask)
    raise InputError(
        f"tokenizer {name!r} is no file; expected 'bytes' or the path of a Hugging Face tokenizer.json"
        f" ({nearest(name, ['bytes'])})"
    )
