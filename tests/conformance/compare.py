"""Comparisons that say where and by how much two trees of arrays differ; a view on the floats of a tree."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Floats = dict[str, Any]


def is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def floats_of(tree: Any) -> tuple[Floats, Callable[[Floats], Any]]:
    """The floating-point leaves of a tree by path, and the function that puts others in their place."""
    with_paths, structure = jax.tree.flatten_with_path(tree)
    leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in with_paths]

    def replaced(floats: Floats) -> Any:
        return jax.tree.unflatten(structure, [floats.get(path, leaf) for path, leaf in leaves])

    return {path: leaf for path, leaf in leaves if is_float(leaf)}, replaced


def cast(tree: Any, dtype: Any) -> Any:
    """The same values with every floating-point leaf in `dtype`, as NumPy arrays."""
    return jax.tree.map(lambda x: np.asarray(x, dtype) if is_float(x) else np.asarray(x), tree)


def _leaves(tree: Any) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path): np.asarray(leaf, np.float64 if is_float(leaf) else None)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def assert_close(found: Any, expected: Any, tolerance: float, what: str) -> None:
    """Every float within `tolerance` times the largest float of `expected`; everything else equal."""
    assert jax.tree.structure(found) == jax.tree.structure(expected), f"{what}: another structure"
    found, expected = _leaves(found), _leaves(expected)
    scale = max((np.abs(x).max(initial=0) for x in expected.values() if is_float(x)), default=0)
    for path, want in expected.items():
        have = found[path]
        assert have.shape == want.shape, f"{what}{path}: shape {have.shape}, expected {want.shape}"
        assert np.isfinite(have).all(), f"{what}{path}: not finite"
        if is_float(want):
            error = np.abs(have - want).max(initial=0)
            assert error <= tolerance * scale, (
                f"{what}{path}: off by {error:.2g}, {error / (scale or 1):.1e} of the largest value "
                f"{scale:.2g}; tolerance {tolerance:.1e}"
            )
        else:
            assert (have == want).all(), f"{what}{path}: integers differ"


def assert_equal(found: Any, expected: Any, what: str) -> None:
    """The same structure and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected), f"{what}: another structure"
    for (path, have), want in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected)):
        assert np.array_equal(have, want), f"{what}{jax.tree_util.keystr(path)}: differs"


def assert_zero(found: Any, what: str) -> None:
    """Every element exactly 0."""
    for path, leaf in jax.tree.leaves_with_path(found):
        largest = np.abs(np.asarray(leaf, np.float64)).max(initial=0)
        assert largest == 0, f"{what}{jax.tree_util.keystr(path)}: {largest:.2g} where 0 is due"


def bytes_of(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
