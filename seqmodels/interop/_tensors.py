"""Weights from their names to ours and back, every one accounted for."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from seqmodels.errors import InputError, nearest
from seqmodels.interop._config import Config
from seqmodels.interop._family import Family, stack_of
from seqmodels.interop._files import FLOATS, WeightFiles
from seqmodels.interop._names import Weight, linear
from seqmodels.models import LanguageModel

HEAD = "lm_head"
_FUSED_EXPERTS = ".experts.gate_up_proj"


def table(family: Family, model: LanguageModel, config: Config, fused: bool = False) -> list[Weight]:
    """The names table of a model, its head included where it has one of its own."""
    head = [] if model.tie_embeddings else linear(family.head[0].removesuffix(".weight"), HEAD)
    return [*family.weights(config, fused), *head]


def read_parameters(family: Family, model: LanguageModel, config: Config, files: WeightFiles) -> dict[str, Any]:
    """Our tree of parameters, NumPy arrays in the dtype that the model keeps them in.

    Raises:
        InputError: a weight is missing, is not expected, has another shape, or is tied and differs; it is named.
    """
    present = set(files)
    weights = table(family, model, config, fused=any(name.endswith(_FUSED_EXPERTS) for name in present))
    shapes = parameter_shapes(model)
    wanted = {
        name: shape
        for weight in weights
        for name, shape in zip(weight.theirs, _their_shapes(weight, shapes), strict=True)
    }
    _check_names(family, model, config, present, wanted)
    for name, shape in wanted.items():
        if files.shape(name) != shape:
            raise InputError(f"weight {name!r} has shape {files.shape(name)}; this model's config makes it {shape}")
        files.dtype(name)

    ours: dict[str, np.ndarray] = {}
    for weight in weights:
        arrays = weight.change.to_ours([files.read(name) for name in weight.theirs])
        for name, array in zip(weight.ours, arrays, strict=True):
            ours[name] = np.asarray(array, shapes[name].dtype)
    _check_tied_head(family, model, present, files)
    return _tree(model, ours)


def write_parameters(
    family: Family, model: LanguageModel, config: Config, params: Any, dtypes: Mapping[str, str], dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors by name, each in the dtype that `dtypes` has for it, or `dtype`."""
    ours = dict(_by_layer(model, params))
    weights = table(family, model, config)
    surplus = ours.keys() - {name for weight in weights for name in weight.ours}
    if surplus:
        raise InputError(f"parameter {min(surplus)!r} has no name in a {family.name} checkpoint")

    def kept(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
        return name, np.asarray(array, FLOATS[dtypes.get(name, dtype)])

    for weight in weights:
        arrays = weight.change.to_theirs([ours[name] for name in weight.ours])
        for name, array in zip(weight.theirs, arrays, strict=True):
            yield kept(name, array)
            if model.tie_embeddings and family.writes_tied_head and name == family.head[1]:
                yield kept(family.head[0], array)
    for name, make in family.recomputed(config).items():
        yield kept(name, make())


def parameter_shapes(model: LanguageModel) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter, those of blocks by their depth."""
    return {name: leaf for name, leaf in _by_layer(model, _abstract(model))}


def _abstract(model: LanguageModel) -> Any:
    tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def _their_shapes(weight: Weight, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> list[tuple[int, ...]]:
    blanks = [np.zeros(shapes[name].shape, np.int8) for name in weight.ours]
    return [x.shape for x in weight.change.to_theirs(blanks)]


def _check_names(
    family: Family, model: LanguageModel, config: Config, present: set[str], wanted: Mapping[str, Any]
) -> None:
    known = {*wanted, *family.recomputed(config)} | ({family.head[0]} if model.tie_embeddings else set())
    surplus = {name for name in present - known if not any(re.search(rule, name) for rule in family.left_out)}
    missing = wanted.keys() - present
    if missing:
        first = min(missing)
        hint = f"; {nearest(first, surplus)}" if surplus else ""
        raise InputError(f"weight {first!r} is missing{_more(missing)}{hint}")
    if surplus:
        raise InputError(f"weight {min(surplus)!r} is not one of a {family.architecture}{_more(surplus)}")


def _more(names: set[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def _check_tied_head(family: Family, model: LanguageModel, present: set[str], files: WeightFiles) -> None:
    head, embedding = family.head
    if model.tie_embeddings and head in present and not _same_bits(files.read(head), files.read(embedding)):
        raise InputError(f"weight {head!r} differs from {embedding!r}, but config.json says that the two are tied")


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _by_layer(model: LanguageModel, params: Any) -> Iterator[tuple[str, Any]]:
    """Parameters by path, `layers/i/` in place of the stack's rounds."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for i, renamed in enumerate(_layer_names(model, name)):
            if not name.startswith("stack/rounds/"):
                yield renamed, leaf
            elif isinstance(leaf, jax.ShapeDtypeStruct):
                yield renamed, jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
            else:
                yield renamed, np.asarray(leaf[i])


def _layer_names(model: LanguageModel, name: str) -> list[str]:
    """What a parameter of the tree is called by depth: one name, or one for each round stacked in it."""
    found = re.fullmatch(r"stack/(rounds|round_(\d+)|remainder)/block_(\d+)/(.*)", name)
    if found is None:
        return [name]
    stack = stack_of(model)
    rounds = {"rounds": range(stack.rounds), "remainder": [stack.rounds]}.get(found[1])
    rounds = [int(found[2])] if rounds is None else rounds
    return [f"layers/{r * stack.round_length + int(found[3])}/{found[4]}" for r in rounds]


def _tree(model: LanguageModel, by_layer: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The tree of which `_by_layer` gives these."""

    def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        parts = [by_layer[renamed] for renamed in _layer_names(model, name)]
        return np.stack(parts) if name.startswith("stack/rounds/") else parts[0]

    return jax.tree_util.tree_map_with_path(leaf, _abstract(model))
