"""What a names table is made of: their tensors, our parameters, and what turns the ones into the others and back.

Our parameters are named by path, those of a block by its depth: `embed/embedding`, `layers/3/mixer/in_proj/kernel`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Arrays = Sequence[np.ndarray]


class Change(NamedTuple):
    """A bijection between their arrays and ours: neither direction computes anything, values only change places."""

    to_ours: Callable[[Arrays], Arrays]
    to_theirs: Callable[[Arrays], Arrays]


def each(to_ours: Callable[[np.ndarray], np.ndarray], to_theirs: Callable[[np.ndarray], np.ndarray]) -> Change:
    """A change of every array on its own."""
    return Change(lambda arrays: [to_ours(x) for x in arrays], lambda arrays: [to_theirs(x) for x in arrays])


SAME = each(lambda x: x, lambda x: x)
# torch.nn.Linear keeps [out, in], a Flax kernel is [in, out].
LINEAR = each(np.transpose, np.transpose)
# torch.nn.Conv1d, depthwise, keeps [channels, 1, width]; ours is [width, channels]. Both have the current token last.
CONVOLUTION = each(lambda x: x[:, 0].T, lambda x: x.T[:, None])
# One matrix of theirs for every expert, ours stacked.
EXPERTS = Change(
    lambda arrays: [np.stack([x.T for x in arrays])],
    lambda arrays: [x.T for x in arrays[0]],
)


class Weight(NamedTuple):
    """One line of a names table: these tensors of theirs are those parameters of ours."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    change: Change = SAME


def same(theirs: str, ours: str) -> Weight:
    return Weight((theirs,), (ours,))


def linear(theirs: str, ours: str, *, bias: bool = False) -> list[Weight]:
    """A projection: `theirs`.weight is `ours`/kernel, and so on."""
    found = [Weight((f"{theirs}.weight",), (f"{ours}/kernel",), LINEAR)]
    return found + [same(f"{theirs}.bias", f"{ours}/bias")] * bias


def convolution(theirs: str, ours: str, *, bias: bool = False) -> list[Weight]:
    """A short convolution, named likewise."""
    found = [Weight((f"{theirs}.weight",), (f"{ours}/kernel",), CONVOLUTION)]
    return found + [same(f"{theirs}.bias", f"{ours}/bias")] * bias


def norm(theirs: str, ours: str) -> Weight:
    return same(f"{theirs}.weight", f"{ours}/scale")


def gated_mlp(theirs: str, ours: str, *, bias: bool = False) -> list[Weight]:
    """gate_proj, up_proj and down_proj, named alike on both sides."""
    names = ("gate_proj", "up_proj", "down_proj")
    return [weight for name in names for weight in linear(f"{theirs}.{name}", f"{ours}/{name}", bias=bias)]


def experts(names: Sequence[str], ours: str) -> Weight:
    """The matrices `names`, one for each expert, stacked in one parameter."""
    return Weight(tuple(f"{name}.weight" for name in names), (ours,), EXPERTS)


def fused_experts(theirs: str, ours: str) -> list[Weight]:
    """The experts as transformers holds them in memory: [expert, out, in], the rows of gate before those of up."""

    def split(arrays: Arrays) -> Arrays:
        return [x.swapaxes(1, 2) for x in np.split(arrays[0], 2, axis=1)]

    def join(arrays: Arrays) -> Arrays:
        return [np.concatenate([x.swapaxes(1, 2) for x in arrays], axis=1)]

    turn = each(lambda x: x.swapaxes(1, 2), lambda x: x.swapaxes(1, 2))
    return [
        Weight((f"{theirs}.gate_up_proj",), (f"{ours}/gate_proj", f"{ours}/up_proj"), Change(split, join)),
        Weight((f"{theirs}.down_proj",), (f"{ours}/down_proj",), turn),
    ]


def heads_together(heads: int, sizes: Sequence[int]) -> Change:
    """Theirs is one Linear whose rows are, head by head, sizes[0] rows of the first part, then sizes[1] of the second,
    and so on; ours are the parts, each a kernel with all its heads. Works on biases too."""
    ends = np.cumsum(sizes)[:-1]

    def split(arrays: Arrays) -> Arrays:
        x = arrays[0]
        parts = np.split(x.reshape(heads, sum(sizes), *x.shape[1:]), ends, axis=1)
        return [part.reshape(-1, *x.shape[1:]).T for part in parts]

    def join(arrays: Arrays) -> Arrays:
        parts = [x.T.reshape(heads, size, *x.shape[:-1]) for x, size in zip(arrays, sizes, strict=True)]
        together = np.concatenate(parts, axis=1)
        return [together.reshape(-1, *together.shape[2:])]

    return Change(split, join)


def channels_together(sizes: Sequence[int]) -> Change:
    """Theirs is one depthwise convolution over all the channels; ours are one for each part of them."""
    ends = np.cumsum(sizes)[:-1]

    def split(arrays: Arrays) -> Arrays:
        return [x[:, 0].T for x in np.split(arrays[0], ends)]

    def join(arrays: Arrays) -> Arrays:
        return [np.concatenate([x.T[:, None] for x in arrays])]

    return Change(split, join)
