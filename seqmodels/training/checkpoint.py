"""Checkpoints that are verified when they are read: a train state, the data position, the config.

A checkpoint of step N is the folder `N`, written in the background by orbax, with two items:

    state/    every array of the train state, by its name ("params/embedding/kernel")
    record/   JSON: shape, dtype and checksum of every array; what the data is, every process's position in it; config

Orbax writes into `N.orbax-checkpoint-tmp` and renames it once everything is in place, so a kill at any moment
leaves either a whole checkpoint or a temporary folder, which is removed at the next start. In a bucket nothing is
renamed: there orbax writes into `N` and puts `commit_success.txt` into it at the end. A folder without that is no
checkpoint, and removed like a temporary one.

Orbax does not notice bytes that changed in a finished checkpoint. The checksums do; the record carries one of itself.

A checksum covers the bits of a whole array and where they stand in it, as one function of the global array.
It is a sum modulo 2^32, which no order of summation changes, so it comes out the same on any mesh: what was
saved on eight devices is verified on one. It runs on the device, and only integers of four bytes travel to
the host.

What may be done with the state after `save` returns: everything. The checksums are known by then and orbax
has copied every array to the host. (On the CPU it reads the arrays in place; jax knows, and a train step that
donates them gets other memory.)
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from seqmodels.errors import InputError, nearest
from seqmodels.files import copy_folder, in_bucket, list_folder, refusal, to_path, told
from seqmodels.parallel.ending import may_be_lost_contact
from seqmodels.parallel.mesh import must_take_turns

State = TypeVar("State")
_TEMPORARY = ".orbax-checkpoint-tmp"
_DAMAGED = "damaged-"
_COMMITTED = "commit_success.txt"
# Seconds for a save that is under way where a process of several has failed.
_COMPLETED_WITHIN = 20.0


class DataIterator(Protocol):
    """What is asked of a data iterator; Grain's have it. The state must be JSON."""

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


@dataclasses.dataclass(frozen=True)
class Restored:
    """A verified checkpoint: its step, what was asked for, and what was saved beside it."""

    step: int
    state: Any
    config: str


class _DamageError(Exception):
    """A checkpoint is torn or its bytes have changed; the text says what was found."""


@functools.cache
def _keep_screen_clean() -> None:
    """Leave out what orbax prints besides raising it.

    It logs the error of a save with its traceback. Once one of its reads or writes has failed, the others,
    left unfinished, complain from wherever they end: that the event loop is closed, or that nobody waits.
    """
    warnings.filterwarnings("ignore", r"coroutine '.*' was never awaited", RuntimeWarning)
    logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())
    logging.getLogger("absl").addFilter(
        lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname
    )
    show = sys.unraisablehook

    def hook(unraisable):
        code = getattr(unraisable.object, "cr_code", None)
        unfinished = code is not None and "orbax" in code.co_filename
        if not unfinished and str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = hook


@functools.cache
def _ask_for_no_bucket() -> None:
    """Leave out that orbax asks of what kind a bucket is. That takes the right storage.buckets.get, which
    roles/storage.objectUser has not got, and it lists and removes the same objects by whatever the answer is."""
    from orbax.checkpoint._src.path import gcs_utils

    gcs_utils.is_hierarchical_namespace_enabled = lambda path: False


