"""What is read off the schedules of kernels: of some written by hand, and of a small one that is compiled; what a grid
moves; the cases and their bounds; the command line."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from seqmodels.errors import EXIT_DEFECT, EXIT_DONE, EXIT_INPUT, InputError
from seqmodels.ops import aaren
from seqmodels.registry import ops
from seqmodels.tools.compile_check.chips import CHIPS
from seqmodels.tools.compile_check.hlo import Module
from seqmodels.tools.kernel_report import __main__ as kernel_report
from seqmodels.tools.kernel_report import cases, figures, hopper, llo, report
from seqmodels.tools.kernel_report.pallas_calls import operations, pallas_calls
from seqmodels.tools.kernel_report.processes import compile_all, compile_on_hopper
from seqmodels.tools.kernel_report.programs import FunctionRequest, array_bytes, build
from seqmodels.tools.kernel_report.worker import TOPOLOGIES
from tests.hopper import needs_cuda_compiler
from tests.tpu_compiler import needs_tpu_compiler

V5E, V5P = (figures.Device(name, CHIPS[name].of_device(cores), cores) for name, cores in (("v5e", 1), ("v5p", 2)))

# A loop over a grid of 4 steps, in 6 passes. In it, under the condition that a step computes at all: two bundles under
# a condition, a loop of one bundle and its delay slots that runs 3 times, and one whose length is not known.
BUNDLES = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = smov 0  ;;  %2 = vsyncpa [#allocation4], 0 }
   0x1 LB: > { %s2 = sphi %s1, %s3 /* iteration index, stage = 0 */ }
   0x2   : > { %10 = sbr.rel (%p1) target bundleno = 23 (0x17), region = 28  ;;  %s4 = sadd.s32 4294967294, %s2 \
/* iteration index, stage = 2 */ }
   0x3   :  {}
   0x4   :  {}
   0x5   :  {}
   0x6   :  {}
   0x7   : > { %11 = dma.done.wait %s9, 64 /* pipeline-emitter-dma-wait */
window_bounds: (8, 1)
strides: (1, 1) */ }
   0x8   : > { %12 = sbr.rel (!%p2) target bundleno = 15 (0xf), region = 40 }
   0x9   :  {}
   0xa   :  {}
   0xb   :  {}
   0xc   :  {}
   0xd PB: > { %13 = vst [vmem:[#allocation2] sm:$0xff] %v1 }
   0xe   : > { %v2 = vmatmul.f32.gmra.mxu0 %v1 }
   0xf LB: >> { %14 = sbr.rel (!%p3) target bundleno = 15 (0xf), region = 50 }
  0x10   :  {}
  0x11   :  {}
  0x12   :  {}
  0x13   :  {}
  0x14 LB: >> { %15 = sbr.rel (!%p4) target bundleno = 20 (0x14), region = 60 }
  0x15   :  {}
  0x16   :  {}
  0x17   : > { %16 = sbr.rel (!%p5) target bundleno = 1 (0x1), region = 94 }
  0x18   :  {}
  0x19   :  {}
  0x1a   :  {}
  0x1b   :  {}
  0x1c   :  { %17 = vsyncpa [#allocation4], 1 }
"""
REGIONS = """\
$region0: #{k.1}
  #allocation2 [shape = 'f32[8,128]', space=vmem, size = 0x1000, offset = 0, scoped, tag = 'scratch operand']
  #allocation3 [shape = 'u32[1]', space=smem, size = 0x4, offset = 0x90000, scoped, tag = 'spilled sreg/preg']
  loop: start=0, step=1, limit=6
  $region93: #{k.1} parent=0 // loop_pre_header
  $region94: #{k.1} parent=0 // loop_body
    #allocation9_spill [shape = 'u32[8,128]', space=vmem, size = 0x1000, offset = 0x3000, scoped, tag = 'spilled']
    loop: start=1, step=2, limit=7
    $region49: #{k.1} parent=94 // loop_pre_header
    $region50: #{k.1} parent=94 // loop_body
    $region60: #{k.1} parent=94 // loop_body
"""
KINDS = "MXU, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL"


def utilization() -> str:
    """One product under the condition; in the loop that runs three times a spill and two fills."""
    rows = [[0] * 5 for _ in range(29)]
    rows[0xE] = [1, 0, 0, 0, 0]
    rows[0xF] = [0, 2, 2, 1, 1]
    lines = [" ".join(map(str, row)) for row in rows]
    return "\n".join(["== CAPACTIY:", KINDS, " 4 3 3 1 1", "== UTILIZATION:", *lines, ""])


@pytest.fixture
def schedule():
    return llo.Schedule(BUNDLES, REGIONS, utilization(), delay_slots=4)


def test_loops_and_their_trips(schedule):
    assert len(schedule.bundles) == 29
    grid, inner, unknown = schedule.loops
    assert schedule.grid_loop == grid == llo.Loop(1, 27, passes=6, stages=2)
    assert grid.trips == 4
    assert inner == llo.Loop(15, 19, passes=3, stages=0) and inner.trips == 3
    assert unknown.passes is None and unknown.first == 20
    assert schedule.unknown_loops(grid) == 1


