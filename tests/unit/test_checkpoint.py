"""Checkpoints: bit for bit, verified, safe against kills, flipped bytes, full disks, and other meshes."""

import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.errors import InputError
from seqmodels.training.checkpoint import Checkpointer, _checksum, list_steps, restore_parameters
from tests.permissions import unprivileged


class TrainState(NamedTuple):
    step: Any
    params: Any
    moments: Any
    keys: Any


def make_state(step):
    """A small state with every kind of array that a train state may hold."""
    keys = jax.random.split(jax.random.key(step), 8)
    return TrainState(
        step=jnp.int32(step),
        params={
            "embedding": {"kernel": jax.random.normal(keys[0], (32, 24))},
            "mixer.0": {"decay": jax.random.normal(keys[1], (4, 7), jnp.bfloat16)},
            "poles": jax.lax.complex(jax.random.normal(keys[2], (5,)), jax.random.normal(keys[3], (5,))),
        },
        moments=[
            jnp.array([0.0, -0.0, jnp.nan, jnp.inf, 1e-45]),
            jnp.zeros((0, 3)),
            jax.random.bits(keys[4], (9,), jnp.uint8),
            jax.random.bernoulli(keys[5], shape=(11,)),
            None,
        ],
        keys={"dropout": keys[6], "shards": jax.random.split(jax.random.key(step, impl="rbg"), 3)},
    )


def bits(tree):
    """Everything that can differ between two trees of arrays, NaNs and negative zeros included."""
    leaves, structure = jax.tree.flatten(tree)
    raw = [
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in leaves
    ]
    return structure, [(str(l.dtype), l.shape, np.asarray(r).tobytes()) for l, r in zip(leaves, raw)]


def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


ABSTRACT = abstract(make_state(0))


def batches():
    dataset = grain.MapDataset.range(100).seed(3).shuffle().repeat().batch(4)
    return iter(dataset.to_iter_dataset())


