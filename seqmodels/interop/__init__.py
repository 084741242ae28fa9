"""Published checkpoints in and out: a folder with config.json and safetensors, as a model and its parameters.

    loaded = load("folder")                  # InputError names the first weight that is missing, surplus or misshapen
    logits, state = loaded.model.apply({"params": loaded.params}, tokens)
    save("other", loaded.model, loaded.params)

A file for each family holds its names table and what its config.json means; `_tensors.py` does the same for all.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from seqmodels.errors import InputError, nearest
from seqmodels.interop._config import Config
from seqmodels.interop._family import Family, Fields, build, config_of
from seqmodels.interop._files import (
    COMPANIONS,
    CONFIG,
    FLOATS,
    WeightFiles,
    copy_companions,
    fill,
    read_config,
    write_json,
    write_weights,
)
from seqmodels.interop._tensors import read_parameters, write_parameters
from seqmodels.interop.llama import LLAMA
from seqmodels.interop.mamba2 import MAMBA2, MAMBA2_ORIGINAL
from seqmodels.interop.minimax import MINIMAX
from seqmodels.interop.qwen3_next import QWEN3_NEXT
from seqmodels.interop.recurrent_gemma import RECURRENT_GEMMA
from seqmodels.models import LanguageModel

FAMILIES: dict[str, Family] = {
    family.name: family for family in (MAMBA2, MAMBA2_ORIGINAL, LLAMA, RECURRENT_GEMMA, MINIMAX, QWEN3_NEXT)
}


class Loaded(NamedTuple):
    """A published model.

    family   one of `FAMILIES`
    config   its config.json
    fields   of our classes, as `seqmodels.interop.build` takes them
    model, params   what these make, and its parameters, NumPy arrays
    dtypes   of its weights, by their names there
    """

    family: Family
    config: Config
    fields: Fields
    model: LanguageModel
    params: dict[str, Any]
    dtypes: dict[str, str]


def family_of(config: Config) -> Family:
    """The family that a config.json is of; an unknown one is an error that names the closest."""
    found = next((family for family in FAMILIES.values() if family.matches(config)), None)
    if found is not None:
        return found
    known = [family.architecture for family in FAMILIES.values()]
    given = (config.get("architectures") or [config.get("model_type")])[0]
    if given is None:
        raise InputError(f"{CONFIG} names no architecture; expected one of {', '.join(known)}")
    raise InputError(f"{CONFIG} is of architecture {given!r}, which has no reader here; {nearest(given, known)}")


def load(folder: str | Path) -> Loaded:
    """The model in a folder, every weight accounted for.

    Raises:
        InputError: no config.json or no safetensors; an unknown architecture; a value of the config that no layer here
            computes; a weight that is missing, surplus, misshapen, or of a dtype other than float32, bfloat16, float16.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; expected one with {CONFIG} and safetensors")
    config = read_config(folder)
    family = family_of(config)
    fields = family.fields(config)
    model = build(fields)
    files = WeightFiles(folder)
    params = read_parameters(family, model, config, files)
    return Loaded(family, config, fields, model, params, {name: files.dtype(name) for name in files})


def save(
    folder: str | Path,
    model: LanguageModel,
    params: Any,
    *,
    family: str | None = None,
    dtype: str = "float32",
    dtypes: Mapping[str, str] | None = None,
    extra: Config | None = None,
    companions: str | Path | None = None,
    shard_bytes: int = 4 * 2**30,
) -> Family:
    """Write a new folder with config.json and safetensors, and return the family that it is of.

    family   one of `FAMILIES`; None for the first that computes what the model computes
    dtype    of the weights, but for those that `dtypes` names
    extra    entries of config.json that say nothing of the function, such as the ids of special tokens
    companions   a folder whose tokenizer files are copied

    Raises:
        InputError: the model's function is not one of that family, or of any; the folder exists.
    """
    folder = Path(folder)
    if dtype not in FLOATS:
        raise InputError(f"dtype {dtype!r} cannot be written; {nearest(dtype, FLOATS)}")
    chosen, config = _published(model, family)
    if "model_type" in config:
        named = {"architectures": [chosen.architecture], "dtype": dtype}
        config = {**named, **(extra or {}), **config}
    else:
        config = {**(extra or {}), **config}

    def write(unfinished: Path) -> None:
        tensors = write_parameters(chosen, model, config, params, dtypes or {}, dtype)
        write_weights(unfinished, tensors, shard_bytes)
        write_json(unfinished / CONFIG, config)
        if companions is not None:
            copy_companions(Path(companions), unfinished)

    fill(folder, write)
    return chosen


def _published(model: LanguageModel, name: str | None) -> tuple[Family, dict[str, Any]]:
    if name is not None and name not in FAMILIES:
        raise InputError(f"architecture {name!r} is not known; {nearest(name, FAMILIES)}")
    reasons = []
    for family in FAMILIES.values() if name is None else [FAMILIES[name]]:
        try:
            return family, config_of(family, model)
        except InputError as error:
            reasons.append(f"{family.name}: {error}")
    raise InputError(f"this model is none of a published architecture ({'; '.join(reasons)})")


__all__ = ["COMPANIONS", "CONFIG", "FAMILIES", "FLOATS", "Loaded", "build", "family_of", "load", "read_config", "save"]
