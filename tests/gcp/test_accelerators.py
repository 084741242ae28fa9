"""The table of slices agrees with itself, with the names that others use, and with the compiler."""

import math

import pytest

from gcp.accelerators import CHIPS_PER_HOST, GENERATIONS, SLICES, find_slice
from seqmodels.errors import InputError
from tests.tpu_compiler import needs_tpu_compiler

ALL = pytest.mark.parametrize("row", SLICES.values(), ids=lambda row: row.name)


@ALL
def test_a_topology_has_the_chips_and_the_hosts(row):
    assert math.prod(map(int, row.topology.split("x"))) == row.chips == row.hosts * CHIPS_PER_HOST


@ALL
def test_the_number_in_a_name_counts_chips_or_cores(row):
    """Cores for v4, v5p and TPU7x, of which a chip has two."""
    generation, _, number = row.name.rpartition("-")
    cores = {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1, "tpu7x": 2}[generation]
    assert int(number) == row.chips * cores


@ALL
def test_a_slice_is_found_by_its_names(row):
    assert find_slice(row.name) is row
    if row.api_type:
        assert find_slice(row.api_type) is row


@ALL
def test_the_cloud_tpu_api_has_both_names_or_none(row):
    assert (row.api_type is None) == (row.runtime is None) == (row.generation == "tpu7x")


def test_a_label_and_a_topology_mean_one_slice():
    labels = [facts.label for facts in GENERATIONS.values()]
    assert len(set(labels)) == len(labels)
    assert len({(row.label, row.topology) for row in SLICES.values()}) == len(SLICES)


@pytest.mark.parametrize(
    ("name", "chips", "hosts", "topology", "label", "machine", "api"),
    [
        ("v5e-256", 256, 64, "16x16", "tpu-v5-lite-podslice", "ct5lp-hightpu-4t", "v5litepod-256"),
        ("v5p-128", 64, 16, "4x4x4", "tpu-v5p-slice", "ct5p-hightpu-4t", "v5p-128"),
        ("v6e-256", 256, 64, "16x16", "tpu-v6e-slice", "ct6e-standard-4t", "v6e-256"),
        ("tpu7x-128", 64, 16, "4x4x4", "tpu7x", "tpu7x-standard-4t", None),
    ],
)
def test_slices_as_published(name, chips, hosts, topology, label, machine, api):
    row = find_slice(name)
    assert (row.chips, row.hosts, row.topology) == (chips, hosts, topology)
    assert (row.label, row.machine_type, row.api_type) == (label, machine, api)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v5e-8", "valid: v5e-4, v5e-16, v5e-32, v5e-64, v5e-128, v5e-256"),
        ("v5litepod-100", "valid: v5e-4, v5e-16"),
        ("v6-256", "did you mean 'v6e'?"),
        ("tpu8x-16", "did you mean 'tpu7x'?"),
        ("", "valid: tpu7x, v4, v5e, v5p, v6e"),
    ],
)
def test_a_slice_that_is_not_there(name, told):
    with pytest.raises(InputError) as error:
        find_slice(name)
    assert str(error.value).startswith(f"tpu is {name!r}: there is no such slice; ")
    assert told in str(error.value)


@needs_tpu_compiler
@ALL
def test_the_compiler_knows_the_slice(row):
    """Its devices, and their memory."""
    from seqmodels.tools.compile_check import chips

    target = chips.target(row.check_name)
    assert len(target.devices) == row.devices
    assert target.generation == row.generation
    assert target.chip.memory / chips.GIB == pytest.approx(row.memory_gib, abs=0.02)