def test_cycles_of_a_step_count_loops_as_often_as_they_run(schedule):
    runs = schedule.runs(schedule.grid_loop)
    assert runs.sum() == 27 + 2 * 5
    assert runs[0] == runs[28] == 0 and runs[15] == 3 and runs[20] == 1
    assert schedule.runs().sum() == 2 + 4 * (27 + 2 * 5)


def test_conditions_are_not_loops_nor_the_body_itself(schedule):
    assert schedule.conditions(schedule.grid_loop) == [llo.Branch(13, 14)]
    assert llo.Branch(7, 22) in schedule.branches
    assert schedule.conditions() == schedule.branches, "of no loop, all are"


def test_a_loop_that_may_have_no_passes_is_not_a_condition():
    """A condition, and in it a loop whose length becomes known only as it runs, which is skipped where that is 0."""
    bundles = """\
     0   :  { %1 = sbr.rel (%p1) target bundleno = 9 (0x9), region = 10 }
   0x1   :  {}
   0x2   : > { %v1 = vadd.f32 %v0, %v0 }
   0x3   : > { %2 = sbr.rel (%p2) target bundleno = 8 (0x8), region = 11 }
   0x4   :  {}
   0x5 LB: >> { %v2 = vadd.f32 %v1, %v1 }
   0x6   : >> { %3 = sbr.rel (!%p3) target bundleno = 5 (0x5), region = 12 }
   0x7   :  {}
   0x8   : > { %v3 = vadd.f32 %v2, %v2 }
   0x9   :  { %v4 = vadd.f32 %v3, %v3 }
"""
    schedule = llo.Schedule(bundles, "", "", delay_slots=1)
    assert schedule.branches == [llo.Branch(2, 8), llo.Branch(5, 7)]
    assert schedule.conditions() == [llo.Branch(2, 8)]


def test_delay_slots_are_those_of_the_generation():
    """Where fewer bundles follow a branch in any case, more are under its condition, and a loop is shorter."""
    schedule = llo.Schedule(BUNDLES, REGIONS, utilization(), delay_slots=1)
    assert schedule.grid_loop.last == 24
    assert schedule.conditions(schedule.grid_loop)[0] == llo.Branch(10, 14)


def test_slots_spills_and_memory(schedule):
    slots = schedule.slots(schedule.runs(schedule.grid_loop))
    assert (slots.spills, slots.fills) == (3, 6)
    assert set(slots.use) == {"MXU", "VLOAD", "VSTORE"}
    assert slots.use["MXU"] == pytest.approx(1 / (4 * 37)) and slots.use["VLOAD"] == pytest.approx(6 / (3 * 37))
    assert schedule.vmem == 0x4000, "of VMEM alone"


def test_without_the_file_of_slots_they_are_unknown():
    assert llo.Schedule(BUNDLES, REGIONS, "", delay_slots=4).slots(jnp.ones(29)) is None


@pytest.fixture
def dumps(tmp_path):
    written = {
        "17-k.1-00-schedule-analysis_packed-bundles-post-ra": "total scheduled bundles: 29",
        "17-k.1-01-packed-bundles-post-ra": BUNDLES,
        "17-k.1-02-post-bundle-packing-post-ra": REGIONS,
        "17-k.1-03-pre-delay_hlo-static-per-bundle-utilization": utilization(),
        "17-TLP-00-deduplication-map": "key:k.1\nordinal:1\nequivalent_hlos[size=2]:\n  k.1\n  k.2\n",
    }
    for name, text in written.items():
        (tmp_path / f"{name}.txt").write_text(text)
    for name, cycles in (("k.1", 150), ("k.9", 0)):
        profile = f'hlo_op_name: "{name}"\nestimated_cycles: {cycles}\n'
        (tmp_path / f"{name}_static_llo_profile.textproto").write_text(profile)
    return llo.Dumps(tmp_path, delay_slots=4)


def test_files_are_found_by_instruction(dumps):
    assert len(dumps.schedule("k.1").bundles) == 29
    assert dumps.schedule("k.2") is dumps.schedule("k.1"), "the compiler has one code for both"
    assert dumps.schedule("k.3") is None
    assert dumps.simulated_cycles("k.2") == 150
    assert dumps.simulated_cycles("k.9") is None, "0 says that the simulator could not follow"


# The traced program.


