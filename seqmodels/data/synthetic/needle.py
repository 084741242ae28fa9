"""Something to remember in a long text: a pass key, or a needle in a haystack.

The text is made as long as fits the sequence, with the tokeniser at hand. An evaluation reports `example_accuracy`, the
share of answers that greedy decoding gives exactly; `seqmodels.evaluation.retrieval` lets a model write and scores what
it writes as RULER does.
"""

import abc
import dataclasses
import functools
import re
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from seqmodels.data.metrics import ExampleAccuracy
from seqmodels.data.sources import find_files, read_documents
from seqmodels.data.synthetic._task import TEST_STREAM, Row, SyntheticTask, next_token_row, random_of
from seqmodels.data.tokenizers import Tokenizer, load_tokenizer
from seqmodels.errors import InputError

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
GREATEST_PASS_KEY = 50_000
DEPTHS = 40

# fmt: off
ADJECTIVES = (
    "amber", "brave", "brisk", "calm", "clever", "crisp", "curious", "eager", "early", "faint", "fancy", "gentle",
    "giant", "grand", "happy", "hidden", "humble", "icy", "jolly", "keen", "lively", "lucky", "mellow", "modest",
    "noble", "plain", "proud", "quiet", "rapid", "silent", "steady", "young",
)
NOUNS = (
    "anchor", "arrow", "basket", "beacon", "bridge", "candle", "canyon", "castle", "cloud", "copper", "falcon",
    "forest", "garden", "harbor", "island", "jacket", "kettle", "lantern", "meadow", "mirror", "needle", "ocean",
    "orchard", "pepper", "pillow", "river", "saddle", "shadow", "sparrow", "thunder", "valley", "window",
)
# fmt: on


class Prompt(NamedTuple):
    """What a model reads, and what it should go on with. The answer begins with a space, which `reference` has not."""

    text: str
    answer: str

    @property
    def reference(self) -> str:
        return self.answer.strip()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalTask(SyntheticTask):
    """A prompt with an answer in it. A new one writes `draw`.

    A row is the separator, the prompt, the answer and the separator, padded at the right. The answer counts, and the
    separator after it.

    tokenizer: "bytes", or the path of a Hugging Face tokenizer.json.
    depth: how much of the filler stands before what is hidden, from 0 to 1. None: it is drawn.
    """

    tokenizer: str | Tokenizer = "bytes"
    depth: float | None = None
    num_test_examples: int = 500

    metrics = (ExampleAccuracy(),)

    def __post_init__(self):
        if isinstance(self.tokenizer, str):
            object.__setattr__(self, "tokenizer", load_tokenizer(self.tokenizer))
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise InputError(f"{type(self).__name__}: depth is {self.depth}; expected 0 (the beginning) to 1 (the end)")
        super().__post_init__()

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @abc.abstractmethod
    def draw(self, random: np.random.Generator) -> Callable[[int], Prompt]:
        """An example: a function from the units of filler in it to the prompt."""

    def depth_or(self, drawn: float) -> float:
        """The depth, or a drawn one. It is drawn in any case, so that the rest of an example depends on no depth."""
        return drawn if self.depth is None else self.depth

    def check_length(self, seq_len: int) -> None:
        self.example(seq_len, np.random.default_rng(0))

    def prompt(self, seq_len: int, random: np.random.Generator) -> Prompt:
        """The one with the most filler of which a row has room."""
        example = self.draw(random)

        def fits(units: int) -> bool:
            return len(self._sequence(example(units))[0]) <= seq_len + 1

        if not fits(0):
            least = len(self._sequence(example(0))[0]) - 1
            raise InputError(
                f"{type(self).__name__}: seq_len is {seq_len}; an example without any filler needs {least}"
            )
        return example(_largest(fits))

    def test_prompts(self, seq_len: int) -> Iterator[Prompt]:
        """Those of the held-out rows, in their order."""
        return (self.prompt(seq_len, random_of(self, (TEST_STREAM, 0), i)) for i in range(self.num_test_examples))

    def example(self, seq_len: int, random: np.random.Generator) -> Row:
        ids, answered = self._sequence(self.prompt(seq_len, random))
        padding = seq_len + 1 - len(ids)
        counted = np.zeros(seq_len + 1, bool)
        counted[len(ids) - answered : len(ids)] = True
        return next_token_row(np.pad(ids, (0, padding), constant_values=self.tokenizer.separator), seq_len, counted)

    def _sequence(self, prompt: Prompt) -> tuple[np.ndarray, int]:
        """The ids of a row before it is padded, and how many at its end count."""
        text, answer = self.tokenizer.encode(prompt.text), self.tokenizer.encode(prompt.answer)
        separator = [self.tokenizer.separator]
        return np.concatenate([separator, text, answer, separator]), len(answer) + 1


