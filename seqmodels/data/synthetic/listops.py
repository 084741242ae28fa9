"""ListOps: nested operations on digits."""

import dataclasses

import numpy as np

from seqmodels.data.metrics import MacroAccuracy
from seqmodels.data.synthetic._task import Row, SyntheticTask, same_position_row
from seqmodels.errors import InputError

SYMBOLS = (*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]", "<pad>")
"""What each id stands for."""
OPERATORS = range(10, 14)
CLOSE, PADDING = 14, 15
DIGIT_PROBABILITY = 0.75
MAX_DRAWS = 100_000


@dataclasses.dataclass(frozen=True)
class ListOps(SyntheticTask):
    """ListOps, Nangia and Bowman 2018, arXiv 1804.06028, with the generator of Long Range Arena (Tay et al. 2020, arXiv
    2011.04006): the value, a digit, of an expression such as [MAX 2 9 [MIN 4 7 ] 0 ].

    A node is a digit with probability 3/4, and at depth `max_depth` certainly; else an operator, uniform of four, with
    a uniform number of arguments from 2 to `max_args`, which are nodes one deeper. The root has depth 1.

        MIN, MAX    the least, the greatest argument
        MED         the median, rounded down
        SM          the sum modulo 10

    An operator and its bracket are two tokens, as Long Range Arena counts lengths; the parentheses of its files, which
    its tokeniser removes, are left out. Expressions are drawn until one has `min_length` to seq_len tokens. It stands
    at the right, after padding, and its value is the target at the last position. `SYMBOLS` says what the ids stand
    for.

    max_depth: 10 in Long Range Arena.
    max_args: 10 in Long Range Arena.
    min_length: None is seq_len / 4, as Long Range Arena has more than 500 of less than 2,000.
    """

    max_depth: int = 10
    max_args: int = 10
    min_length: int | None = None

    metrics = (MacroAccuracy(),)

    def __post_init__(self):
        self.require(max_depth=2, max_args=2)
        if self.min_length is not None:
            self.require(min_length=1)
        super().__post_init__()

    @property
    def vocab_size(self) -> int:
        return len(SYMBOLS)

    def least(self, seq_len: int) -> int:
        """The least number of tokens of an expression."""
        return seq_len // 4 if self.min_length is None else self.min_length

    @property
    def longest(self) -> int:
        """The number of tokens of the longest expression that there is."""
        length = 1
        for _ in range(self.max_depth - 1):
            length = 2 + self.max_args * length
        return length

    def check_length(self, seq_len: int) -> None:
        self.require_length(seq_len, 4, "an operator, two digits and a bracket")
        least = self.least(seq_len)
        if least > min(seq_len, self.longest):
            raise InputError(
                f"ListOps: min_length is {least} with seq_len {seq_len}; expected at most that, and at most"
                f" {self.longest}, the longest expression of depth {self.max_depth} with {self.max_args} arguments"
            )

    def example(self, seq_len: int, random: np.random.Generator) -> Row:
        least = self.least(seq_len)
        drawn = (self.expression(random, seq_len, operator=least > 1) for _ in range(MAX_DRAWS))
        expression = next((tokens for tokens in drawn if len(tokens) >= max(least, 1)), None)
        if expression is None:
            raise InputError(
                f"ListOps: none of {MAX_DRAWS:,} expressions has {least} to {seq_len} tokens; expected lengths that"
                f" depth {self.max_depth} and {self.max_args} arguments make more often"
            )
        tokens = np.full(seq_len, PADDING)
        tokens[-len(expression) :] = expression
        return same_position_row(tokens, np.array([seq_len - 1]), value(expression))

    def expression(self, random: np.random.Generator, longest: int, operator: bool) -> list[int]:
        """A random expression; [] for one of more than `longest` tokens. operator: the root is no digit."""
        tokens: list[int] = []
        # Of every open operator, how many arguments are still to come.
        missing: list[int] = []
        while True:
            depth = len(missing) + 1
            is_digit = depth == self.max_depth or random.random() < DIGIT_PROBABILITY
            if is_digit and not (operator and depth == 1):
                tokens.append(int(random.integers(10)))
            else:
                tokens.append(int(random.integers(OPERATORS.start, OPERATORS.stop)))
                missing.append(int(random.integers(2, self.max_args + 1)) + 1)
            while missing:
                missing[-1] -= 1
                if missing[-1]:
                    break
                missing.pop()
                tokens.append(CLOSE)
            # Every missing argument is a token or more, and every open operator has a bracket to come.
            if len(tokens) + sum(missing) + len(missing) > longest:
                return []
            if not missing:
                return tokens


def value(expression: list[int]) -> int:
    """The value of an expression, 0 .. 9."""
    open_operators: list[list[int]] = [[]]
    for token in expression:
        if token in OPERATORS:
            open_operators.append([token])
            continue
        if token == CLOSE:
            operator, *arguments = open_operators.pop()
            token = _apply(operator, sorted(arguments))
        open_operators[-1].append(token)
    return open_operators[0][0]


def _apply(operator: int, arguments: list[int]) -> int:
    match SYMBOLS[operator]:
        case "[MIN":
            return arguments[0]
        case "[MAX":
            return arguments[-1]
        case "[MED":
            middle = len(arguments) // 2
            return (arguments[middle] + arguments[-1 - middle]) // 2
        case _:
            return sum(arguments) % 10
