"""Linear regression in context, and two predictors to judge a model by."""

import dataclasses

import numpy as np

from seqmodels.data.synthetic._task import Row, SyntheticTask
from seqmodels.errors import InputError


@dataclasses.dataclass(frozen=True)
class LinearRegression(SyntheticTask):
    """Linear regression in context, Garg et al. 2022, arXiv 2208.01066: x_1 y_1 x_2 y_2 ..., where y is asked for.

        w     normal, [dim], of variance 1 / dim in each direction, drawn anew for each sequence
        x_i   normal, [dim]                           y_i = w . x_i + noise e_i,    e_i normal

    For `seqmodels.models.Regressor`. An input is dim + 1 numbers: (x, 0) at even positions, whose target is y, and
    (0, y) at odd ones, which have no weight. The loss is the squared error; that of always saying 0 is 1 + noise^2.

    `ridge_predictions` is the best that any model can do; `gradient_step_predictions` is what one layer of softmax
    attention with several heads learns (He et al. 2025, arXiv 2503.12734). Garg et al. have w of variance 1 and no
    noise.

    dim: of x.
    noise: standard deviation of what is added to y.
    """

    dim: int = 8
    noise: float = 0.1

    def __post_init__(self):
        self.require(dim=1)
        if not self.noise >= 0.0:
            raise InputError(f"LinearRegression: noise is {self.noise}; expected 0 or more")
        super().__post_init__()

    @property
    def vocab_size(self) -> int:
        """It has no ids."""
        return 0

    @property
    def input_size(self) -> int:
        return self.dim + 1

    def check_length(self, seq_len: int) -> None:
        self.require_length(seq_len, 1, "an x and its target")

    def example(self, seq_len: int, random: np.random.Generator) -> Row:
        pairs = (seq_len + 1) // 2
        w = random.normal(size=self.dim) / np.sqrt(self.dim)
        xs = random.normal(size=(pairs, self.dim))
        ys = xs @ w + self.noise * random.normal(size=pairs)
        tokens = np.zeros((2 * pairs, self.dim + 1), np.float32)
        tokens[0::2, :-1], tokens[1::2, -1] = xs, ys
        targets, weights = np.zeros(2 * pairs, np.float32), np.zeros(2 * pairs, np.float32)
        targets[0::2], weights[0::2] = ys, 1.0
        return {"tokens": tokens[:seq_len], "targets": targets[:seq_len], "weights": weights[:seq_len]}


def pairs_of(tokens: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """xs [B, n, dim] and ys [B, n] of rows of `LinearRegression`, float64."""
    return tokens[:, 0::2, :-1].astype(np.float64), targets[:, 0::2].astype(np.float64)


def ridge_predictions(xs: np.ndarray, ys: np.ndarray, noise: float) -> np.ndarray:
    """Bayes' estimate of each y from the pairs before it and its x: float64 [B, n].

        y_i = x_i . (X' X + dim noise^2 I)^-1 X' Y        X, Y: the pairs before i

    the mean of y given these, where w and the noise are as in `LinearRegression`. Without noise it is the least-norm
    solution.
    """
    rows, pairs, dim = xs.shape
    predictions = np.zeros((rows, pairs))
    for i in range(1, pairs):
        x, y = xs[:, :i], ys[:, :i, None]
        if noise:
            w = np.linalg.solve(x.mT @ x + dim * noise**2 * np.eye(dim), x.mT @ y)
        else:
            w = np.linalg.pinv(x) @ y
        predictions[:, i] = (xs[:, i, None] @ w)[:, 0, 0]
    return predictions


def gradient_step_predictions(
    xs: np.ndarray, ys: np.ndarray, noise: float, learning_rate: float | None = None
) -> np.ndarray:
    """One step of gradient descent from w = 0 on the pairs before each y, with centred x: float64 [B, n].

        y_i = learning_rate / n sum_j<i y_j (x_j - mean x) . x_i        n: the number of pairs before i

    (the debiased gradient step of He et al. 2025, arXiv 2503.12734).

    learning_rate: None is the best for `LinearRegression`: n / (n + dim + dim noise^2).
    """
    _, pairs, dim = xs.shape
    predictions = np.zeros(ys.shape)
    for i in range(1, pairs):
        x, y = xs[:, :i], ys[:, :i, None]
        rate = i / (i + dim + dim * noise**2) if learning_rate is None else learning_rate
        w = rate / i * ((x - x.mean(axis=1, keepdims=True)).mT @ y)
        predictions[:, i] = (xs[:, i, None] @ w)[:, 0, 0]
    return predictions
