"""A training step of two million tokens on 64 chips, by the way its shards exchange states: what the compiler says."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seqmodels.errors import InputError
from seqmodels.tools.long_context.views import View, experiment

DESCRIPTION = """\
The training step of configs/long_context/two_million_tokens.gin, a model of 16 layers and 16 heads of 128 on one
sequence of 2,097,152 tokens, compiled for slices of 64 chips, which all split the sequence:

  LASP-2          lightning attention, exchange "prefix": the states of all shards, gathered once each way
  LASP-1          the same, exchange "hops": one state from shard to shard
  ring attention  softmax attention in the place of every lightning attention, exchange "ring"; the compiler is too slow
                  for it at this size, so one layer of one head is compiled at 65,536 tokens on the same slice, whose
                  messages are as many and whose bytes grow in proportion

Columns: what operators exchange (collectives; MiB that a device sends; ms on its links as published, and how many of
them beside other work); and bounds on a device's step in ms: products at the chip's peak, traffic to memory at full
bandwidth, and the schedule's instructions one after the other, each at its bound. Latency is in none of them. The
products of ring attention are those of scores and outputs alone, 6 T^2 d a layer, half of all pairs, both passes.

The paper measures 15.2% more throughput than LASP-1 and 36.6% more than ring attention, on 64 GPUs. What bytes and
links say is in the schedule's difference; that the messages of LASP-1 wait for each other, 63 in a row, each with its
latency, is not, so that the difference here is a lower bound. Ring attention is not comparable: the paper sends around
the keys and values of linear attention, whose products grow with T; those of softmax, here, grow with T^2."""

TOPOLOGIES = ("v5e:8x8", "v5p:4x4x4")
WAYS = {"LASP-2": "prefix", "LASP-1": "hops"}
RING_TOKENS = 65_536
RING = (
    "LanguageModel.pattern=('softmax_attention',)",
    "SoftmaxAttention.exchange='ring'",
    "SoftmaxAttention.num_heads=1",
    "LanguageModel.d_model=128",
    "LanguageModel.n_layers=1",
    f"train.seq_len={RING_TOKENS}",
)
COLUMNS = (
    *("slice", "way", "collectives", "MiB sent", "link ms", "hidden ms"),
    *("compute ms", "memory ms", "schedule ms", "GiB of a device"),
)


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", nargs="+", default=TOPOLOGIES, metavar="SLICE", help="slices of 64 chips")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the compiler's reports there")


def measure(options: argparse.Namespace) -> list[Sequence[str]]:
    # The chips' module is to be imported before jax.
    from seqmodels.tools.compile_check.chips import Target, generation_of, target  # isort: skip

    for topology in options.topology:
        generation_of(topology)
    import jax

    from seqmodels import config
    from seqmodels.constructors import register_constructors
    from seqmodels.tools.compile_check import report as reports
    from seqmodels.tools.compile_check.check import Report, check, gib
    from seqmodels.training import TrainingJob

    jax.config.update("jax_enable_compilation_cache", False)
    register_constructors()
    rows: list[Sequence[str]] = [COLUMNS]
    found = []

    def compiled(slices: Target, way: str, *overrides: str) -> tuple[TrainingJob, Report]:
        config.parse([experiment("two_million_tokens")], overrides)
        job = TrainingJob()
        report = check(job, slices)
        config.clear()
        print(reports.text(report), flush=True)
        found.append({"way": way, **reports.as_json(report)})
        if report.counts is None:
            raise InputError(f"{slices.name}, {way}: {report.error}")
        return job, report

    for topology in options.topology:
        slices = target(topology)
        for way, exchange in WAYS.items():
            job, report = compiled(slices, way, f"MiniMaxLightningAttention.exchange={exchange!r}")
            bounds = [f"{1e3 * report.bounds[name]:,.1f}" for name in ("compute", "memory", "schedule")]
            rows.append((topology, way, *_exchanged(report, 1, 1), *bounds, gib(report.memory.total)))
        _, report = compiled(slices, "ring attention", *RING)
        layers, width, length = job.model.n_layers, job.model.d_model, job.seq_len
        larger = layers * width // 128 * length // RING_TOKENS
        products = 6 * length**2 * width * layers / len(slices.devices) / slices.chip.flops
        cells = (*_exchanged(report, layers, larger)[:3], "-")  # what is hidden does not grow in proportion
        rows.append((topology, "ring attention", *cells, f"{1e3 * products:,.1f}", "-", "-", "-"))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return rows


def _exchanged(report: Any, more: int, larger: int) -> tuple[str, ...]:
    """Cells of what operators exchange: `more` times as many collectives, `larger` times the bytes."""
    own = [x for x in report.counts.collectives if x.by == "operators"]
    sent = larger * sum(x.wire_bytes for x in own) / 2**20
    times = [1e3 * larger * sum(getattr(x, name) for x in own) for name in ("seconds", "hidden_seconds")]
    return (f"{more * sum(x.count for x in own):,}", f"{sent:,.0f}", *(f"{time:,.1f}" for time in times))


def draw(rows: list[Sequence[str]], file: Path) -> None:
    """Bytes and times of the ways side by side, a group of bars for each slice."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"MiB sent": "MiB that a device sends in a step", "link ms": "ms on a device's links"}
    panels |= {"compute ms": "ms of a step's products at the peak"}
    slices, ways = (list(dict.fromkeys(row[i] for row in rows[1:])) for i in (0, 1))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(13, 4), layout="constrained")
    for (column, title), ax in zip(panels.items(), axes):
        for i, way in enumerate(ways):
            cells = [row[COLUMNS.index(column)] for row in rows[1:] if row[1] == way]
            values = [float(cell.replace(",", "")) if cell != "-" else 0.0 for cell in cells]
            bars = ax.bar([j + 0.27 * (i - 1) for j in range(len(slices))], values, 0.25, label=way)
            ax.bar_label(bars, labels=[f"{value:,.0f}" for value in values], fontsize=8)
        ax.set(xticks=range(len(slices)), xticklabels=slices, title=title, yscale="log")
        ax.margins(y=0.15)
        ax.grid(axis="y", alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ways), frameon=False)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


VIEW = View("two million tokens on 64 chips, by exchange, statically", DESCRIPTION, _add, measure, draw)