@dataclasses.dataclass(frozen=True)
class Passkey(RetrievalTask):
    """Pass key retrieval, Mohtashami and Jaggi 2023 (Landmark attention), arXiv 2305.16300.

    A line says what to do; then come the filler, cut after some of its characters, the line with the pass key, a number
    from 1 to 50,000, and the filler again; the last line asks for it. How many of the characters of filler stand before
    the pass key is uniform, where `depth` does not say it.
    """

    def draw(self, random: np.random.Generator) -> Callable[[int], Prompt]:
        key, place = random.integers(1, GREATEST_PASS_KEY + 1), self.depth_or(random.random())

        def prompt(characters: int) -> Prompt:
            before = min(int(place * (characters + 1)), characters)
            filler = (FILLER + " ") * (characters // len(FILLER) + 1)
            lines = (
                "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will "
                "quiz you about the important information there.",
                filler[:before],
                f"The pass key is {key}. Remember it. {key} is the pass key.",
                filler[: characters - before],
                "What is the pass key? The pass key is",
            )
            return Prompt("\n".join(lines), f" {key}")

        return prompt


@dataclasses.dataclass(frozen=True)
class NeedleInAHaystack(RetrievalTask):
    """The single needles of RULER, Hsieh et al. 2024, arXiv 2404.06654: S-NIAH-1, S-NIAH-2 and S-NIAH-3.

        level   haystack                             value
        1       one line of filler, repeated         a number of seven digits
        2       sentences of an essay                a number of seven digits
        3       sentences of an essay                a UUID

    The needle, "One of the special magic numbers for KEY is: VALUE.", is between two lines or sentences, at one of 40
    depths evenly spaced from the beginning to the end, or at `depth`. KEY is an adjective and a noun. An essay's
    sentences are those from a uniform one on, the first following the last; training and evaluation have the same. A
    value that the essay has is drawn anew.

    level: 1, 2 or 3.
    paths: the essays, see `seqmodels.data.sources.find_files`. None: the documentation of Python that `help()` shows.
    """

    level: int = 1
    paths: str | Sequence[str] | None = None

    def __post_init__(self):
        if self.level not in (1, 2, 3):
            raise InputError(f"NeedleInAHaystack: level is {self.level}; expected 1, 2 or 3")
        if self.level == 1 and self.paths is not None:
            raise InputError(f"NeedleInAHaystack: paths is {self.paths!r} with level 1; expected None, it has no essay")
        super().__post_init__()

    @property
    def fingerprint(self) -> str:
        text = self.essay.encode()
        return f"{type(self).__name__}, haystack of {len(text):,} bytes with checksum {zlib.crc32(text):08x}"

    @functools.cached_property
    def sentences(self) -> list[str]:
        """Of the essay; of level 1 the line of filler."""
        if self.level == 1:
            return [FILLER]
        if self.paths is None:
            texts = list(_documentation().values())
        else:
            documents = read_documents(find_files(self.paths))
            texts = [document.text.decode(errors="replace") for document in documents]
        words = " ".join(" ".join(texts).split())
        if not words:
            raise InputError(f"NeedleInAHaystack: {self.paths!r} has no text in it; expected an essay")
        return re.split(r"(?<=[.!?]) ", words)

    @functools.cached_property
    def essay(self) -> str:
        return " ".join(self.sentences)

    def draw(self, random: np.random.Generator) -> Callable[[int], Prompt]:
        kind, between = "number" if self.level < 3 else "uuid", "\n" if self.level == 1 else " "
        key = f"{random.choice(ADJECTIVES)}-{random.choice(NOUNS)}"
        depth = self.depth_or(random.integers(DEPTHS) / (DEPTHS - 1))
        first = random.integers(len(self.sentences))
        value = self._value(random)
        while value in self.essay:
            value = self._value(random)

        def prompt(units: int) -> Prompt:
            lines = [self.sentences[(first + i) % len(self.sentences)] for i in range(units)]
            lines.insert(round(depth * units), f"One of the special magic {kind}s for {key} is: {value}.")
            text = (
                f"A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz "
                f"you about the {kind} afterwards.\n{between.join(lines)}\nWhat is the special magic {kind} for {key} "
                f"mentioned in the provided text? The special magic {kind} for {key} mentioned in the provided text is"
            )
            return Prompt(text, f" {value}")

        return prompt

    def _value(self, random: np.random.Generator) -> str:
        if self.level < 3:
            return str(random.integers(10**6, 10**7))
        return str(uuid.UUID(bytes=random.bytes(16), version=4))


def _documentation() -> dict[str, str]:
    """What `help()` says of each topic of the language."""
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise InputError("NeedleInAHaystack: this Python has no documentation; name essays with `paths`") from error
    return topics


def _largest(fits: Callable[[int], bool]) -> int:
    """The greatest n that fits, where 0 does and what is larger than one that does not fit does not either."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