def open_quietly(folder, **options):
    """A checkpointer whose reports are put into a list."""
    reports = []
    return Checkpointer(folder, every=options.pop("every", 10), report=reports.append, **options), reports


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints of steps 10 and 20; copy it before changing it."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpointer(folder, every=10) as checkpointer:
        for step in (10, 20):
            assert checkpointer.save(step, make_state(step))
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def files_below(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path):
    data = bytearray(path.read_bytes())
    for index in range(0, len(data), max(1, len(data) // 7)):
        data[index] ^= 0x10
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete(path):
    path.unlink()


def array_files(folder, step):
    return [path for path in (folder / str(step)).rglob("*") if "ocdbt.process_0/d/" in str(path)]


def damage(folder, *steps):
    for step in steps:
        for path in array_files(folder, step):
            flip(path)


def run(program, *arguments, environment=None, prefix=(), **options):
    """Run a program text in a fresh interpreter."""
    return subprocess.run(
        [*prefix, sys.executable, "-c", PRELUDE + textwrap.dedent(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **(environment or {})},
        **options,
    )


PRELUDE = """
import os, sys, time
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from seqmodels.errors import InputError, run_main
from seqmodels.training.checkpoint import Checkpointer, list_steps, restore_parameters

def random_state(step, megabytes):
    rng = np.random.default_rng(step)
    return {"params": {f"w{i}": jnp.asarray(rng.random((1 << 18,), np.float32)) for i in range(megabytes)}}
"""


def test_what_is_restored_equals_what_was_saved_bit_for_bit(tmp_path):
    iterator = batches()
    for _ in range(7):
        next(iterator)
    with Checkpointer(tmp_path, every=5, config="model.width = 64\n") as checkpointer:
        assert checkpointer.restore(ABSTRACT) is None
        assert checkpointer.save(5, make_state(5), iterator)
    expected = next(iterator)

    resumed = batches()
    with Checkpointer(tmp_path, every=5) as checkpointer:
        restored = checkpointer.restore(ABSTRACT, resumed)
    assert restored.step == 5
    assert bits(restored.state) == bits(make_state(5))
    assert bits(restored.state) != bits(make_state(6))
    assert restored.config == "model.width = 64\n"
    np.testing.assert_array_equal(next(resumed), expected)
    draw = jax.random.normal(restored.state.keys["dropout"], (3,))
    np.testing.assert_array_equal(draw, jax.random.normal(make_state(5).keys["dropout"], (3,)))


def test_other_data_is_refused(tmp_path):
    with Checkpointer(tmp_path, every=1, data="10 tokens") as checkpointer:
        checkpointer.save(1, make_state(1), batches())
    with (
        Checkpointer(tmp_path, every=1, data="11 tokens") as checkpointer,
        pytest.raises(InputError, match=r"trained on other data \(10 tokens\) than there is now \(11 tokens\)"),
    ):
        checkpointer.restore(ABSTRACT, batches())
    assert restore_parameters(tmp_path).step == 1


def test_which_steps_are_saved_and_which_stay(tmp_path):
    with Checkpointer(tmp_path, every=3, keep=2) as checkpointer:
        started = [step for step in range(1, 11) if checkpointer.save(step, make_state(step))]
        assert started == [3, 6, 9]
        assert checkpointer.save(10, make_state(10), final=True)
        assert not checkpointer.save(10, make_state(10), final=True)
        checkpointer.wait()
        assert list_steps(tmp_path) == [9, 10]
    with Checkpointer(tmp_path, every=None, keep=2) as checkpointer:
        assert checkpointer.restore(ABSTRACT).step == 10
        assert not checkpointer.save(10, make_state(10), final=True)
        assert not checkpointer.save(12, make_state(12))
        assert checkpointer.save(13, make_state(13), final=True)
    assert list_steps(tmp_path) == [10, 13]


@pytest.mark.parametrize("option", ["every", "keep"])
def test_a_count_below_one_is_refused(tmp_path, option):
    with pytest.raises(InputError, match=f"checkpoint {option} is 0; expected at least 1"):
        Checkpointer(tmp_path, **{"every": 5, option: 0})


def test_a_train_step_may_donate_the_state_while_it_is_written(tmp_path):
    step = jax.jit(lambda x: jax.tree.map(lambda leaf: -leaf - 1, x), donate_argnums=0)
    make = jax.jit(lambda: {f"w{i}": jnp.arange(1 << 20, dtype=jnp.float32) + i for i in range(12)})
    expected, state = bits(make()), make()
    unsaved = make()
    step(unsaved)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(unsaved)), "the step does not donate"
    with Checkpointer(tmp_path, every=1) as checkpointer:
        checkpointer.save(1, state)
        later = step(state)
        for _ in range(3):
            later = step(later)
        jax.block_until_ready(later)
        checkpointer.wait()
        assert bits(checkpointer.restore(abstract(later)).state) == expected


def test_a_kill_during_a_save_leaves_the_checkpoint_before_it(tmp_path):
    program = """
        folder = sys.argv[1]
        checkpointer = Checkpointer(folder, every=1)
        checkpointer.save(1, random_state(1, 2))
        checkpointer.wait()
        state = random_state(2, 40)
        print("saving", flush=True)
        checkpointer.save(2, state)
        checkpointer.wait()
        time.sleep(60)
    """
    torn = 0
    for trial, delay in enumerate((0.0, 0.05)):
        folder = tmp_path / str(trial)
        command = [sys.executable, "-c", PRELUDE + textwrap.dedent(program), str(folder)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as job:
            assert job.stdout.readline() == b"saving\n"
            while not any(path.name.startswith("2") for path in folder.iterdir()):
                assert job.poll() is None
            time.sleep(delay)
            job.kill()
        leftovers = [path for path in folder.iterdir() if "orbax-checkpoint-tmp" in path.name]
        torn += bool(leftovers)
        steps = list_steps(folder)
        checkpointer, reports = open_quietly(folder)
        with checkpointer:
            assert not any("tmp" in path.name for path in folder.iterdir())
            newest = steps[-1]
            count = {1: 2, 2: 40}[newest]
            rng = np.random.default_rng(newest)
            expected = {"params": {f"w{i}": rng.random((1 << 18,), np.float32) for i in range(count)}}
            restored = checkpointer.restore(abstract(expected))
        assert (restored.step, reports) == (newest, [])
        assert bits(restored.state) == bits(expected)
        shutil.rmtree(folder)
    assert torn, "no kill hit a save: make the state larger"


@pytest.mark.parametrize("harm", [flip, truncate, delete])
def test_harm_to_any_file_is_caught_or_harmless(saved, tmp_path, harm):
    """Restored is step 20 bit for bit, or step 10 with a report; never anything else."""
    caught = set()
    for number, path in enumerate(files_below(saved / "20")):
        folder = shutil.copytree(saved, tmp_path / str(number))
        harm(folder / path.relative_to(saved))
        checkpointer, reports = open_quietly(folder)
        with checkpointer:
            restored = checkpointer.restore(ABSTRACT)
        assert bits(restored.state) == bits(make_state(restored.step))
        if restored.step == 10:
            assert len(reports) == 1 and f"{folder}/20 is damaged" in reports[0] and "\n" not in reports[0]
            assert sorted(path.name for path in folder.iterdir()) == ["10", "damaged-20"]
            caught.add(str(path.relative_to(saved / "20")))
        else:
            assert reports == []
    assert "record/metadata" in caught
    assert "state/manifest.ocdbt" in caught
    assert any(name.startswith("state/ocdbt.process_0/d/") for name in caught)


def test_changed_bytes_of_an_array_are_named_where_orbax_sees_nothing(tmp_path):
    """Uncompressible numbers in a large array: the storage underneath restores the flipped bits silently."""
    kernel = jax.random.normal(jax.random.key(0), (512, 512))
    state = {"params": {"kernel": kernel, "bias": jnp.zeros(3)}}
    with Checkpointer(tmp_path, every=1) as checkpointer:
        checkpointer.save(1, state)
    path = max(array_files(tmp_path, 1), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="every checkpoint in"):
        restore_parameters(tmp_path, report=(reports := []).append)
    assert len(reports) == 1 and "'params/kernel'" in reports[0] and "bytes" in reports[0]


def test_a_damaged_step_is_kept_aside_and_can_be_saved_again(copy):
    for other in ("damaged-20", "damaged-20-2"):
        damage(copy, 20)
        checkpointer, reports = open_quietly(copy)
        with checkpointer:
            assert checkpointer.restore(ABSTRACT).step == 10
            assert (copy / other).is_dir() and len(reports) == 1
            assert checkpointer.save(20, make_state(20))
        checkpointer, reports = open_quietly(copy)
        with checkpointer:
            assert checkpointer.restore(ABSTRACT).step == 20
        assert reports == []


def test_when_all_are_damaged_nothing_starts_from_scratch(copy):
    damage(copy, 10, 20)
    before = {path: path.read_bytes() for path in files_below(copy)}
    for _ in range(2):
        checkpointer, reports = open_quietly(copy)
        with checkpointer, pytest.raises(InputError, match=r"every checkpoint in .* is damaged \(20, 10\)"):
            checkpointer.restore(ABSTRACT)
        assert len(reports) == 2
        assert {path: path.read_bytes() for path in files_below(copy)} == before
    shutil.rmtree(copy / "10")
    (copy / "20").rename(copy / "damaged-20")
    checkpointer, _ = open_quietly(copy)
    with checkpointer, pytest.raises(InputError, match=r"is damaged \(damaged-20\)"):
        checkpointer.restore(ABSTRACT)


def another(**params):
    return ABSTRACT._replace(params={**ABSTRACT.params, **params})


def without(tree, name):
    return {key: value for key, value in tree.items() if key != name}


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (
            another(embedding={"kernel": jax.ShapeDtypeStruct((32, 25), jnp.float32)}),
            r"array 'params/embedding/kernel' in .*/20 is float32 \(32, 24\); "
            r"this model expects float32 \(32, 25\)",
        ),
        (
            another(embedding={"kernel": jax.ShapeDtypeStruct((32, 24), jnp.bfloat16)}),
            r"is float32 \(32, 24\); this model expects bfloat16 \(32, 24\)",
        ),
        (
            ABSTRACT._replace(params=without(ABSTRACT.params, "poles") | {"polse": ABSTRACT.params["poles"]}),
            r"has no array 'params/polse', which this model expects; did you mean 'params/poles'\?",
        ),
        (
            another(extra=jax.ShapeDtypeStruct((2,), jnp.float32)),
            r"has no array 'params/extra', which this model expects",
        ),
        (
            ABSTRACT._replace(params=without(ABSTRACT.params, "poles")),
            r"has an array 'params/poles' that this model does not have",
        ),
        (
            ABSTRACT._replace(
                keys={**ABSTRACT.keys, "dropout": jax.ShapeDtypeStruct((), ABSTRACT.keys["shards"].dtype)}
            ),
            r"'keys/dropout' in .* is key<fry> \(\); this model expects key<rbg> \(\)",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_not_damage(copy, expected, message):
    checkpointer, reports = open_quietly(copy)
    with checkpointer, pytest.raises(InputError, match=message) as refusal:
        checkpointer.restore(expected)
    assert "\n" not in str(refusal.value)
    assert reports == [] and list_steps(copy) == [10, 20]


def test_a_data_position_that_is_missing_or_does_not_fit_is_told(copy):
    class Broken:
        def set_state(self, state):
            raise KeyError("next_index")

        def get_state(self):
            return {"other": 1}

    checkpointer, _ = open_quietly(copy)
    with checkpointer:
        with pytest.raises(InputError, match="without a data position"):
            checkpointer.restore(ABSTRACT, batches())
        checkpointer.save(30, make_state(30), Broken())
        checkpointer.wait()
        with pytest.raises(InputError, match="does not fit this data pipeline: KeyError"):
            checkpointer.restore(ABSTRACT, Broken())


def test_parameters_alone_for_other_programs(copy):
    restored = restore_parameters(copy)
    assert restored.step == 20
    assert bits(restored.state) == bits(make_state(20).params)
    restored = restore_parameters(copy, ABSTRACT.params, step=10)
    assert restored.step == 10
    assert bits(restored.state) == bits(make_state(10).params)
    with pytest.raises(InputError, match="has no field 'parms'; did you mean 'params'"):
        restore_parameters(copy, field="parms")
    with pytest.raises(InputError, match=r"no checkpoint of step 15 in .*; there are 10, 20"):
        restore_parameters(copy, step=15)
    with pytest.raises(InputError, match=r"no checkpoint in .*nowhere"):
        restore_parameters(copy / "nowhere")
    wrong = another(embedding={"kernel": jax.ShapeDtypeStruct((32, 25), jnp.float32)}).params
    with pytest.raises(InputError, match=r"expects float32 \(32, 25\)"):
        restore_parameters(copy, wrong)

    damage(copy, 20)
    reports = []
    assert restore_parameters(copy, report=reports.append).step == 10
    assert len(reports) == 1 and list_steps(copy) == [10, 20]
    with pytest.raises(InputError, match=r"the checkpoint of step 20 in .* is damaged"):
        restore_parameters(copy, step=20, report=reports.append)


def test_a_folder_that_may_only_be_read_can_be_read_but_not_trained_in(copy):
    ours = itertools.takewhile(lambda folder: folder != Path(tempfile.gettempdir()), copy.parents)
    for folder in (copy, *ours):
        folder.chmod(0o755)
    with unprivileged():
        assert bits(restore_parameters(copy).state) == bits(make_state(20).params)
        with pytest.raises(InputError, match=r"cannot use .*new for checkpoints: Permission denied"):
            Checkpointer(copy / "new", every=1)
        checkpointer = Checkpointer(copy, every=1)
        with pytest.raises(InputError, match="Permission denied; that of step 20 is intact"), checkpointer:
            checkpointer.save(30, make_state(30))
    (copy / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot use .*file for checkpoints: File exists"):
        Checkpointer(copy / "file", every=1)


def test_a_program_that_meets_a_damaged_checkpoint_says_so_in_one_line(copy):
    program = "print(restore_parameters(sys.argv[1]).step)"
    damage(copy, 20)
    for harm, said in ((lambda path: None, "state cannot be read"), (delete, "record cannot be read")):
        harm(copy / "20" / "record" / "metadata")
        done = run(program, copy)
        assert done.stdout == "10\n"
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"checkpoint {copy}/20 is damaged: {said}")


FULL_DISK = """
    def main(argv):
        folder, fill, then = argv
        checkpointer = Checkpointer(folder, every=2)
        checkpointer.save(2, random_state(2, 1))
        checkpointer.wait()
        if fill == "limit":
            import resource
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        elif fill == "readonly":
            assert os.system(f"mount -o remount,ro {folder}") == 0
        try:
            checkpointer.save(4, random_state(4, 8))
            if then == "save":
                for _ in range(1000):
                    checkpointer.save(5, None)
                    time.sleep(0.01)
            elif then == "wait":
                checkpointer.wait()
            elif then == "close":
                checkpointer.close()
        except InputError as error:
            checkpointer.close()
            kept = restore_parameters(folder)
            same = all(np.array_equal(kept.state[n], w) for n, w in random_state(2, 1)["params"].items())
            print(list_steps(folder), kept.step, same)
            raise
    run_main(main)
"""
TINY_DISK = 'mkdir -p "$0" && mount -t tmpfs -o size=4m none "$0" && exec "$@"'


def tiny_disk(folder):
    """The start of a command line that runs what follows where `folder` is a disk of 4 MB."""
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", TINY_DISK, str(folder)]


@pytest.mark.parametrize(
    ("fill", "then"),
    [("disk", "save"), ("disk", "wait"), ("disk", "close"), ("limit", "save"), ("readonly", "save")],
)
def test_a_disk_that_is_full_or_read_only_is_told_and_the_checkpoint_before_it_stays(tmp_path, fill, then):
    prefix = []
    if fill != "limit":
        prefix = tiny_disk(tmp_path / "disk")
        if subprocess.run([*prefix, "true"], capture_output=True).returncode:
            pytest.skip("no small disk can be mounted here; the limit on file sizes is tested instead")
    done = run(FULL_DISK, tmp_path / "disk", fill, then, prefix=prefix)
    reason = {
        "disk": "No space left on device",
        "limit": "File too large",
        "readonly": "Read-only file system",
    }[fill]
    assert done.stderr == (
        f"error: cannot write a checkpoint into {tmp_path / 'disk'}: {reason}; that of step 2 is intact\n"
    )
    assert (done.returncode, done.stdout) == (2, "[2] 2 True\n")


MESHES = """
    folder = sys.argv[1]
    def put(mesh, spec):
        at = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))
        return {
            "params": {
                "w": at(jnp.arange(64 * 48, dtype=jnp.float32).reshape(64, 48) / 7, spec),
                "b": at((jnp.arange(40) / 3).astype(jnp.bfloat16), P(spec[0])),
            },
            "keys": at(jax.random.split(jax.random.key(1), 8), P(spec[0])),
            "step": at(jnp.int32(3), P()),
        }
    def mesh(*shape):
        types = (jax.sharding.AxisType.Auto,) * 2
        return jax.make_mesh(shape, ("data", "fsdp"), axis_types=types)
    one, other = put(mesh(4, 2), P("data", "fsdp")), put(mesh(2, 4), P("fsdp", None))
    with Checkpointer(folder, every=1, report=print) as checkpointer:
        checkpointer.save(3, one)
        checkpointer.wait()
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), other)
        found = checkpointer.restore(target).state
        raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(other)):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)
            np.testing.assert_array_equal(raw(a), raw(b))
        assert len(found["params"]["w"].sharding.device_set) == 8
"""


def test_another_mesh_restores_the_same_numbers_and_verifies_them(tmp_path):
    done = run(MESHES, tmp_path, environment={"XLA_FLAGS": "--xla_force_host_platform_device_count=8"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    parameters = restore_parameters(tmp_path).state
    np.testing.assert_array_equal(
        parameters["w"], np.asarray(jnp.arange(64 * 48, dtype=jnp.float32).reshape(64, 48) / 7)
    )
    damage(tmp_path, 3)
    with pytest.raises(InputError, match=r"every checkpoint in .* is damaged"):
        restore_parameters(tmp_path, report=lambda line: None)


PROCESSES = """
    folder, port, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    import grain
    from jax.experimental import multihost_utils

    def batches():
        return iter(grain.MapDataset.range(100).seed(1).shuffle()[rank::2].batch(2).to_iter_dataset())

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    make = jax.jit(
        lambda step: {"w": jnp.arange(4096.0) * step, "step": step, "key": jax.random.key(step)},
        out_shardings={"w": split, "step": whole, "key": whole},
    )
    state = [make(np.int32(step)) for step in (1, 2)]
    jax.block_until_ready(state)
    iterator = batches()
    with Checkpointer(folder, every=1) as checkpointer:
        try:
            checkpointer.save(1, {"step": jnp.int32(1)})
        except TypeError as error:
            assert "'step' of the state is an array of this process alone" in str(error), error
        else:
            raise AssertionError("an array of one process was saved")
        for _ in range(rank + 1):
            next(iterator)
        checkpointer.save(1, state[0], iterator)
        expected = next(iterator)
        checkpointer.save(2, state[1], iterator)
        checkpointer.wait()
    multihost_utils.sync_global_devices("saved")
    if rank == 0:
        for path in os.popen(f"find {folder}/2/state/ocdbt.process_*/d -type f").read().split():
            data = bytearray(open(path, "rb").read())
            data[len(data) // 2] ^= 1
            open(path, "wb").write(data)
    multihost_utils.sync_global_devices("damaged")
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
    iterator = batches()
    with Checkpointer(folder, every=1) as checkpointer:
        restored = checkpointer.restore(jax.tree.map(like, state[0]), iterator)
    assert restored.step == 1
    np.testing.assert_array_equal(restored.state["w"], np.arange(4096.0))
    np.testing.assert_array_equal(next(iterator), expected)
    print("equal", sorted(os.listdir(folder)), flush=True)
    multihost_utils.sync_global_devices("done")
"""


def test_two_processes_save_resume_and_pass_over_the_same_checkpoint(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    program = PRELUDE + textwrap.dedent(PROCESSES)
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "run"), port, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        results = [job.communicate(timeout=100) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    for job, (out, error) in zip(jobs, results):
        assert job.returncode == 0, error[-3000:]
        assert out.endswith("equal ['1', 'damaged-2']\n")
    assert "2 is damaged" in results[0][1] and "2 is damaged" not in results[1][1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint32", "bool", "complex64"])
def test_a_checksum_sees_every_bit_and_every_place(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 2, (3, 5)).astype(dtype))
    original = np.asarray(x)
    own = int(_checksum(x))
    assert int(_checksum(x + 0)) == own
    width = 1 if dtype == "bool" else 8 * original.itemsize
    for bit in range(width):
        changed = original.copy()
        changed.reshape(-1).view(np.uint8)[6 * original.itemsize + bit // 8] ^= 1 << bit % 8
        assert int(_checksum(jnp.asarray(changed))) != own
    assert int(_checksum(x[::-1])) != own
    assert int(_checksum(x[:, ::-1])) != own


def test_a_checksum_sees_two_flipped_signs():
    """A sum of words times odd weights does not: two highest bits cancel, whatever the weights."""
    x = np.arange(1, 9, dtype=np.float32)
    own = int(_checksum(jnp.asarray(x)))
    for other in range(1, 8):
        changed = x.copy()
        changed[[0, other]] *= -1
        assert int(_checksum(jnp.asarray(changed))) != own