def product(x, y, block=128, semantics=("parallel", "parallel", "arbitrary"), name="product"):
    def step(x, y, out, total):
        @pl.when(pl.program_id(2) == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        total[...] += jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            out[...] = total[...].astype(out.dtype)

    rows, inner, columns = (n // block for n in (x.shape[0], x.shape[1], y.shape[1]))
    call = pl.pallas_call(
        step,
        name=name,
        grid=(rows, columns, inner),
        in_specs=[
            pl.BlockSpec((block, block), lambda i, j, k: (i, k)),
            pl.BlockSpec((block, block), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((block, block), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], y.shape[1]), x.dtype),
        scratch_shapes=[pltpu.VMEM((block, block), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
    )
    return call(x, y)


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def calls(function, *arguments):
    return list(pallas_calls(jax.jit(function).trace(*arguments).jaxpr.jaxpr))


BLOCK = 128 * 128 * 2


def test_what_a_grid_moves_and_computes():
    (call,) = calls(product, shape(256, 512), shape(512, 384))
    assert call.grid == (2, 3, 4) and call.steps == 24
    assert call.semantics == ("parallel", "parallel", "arbitrary")
    assert [block.copies for block in call.blocks] == [24, 24, 6]
    assert [block.is_output for block in call.blocks] == [False, False, True]
    assert call.traffic() == (24 + 24 + 6) * BLOCK
    assert call.traffic([True, False, True]) == 24 * BLOCK
    assert not call.unknown_traffic
    assert call.operations == 2 * 256 * 512 * 384
    assert call.shares == (0.25, 0.25)
    assert call.signature == ("bf16[256,384]", "bf16[256,512]", "bf16[512,384]")


def test_a_block_that_the_next_step_needs_again_is_not_moved():
    """With one block along the contracted axis, x changes with the first axis of the grid alone."""
    (call,) = calls(product, shape(256, 128), shape(128, 384))
    assert [block.copies for block in call.blocks] == [2, 6, 6]
    assert call.shares == (1.0, 1.0)


def test_calls_in_loops_and_in_other_calls():
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jax.jit(product)(x, w), None), x, weights)[0]

    (call,) = calls(layers, shape(128, 128), shape(5, 128, 128))
    assert call.times == 5
    traced = jax.jit(layers).trace(shape(128, 128), shape(5, 128, 128)).jaxpr.jaxpr
    assert operations(traced) == 5 * 2 * 128**3


def run_by_data(table, x, condition=lambda step, table: step < 2):
    """Reads the blocks that a table names, and computes where a condition holds."""

    def body(table, x, aside, out):
        @pl.when(condition(pl.program_id(0), table))
        def _():
            out[...] = x[...]

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(4,),
        in_specs=[pl.BlockSpec((8, 128), lambda i, table: (table[i], 0)), pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec((8, 128), lambda i, table: (i, 0)),
    )
    return pl.pallas_call(body, grid_spec=grid, out_shape=shape(32, 128, dtype=x.dtype))(table, x, x)


def test_what_depends_on_data_is_said_to():
    (call,) = calls(run_by_data, shape(4, dtype=jnp.int32), shape(32, 128, dtype=jnp.float32))
    indexed, aside, _ = call.blocks
    assert indexed.copies == 4 and not indexed.exact
    assert aside is None, "the kernel copies it itself"
    assert call.unknown_traffic
    assert call.shares == (0.5,)
    (call,) = calls(lambda *x: run_by_data(*x, lambda step, table: table[0] > 0), *(
        shape(4, dtype=jnp.int32), shape(32, 128, dtype=jnp.float32)
    ))  # fmt: skip
    assert call.shares == (1.0,)


def test_products_under_a_condition_count_as_often_as_it_holds():
    """Of 4 steps one; `jnp.where` and a function in between do not hide that."""

    def body(x, out):
        last = jax.jit(lambda i: jnp.where(i >= 2, i, 0) * 2)(pl.program_id(0))

        @pl.when((last > 4) & (pl.program_id(0) > 0))
        def _():
            out[...] = jax.lax.fori_loop(0, 3, lambda _, total: total @ x[...], x[...])

    block = pl.BlockSpec((128, 128), lambda i: (0, i))
    (call,) = calls(
        pl.pallas_call(body, grid=(4,), in_specs=[block], out_specs=block, out_shape=shape(128, 512)), shape(128, 512)
    )
    assert call.shares == (0.25,)
    assert call.operations == 3 * 2 * 128**3


# Time.


def call_of(**changes):
    """Of the kernel whose schedule is written above."""
    (call,) = calls(product, shape(128, 512), shape(512, 128))
    return call._replace(shares=(0.25,), **changes)


def test_time_of_a_kernel(dumps):
    """Of 4 steps, each waiting for two blocks, with the condition's two bundles in one of them."""
    kernel = figures.kernel("k.1", call_of(), dumps, V5E)
    assert (kernel.steps, kernel.cores, kernel.entry_cycles) == (4, 1, 2)
    assert kernel.cycles_at_most == 37 and kernel.cycles == 37 - 1.5
    latency = 650 + BLOCK / 374 + 30
    assert kernel.latency == pytest.approx(latency)
    expected = (4 * (latency + kernel.cycles) / 2 + 2) / 1.5e9
    assert kernel.seconds == pytest.approx(expected) and kernel.limit == "latency"
    assert kernel.traffic == (4 + 4 + 1) * BLOCK and kernel.operations == 2 * 128 * 512 * 128
    assert kernel.mxu == pytest.approx(kernel.operations / 197e12 / expected)
    assert (kernel.spills, kernel.fills, kernel.vmem, kernel.simulated_cycles) == (3, 6, 0x4000, 150)
    assert kernel.remarks == ["1 loops of unknown length count once"]


def test_time_of_a_kernel_whose_operands_are_on_the_chip(dumps):
    """No copies to wait for, nothing moved: its schedule alone."""
    kernel = figures.kernel("k.1", call_of(), dumps, V5E, on_chip=[True, True, True])
    assert kernel.traffic == kernel.latency == 0 and kernel.limit == "schedule"
    assert kernel.seconds == pytest.approx((4 * 35.5 + 2) / 1.5e9)


def test_time_of_a_kernel_that_moves_much(dumps):
    large = call_of()
    blocks = tuple(block._replace(bytes=2**24) for block in large.blocks)
    slow = V5E._replace(chip=V5E.chip._replace(bandwidth=1e9))
    slow = figures.kernel("k.1", large._replace(blocks=blocks), dumps, slow)
    assert slow.limit == "bandwidth" and slow.seconds == pytest.approx(9 * 2**24 / 0.9e9)


def test_cores_share_a_grid_with_a_parallel_axis(dumps):
    shared = figures.kernel("k.1", call_of(grid=(2, 1, 4)), dumps, V5P)
    assert (shared.steps, shared.cores) == (8, 2)
    assert not any("passes" in x for x in shared.remarks), "the schedule is that of a core: 4 steps"
    alone = figures.kernel("k.1", call_of(grid=(1, 1, 4)), dumps, V5P)
    assert alone.cores == 1, "its only parallel axes have one step"
    unlike = figures.kernel("k.1", call_of(grid=(4, 1, 4)), dumps, V5P)
    assert any("6 passes a core, 8 or 2 more were expected" in x for x in unlike.remarks)


def test_conditions_that_cannot_be_told_apart_count_as_if_they_held(dumps):
    kernel = figures.kernel("k.1", call_of()._replace(shares=(0.25, 0.5)), dumps, V5E)
    assert kernel.cycles == kernel.cycles_at_most == 37
    assert any("2 conditions in 1 branches" in x for x in kernel.remarks)


PROGRAM = """\
HloModule m, is_scheduled=true

%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %k.2 = f32[8,128]{1,0:T(8,128)} add(%x, %x)
}

%condition (p.1: (s32[], f32[8,128])) -> pred[] {
  %p.1 = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %n = s32[]{:T(128)} constant(10)
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[1024,1024]) -> f32[8,128] {
  %a = f32[1024,1024]{1,0:T(8,128)} parameter(0)
  %start = (f32[1024,1024]{1,0:T(8,128)S(1)}, f32[1024,1024]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
  %t = (s32[], f32[8,128]{1,0:T(8,128)}) tuple(%a)
  %w = (s32[], f32[8,128]{1,0:T(8,128)}) while(%t), condition=%condition, body=%body
  %end = f32[1024,1024]{1,0:T(8,128)S(1)} copy-done(%start)
  ROOT %o = f32[8,128]{1,0:T(8,128)} get-tuple-element(%w), index=1
}
"""


def test_time_of_a_program_with_a_loop_and_a_copy_beside_it(dumps):
    """The loop's instruction has the code of k.1; the copy of 4 MiB takes longer than the ten passes."""
    found = figures.program(PROGRAM, [], dumps, V5E)
    by_name = {part.name: part for part in found.parts}
    once = (2 + 4 * 37) / 1.5e9
    assert by_name["k.2"].times == 10 and by_name["k.2"].limit == "schedule"
    assert by_name["k.2"].seconds == pytest.approx(10 * once)
    copied = 2**22 / (0.9 * 0.819e12)
    assert by_name["start"].seconds == pytest.approx(copied)
    assert found.seconds == pytest.approx((2**22 + 10 * 3 * 2**12) / (0.9 * 0.819e12)), "its traffic in all"
    fast = V5E._replace(chip=V5E.chip._replace(bandwidth=1e14))
    assert figures.program(PROGRAM, [], dumps, fast).seconds == pytest.approx(10 * once), "the copy is hidden"


def test_kernels_are_paired_with_calls_by_their_arrays_and_names():
    lines = [
        "  %small.1 = bf16[128,128]{1,0} custom-call(%x, %x), custom_call_target=\"tpu_custom_call\"",
        "  %second.1 = bf16[256,256]{1,0} custom-call(%y, %y), custom_call_target=\"tpu_custom_call\"",
        "  %first.1 = bf16[256,256]{1,0} custom-call(%y, %second.1), custom_call_target=\"tpu_custom_call\"",
    ]
    head = ["ENTRY %main (x: bf16[128,128]) -> bf16[256,256] {", "  %x = bf16[128,128]{1,0} parameter(0)"]
    module = Module("\n".join([*head, "  %y = bf16[256,256]{1,0} parameter(1)", *lines, "}"]))

    def program(x, y):
        first = product(y, y, name="first")
        return product(x, x, name="small"), product(first, y, name="second")

    found = figures._paired(module, calls(program, shape(128, 128), shape(256, 256)))
    assert [(name, call.name) for name, call in found] == [
        ("small.1", "small"), ("second.1", "second"), ("first.1", "first")
    ]  # fmt: skip


# Cases.


def requests(backend, **sizes):
    each = cases.size(**{"tokens": 256, "length": 64, "heads": 2, "channels": 8, **sizes})
    return [cases.Request(case, direction, backend, each) for case in cases.CASES for direction in cases.DIRECTIONS]


@pytest.mark.parametrize("request_", requests("xla"), ids=lambda x: f"{x.case}, {x.direction}")
def test_every_case_can_be_traced(request_):
    def of(arrays):
        return [(x.shape, x.dtype) for x in arrays]

    built = request_.build()
    results = of(jax.tree.leaves(jax.eval_shape(built.function, *built.arguments)))
    inputs = of(request_._replace(direction="forward").build().arguments)
    wide = max(shape for shape, dtype in inputs if len(shape) == 3 and dtype == jnp.bfloat16)
    assert wide == (2, 64, 2 * 8), "as a projection gives it"
    output = [(wide, jnp.bfloat16)]
    assert results == {"forward": output, "backward": inputs, "both": output + inputs}[request_.direction]


def test_sizes_have_as_many_tokens_as_were_asked_for():
    sizes = [cases.size(131072, length, 16, 128) for length in (2048, 8192, 65536)]
    assert [(x.batch, x.heads) for x in sizes] == [(4, 16), (1, 16), (1, 2)]
    assert {x.token_heads for x in sizes} == {131072}


@pytest.mark.parametrize(
    ("generation", "cores", "forward", "backward"),
    [("v5e", 1, 165, 371), ("v5p", 2, 56, 159), ("v6e", 1, 82, 144)],
)
def test_bounds_of_linear_attention(generation, cores, forward, backward):
    """Of 131,072 tokens of one head, 128 channels, decay per token, in microseconds: worked out by hand."""
    device = figures.Device(generation, CHIPS[generation].of_device(cores), cores)
    for direction, expected in (("forward", forward), ("backward", backward)):
        each = cases.size(131072, 8192, 16, 128)
        built = cases.Request("linear_attention, scalar decay", direction, "xla", each).build()
        results = jax.tree.leaves(jax.eval_shape(built.function, *built.arguments))
        moved = array_bytes([*built.arguments, *results]) if built.bytes is None else built.bytes
        bound = figures.bound(built.operations, moved, device)
        assert round(1e6 * bound.seconds) == expected


def test_an_operator_without_a_kernel_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(aaren, "AAREN", dataclasses.replace(aaren.AAREN, kernels={}))
    each = cases.size(256, 64, 2, 8)
    with pytest.raises(InputError, match="aaren has no kernel for TPUs"):
        cases.Request("aaren", "forward", "pallas_tpu", each).build()


def test_directions_of_a_function_with_arguments_that_are_no_floats():
    def function(x, i, y):
        return jnp.sin(x[i]), y

    values = (jnp.arange(12.0).reshape(4, 3), jnp.array([2, 0]), jnp.ones(5))
    cotangents = (jnp.ones((2, 3)), jnp.full(5, 2.0))
    outputs, pullback = jax.vjp(lambda x, y: function(x, values[1], y), values[0], values[2])
    arguments = [shape(*x.shape, dtype=x.dtype) for x in values]

    both = build(function, arguments, "both")
    assert [x.shape for x in both.arguments] == [(4, 3), (2,), (5,), (2, 3), (5,)]
    found = both.function(*values, *cotangents)
    jax.tree.map(np.testing.assert_array_equal, found, (outputs, pullback(cotangents)))

    backward = build(function, arguments, "backward")
    assert [x.shape for x in jax.eval_shape(backward.function, *backward.arguments)] == [(4, 3), (5,)]
    assert backward.bytes == 4 * (12 + 2 + 5 + 6 + 5 + 12 + 5)
    # What the forward pass needs alone is not computed again.
    assert "sin" not in str(jax.make_jaxpr(backward.function)(*backward.arguments))
    assert "sin" in str(jax.make_jaxpr(both.function)(*both.arguments))


def test_every_generation_can_be_compiled_for():
    assert set(TOPOLOGIES) == set(figures.TIMING) == set(CHIPS)


# With the compiler.

KERNEL_FILE = '''
import os

import jax.numpy as jnp

from tests.unit.test_kernel_report import product as matmul


def product(x, y, block=128):
    return matmul(x, y, block=block)


def layers(x, w):
    return jnp.tanh(x @ w)


def end_the_process(x):
    os.abort()


def refuse(x):
    raise NotImplementedError("no such shape")
'''


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """A file of functions, as someone who writes kernels has it; returns its path."""
    from tests.test_architecture import REPOSITORY

    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    file = tmp_path / "my_kernels.py"
    file.write_text(KERNEL_FILE)
    return file


@needs_tpu_compiler
def test_a_compiled_kernel(kernels, here, tmp_path):
    """Of 8 steps, whose blocks and operations are known."""
    arguments = ["--arguments", "bf16[512,512] bf16[512,512]", "--set", "block=256", "--json", tmp_path / "k.json"]
    ended = here(kernel_report.main, "--function", f"{kernels}:product", *arguments, "--generations", "v5e")
    assert ended.code == EXIT_DONE, ended
    (found,) = json.loads((tmp_path / "k.json").read_text())
    (kernel,) = found["program"]["kernels"]
    assert kernel["grid"] == [2, 2, 2] and kernel["steps"] == 8 and kernel["times"] == 1
    assert kernel["operations"] == 2 * 512**3 == found["bound"]["operations"]
    assert kernel["traffic"] == (8 + 8 + 4) * 256 * 256 * 2
    assert found["bound"]["bytes"] == 3 * 512 * 512 * 2
    ideal = 2 * 256**3 / 131072
    assert ideal < kernel["cycles"] < kernel["cycles_at_most"] < 4 * ideal
    assert kernel["remarks"] == [], "its conditions and its loop were found"
    assert 0 < kernel["mxu"] < kernel["slots"]["MXU"] < 1
    assert kernel["vmem"] >= 256 * 256 * (2 * 3 * 2 + 4) - 2**18
    assert found["program"]["seconds"] >= found["bound"]["seconds"]
    assert f"{kernel['cycles']:,.0f} cycles a step" in ended.out and "8 steps" in ended.out


@needs_tpu_compiler
def test_programs_after_one_that_ends_the_compiler(kernels):
    def request(name, shapes="bf16[1024,1024]"):
        return FunctionRequest(f"{kernels}:{name}", shapes, {})

    wanted = [request("end_the_process"), request("layers", "bf16[1024,1024] bf16[1024,1024]"), request("refuse")]
    ended, compiled, refused = compile_all("v6e", wanted, simulate=False)
    assert "ended with code" in ended["error"]
    assert compiled["program"]["operations"] == 2 * 1024**3 and compiled["program"]["kernels"] == []
    assert compiled["program"]["seconds"] >= compiled["bound"]["seconds"] > 0
    assert refused["error"] == "NotImplementedError: no such shape" and "Traceback" in refused["message"]


# The command line and what it writes.


def result(seconds, *kernels):
    kernel = {
        "name": "forward.1", "times": 1, "grid": (4,), "steps": 4, "cores": 1, "cycles": 10.0, "cycles_at_most": 12.0,
        "latency": 5.0, "entry_cycles": 2.0, "simulated_cycles": None, "seconds": seconds, "operations": 1e9,
        "mxu": 0.5, "slots": {"MXU": 0.5}, "spills": 3.0, "fills": 7.0, "vmem": 2**20, "traffic": 2**21,
        "limit": "schedule", "remarks": [],
    }  # fmt: skip
    program = {"seconds": seconds, "kernels": [kernel | each for each in kernels], "parts": [], "unknown_loops": 0}
    bound = {"operations": 1e9, "bytes": 1e6, "seconds": 1e-5, "limit": "products"}
    return {"compile_seconds": 1.0, "bound": bound, "program": program}


NONE = {"error": "aaren has no kernel for TPUs", "message": "", "input_error": True}


@pytest.fixture
def rows():
    return [
        report.Row("delta", "forward", 2048, "v5e", result(2e-5, {}), result(8e-5)),
        report.Row("delta", "backward", 2048, "v5e", result(4e-5, {}, {"name": "dq.1"}), result(4e-5)),
        report.Row("aaren", "forward", 2048, "v5e", NONE, result(3e-5)),
        report.Row("aaren", "forward", 8192, "v5e", NONE, None),
    ]


def test_tables(rows):
    first, *_, last = report.programs_table(rows).rows
    assert first == ("delta, forward", "2,048", "v5e", "20.0", "10.0", "2.00", "80.0", "4.00")
    assert last == ("aaren, forward", "8,192", "v5e", "-", "-", "-", "-", "-")
    kernels = report.kernels_table(rows).rows
    assert [row[0] for row in kernels] == ["delta: forward.1", "delta: forward.1", "delta: dq.1"]
    assert report.missing(rows) == ["aaren has no kernel for TPUs (aaren; forward; 2,048, 8,192; v5e)"]
    assert "aaren has no kernel" in report.text(rows)


def test_a_program_as_text():
    text = report.program_text("v5e", "f, forward", result(2e-5, {}))
    assert "20.0 us; bound 10.0 us by products (50% of the time)" in text
    assert "10 cycles a step (12 if all conditions held)" in text and "spills 3 and fills 7" in text
    assert len(report.program_text("v5e", "f", result(2e-5, {}, {}), kernels_only=True).splitlines()) == 2


def test_cases_are_reported_and_written(here, tmp_path, monkeypatch):
    asked = []

    def compile_all(generation, requests, *, simulate):
        asked.append((generation, [request.backend for request in requests], simulate))
        return iter([result(2e-5, {}) if x.backend == "pallas_tpu" else result(6e-5) for x in requests])

    monkeypatch.setattr(kernel_report, "compile_all", compile_all)
    files = {name: tmp_path / f"k.{end}" for name, end in (("json", "json"), ("markdown", "md"), ("plot", "png"))}
    options = [x for name, file in files.items() for x in (f"--{name}", file)]
    options += ["--generations", "v4", "v6e", "--lengths", "2048", "--simulate"]
    ended = here(kernel_report.main, "--cases", "aaren", "delta_rule, scalar decay", *options)
    assert ended.code == EXIT_DONE, ended
    assert asked == [
        ("v4", ["pallas_tpu"] * 4, False),
        ("v4", ["xla"] * 4, False),
        ("v6e", ["pallas_tpu"] * 4, True),
        ("v6e", ["xla"] * 4, False),
    ]
    written = json.loads(files["json"].read_text())
    assert len(written["rows"]) == 8 and "jax" in written["environment"]["packages"]
    document = files["markdown"].read_text()
    assert "| aaren, backward | 2,048 | v6e | 20.0 | 10.0 | 2.00 | 60.0 | 3.00 |" in document
    assert document.count("<!-- kernels: begin -->") == 1 and "libtpu" in document
    assert files["plot"].stat().st_size > 1000


def test_a_function_that_is_not_compiled_ends_with_an_error(here, monkeypatch):
    refused = {"error": "ValueError: no such block", "message": "Traceback\nValueError: no such block"}
    monkeypatch.setattr(kernel_report, "compile_all", lambda *x, **y: iter([refused]))
    ended = here(kernel_report.main, "--function", "f.py:f", "--arguments", "f32[8]", "--generations", "v4", "v5e")
    assert ended.code == EXIT_DEFECT
    assert ended.out.count("NOT COMPILED\n    Traceback\n    ValueError: no such block") == 2
    monkeypatch.setattr(kernel_report, "compile_all", lambda *x, **y: iter([{**NONE, "error": "no file f.py"}]))
    ended = here(kernel_report.main, "--function", "f.py:f", "--arguments", "f32[8]", "--generations", "v4")
    assert ended.code == EXIT_INPUT and ended.err == "error: no file f.py\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--generations", "v6"], "--generations has 'v6', which does not exist; did you mean 'v6e'?"),
        (["--cases", "delta_rul"], "--cases has 'delta_rul', which does not exist; did you mean 'delta_rule'?"),
        (["--cases", "linear_attention, scalar decays"], "did you mean 'linear_attention, scalar decay'?"),
        (["--directions", "backwards"], "did you mean 'backward'?"),
        (["--lengths", "3000"], "--lengths has 3000, which does not divide the 131072 of --tokens"),
        (["--lengths", "0"], "--lengths has 0; expected at least 1"),
        (["--heads", "0"], "--heads is 0; expected at least 1"),
        (["--heads", "3"], "are no whole number of sequences of 2048 with 3 heads"),
        (["--function", "a:b"], "--function needs --arguments"),
        (["--arguments", "f32[8]"], "--arguments and --set are those of a --function"),
        (["--function", "a:b", "--arguments", "f32[8]", "--cases", "aaren"], "--cases is for our operators"),
        (["--function", "a:b", "--arguments", "f32[8]", "--set", "block"], "--set 'block': expected NAME=VALUE"),
        (["--generations", "h100", "v5e"], "--generations has h100 beside TPUs"),
        (["--generations", "h100", "--simulate"], "--simulate is for TPUs; expected it without h100"),
        (["--sizes", "128"], "--sizes has '128'; expected positions and KiB, as 128:1024"),
        (["--plot", "kernels.jpg"], "expected one of .png, .svg, .pdf"),
        (["--json", "/dev/null/kernels.json"], "cannot be written"),
    ],
)
def test_wrong_inputs(here, arguments, message):
    ended = here(kernel_report.main, *arguments)
    assert ended.code == EXIT_INPUT and message in ended.err, ended
    assert ended.err.count("\n") == 1, ended.err


