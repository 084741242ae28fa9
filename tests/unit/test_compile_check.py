"""What is read off compiled programs: of some whose products, bytes and collectives are known by hand, compiled for TPU
slices; and the command line on a small job."""

import argparse
import dataclasses
import itertools
import json
import random
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from seqmodels.data import MQAR, TextData
from seqmodels.errors import EXIT_DEFECT, EXIT_DONE, EXIT_INPUT
from seqmodels.parallel.mesh import make_mesh
from seqmodels.tools.compile_check import __main__ as compile_check
from seqmodels.tools.compile_check import chips, hlo, schedule, summary
from seqmodels.training import TrainingJob
from seqmodels.training.compiler_presets import PRESETS, compiler_options
from tests.program.programs import REPOSITORY, write_config
from tests.tpu_compiler import needs_tpu_compiler

# Programs for TPUs are kept in the cache of compiled programs, but cannot be read without one.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")

MESH = {"data": 2, "fsdp": 2, "seq": 4, "tensor": 1}


def compiled(function, *arguments, topology="v5e:2x4", options=None, slices=1, **sizes):
    """The counts of a function of arrays given as (shape, dtype, PartitionSpec), on a mesh of the slices."""
    target = chips.target(topology, slices)
    mesh = make_mesh(devices=target.devices, slices=slices, **sizes)
    shapes = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, spec)) for s, d, spec in arguments]
    with jax.set_mesh(mesh):
        lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",))
        program = lowered.compile(compiler_options=options)
    in_slice = {**mesh.shape, "data": mesh.shape["data"] // slices}
    return schedule.count(program.as_text(), in_slice, target.chip)


def collective(attributes: str) -> hlo.Instruction:
    return hlo.Instruction("x", "f32[4]", "all-gather", ("y",), "%y", attributes, False)


@pytest.mark.parametrize(
    ("written", "axes", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}", ("seq",), 4),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7},{8,12},{9,13},{10,14},{11,15}}, x=1", ("fsdp",), 2),
        ("replica_groups={}", ("data", "fsdp", "seq"), 16),
        ("replica_groups=[4,4]<=[16]", ("seq",), 4),
        ("replica_groups=[4,4]<=[4,4]T(1,0), dimensions={0}", ("data", "fsdp"), 4),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_1'}", ("seq",), 4),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_0'}", ("data", "fsdp"), 4),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=4], device_ids=([4,4]T(1,0)) {'a'}, dimensions={1}", ("seq",), 4),
        ("source_target_pairs={{0,1},{1,2},{2,3}}", ("seq",), 2),
        ("source_target_pairs={{0,8},{8,0}}, channel_id=3", ("data",), 2),
    ],
)
def test_who_talks_to_whom(written, axes, size):
    assert hlo.talk(collective(f", {written}"), MESH) == hlo.Talk(axes, size)


def test_groups_that_cannot_be_read_are_not_guessed():
    with pytest.raises(ValueError, match="unknown way"):
        hlo.talk(collective(", replica_groups=mesh['a'=16] {'a':(2)4}"), MESH)


def test_bytes_of_shapes():
    tiled, tuple_ = "bf16[3,130]{1,0:T(8,128)(2,1)S(1)}", "(f32[], /*index=1*/pred[7]{0:T(512)}, s4[3])"
    assert hlo.buffers(tiled) == [hlo.Buffer("bf16", (3, 130), 1, 8 * 256 * 2)]
    assert hlo.buffers(tiled)[0].payload == 3 * 130 * 2
    assert [x.bytes for x in hlo.buffers(tuple_)] == [4, 512, 2]


def test_places_of_a_window_that_meet_the_input():
    draw = random.Random(0)
    for _ in range(200):
        length, outputs, size = (draw.randint(1, 7) for _ in range(3))
        stride, spread, apart, before = (draw.randint(1, 3), draw.randint(1, 3), draw.randint(1, 3), draw.randint(0, 4))
        window = f"size={size} stride={stride} pad={before}_1 lhs_dilate={spread} rhs_dilate={apart}"
        met = {i * spread for i in range(length)}
        pairs = itertools.product(range(outputs), range(size))
        expected = sum(o * stride + place * apart - before in met for o, place in pairs)
        assert schedule._positions(length, outputs, window, 0) == expected, window