def print_report(line: str) -> None:
    """Say it on the standard error of the first process."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


class Checkpointer:
    """The checkpoints of one training run.

    Every process of a job makes the same calls in the same order. Errors of the disk, also those of a save
    that went on in the background, are `InputError`s, raised at the next `save`, `wait` or `close`; the
    checkpoints that were there stay as they are.

    Args:
        directory: where the checkpoints are, shared by all processes; created when missing. A local path or a
            bucket.
        every: `save` is due at the multiples of this number of steps; None for final saves only.
        keep: how many of the newest checkpoints stay; an older one goes once a newer one is complete.
        config: the text of the operative config, saved in every checkpoint.
        data: says which data is trained on; a checkpoint that was saved with another text is not gone on from.
        report: called with one line for each damaged checkpoint that `restore` passes over.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        every: int | None,
        keep: int = 3,
        config: str = "",
        data: str = "",
        report: Callable[[str], None] = print_report,
    ):
        for name, value in (("every", every), ("keep", keep)):
            if value is not None and value < 1:
                raise InputError(f"checkpoint {name} is {value}; expected at least 1")
        self.directory = _absolute(directory)
        self.every = every
        self._config = config
        self._data = data
        self._report = report
        _keep_screen_clean()
        if in_bucket(self.directory):
            _ask_for_no_bucket()
        with told(f"cannot use {directory} for checkpoints", self.directory, expected="a writable folder"):
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                for leftover in _leftovers(self.directory):
                    leftover.rmtree()
            _barrier("seqmodels_checkpoint_open")
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=False,
                # Made in the background, folders that cannot be made leave threads that wait for them for minutes.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options)
            self._newest = max(list_steps(self.directory), default=None)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None and jax.process_count() > 1:
            # A save under way is completed if the others, who do not know of the error yet, are there for it.
            if not may_be_lost_contact(error):
                closing = threading.Thread(target=self._close_silently, daemon=True)
                closing.start()
                closing.join(_COMPLETED_WITHIN)
            return
        try:
            self.close()
        except InputError as lost:
            if error is None:
                raise
            error.add_note(f"The last checkpoint failed as well: {lost}")

    def save(
        self,
        step: int,
        state: Any,
        data_iterator: DataIterator | None = None,
        *,
        final: bool = False,
    ) -> bool:
        """Start to save in the background if `step` is due or `final`; return whether it did.

        Call it after every step: when nothing is due it only looks whether an earlier save failed. A step
        that is already saved is not saved again. `state` is any pytree of jax arrays (typed keys too);
        `data_iterator` gives the position from which the batch after this step comes.
        """
        if not self._manager.is_saving_in_progress():
            self.wait()
        due = final or (self.every is not None and step % self.every == 0)
        if not due or step == self._newest:
            return False
        arrays = _named_leaves(state)
        position = None if data_iterator is None else data_iterator.get_state()
        record = {
            "step": step,
            "arrays": _describe(arrays, _checksums(arrays)),
            "positions": [json.loads(text) for text in _gather(json.dumps(position))],
            "config": self._config,
            "data": self._data,
        }
        record = json.loads(json.dumps(record))
        self._guarded(
            self._manager.save,
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave({name: raw for name, raw in _raw(arrays).items() if raw.size}),
                record=ocp.args.JsonSave({"crc32": _crc32(record), "record": record}),
            ),
            force=True,
        )
        self._newest = step
        return True

    def wait(self) -> None:
        """Return when nothing is being saved any more; raise if the last save failed."""
        self._guarded(self._manager.wait_until_finished)

    def close(self) -> None:
        """Wait, and end orbax's threads, which otherwise complain of a closed event loop when Python ends."""
        try:
            self.wait()
        finally:
            self._guarded(self._manager.close)

    def _close_silently(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def restore(self, abstract_state: State, data_iterator: DataIterator | None = None) -> Restored | None:
        """The newest checkpoint that is whole, or None when there is no checkpoint at all.

        Every checksum is verified. A damaged checkpoint is reported and the one before it is used; the
        damaged one is then renamed to `damaged-STEP` and never deleted. `data_iterator` is moved to where it
        was.

        Args:
            abstract_state: `jax.ShapeDtypeStruct`s (or arrays) in the tree that was saved. Their shardings
                say where the arrays go, on any mesh; without a sharding, the default device.

        Raises:
            InputError: all checkpoints are damaged, or the checkpoint is sound but is one of another state,
                another number of processes, other data, or another data pipeline. Nothing has been changed then.
        """
        passed_over = []
        for step in reversed(list_steps(self.directory)):
            folder = self.directory / str(step)
            try:
                record = _read_record(folder, step)
                arrays = _read_arrays(folder, record, _named_leaves(abstract_state))
            except _DamageError as damage:
                self._report(f"checkpoint {folder} is damaged, trying the one before it: {damage}")
                passed_over.append(step)
                continue
            if data_iterator is not None:
                self._check_data(record, folder)
                _move(data_iterator, record, folder)
            self._set_aside(passed_over)
            self._newest = step
            leaves = [arrays[name] for name in _named_leaves(abstract_state)]
            state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
            return Restored(step, state, record["config"])
        damaged = [str(step) for step in passed_over]
        with told(f"cannot read {self.directory}", self.directory):
            damaged += [path.name for path in list_folder(self.directory) if path.name.startswith(_DAMAGED)]
        if damaged:
            raise InputError(
                f"every checkpoint in {self.directory} is damaged ({', '.join(damaged)}); "
                "nothing was changed: put a sound copy back, or start over in another folder"
            )
        return None

    def _check_data(self, record: Mapping, folder: epath.Path) -> None:
        if record["data"] != self._data:
            raise InputError(
                f"checkpoint {folder} was trained on other data ({record['data']}) than there is now ({self._data}): "
                "put the old data back, or start in another run directory"
            )

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Rename damaged checkpoints, so that training saves these steps again."""
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                names = (f"{_DAMAGED}{step}{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
                free = next(name for name in names if not (self.directory / name).exists())
                self._guarded(_rename, self.directory / str(step), self.directory / free)
        _barrier("seqmodels_checkpoint_set_aside")
        self._manager.reload()

    def _guarded(self, call: Callable[..., Any], *args: Any, **options: Any) -> None:
        """Run a call of orbax; what the disk refuses becomes an InputError in one line."""
        try:
            call(*args, **options)
        except Exception as error:
            refused = refusal(error, self.directory)
            if refused is None:
                raise
            what = f"cannot write a checkpoint into {self.directory}: {refused}"
            try:
                intact = list_steps(self.directory)
            except InputError:
                raise type(refused)(what) from error
            self._newest = max(intact, default=None)
            rest = f"that of step {intact[-1]} is intact" if intact else "there is none from before"
            raise type(refused)(f"{what}; {rest}") from error


def list_steps(directory: str | os.PathLike) -> list[int]:
    """The steps that have a checkpoint in `directory`, oldest first; empty when there is no such folder."""
    with told(f"cannot read {os.fspath(directory)}", directory):
        steps = [path for path in list_folder(to_path(directory)) if path.name.isdecimal()]
        return sorted(int(path.name) for path in steps if _is_committed(path))


def _is_committed(step: epath.Path) -> bool:
    return not in_bucket(step) or (step / _COMMITTED).exists()


def _leftovers(directory: epath.Path) -> list[epath.Path]:
    """What a killed process was saving."""
    return [
        path
        for path in list_folder(directory)
        if _TEMPORARY in path.name or (path.name.isdecimal() and not _is_committed(path))
    ]


def _rename(checkpoint: epath.Path, target: epath.Path) -> None:
    if not in_bucket(checkpoint):
        checkpoint.rename(target)
        return
    # In this order, so that a kill leaves the checkpoint, or its copy and a leftover.
    copy_folder(checkpoint, target)
    (checkpoint / _COMMITTED).unlink()
    checkpoint.rmtree()


def restore_parameters(
    directory: str | os.PathLike,
    abstract_parameters: Any = None,
    *,
    step: int | None = None,
    field: str = "params",
    report: Callable[[str], None] = print_report,
) -> Restored:
    """One field of the saved state, by default its parameters, verified, without the rest; writes nothing.

    Args:
        abstract_parameters: the tree of shapes, dtypes and shardings to restore into. None gives nested
            dictionaries of what was saved, on the default device.
        step: which checkpoint; None for the newest one that is whole.

    Raises:
        InputError: there is no such checkpoint or no such field, the asked step or every step is damaged, or
            the shapes differ.
    """
    directory = _absolute(directory)
    steps = list_steps(directory)
    if not steps:
        raise InputError(f"no checkpoint in {directory}; expected a folder in which training has saved")
    if step is not None and step not in steps:
        raise InputError(f"no checkpoint of step {step} in {directory}; there are {_listed(steps)}")
    for candidate in [step] if step is not None else reversed(steps):
        folder = directory / str(candidate)
        try:
            record = _read_record(folder, candidate)
            wanted = _wanted(folder, record, abstract_parameters, field)
            arrays = _read_arrays(folder, record, wanted, within=f"{field}/")
        except _DamageError as damage:
            report(f"checkpoint {folder} is damaged: {damage}")
            continue
        leaves = [arrays[name] for name in wanted]
        if abstract_parameters is None:
            tree: dict = {}
            for name, leaf in zip(wanted, leaves, strict=True):
                *parents, last = name.split("/")[1:]
                node = tree
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[last] = leaf
        else:
            tree = jax.tree.unflatten(jax.tree.structure(abstract_parameters), leaves)
        return Restored(candidate, tree, record["config"])
    damaged = "every checkpoint" if step is None else f"the checkpoint of step {step}"
    raise InputError(f"{damaged} in {directory} is damaged; there are those of steps {_listed(steps)}")


def _absolute(directory: str | os.PathLike) -> epath.Path:
    """Orbax takes no relative paths. An address in a bucket stays as it is."""
    path = os.fspath(directory)
    return to_path(path if "://" in path else os.path.abspath(path))


def _listed(steps: Iterable[int]) -> str:
    return ", ".join(map(str, steps))


def _wanted(folder: epath.Path, record: Mapping, abstract: Any, field: str) -> dict[str, Any]:
    """Name -> shape and dtype of the arrays of one field of the state."""
    if abstract is not None:
        return {f"{field}/{name}": leaf for name, leaf in _named_leaves(abstract).items()}
    names = [name for name in record["arrays"] if name.startswith(f"{field}/")]
    if not names:
        fields = {name.split("/")[0] for name in record["arrays"]}
        raise InputError(f"checkpoint {folder} has no field {field!r}; {nearest(field, fields)}")
    for name in names:
        if "key" in record["arrays"][name]:
            raise InputError(
                f"{name!r} in checkpoint {folder} is a random key; name the tree that it belongs to"
            )
    return {
        name: jax.ShapeDtypeStruct(tuple(record["arrays"][name]["shape"]), record["arrays"][name]["dtype"])
        for name in names
    }


def _read_record(folder: epath.Path, step: int) -> dict[str, Any]:
    saved, problem = _read_item(ocp.JsonCheckpointHandler(), folder / "record", ocp.args.JsonRestore())
    if not problem:
        try:
            if _crc32(saved["record"]) != saved["crc32"]:
                problem = "the bytes of its record have changed"
            elif saved["record"]["step"] != step:
                problem = f"its record is one of step {saved['record']['step']}"
        except (KeyError, TypeError):
            problem = "its record is none"
    _raise_damage(problem)
    return saved["record"]


def _read_arrays(
    folder: epath.Path, record: Mapping, wanted: Mapping[str, Any], within: str = ""
) -> dict[str, jax.Array]:
    """The arrays named in `wanted`, which must be all those that the record has below `within`, verified."""
    saved = {name: entry for name, entry in record["arrays"].items() if name.startswith(within)}
    _compare(folder, saved, wanted)
    targets = {name: _target(leaf) for name, leaf in wanted.items()}
    stored = {name: target for name, target in targets.items() if target.size}
    raw, problem = _read_item(
        ocp.PyTreeCheckpointHandler(),
        folder / "state",
        ocp.args.PyTreeRestore(
            stored, restore_args=ocp.checkpoint_utils.construct_restore_args(stored), partial_restore=True
        ),
    )
    _raise_damage(problem)
    # Orbax stores no empty arrays: there is nothing in them to restore but their shape.
    raw |= {name: jnp.zeros(t.shape, t.dtype, device=t.sharding) for name, t in targets.items() if not t.size}
    arrays = {name: raw[name] for name in wanted}
    for name in wanted:
        if "key" in saved[name]:
            arrays[name] = jax.random.wrap_key_data(raw[name], impl=saved[name]["key"])
    checksums = _checksums(arrays)
    changed = [name for name in wanted if checksums[name] != saved[name]["checksum"]]
    if changed:
        others = f" and of {len(changed) - 1} more" if len(changed) > 1 else ""
        raise _DamageError(f"the bytes of array {changed[0]!r}{others} have changed")
    return arrays


def _read_item(handler: ocp.CheckpointHandler, folder: epath.Path, args: Any) -> tuple[Any, str]:
    """What orbax reads and "", or None and why it could not."""
    _keep_screen_clean()
    try:
        with ocp.Checkpointer(handler) as reader:
            return reader.restore(folder, args=args), ""
    except Exception as error:
        return None, f"{folder.name} cannot be read ({_cause(error, folder)})"


def _compare(folder: epath.Path, saved: Mapping[str, Mapping], wanted: Mapping[str, Any]) -> None:
    """A checkpoint of another model is not damaged: it is the wrong one, and the person has to know."""
    surplus = saved.keys() - wanted.keys()
    for name, leaf in wanted.items():
        if name not in saved:
            hint = nearest(name, surplus) if surplus else f"it has {len(saved)} others"
            raise InputError(f"checkpoint {folder} has no array {name!r}, which this model expects; {hint}")
        found = saved[name]["dtype"], tuple(saved[name]["shape"])
        expected = str(leaf.dtype), tuple(leaf.shape)
        if found != expected:
            raise InputError(
                f"array {name!r} in checkpoint {folder} is {found[0]} {found[1]}; "
                f"this model expects {expected[0]} {expected[1]}"
            )
    if surplus:
        raise InputError(f"checkpoint {folder} has an array {min(surplus)!r} that this model does not have")


def _move(data_iterator: DataIterator, record: Mapping, folder: epath.Path) -> None:
    positions = record["positions"]
    if len(positions) == jax.process_count():
        position = positions[jax.process_index()]
    elif all(position == positions[0] for position in positions):
        position = positions[0]
    else:
        raise InputError(
            f"checkpoint {folder} has different data positions of {len(positions)} processes; this job has "
            f"{jax.process_count()}: start it with as many as before"
        )
    if position is None:
        raise InputError(f"checkpoint {folder} was saved without a data position")
    try:
        data_iterator.set_state(position)
    except Exception as error:
        raise InputError(
            f"the data position in checkpoint {folder} does not fit this data pipeline: {error!r}"
        ) from error


def _named_leaves(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError(
            "two arrays of the state have the same name once the keys of their paths are joined by '/'"
        )
    return named


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Arrays of numbers: a typed random key becomes the integers behind it."""
    return {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in arrays.items()}


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    """What orbax has to restore for this leaf, and where to."""
    raw = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=sharding)