@pytest.mark.parametrize(
    ("place", "shapes", "keywords", "message"),
    [
        ("product", "f32[8]", {}, "expected MODULE:FUNCTION"),
        ("no_such_module_here:f", "f32[8]", {}, "there is no module 'no_such_module_here'"),
        ("missing.py:f", "f32[8]", {}, "there is no file missing.py"),
        ("math:sine", "f32[8]", {}, "math has no 'sine'; did you mean 'sin'"),
        ("math:sin", "f32(8)", {}, "has 'f32(8)'; expected a type and sizes"),
        ("math:sin", "bf8[8]", {}, "of no known type; did you mean 'bf16'?"),
        ("math:sin", "f32[8]", {"block": "large"}, "--set block=large: expected a Python literal"),
    ],
)
def test_wrong_functions(place, shapes, keywords, message):
    with pytest.raises(InputError) as error:
        FunctionRequest(place, shapes, keywords).build()
    assert message in str(error.value)


@needs_tpu_compiler
def test_sizes_are_tried(here):
    ended = here(
        kernel_report.main, "--cases", "linear_attention, no decay", "--lengths", "512", "--tokens", "1024",
        "--heads", "2", "--generations", "v5e", "--directions", "forward", "--sizes", "128:64", "256:256",
    )  # fmt: skip
    assert ended.code == EXIT_DONE, ended.err
    assert "chunks of 128 in steps of 64 KiB" in ended.out and "chunks of 256 in steps of 256 KiB" in ended.out
    steps = [line.split()[-9] for line in ended.out.splitlines() if "linear_attention_forward" in line]
    assert len(set(steps)) == 2, ended.out