@needs_tpu_compiler
def test_products_and_traffic_in_a_loop():
    """Twelve layers: the stacked weights are read once, not twelve times."""
    layers, width = 12, 1024

    def run(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    weights = ((layers, width, width), jnp.bfloat16, P())
    counts = compiled(run, ((width, width), jnp.bfloat16, P()), weights)
    assert counts.operations == 2 * layers * width**3
    assert counts.collectives == [] and counts.unknown_loops == 0
    once = layers * width * width * 2
    assert once < counts.traffic < 1.5 * once
    assert counts.schedule_seconds >= counts.operations / chips.CHIPS["v5e"].flops


@needs_tpu_compiler
def test_collectives_are_counted_with_their_axes_and_bytes():
    split = P(("fsdp", "seq"))

    def run(x):
        gathered = jax.lax.all_gather(x, "seq", axis=0, tiled=True)
        return gathered, jax.lax.psum(x, "fsdp"), jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)])

    def shards(x):
        return jax.shard_map(run, in_specs=split, out_specs=(P("fsdp"), P("seq"), split), check_vma=False)(x)

    counts = compiled(shards, ((4096, 1024), jnp.float32, split), data=1, fsdp=2, seq=4)
    found = {(x.kind, x.axes): x for x in counts.collectives}
    assert {x.by for x in counts.collectives} == {"operators"}
    gather = found["all-gather", ("seq",)]
    assert (gather.count, gather.devices, gather.bytes) == (1, 4, 4 * 512 * 1024 * 4)
    assert gather.wire_bytes == 3 * 512 * 1024 * 4
    permute = found["collective-permute", ("fsdp",)]
    assert permute.count == 1 and permute.wire_bytes == permute.bytes
    reduced = found["all-reduce", ("fsdp",)]
    assert reduced.wire_bytes == reduced.bytes  # twice the half that each of two sends


@needs_tpu_compiler
def test_a_sum_over_slices_sends_a_part_to_the_other_slice():
    """Each device its share of what its own slice has summed up."""
    size = 8 * 2**20
    whole = ((16, size), jnp.float32, P("data"))
    counts = compiled(lambda x: x.sum(0), whole, slices=2, data=16)
    sent = [x for x in counts.collectives if x.kind == "send to a slice"]
    assert sum(x.wire_bytes for x in sent) == size * 4 / 8
    assert any(x.kind in ("reduce-scatter", "all-reduce") and x.devices == 8 for x in counts.collectives)


def layers_split_over_fsdp(options, topology):
    """(hidden, all) all-gathers of weights in a loop over layers, the second of each layer beside the first product."""

    def run(x, first, second):
        def layer(x, weights):
            up, down = (jax.lax.with_sharding_constraint(w, P()) for w in weights)
            return jax.nn.relu(x @ up) @ down, None

        return jax.lax.scan(layer, x, (first, second))[0]

    x = ((131072, 2048), jnp.bfloat16, P(("data", "fsdp")))
    weights = ((4, 2048, 2048), jnp.bfloat16, P(None, "fsdp"))
    counts = compiled(run, x, weights, weights, topology=topology, options=options, data=1, fsdp=-1)
    gathers = [x for x in counts.collectives if x.kind == "all-gather" and x.bytes > 2**20]
    return sum(x.overlapped for x in gathers), sum(x.count for x in gathers)


SLICES = {"v4": "v4:2x2x2", "v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4", "tpu7x": "tpu7x:2x2x1"}


@needs_tpu_compiler
@pytest.mark.parametrize("generation", SLICES)
def test_gathers_run_beside_compute_where_they_are_asked_to(generation):
    """Unasked on v5e; by the preset on those that it has options for, where all waits for them without it. On TPU7x the
    compiler cuts such a product into parts that it sends around."""
    options = PRESETS["async_gathers"].get(chips.CHIPS[generation].kind)
    compiler = tuple(int(part) for part in version("libtpu").split(".")[:3])
    hidden, gathers = layers_split_over_fsdp({}, SLICES[generation])
    assert (gathers > 0) == (generation != "tpu7x")
    assert (hidden > 0) == (generation == "v5e")
    if options is not None:
        hidden, gathers = layers_split_over_fsdp(dict(options), SLICES[generation])
        assert hidden >= gathers / 2 > 0 or (generation == "v5p" and compiler < (0, 0, 50))


