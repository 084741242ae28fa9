"""Folders with a config.json and weights as safetensors, in one file or in several with an index."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from seqmodels.errors import InputError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# What lies beside the weights, says nothing of the model, and is carried along.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
FLOATS: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_SHARD_BYTES = 4 * 2**30


def _library() -> ModuleType:
    try:
        import safetensors.numpy
    except ModuleNotFoundError as error:
        raise InputError("reading and writing weights needs safetensors: pip install 'seqmodels[interop]'") from error
    return safetensors


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder."""
    return _read_json(folder / CONFIG, f"{folder} is no published model")


def _read_json(file: Path, problem: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{problem}: there is no file {file}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no JSON object")
    return content


class WeightFiles:
    """The tensors of a folder by name; one is read when it is asked for.

    Raises:
        InputError: there are no safetensors, a shard is missing, or a file is not what it should be.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._open: dict[str, Any] = {}
        if (folder / INDEX).is_file():
            placed = _read_json(folder / INDEX, "the index is missing").get("weight_map")
            if not isinstance(placed, dict):
                raise InputError(f"{folder / INDEX} has no weight_map")
            self._places: dict[str, str] = placed
            for shard in sorted(set(placed.values())):
                surplus = sorted(name for name in self._names(shard) if placed.get(name) != shard)
                if surplus:
                    raise InputError(f"{folder / shard} holds {surplus[0]!r}, which the index does not place there")
            for name, shard in placed.items():
                if name not in self._names(shard):
                    raise InputError(f"weight {name!r} is missing: {folder / shard} does not hold what the index says")
        elif (folder / WEIGHTS).is_file():
            self._places = dict.fromkeys(self._names(WEIGHTS), WEIGHTS)
        else:
            others = sorted(path.name for path in folder.glob("*.bin"))
            hint = f"; it has {others[0]}, which has to be saved as safetensors first" if others else ""
            raise InputError(f"{folder} has no weights: expected {WEIGHTS} or {INDEX}{hint}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """"float32" and so on; InputError for one that is not in `FLOATS`."""
        given = self._slice(name).get_dtype()
        found = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(given)
        if found is None:
            raise InputError(f"weight {name!r} in {self._folder} is {given}; expected one of {', '.join(FLOATS)}")
        return found

    def read(self, name: str) -> np.ndarray:
        return self._file(self._places[name]).get_tensor(name)

    def _names(self, file: str) -> frozenset[str]:
        return frozenset(self._file(file).keys())

    def _slice(self, name: str) -> Any:
        return self._file(self._places[name]).get_slice(name)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self._folder / name
            if not path.is_file():
                raise InputError(f"{path} is missing; the index {INDEX} names it")
            library = _library()
            try:
                self._open[name] = library.safe_open(path, framework="numpy")
            except (library.SafetensorError, OSError) as error:
                raise InputError(f"{path} is damaged or no safetensors file: {error}") from error
        return self._open[name]


def write_weights(folder: Path, arrays: Iterator[tuple[str, np.ndarray]], shard_bytes: int = _SHARD_BYTES) -> None:
    """Write tensors in one file, or in shards of at most so many bytes (a tensor larger than that has its own)."""
    save = _library().numpy.save_file
    shard_of: dict[str, int] = {}
    shards = 0
    held: dict[str, np.ndarray] = {}
    size = total = 0

    def flush() -> None:
        nonlocal held, size, shards
        # torch's readers ask for this mark.
        save(held, folder / f"shard-{shards}", metadata={"format": "pt"})
        shard_of.update(dict.fromkeys(held, shards))
        held, size, shards = {}, 0, shards + 1

    for name, array in arrays:
        if held and size + array.nbytes > shard_bytes:
            flush()
        held[name] = np.ascontiguousarray(array)
        size, total = size + array.nbytes, total + array.nbytes
    flush()
    if shards == 1:
        (folder / "shard-0").rename(folder / WEIGHTS)
        return
    final = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for i, file in enumerate(final):
        (folder / f"shard-{i}").rename(folder / file)
    index = {"metadata": {"total_size": total}, "weight_map": {name: final[i] for name, i in shard_of.items()}}
    write_json(folder / INDEX, index)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer and what else lies beside weights."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def fill(folder: Path, write: Any) -> None:
    """Make a new folder with what `write(unfinished folder)` puts in it: it is there as a whole, or not at all.

    Raises:
        InputError: there is something at that place already, or the disk refuses.
    """
    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already; name a new folder")
    try:
        unfinished.mkdir(parents=True)
        write(unfinished)
        unfinished.replace(folder)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