def _describe(arrays: Mapping[str, jax.Array], checksums: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    entries = {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "checksum": checksums[name]}
        for name, leaf in arrays.items()
    }
    for name, leaf in arrays.items():
        if _is_key(leaf):
            entries[name]["key"] = str(jax.random.key_impl(leaf))
    return entries


def _checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    for name, leaf in arrays.items():
        if not isinstance(leaf, jax.Array):
            raise TypeError(f"{name!r} of the state is a {type(leaf).__name__}; expected a jax array")
        if jax.process_count() > 1 and leaf.is_fully_addressable:
            raise TypeError(
                f"{name!r} of the state is an array of this process alone; expected a global one: "
                "make it under jit, or put it on the mesh with a replicated NamedSharding"
            )
    sums = {}
    for name, raw in _raw(arrays).items():
        sums[name] = _checksum(raw)
        if must_take_turns(raw.sharding.device_set):
            sums[name].block_until_ready()
    return {name: int(value) for name, value in sums.items()}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """The sum over i of mix(word_i ^ mix(i)) modulo 2^32.

    `mix` is a bijection, so one changed word always changes the sum; several changed words, or words that
    changed places, go unseen with a probability of 2^-32.
    """
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}").astype(jnp.uint32)
    position, stride = jnp.uint32(1), 1
    for axis in reversed(range(words.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(_mix(words ^ _mix(position)), dtype=jnp.uint32)


def _mix(word: jax.Array) -> jax.Array:
    """The last step of MurmurHash3 (Austin Appleby, public domain): each bit in changes half of those out."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


def _crc32(record: Any) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _gather(text: str) -> list[str]:
    """The text of every process, in every process, by process index."""
    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(own.size))
    rows = multihost_utils.process_allgather(np.pad(own, (0, int(lengths.max()) - own.size)))
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def _raise_damage(problem: str) -> None:
    """Raise in every process if any process found a problem, so that all pass over the same checkpoints."""
    for found in _gather(problem):
        if found:
            raise _DamageError(found)


def _cause(error: Exception, folder: epath.Path) -> str:
    """An error of a read in one short line; raise instead where the checkpoint is not what is at fault."""
    refused = refusal(error, folder)
    if refused is not None:
        raise type(refused)(f"cannot read the checkpoint: {refused}") from error
    if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
        raise error
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 200 else f"{line[:200]}..."