@needs_tpu_compiler
def test_an_option_that_the_compiler_does_not_know_is_refused():
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_tpu_no_such_option"):
        compiled(jnp.sin, ((8,), jnp.float32, P()), options={"xla_tpu_no_such_option": True}, data=-1)


def test_no_option_of_the_compiler_unless_a_job_asks_for_a_preset():
    """No shipped config does."""
    for chip in chips.CHIPS.values():
        devices = np.array([argparse.Namespace(device_kind=chip.kind)])
        assert compiler_options(None, argparse.Namespace(devices=devices)) == {}
        kinds = [of_kind.get(chip.kind, {}) for of_kind in PRESETS.values()]
        assert [compiler_options(name, argparse.Namespace(devices=devices)) for name in PRESETS] == kinds
    preset = next(field for field in dataclasses.fields(TrainingJob) if field.name == "compiler_preset")
    assert preset.default is None
    assert not [file for file in (REPOSITORY / "configs").rglob("*.gin") if "compiler_preset" in file.read_text()]


def test_presets_are_for_known_devices():
    kinds = {chip.kind for chip in chips.CHIPS.values()}
    assert all(set(of_kind) <= kinds for of_kind in PRESETS.values())
    assert set(PRESETS) == {"async_gathers"}, "every preset has its own test above"


def test_every_generation_is_in_the_tests():
    assert set(SLICES) == set(chips.CHIPS)


@pytest.mark.parametrize("data", [TextData(), TextData(packing="pack"), MQAR()])
def test_data_says_whether_it_is_packed(data):
    assert data.packed == ("segment_ids" in next(data.train_batches(2, 64, 0)))


# The command line.

JOB = "\ntrain.mesh = @DeviceMesh()\nDeviceMesh.fsdp = 2\nDeviceMesh.seq = 2\nLanguageModel.pattern = ('retention',)\n"


@pytest.fixture
def gin(tmp_path):
    text = write_config(tmp_path, JOB).read_text()
    file = tmp_path / "job.gin"
    file.write_text("\n".join(line for line in text.splitlines() if "GatedLinearAttention" not in line))
    return file


@needs_tpu_compiler
def test_a_job_that_fits(gin, here, tmp_path):
    file = tmp_path / "report.json"
    arguments = ["--config", gin, "--topology", "v5e:2x4", "--json", file, "--markdown", tmp_path / "report.md"]
    ended = here(compile_check.main, *arguments, "--hlo", tmp_path / "hlo")
    assert ended.code == EXIT_DONE, ended
    assert "GiB a device: fits" in ended.out and "all-gather" in ended.out
    (report,) = json.loads(file.read_text())["reports"]
    assert report["fits"] and report["devices"] == 8 and report["mesh"] == {"data": 2, "fsdp": 2, "seq": 2, "tensor": 1}
    kinds = ("parameters", "optimizer", "batch", "padding", "outputs", "temporaries", "code")
    assert report["memory"]["host"] == 0
    assert report["memory"]["total"] == sum(report["memory"][kind] for kind in kinds)
    exchanged = [x for x in report["counts"]["collectives"] if x["by"] == "operators"]
    assert [(x["kind"], x["axes"], x["count"]) for x in exchanged] == [("all-gather", ["seq"], 2)]
    assert report["bounds"]["model"] > 0 and report["compile_seconds"] > 0
    assert "| v5e:2x4 |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "hlo" / "v5e_2x4.hlo.txt").read_text().startswith("HloModule")


@needs_tpu_compiler
def test_a_job_that_does_not_fit(gin, here):
    large = ["--gin.LanguageModel.d_model=8192", "--gin.LanguageModel.n_layers=40", "--gin.Retention.num_heads=32"]
    ended = here(compile_check.main, "--config", gin, "--topology", "v5e:2x4", *large)
    assert ended.code == EXIT_DEFECT, ended
    assert "DOES NOT COMPILE: RESOURCE_EXHAUSTED" in ended.out and "exceed" in ended.out


