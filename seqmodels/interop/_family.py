"""What a family of published models says about itself, and what a model of ours looks like from outside.

A family turns a config.json into fields of our classes and back, and lists its weights. Whether one of our models is
of a family is not a matter of its name: its config is written, read again, and what that gives is compared.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from seqmodels.errors import InputError
from seqmodels.interop._config import Config
from seqmodels.interop._names import Weight
from seqmodels.layers import Mixer
from seqmodels.models import Block, LanguageModel, Stack
from seqmodels.registry import MIXERS

# Fields by class, as in a gin file: {"LanguageModel": {"d_model": 64, ...}, "Mamba2": {...}}. `pattern` holds names of
# the registry, `mlp` the class of the feed-forward layer.
Fields = dict[str, dict[str, Any]]

# What changes how a model is computed, or where it starts, but not the function of its parameters.
NO_PART_OF_THE_FUNCTION = {
    *("form", "chunk_size", "backend", "dtype", "param_dtype", "scan", "remat", "parent", "name"),
    *("layer_index", "pattern", "mixer", "mlp"),
    *("dt_min", "dt_max", "dt_init_floor", "A_init_range"),
}


class Family(NamedTuple):
    """A kind of published checkpoint.

    name           what the command line calls it
    architecture   what its config.json says it is
    matches        whether a config.json is one of this family
    fields         config.json -> fields of our classes; InputError where it asks for what there is not
    config         our model -> config.json; may presume a model of this family, the result is read again and compared
    weights        (config.json, whether its experts are fused) -> the names table, without the head
    head           (their head, their embedding): the head is left out of the table where the two are tied
    writes_tied_head   whether a tied head is written as well
    recomputed     (config.json) -> buffers of theirs that are no parameters here: {name: what makes the array}. They
                   are passed over when read, and written
    left_out       regular expressions of names that are passed over when read, and not written
    """

    name: str
    architecture: str
    matches: Callable[[Config], bool]
    fields: Callable[[Config], Fields]
    config: Callable[["Anatomy"], dict[str, Any]]
    weights: Callable[[Config, bool], list[Weight]]
    head: tuple[str, str]
    writes_tied_head: bool = False
    recomputed: Callable[[Config], Mapping[str, Callable[[], np.ndarray]]] = lambda config: {}
    left_out: tuple[str, ...] = ()


def of_architecture(name: str) -> Callable[[Config], bool]:
    """Whether a config.json names that architecture."""
    return lambda config: name in (config.get("architectures") or ())


def build(fields: Fields) -> LanguageModel:
    """The model that these fields describe."""

    def complete(cls: type) -> dict[str, Any]:
        # With its defaults, so that a config file that has been read has no say in it.
        own = {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING and f.init}
        return {**{name: own[name] for name in own.keys() - {"parent", "name"}}, **fields.get(cls.__name__, {})}

    def constructor(cls: type) -> Callable[..., nn.Module]:
        return functools.partial(cls, **complete(cls))

    own = complete(LanguageModel)
    own["pattern"] = tuple(constructor(MIXERS[name].layer) for name in own["pattern"])
    if own.get("mlp") is not None:
        own["mlp"] = constructor(own["mlp"])
    return LanguageModel(**own)


class Anatomy(NamedTuple):
    """A model in parts: itself, its mixers in the order of the layers, its feed-forward layer."""

    model: LanguageModel
    mixers: tuple[Mixer, ...]
    mlp: nn.Module | None

    @classmethod
    def of(cls, model: LanguageModel) -> "Anatomy":
        stack = stack_of(model)
        places = [Block(**fields, parent=None).make_mixer(0, parent=None) for fields in stack.blocks()]
        mixers = tuple(places[i % len(places)] for i in range(model.n_layers))
        return cls(model, mixers, None if model.mlp is None else model.mlp(d_model=model.d_model, parent=None))

    def the(self, kind: type[Mixer]) -> Mixer:
        """The mixer of that class; InputError where there is none."""
        found = next((mixer for mixer in self.mixers if type(mixer) is kind), None)
        if found is None:
            raise InputError(f"it has no {kind.__name__}")
        return found

    def kinds(self, names: Mapping[type[Mixer], str]) -> list[str]:
        """What each layer's mixer is called in `names`; InputError for one that is not in there."""
        for mixer in self.mixers:
            if type(mixer) not in names:
                raise InputError(f"it has a {type(mixer).__name__}")
        return [names[type(mixer)] for mixer in self.mixers]

    def feed_forward(self, kind: type[nn.Module]) -> nn.Module:
        """The feed-forward layer, of that class; InputError where it is of another."""
        if type(self.mlp) is not kind:
            raise InputError(f"its feed-forward layer is {type(self.mlp).__name__}, not {kind.__name__}")
        return self.mlp

    def functions(self) -> dict[str, dict[str, Any]]:
        """Everything that decides the function of the parameters, by part."""
        own = {**_function(self.model), "mixer_scales": self.mixer_scales()}
        parts = {"LanguageModel": own, type(self.mlp).__name__: {} if self.mlp is None else _function(self.mlp)}
        return parts | {f"layer {i}, {type(m).__name__}": _function(m) for i, m in enumerate(self.mixers)}

    def mixer_scales(self) -> list[tuple[float, float]]:
        """(alpha, beta) of every layer."""
        blocks = stack_of(self.model).blocks()
        return [blocks[i % len(blocks)]["mixer_scales"] for i in range(self.model.n_layers)]


def stack_of(model: LanguageModel) -> Stack:
    """The stack inside a model."""
    return Stack(**model.stack_fields(), parent=None)


def _function(module: nn.Module) -> dict[str, Any]:
    fields = {name: getattr(module, name) for name in module.__dataclass_fields__ if not name.startswith("_")}
    kept = {name: value for name, value in fields.items() if name not in NO_PART_OF_THE_FUNCTION}
    return {name: _resolved(module, name, value) for name, value in kept.items()}


def _resolved(module: nn.Module, name: str, value: Any) -> Any:
    """A field that may be None for a value that follows from others, as that value."""
    follows = {"head_dim": ("channels", "key_dim"), "num_kv_heads": ("kv_heads",), "lru_width": ("width",)}
    follows |= {"num_v_heads": ("value_heads",), "hidden_dim": ("width",)}
    if value is None:
        value = next((getattr(module, p) for p in follows.get(name, ()) if hasattr(type(module), p)), None)
    return tuple(value) if isinstance(value, list) else value


def config_of(family: Family, model: LanguageModel) -> dict[str, Any]:
    """The model's config.json as one of that family; InputError where it computes something else."""
    anatomy = Anatomy.of(model)
    config = {**family.config(anatomy)}
    own, published = anatomy.functions(), Anatomy.of(build(family.fields(config))).functions()
    for part, fields in own.items():
        for field, value in fields.items():
            other = published.get(part, {}).get(field)
            if value != other:
                raise InputError(f"its {part} has {field} = {value!r} where a {family.name} has {other!r}")
    return config