def test_without_the_compiler(here, monkeypatch):
    monkeypatch.setattr(kernel_report.importlib.util, "find_spec", lambda name: None)
    ended = here(kernel_report.main, "--cases", "aaren")
    assert ended.code == EXIT_INPUT and "the TPU compiler is not installed" in ended.err


def test_cases_are_listed(here):
    ended = here(kernel_report.main, "--list")
    assert ended.out.splitlines() == list(cases.CASES)


# Kernels for GPUs.

REMARKS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'body_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for body_mosaic_gpu_kernel
    72 bytes stack frame, 68 bytes spill stores, 72 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 72 bytes cumulative stack size, 1 bytes smem
"""
PASSES = """\
    %c128 = arith.constant 128 : index
    %c103472_i32 = arith.constant 103472 : i32
    %543 = gpu.launch async [%0] blocks(%arg2, %arg3, %arg4) in (%arg8 = %c2, %arg9 = %c4, %arg10 = %c1) \
threads(%arg5, %arg6, %arg7) in (%arg11 = %c128, %arg12 = %c1_0, %arg13 = %c1_1) \
dynamic_shared_memory_size %c103472_i32 {
    %c8_i32 = arith.constant 8 : i32
    %321 = gpu.launch async [%0] threads(%arg5) in (%arg11 = %c128) dynamic_shared_memory_size %c8_i32 {
"""


def test_what_the_compiler_writes_of_kernels_for_gpus(tmp_path):
    for name, registers in (("body_10", 94), ("body_9", 255)):
        (tmp_path / f"{name}.ptxas").write_text(REMARKS.replace("255", str(registers)))
        (tmp_path / f"{name}.ptx").write_text(".visible .entry body_mosaic_gpu_kernel(\n)\n.maxntid 128, 1, 1\n")
        (tmp_path / f"{name}.mlir-passes.log").write_text(PASSES)
    expected = hopper.Kernel("body", registers=255, spills=140, shared_memory=103472, threads=128)
    assert hopper.read(tmp_path) == [expected, expected._replace(registers=94)]


@pytest.mark.parametrize(
    ("registers", "shared_memory", "threads", "blocks"),
    [
        (94, 43024, 128, 5),  # by registers: 12,288 of a block
        (32, 75 << 10, 128, 3),  # by shared memory, of which a KiB more is taken
        (32, 0, 1024, 2),  # by threads
        (255, 0, 256, 1),
        (16, 0, 32, 32),
        (255, 0, 1024, 0),
    ],
)
def test_blocks_of_a_multiprocessor(registers, shared_memory, threads, blocks):
    assert hopper.Kernel("body", registers, 0, shared_memory, threads).blocks == blocks


def test_every_operator_with_a_kernel_for_gpus_is_a_case():
    reported = {case.partition(",")[0] for case in cases.CASES}
    assert {name for name, op in ops().items() if cases.GPU_KERNEL in op.kernels} <= reported


# Bytes of registers that a thread stores and loads, in all its code; those of linear attention are bounded in
# test_gpu_kernels. The memory's two states of 128 x 64 take all registers.
SPILLS = {
    "linear_attention, decay per channel": 0,
    "delta_rule, scalar decay": 0,
    "delta_rule, decay per channel": 0,
    "aaren": 0,
    "neural_memory, a matrix": 1200,
}


@needs_cuda_compiler
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(x, marks=[pytest.mark.slow] if x == "delta_rule, scalar decay" else [])
        for x in SPILLS
    ],
)
def test_registers_and_shared_memory_of_kernels_for_gpus(case):
    request_ = cases.Request(case, "both", cases.GPU_KERNEL, cases.size(512, 128, 2, 128))
    found = compile_on_hopper(request_)
    assert len(found["kernels"]) == 2, found
    for kernel in found["kernels"]:
        assert kernel["spills"] <= SPILLS[case], kernel
        assert kernel["shared_memory"] <= hopper.SHARED_MEMORY and kernel["blocks"] >= 1, kernel


@needs_cuda_compiler
def test_kernels_for_gpus_are_reported_and_written(here, tmp_path):
    document, figures_ = tmp_path / "k.md", tmp_path / "k.json"
    ended = here(
        kernel_report.main, "--generations", "h100", "--cases", "ssd, one group", "--tokens", "256", "--lengths", "128",
        "--heads", "2", "--channels", "64", "--directions", "forward",
        "--markdown", document, "--json", figures_,
    )  # fmt: skip
    assert ended.code == EXIT_DONE, ended.err
    written = {row["case"]: row for row in json.loads(figures_.read_text())["rows"]}
    found = written["ssd, one group"]["kernels"][-1]
    assert 0 < found["registers"] <= 255 and 0 < found["shared_memory"] <= hopper.SHARED_MEMORY
    assert f"| 128 | {found['registers']} | {found['spills']} |" in document.read_text()


@needs_cuda_compiler
def test_a_kernel_that_asks_for_too_much_shared_memory(here):
    ended = here(
        kernel_report.main, "--generations", "h100", "--function", f"{__file__}:much_shared_memory",
        "--arguments", "f32[128]",
    )  # fmt: skip
    assert ended.code == EXIT_DEFECT and "shared memory" in ended.out, ended


def much_shared_memory(x):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def body(x, o, space):
        space[0] = x[...]
        o[...] = space[0]

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM((1000, *x.shape), x.dtype)],
        grid=(1,),
        grid_names=("one",),
    )(x)
