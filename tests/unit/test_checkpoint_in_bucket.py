"""Checkpoints in a bucket, where nothing is renamed: whenever a process dies in a save, the one before it is used."""

import re

import pytest

from seqmodels.errors import InputError
from seqmodels.files import to_path
from seqmodels.training.checkpoint import Checkpointer, list_steps, restore_parameters
from tests.fake_gcs import BUCKET, FakeGCS, Request
from tests.unit.test_checkpoint import ABSTRACT, bits, make_state, open_quietly

Objects = dict[str, bytes]


@pytest.fixture
def key(request) -> str:
    """The folder of the test's checkpoints within the bucket."""
    return f"checkpoints/{re.sub(r'[^a-z0-9_]', '-', request.node.name)}"


def put_all(gcs: FakeGCS, key: str, objects: Objects) -> str:
    """Make the folder hold exactly these; returns its address."""
    for name in gcs.below(key):
        del gcs.objects[f"{key}/{name}"]
    for name, data in objects.items():
        gcs.put(f"{key}/{name}", data)
    return f"gs://{BUCKET}/{key}"


def moments(gcs: FakeGCS, key: str, action) -> list[Objects]:
    """What the folder holds before each write and each deletion of an action, and each time it is another thing."""
    seen: list[Objects] = []

    def look(request: Request) -> None:
        if request.action in ("write", "delete") and (now := gcs.below(key)) not in seen[-1:]:
            seen.append(now)

    with gcs.ruled(look):
        action()
    return seen


@pytest.fixture(scope="module")
def saved(gcs) -> Objects:
    """The checkpoints of steps 10 and 20."""
    key = "checkpoints/saved"
    with Checkpointer(f"gs://{BUCKET}/{key}", every=10) as checkpointer:
        for step in (10, 20):
            assert checkpointer.save(step, make_state(step))
    return gcs.below(key)


def test_what_is_restored_equals_what_was_saved_bit_for_bit(gcs, key, saved):
    checkpointer, reports = open_quietly(put_all(gcs, key, saved))
    with checkpointer:
        restored = checkpointer.restore(ABSTRACT)
    assert restored.step == 20 and bits(restored.state) == bits(make_state(20)) and reports == []
    assert bits(restore_parameters(checkpointer.directory, step=10).state) == bits(make_state(10).params)


def test_the_oldest_go(gcs, key):
    with Checkpointer(f"gs://{BUCKET}/{key}", every=1, keep=2) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, make_state(step))
    assert list_steps(f"gs://{BUCKET}/{key}") == [2, 3]
    assert {name.partition("/")[0] for name in gcs.below(key)} == {"2", "3"}


def test_a_kill_at_any_write_of_a_save_leaves_the_checkpoint_before_it(gcs, key, saved):
    folder = put_all(gcs, key, {name: data for name, data in saved.items() if name.startswith("10/")})

    def save():
        with Checkpointer(folder, every=10) as checkpointer:
            checkpointer.save(20, make_state(20))

    torn = moments(gcs, key, save)
    assert len(torn) > 8 and not any("20/commit_success.txt" in objects for objects in torn)
    for objects in torn:
        put_all(gcs, key, objects)
        assert list_steps(folder) == [10]
        checkpointer, reports = open_quietly(folder)
        with checkpointer:
            assert not any(name.startswith("20/") for name in gcs.below(key))
            restored = checkpointer.restore(ABSTRACT)
            assert restored.step == 10 and bits(restored.state) == bits(make_state(10)) and reports == []
    # After the last of them the step can be saved.
    save()
    assert list_steps(folder) == [10, 20]


def test_those_who_only_read_pass_over_what_is_not_committed_and_leave_it(gcs, key, saved):
    torn = {name: data for name, data in saved.items() if name != "20/commit_success.txt"}
    folder = put_all(gcs, key, torn)
    assert restore_parameters(folder).step == 10
    assert gcs.below(key) == torn


def damaged(saved: Objects, step: int) -> Objects:
    """With a flipped bit in every byte of the arrays of a step."""
    arrays = [name for name in saved if name.startswith(f"{step}/state/") and "/d/" in name]
    assert arrays
    return saved | {name: bytes(byte ^ 1 for byte in saved[name]) for name in arrays}


def test_a_kill_at_any_moment_loses_nothing_of_a_damaged_checkpoint(gcs, key, saved):
    before = damaged(saved, 20)
    folder = put_all(gcs, key, before)
    harmed = {name.removeprefix("20/"): data for name, data in before.items() if name.startswith("20/")}

    def restore():
        checkpointer, reports = open_quietly(folder)
        with checkpointer:
            restored = checkpointer.restore(ABSTRACT)
            assert restored.step == 10 and bits(restored.state) == bits(make_state(10))
        return reports

    seen = moments(gcs, key, restore)
    assert len(seen) > 2 * len(harmed) - 2  # each object is copied and deleted
    assert gcs.below(f"{key}/damaged-20") == harmed and list_steps(folder) == [10]
    for objects in seen:
        left = {name.removeprefix("20/") for name in objects if name.startswith("20/")}
        assert left == harmed.keys() or "commit_success.txt" not in left
    for objects in seen[:: max(1, len(seen) // 8)]:
        put_all(gcs, key, objects)
        assert len(restore()) == (1 if "20/commit_success.txt" in objects else 0)
        asides = {name.partition("/")[0] for name in gcs.below(key)} - {"10"}
        assert any(gcs.below(f"{key}/{aside}") == harmed for aside in asides)
        assert list_steps(folder) == [10]


def test_a_missing_object_is_damage_and_when_all_are_damaged_nothing_starts_from_scratch(gcs, key, saved):
    before = damaged(saved, 20)
    before = {name: data for name, data in before.items() if name != "10/record/metadata"}
    folder = put_all(gcs, key, before)
    checkpointer, reports = open_quietly(folder)
    with checkpointer, pytest.raises(InputError, match=r"every checkpoint in .* is damaged \(20, 10\)"):
        checkpointer.restore(ABSTRACT)
    assert len(reports) == 2 and gcs.below(key) == before


@pytest.mark.parametrize("action", ["write", "read", "list"])
def test_a_right_that_is_missing_is_told_in_one_line(gcs, key, saved, action):
    folder = put_all(gcs, key, saved)

    def use():
        checkpointer, _ = open_quietly(folder)
        with checkpointer:
            checkpointer.restore(ABSTRACT)
            checkpointer.save(30, make_state(30))

    rule = lambda request: 403 if request.action == action else None  # noqa: E731
    with gcs.ruled(rule), pytest.raises(InputError, match=rf"gs://{BUCKET} .*403.*storage\.objectUser") as refused:
        use()
    assert "\n" not in str(refused.value) and not hasattr(refused.value, "__notes__")
    # What was there is there, and no worse for it.
    assert gcs.below(key).items() >= saved.items()
    use()
    assert list_steps(folder) == [10, 20, 30]


def test_a_folder_that_is_not_there_has_no_checkpoints(gcs):
    assert list_steps(f"gs://{BUCKET}/nothing") == []
    with pytest.raises(InputError, match=rf"no checkpoint in gs://{BUCKET}/nothing"):
        restore_parameters(f"gs://{BUCKET}/nothing")
    assert not to_path(f"gs://{BUCKET}/nothing").exists()