def test_a_summary_says_what_fits_or_why_not(here, tmp_path):
    fits = {"target": "v5e:2x4", "fits": True, "memory": {"total": 3 * 2**29}, "capacity": 2**34}
    fits["compile_seconds"] = 7.4
    refused = {**fits, "target": "2 x v5e:2x4", "fits": False, "memory": None, "error": "RESOURCE | EXHAUSTED"}
    conditions = {"time": "2026-01-02T03:04:05", "packages": {"jax": "0.1", "libtpu": "0.2"}}
    whole = {"environment": conditions, "config": "mine a.b=1", "reports": [fits, refused]}
    of_config, of_job, document = (tmp_path / name for name in ("config.json", "job.json", "reports.md"))
    of_config.write_text(json.dumps(whole))
    of_job.write_text(json.dumps({**whole, "reports": [fits], "job": {"tpu": "v5e-8"}}))
    for _ in range(2):  # the table is put in the place of the one before
        ended = here(summary.main, of_config, of_job, "--markdown", document)
    assert ended.code == EXIT_DONE, ended
    rows = [line for line in document.read_text().splitlines() if line.startswith("| mine")]
    assert rows == [
        "| mine a.b=1 | v5e:2x4 | 1.50 | 16.00 | 7 | 2026-01-02 | 0.1 | 0.2 | fits |",
        r"| mine a.b=1 | 2 x v5e:2x4 | - | 16.00 | 7 | 2026-01-02 | 0.1 | 0.2 | RESOURCE \| EXHAUSTED |",
        "| mine a.b=1 | v5e-8, v5e:2x4 | 1.50 | 16.00 | 7 | 2026-01-02 | 0.1 | 0.2 | fits |",
    ]
    of_job.write_text("[]")
    for file, message in ((of_job, "no file of reports"), (tmp_path / "none.json", "No such file")):
        ended = here(summary.main, file)
        assert ended.code == EXIT_INPUT and message in ended.err, ended


@needs_tpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize("generation", SLICES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_compiles_a_training_step_on_every_generation(gin, here, tmp_path, preset, generation):
    report = tmp_path / "report.json"
    preset_given = f"--gin.train.compiler_preset={preset!r}"
    ended = here(compile_check.main, "--config", gin, "--topology", SLICES[generation], preset_given, "--json", report)
    assert ended.code == EXIT_DONE, ended
    (found,) = json.loads(report.read_text())["reports"]
    assert found["preset"] == preset and found["options"] == PRESETS[preset].get(chips.CHIPS[generation].kind, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5x:2x4"], "there is no TPU generation 'v5x'; did you mean 'v5"),
        (["--topology", "v5p:8x8"], r"--topology v5p:8x8: expected the slice's shape in chips, v5p:NxNxN"),
        (["--topology", "v5e-256"], "there is no TPU generation 'v5e-256'; did you mean 'v5e'"),
        (["--topology", "v5e:2x4", "--option", "fast"], "--option 'fast': expected NAME=VALUE"),
        (["--topology", "v5e:2x4", "--json", "/dev/null/report.json"], "cannot be written"),
        (["--topology", "v5e:2x4", "--gin.DeviceMesh.fsdp=3"], "does not fit 8 devices"),
        (["--topology", "v5e:2x4", "--gin.train.batch_size=2"], "train.batch_size is 2: expected a multiple of 4"),
        (["--topology", "v5e:2x4", "--gin.train.compiler_preset='async'"], "did you mean 'async_gathers'"),
        (["--topology", "v5e:2x4", "--gin.AdamW.b3=0.5"], "no parameter 'b3'"),
        pytest.param(["--topology", "v5e:3x5"], "the compiler knows no such slice", marks=needs_tpu_compiler),
    ],
)
def test_wrong_inputs(gin, here, arguments, message):
    ended = here(compile_check.main, "--config", gin, *arguments)
    assert ended.code == EXIT_INPUT and message in ended.err, ended
    assert ended.err.count("\n") == 1, ended.err


def test_without_the_compiler(gin, here, monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    ended = here(compile_check.main, "--config", gin, "--topology", "v5e:2x4")
    assert ended.code == EXIT_INPUT and "the TPU compiler is not installed" in ended.err


@needs_tpu_compiler
def test_softmax_attention_on_a_mesh_is_the_kernel(gin, here):
    """Also where the mesh in context is of devices that nothing can run on."""
    softmax = ["--gin.LanguageModel.pattern=('softmax_attention',)", "--gin.DeviceMesh.seq=1"]
    width = ["--gin.LanguageModel.d_model=256", "--gin.SoftmaxAttention.num_heads=2", "--gin.train.seq_len=128"]
    ended = here(compile_check.main, "--config", gin, "--topology", "v5e:2x2", *softmax, *width)
    assert ended.code == EXIT_DONE and "splash_mha_fwd" in ended.out, ended
