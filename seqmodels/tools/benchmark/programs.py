"""What a measured call does: an operator's outputs, or those and the gradients of all its inputs.

Functions take an operator's arrays by name, or trees of them, and return its output. Values are named "o", and
gradients after their array: "dq", "dweights[0].A".
"""

from collections.abc import Callable, Mapping
from typing import Any

Values = dict[str, Any]


def jax_step(function: Callable[..., Any], backward: bool) -> Callable[[Mapping[str, Any], Any], Values]:
    """(arrays, cotangent of the output) -> values, to be compiled."""
    import jax

    def forward(arrays: Mapping[str, Any], cotangent: Any) -> Values:
        return {"o": function(**arrays)}

    def both(arrays: Mapping[str, Any], cotangent: Any) -> Values:
        o, pull_back = jax.vjp(lambda arrays: function(**arrays), arrays)
        gradients = jax.tree.leaves_with_path(pull_back(cotangent)[0])
        return {"o": o, **{f"d{named(path)}": x for path, x in gradients}}

    return both if backward else forward


def torch_step(function: Callable[..., Any], backward: bool) -> Callable[[Mapping[str, Any], Any], Values]:
    """(arrays, cotangent of the output) -> values. For gradients every array has to require one."""
    import torch
    from jax import tree

    def forward(arrays: Mapping[str, Any], cotangent: Any) -> Values:
        with torch.no_grad():
            return {"o": function(**arrays)}

    def both(arrays: Mapping[str, Any], cotangent: Any) -> Values:
        leaves = {named(path): x for path, x in tree.leaves_with_path(arrays)}
        o = function(**arrays)
        grads = torch.autograd.grad(o, list(leaves.values()), cotangent, allow_unused=True)
        return {"o": o.detach(), **{f"d{name}": x for name, x in zip(leaves, grads) if x is not None}}

    return both if backward else forward


def named(path: tuple) -> str:
    """An array's name, and its place in a tree of them."""
    from jax.tree_util import keystr

    return path[0].key + keystr(path[1:])


def one_line(error: BaseException) -> str:
    """An exception as a reason in a table."""
    text = f"{type(error).__name__}: {error}".strip()
    return text.splitlines()[0][:200]
