"""A training step of two million tokens on 64 chips, by the way its shards exchange states: what the compiler says."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from seqmodels.tools.long_context.views import View, experiment

DESCRIPTION = """\
The training step of configs/experiments/two_million_tokens.gin, a model of 16 layers and 16 heads of 128 on one
sequence of 2,097,152 tokens, compiled for slices of 64 chips, which all split the sequence:

  LASP-2          lightning attention, exchange "prefix": the states of all shards, gathered once each way
  LASP-1          the same, exchange "hops": one state from shard to shard
  ring attention  softmax attention in the place of every lightning attention, exchange "ring"

Columns: what operators exchange (collectives; MiB that a device sends; ms on its links as published, and how many of
them beside other work); and bounds on a device's step in ms: products at the chip's peak, traffic to memory at full
bandwidth, and the schedule's instructions one after the other, each at its bound. Latency is in none of them. Of ring
attention every block of keys is counted for every query; a run skips the half that causality hides."""

TOPOLOGIES = ("v5e:8x8", "v5p:4x4x4")
LIGHTNING = "MiniMaxLightningAttention.exchange={!r}"
RING = ("LanguageModel.pattern=('softmax_attention',)", "SoftmaxAttention.num_heads=16")
WAYS: dict[str, tuple[str, ...]] = {
    "LASP-2": (LIGHTNING.format("prefix"),),
    "LASP-1": (LIGHTNING.format("hops"),),
    "ring attention": (*RING, "SoftmaxAttention.exchange='ring'"),
}
COLUMNS = (
    *("slice", "way", "collectives", "MiB sent", "link ms", "hidden ms"),
    *("compute ms", "memory ms", "schedule ms", "GiB of a device"),
)


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", nargs="+", default=TOPOLOGIES, metavar="SLICE", help="slices of 64 chips")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the compiler's reports there")


def measure(options: argparse.Namespace) -> list[Sequence[str]]:
    # The chips' module is to be imported before jax.
    from seqmodels.tools.compile_check.chips import generation_of, target

    for topology in options.topology:
        generation_of(topology)
    import jax

    from seqmodels import config
    from seqmodels.constructors import register_constructors
    from seqmodels.tools.compile_check import report as reports
    from seqmodels.tools.compile_check.check import check, gib
    from seqmodels.training import TrainingJob

    jax.config.update("jax_enable_compilation_cache", False)
    register_constructors()
    rows, found = [COLUMNS], []
    for topology in options.topology:
        for way, overrides in WAYS.items():
            config.parse([experiment("two_million_tokens")], list(overrides))
            report = check(TrainingJob(), target(topology))
            config.clear()
            print(reports.text(report), flush=True)
            found.append({"way": way, **reports.as_json(report)})
            if report.counts is None:
                rows.append((topology, way, report.error, *["-"] * (len(COLUMNS) - 3)))
                continue
            own = [x for x in report.counts.collectives if x.by == "operators"]
            times = [sum(x.seconds for x in own), sum(x.hidden_seconds for x in own)]
            times += [report.bounds[name] for name in ("compute", "memory", "schedule")]
            sent = sum(x.wire_bytes for x in own) / 2**20
            cells = (f"{sum(x.count for x in own):,}", f"{sent:,.0f}", *(f"{1e3 * t:,.1f}" for t in times))
            rows.append((topology, way, *cells, gib(report.memory.total)))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return rows


def draw(rows: list[Sequence[str]], file: Path) -> None:
    """Bytes and times of the ways side by side, a group of bars for each slice."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"MiB sent": "MiB that a device sends in a step", "link ms": "ms on a device's links"}
    panels |= {"schedule ms": "ms of a step, instructions at their bounds"}
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
    axes[0].legend(frameon=False)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


VIEW = View("two million tokens on 64 chips, by exchange, statically", DESCRIPTION, _add, measure, draw)
