"""The report of a sweep: what it picks, what it never drops, what its files hold, what its pictures show."""

import base64
import csv
import html.parser
import itertools
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from seqmodels.errors import InputError
from seqmodels.files import copy_folder
from seqmodels.tools import _pictures
from seqmodels.tools.report import __main__ as program
from seqmodels.tools.report import draw, events, tables
from seqmodels.tools.report.pictures import HeatMaps, Map
from seqmodels.tools.report.points import FAILED, FINISHED, NOT_BEGUN, UNFINISHED, read_sweep
from seqmodels.tools.report.report import Report, choose
from seqmodels.tools.report.selection import less_is_better, select
from seqmodels.training import Report as TrainingReport
from seqmodels.training.run_directory import RunDirectory

STEPS, EVERY, BATCH, LENGTH = 40, 10, 4, 16
MIXERS = ["softmax_attention", "based", "mamba2"]
RATES = [0.001, 0.003, 0.01]
ENVIRONMENT = [
    {
        "time": "2026-11-28T14:00:00+00:00",
        "command": ["python", "train.py"],
        "source": {"revision": "0123456789abcdef", "changed": [" M train.py"]},
        "python": "3.11.7",
        "platform": "Linux-x86_64",
        "processor": "a processor",
        "cores": 2,
        "devices": "4 x a chip",
        "packages": {"jax": "0.10.2", "numpy": "2.4.6", "zstandard": "1"},
    }
]


def write_point(folder: Path, axes: dict, order: dict, *, start: bool = True, **changes) -> Path:
    """What a sweep writes before a point runs, and what is there as soon as it has started."""
    name = "-".join(str(x).replace(" ", "_") for x in axes.values())
    point = {
        "name": name,
        "sweep": "configs/experiments/recall.gin",
        "question": ["# Question   Who recalls <8 & more?", "# Command    python -m ..."],
        "metric": "accuracy",
        "best_of": [axis for axis in order if axis == "learning_rate"],
        "axes": axes,
        "order": order,
        "bindings": [f"X.{axis} = {label!r}" for axis, label in axes.items()],
    }
    (folder / name).mkdir(parents=True)
    (folder / name / "point.json").write_text(json.dumps(point | changes))
    (folder / name / "config.gin").write_text("train.steps = 40\n")
    if start:
        sizes = {"batch_size": BATCH, "seq_len": LENGTH, "steps": STEPS}
        (folder / name / "operative_config.gin").write_text("".join(f"train.{x} = {y}\n" for x, y in sizes.items()))
        (folder / name / "environment.json").write_text(json.dumps(ENVIRONMENT))
    return folder / name


def train(path: Path, accuracy: float, *, first: int = 1, last: int = STEPS, loss: float = 1.0) -> None:
    """Rows as a run makes them from one step to another, by what makes them."""
    run = RunDirectory(path)
    run.tensorboard.mkdir(exist_ok=True)
    run.cut_metrics(first - 1)
    sizes = {"tokens_per_step": BATCH * LENGTH, "flops_per_token": None, "bytes_per_token": None}
    with TrainingReport(run, start=first - 1, steps=STEPS, every=EVERY, **sizes) as report:
        for step in range(first, last + 1):
            share = step / STEPS
            report.step(step, {"loss": loss / share, "accuracy": accuracy * share})
            if step % EVERY == 0:
                report.evaluation(step, {"loss": loss / share, "accuracy": accuracy * share, "sinks": 0.5})
    run.close()


def finish(path: Path, accuracy: float, *, width: int = 32, loss: float = 1.0) -> Path:
    train(path, accuracy, loss=loss)
    (path / "DONE").write_text(json.dumps({"step": STEPS, "metrics": {}}))
    layer = {"mixer": "based", "training_flops_per_token": 6.0, "decoding_flops_per_token": 2.0}
    mixers = [
        {"layer": i, "state_bytes": width * width * (1 + 2 * i), "state_grows": i == 1, **layer} for i in range(2)
    ]
    costs = {"parameters": 100 * width, "seq_len": LENGTH, "flops_per_token": 1000.0 * width, "mixers": mixers}
    (path / "costs.json").write_text(json.dumps(costs))
    return path


def make_sweep(folder: Path, order: dict, accuracy, **changes) -> Path:
    """Every point finished, with the accuracy that a function of its axes says; None leaves it where it began."""
    for labels in itertools.product(*order.values()):
        axes = dict(zip(order, labels))
        path, value = write_point(folder, axes, order, **changes), accuracy(**axes)
        if value is not None:
            finish(path, value, width=axes.get("d_model", 32), loss=2 - value)
    return folder


def add_evaluation(path: Path, suite: str, **content) -> None:
    (path / "evaluations").mkdir(exist_ok=True)
    whole = {"suite": suite, "step": STEPS, "arguments": {}, "units": {}, **content}
    (path / "evaluations" / f"{suite}.json").write_text(json.dumps(whole))
    (path / "evaluations" / "evaluated.json").write_text(json.dumps({suite: f"{suite} --lengths 8"}))


def rows_of(folder: Path, metric: str | None = None):
    return select(read_sweep(folder, metric))


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


ORDER = {"mixer": MIXERS, "d_model": [32, 64], "learning_rate": RATES, "seed": [0, 1, 2]}


def accuracy(mixer, d_model, learning_rate, seed):
    best = {"softmax_attention": 0.01, "based": 0.003, "mamba2": 0.001}[mixer]
    return round(0.3 + d_model / 200 - 0.2 * abs(math.log10(learning_rate / best)) + 0.01 * seed**2, 6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep that has finished, with evaluations; nobody changes it."""
    folder = make_sweep(tmp_path_factory.mktemp("sweep"), ORDER, accuracy)
    for path in folder.iterdir():
        seed, rate = (json.loads((path / "point.json").read_text())["axes"][x] for x in ("seed", "learning_rate"))
        rows = [{"length": n, "perplexity": n * rate + seed, "says": "x"} for n in (16, 32, 64)]
        add_evaluation(path, "perplexity", x="length", units={"length": "tokens"}, rows=rows)
    return folder


@pytest.fixture(scope="module")
def written(whole, tmp_path_factory):
    """The folder of its report, pictures of three kinds."""
    out = tmp_path_factory.mktemp("report")
    names = ["accuracy_by_state_bytes", "loss_by_seconds", "perplexity"]
    assert program.main([str(whole), "--out", str(out), "--pictures", *names]) == 0
    return out


# What is picked


def test_the_best_is_that_with_the_best_mean_over_seeds(whole):
    rows = rows_of(whole)
    assert [tuple(row.axes.values()) for row in rows] == list(itertools.product(MIXERS, [32, 64]))
    for row in rows:
        means = {rate: np.mean([accuracy(**row.axes, learning_rate=rate, seed=s) for s in range(3)]) for rate in RATES}
        assert row.best == {"learning_rate": max(means, key=means.get)}
        assert row.mean == pytest.approx(max(means.values()))


def test_of_a_loss_the_least_is_the_best(tmp_path):
    order = {"mixer": ["based"], "learning_rate": RATES}
    make_sweep(tmp_path, order, lambda mixer, learning_rate: {0.001: 0.2, 0.003: 0.9, 0.01: 0.5}[learning_rate])
    for metric in (None, "loss"):
        (row,) = rows_of(tmp_path, metric)
        assert row.best == {"learning_rate": 0.003}
    assert row.mean == pytest.approx(1.1)
    names = {"loss": True, "bigram_excess": True, "bits_per_byte": True, "perplexity": True, "macro_accuracy": False}
    assert {name: less_is_better(name) for name in names} == names


def test_a_best_value_at_the_edge_of_what_was_tried_is_told(whole, written):
    edges = {row.axes["mixer"]: list(row.edges) for row in rows_of(whole)}
    assert edges == {"softmax_attention": ["learning_rate"], "based": [], "mamba2": ["learning_rate"]}
    marked = {row["mixer"]: row["at an edge"] for row in read_csv(written / "summary.csv")}
    assert marked == {"softmax_attention": "learning_rate", "based": "", "mamba2": "learning_rate"}
    text = (written / "report.md").read_text()
    assert "| 0.01 (edge) |" in text and "| 0.003 |" in text and "| 0.001 (edge) |" in text


@pytest.mark.parametrize(("failed", "edge"), [(False, True), (True, False)])
def test_beyond_the_best_a_point_that_failed_is_an_outcome_and_one_that_goes_on_is_not(tmp_path, failed, edge):
    order = {"mixer": ["based"], "learning_rate": RATES}
    known = {0.001: 0.2, 0.003: 0.9, 0.01: None}
    make_sweep(tmp_path, order, lambda mixer, learning_rate: known[learning_rate])
    if failed:
        (tmp_path / "based-0.01" / "FAILED").write_text(json.dumps({"reason": "ended with 1", "says": []}))
    (row,) = rows_of(tmp_path)
    assert (row.best, bool(row.edges)) == ({"learning_rate": 0.003}, edge)
    assert (row.finished, row.of) == (2, 3)


def test_a_value_with_which_seeds_failed_is_not_the_best(tmp_path):
    order = {"mixer": ["based"], "learning_rate": RATES, "seed": [0, 1]}
    # The luckiest of all runs, whose like failed.
    known = {0.001: (0.5, 0.6), 0.003: (0.7, 0.7), 0.01: (0.99, None)}
    make_sweep(tmp_path, order, lambda mixer, learning_rate, seed: known[learning_rate][seed])
    (row,) = rows_of(tmp_path)
    assert (row.best, row.mean) == ({"learning_rate": 0.003}, pytest.approx(0.7))


def test_state_is_told_by_layer_also_where_a_layer_has_several_mixers(tmp_path):
    make_sweep(tmp_path, {"mixer": ["based"]}, lambda mixer: 0.5)
    file = tmp_path / "based" / "costs.json"
    costs = json.loads(file.read_text())
    costs["mixers"] = [{**costs["mixers"][0], "layer": layer, "state_bytes": 100 + layer} for layer in (0, 0, 1, 1)]
    file.write_text(json.dumps(costs))
    (row,) = rows_of(tmp_path)
    assert row.points[0].per_layer("state_bytes") == (100 + 100 + 101 + 101) / 2


def test_names_have_no_edge(tmp_path):
    make_sweep(tmp_path, {"mixer": MIXERS}, lambda mixer: 0.5, best_of=["mixer"])
    (row,) = rows_of(tmp_path)
    assert (row.best, row.edges) == ({"mixer": MIXERS[0]}, [])


def test_the_spread_over_seeds_is_numpys(whole, written):
    for row in read_csv(written / "summary.csv"):
        axes = {
            "mixer": row["mixer"],
            "d_model": int(row["d_model"]),
            "learning_rate": float(row["best learning_rate"]),
        }
        values = [accuracy(**axes, seed=seed) for seed in range(3)]
        expected = np.mean(values), np.min(values), np.max(values), np.std(values, ddof=1)
        found = [row[f"accuracy{name}"] for name in ("", " min", " max", " standard deviation")]
        np.testing.assert_allclose([float(x) for x in found], expected, rtol=1e-12)
        assert row["seeds"] == "3"


def test_a_result_that_is_not_a_number_is_never_the_best(tmp_path):
    order = {"mixer": ["based"], "learning_rate": RATES}
    known = {0.001: math.nan, 0.003: 0.1, 0.01: math.nan}
    make_sweep(tmp_path, order, lambda mixer, learning_rate: known[learning_rate])
    (row,) = rows_of(tmp_path)
    assert row.best == {"learning_rate": 0.003}


# What has not finished


def test_every_point_that_has_not_finished_is_named_and_counts_for_nothing(tmp_path, capsys):
    order = {"mixer": MIXERS, "d_model": [32, 64]}
    for mixer in MIXERS[:2]:
        finish(write_point(tmp_path, {"mixer": mixer, "d_model": 32}, order), 0.5)
    train(write_point(tmp_path, {"mixer": MIXERS[0], "d_model": 64}, order), 0.99, last=20)
    broken = write_point(tmp_path, {"mixer": MIXERS[1], "d_model": 64}, order)
    train(broken, 0.98, last=10)
    why = {"program": "train.py", "code": 1, "reason": "train.py ended with 1", "says": ["error: the loss is nan"]}
    (broken / "FAILED").write_text(json.dumps(why))
    (tmp_path / "based-32" / "FAILED").write_text(json.dumps(why | {"reason": "tools.evaluate ended with 2"}))
    write_point(tmp_path, {"mixer": MIXERS[2], "d_model": 32}, order, start=False)

    assert program.main([str(tmp_path), "--no_pictures"]) == 0
    lines = [
        "softmax_attention-64: unfinished, step 20 of 40",
        "based-32: finished, tools.evaluate ended with 2: error: the loss is nan",
        "based-64: failed, step 10 of 40: train.py ended with 1: error: the loss is nan",
        "mamba2-32: not begun",
        "mixer mamba2, d_model 64: not begun",
    ]
    texts = [
        capsys.readouterr().out,
        *((tmp_path / "report" / name).read_text() for name in ("report.md", "report.html")),
    ]
    for line, text in itertools.product(lines, texts):
        assert line in text
        assert "6 points: 2 finished, 1 unfinished, 1 failed, 2 not begun" in text
    found = {row["point"]: row["status"] for row in read_csv(tmp_path / "report" / "points.csv")}
    assert list(found.values()) == [FINISHED, UNFINISHED, FINISHED, FAILED, NOT_BEGUN, NOT_BEGUN]
    summary = read_csv(tmp_path / "report" / "summary.csv")
    assert [row["accuracy"] for row in summary] == ["0.5", "", "0.5", "", "", ""]
    assert [row["finished"] for row in summary] == ["1", "0", "1", "0", "0", "0"]


def test_a_sweep_whose_runs_have_not_been_evaluated_has_a_report(tmp_path):
    write_point(tmp_path, {"mixer": "based"}, {"mixer": MIXERS})
    assert program.main([str(tmp_path)]) == 0
    assert "3 points: 2 not begun, 1 unfinished" in (tmp_path / "report" / "report.md").read_text()


def test_points_of_a_sweep_that_was_extended_are_one_sweep(tmp_path):
    for order in ({"mixer": MIXERS[:2], "d_model": [32]}, {"mixer": MIXERS[:1], "d_model": [16, 32, 64]}):
        axes = {"mixer": order["mixer"][-1], "d_model": order["d_model"][-1]}
        finish(write_point(tmp_path, axes, order), 0.5)
    sweep = read_sweep(tmp_path)
    assert sweep.order == {"mixer": MIXERS[:2], "d_model": [16, 32, 64]}
    there = [(*point.axes.values(), point.status) for point in sweep.points]
    first, second = MIXERS[:2]
    assert there == [(first, 16, NOT_BEGUN), (first, 32, NOT_BEGUN), (first, 64, FINISHED), (second, 32, FINISHED)]


# What the files hold


def test_a_copy_of_the_run_directories_alone_has_the_same_report(whole, written, tmp_path):
    for path in whole.iterdir():
        if (path / "point.json").exists():
            shutil.copytree(path, tmp_path / "elsewhere" / path.name)
    assert program.main([str(tmp_path / "elsewhere"), "--pictures", "accuracy_by_state_bytes"]) == 0
    out = tmp_path / "elsewhere" / "report"
    for name in ("points.csv", "results.csv", "summary.csv", "accuracy_by_state_bytes.png"):
        assert (out / name).read_bytes() == (written / name).read_bytes(), name
    assert program.main([str(whole), "--out", str(tmp_path / "again"), "--pictures", "accuracy_by_state_bytes"]) == 0
    for name in ("report.md", "report.html"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_a_sweep_that_was_killed_has_the_results_of_one_that_was_not(tmp_path):
    order = {"mixer": MIXERS[:1], "learning_rate": RATES[:2]}
    for name in ("undisturbed", "killed"):
        make_sweep(tmp_path / name, order, lambda mixer, learning_rate: 0.25 + learning_rate)
    path = tmp_path / "killed" / "softmax_attention-0.003"
    shutil.rmtree(path / "tensorboard")
    (path / "metrics.jsonl").unlink()
    value = 0.25 + 0.003
    train(path, value, last=27, loss=2 - value)  # its last checkpoint is that of step 20
    train(path, value, first=21, loss=2 - value)
    (path / "environment.json").write_text(
        json.dumps([*ENVIRONMENT, {**ENVIRONMENT[0], "time": "2027-01-01T00:00:00"}])
    )
    for name in ("undisturbed", "killed"):
        assert program.main([str(tmp_path / name), "--no_pictures"]) == 0
    reports = [tmp_path / name / "report" for name in ("undisturbed", "killed")]
    for file in ("results.csv", "summary.csv"):
        one, other = (report.joinpath(file).read_bytes() for report in reports)
        assert one == other and len(one) > 100
    assert reports[0].joinpath("points.csv").read_bytes() != reports[1].joinpath("points.csv").read_bytes()
    assert "2026-11-28 to 2027-01-01" in reports[1].joinpath("report.md").read_text()
    assert "(3 starts)" in reports[1].joinpath("report.md").read_text()


def test_numbers_of_a_csv_are_those_of_the_runs(whole, written):
    rows = read_csv(written / "points.csv")
    assert len(rows) == math.prod(map(len, ORDER.values()))
    for row in rows:
        width = int(row["d_model"])
        expected = {
            "accuracy": accuracy(row["mixer"], width, float(row["learning_rate"]), int(row["seed"])),
            "parameters": 100 * width,
            "state_bytes_per_layer": 2 * width * width,  # the mean of two layers
            "forward_flops_per_token": 1000 * width,
            "mixer_training_flops_per_token": 6,
            "mixer_decoding_flops_per_token": 2,
            "step": STEPS,
            "tokens": STEPS * BATCH * LENGTH,
            "training_flops": 3 * 1000 * width * STEPS * BATCH * LENGTH,
        }
        assert {name: float(row[name]) for name in expected} == expected
        assert float(row["loss"]) == pytest.approx(2 - expected["accuracy"], abs=1e-12)
        assert float(row["seconds"]) > 0 and float(row["tokens_per_second"]) > 0
        assert (row["state_grows"], row["status"], row["reason"]) == ("True", FINISHED, "")
    without = read_csv(written / "results.csv")
    assert [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows] == without


def test_an_axis_may_have_the_name_of_a_column(tmp_path):
    make_sweep(tmp_path, {"mixer": MIXERS[:1], "step": [7]}, lambda mixer, step: 0.5)
    table = tables.points(read_sweep(tmp_path), times=False)
    row = dict(zip(table.columns, table.rows[0]))
    assert (row["step"], row["step (run)"]) == (7, STEPS)


class _Page(html.parser.HTMLParser):
    """Everything that a page would load, its pictures, and the cells of its tables."""

    def __init__(self, text: str):
        super().__init__()
        self.loads: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.loads += [given[name] for name in ("src", "href", "action", "data", "srcset") if name in given]
        assert tag not in ("link", "iframe", "object", "embed", "base")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag == "td":
            self.tables[-1][-1].append(given["data-value"])


def test_the_page_needs_nothing_from_outside(written):
    text = (written / "report.html").read_text()
    page = _Page(text)
    assert len(page.loads) == 3 and all(x.startswith("data:image/png;base64,") for x in page.loads)
    pictures = [base64.b64decode(x.partition(",")[2]) for x in page.loads]
    assert sorted(pictures) == sorted(file.read_bytes() for file in written.glob("*.png"))
    assert not re.search(r"https?://|url\(|@import|fetch\(", re.sub(r'src="data:[^"]*"', "", text))
    for words in (
        "Who recalls &lt;8 &amp; more?",
        "seqmodels 0123456789ab with local changes",
        "jax 0.10.2",
        "4 x a chip, a processor, 2 cores, Linux-x86_64",
    ):
        assert words in text
    assert "--sweep_dir DIR" in text and "seconds of compute" in text and "(54 starts)" in text


def test_tables_of_the_page_are_sorted_by_numbers_and_not_by_how_they_are_written(written):
    summary, points = _Page((written / "report.html").read_text()).tables
    rows = read_csv(written / "summary.csv")
    names = ["mixer", "d_model", "best learning_rate", "accuracy", "loss", "parameters", "state_bytes_per_layer"]
    assert [cells[: len(names)] for cells in summary[1:]] == [[row[name] for name in names] for row in rows]
    rows = read_csv(written / "points.csv")
    assert [cells[:7] for cells in points[1:]] == [list(row.values())[:7] for row in rows]


def test_a_section_of_a_document_has_the_summary_and_its_pictures_beside_it(whole, tmp_path):
    file = tmp_path / "docs" / "recall.md"
    name = "accuracy_by_width"
    arguments = [str(whole), "--out", str(tmp_path / "out"), "--markdown", str(file), "--pictures", name]
    for _ in range(2):
        assert program.main(arguments) == 0
    text = file.read_text()
    assert text.startswith("# Recall\n") and text.count("## recall") == 1 and text.count("| based | 32 |") == 1
    assert f"]({file.stem}_{name}.png)" in text
    assert (tmp_path / "docs" / f"recall_{name}.png").read_bytes() == (tmp_path / "out" / f"{name}.png").read_bytes()


def test_seconds_add_up_over_starts_and_a_later_start_hides_the_steps_behind_it(tmp_path):
    path = write_point(tmp_path, {"mixer": "based"}, {"mixer": MIXERS})
    train(path, 0.5, last=30)
    once = events.read_times(path / "tensorboard")
    assert list(once.speeds) == [10, 20, 30]
    train(path, 0.5, first=11)
    twice = events.read_times(path / "tensorboard")
    assert sorted(twice.speeds) == [10, 20, 30, 40] and twice.seconds > once.seconds
    assert twice.speeds[10] == once.speeds[10] and twice.speeds[20] != once.speeds[20]
    train(path, 0.5, first=21, last=30)
    assert sorted(events.read_times(path / "tensorboard").speeds) == [10, 20, 30]
    last = max((path / "tensorboard").iterdir(), key=lambda file: file.name)
    last.write_bytes(last.read_bytes()[: last.read_bytes().rindex(events.SPEED.encode())])
    assert sorted(events.read_times(path / "tensorboard").speeds) == [10, 20]


def test_the_clock_of_a_curve_counts_training_alone():
    times = events.Times(100.0, {20: 50.0, 30: 10.0, 40: 20.0})
    assert times.clock([1, 20, 40], 10) == pytest.approx([0.5, 0.5 + 3.8, 0.5 + 3.8 + 10])
    assert events.NO_TIMES.clock([1], 10) is None


# What the pictures show


def test_which_pictures_there_are_follows_from_the_axes(whole, tmp_path):
    report = Report.of(read_sweep(whole))
    curves = [f"{name}_by_{x}" for name in ("accuracy", "loss") for x in ("tokens", "flops", "seconds")]
    names = [picture.name for picture in report.pictures]
    assert names == ["accuracy_by_state_bytes", "accuracy_by_width", *curves, "perplexity"]
    make_sweep(tmp_path, {"mixer": MIXERS, "seq_len": [16, 32]}, lambda mixer, seq_len: 0.5)
    names = [picture.name for picture in Report.of(read_sweep(tmp_path)).pictures]
    assert names == ["accuracy_by_state_bytes", "accuracy_by_length", *curves]


def drawn(folder: Path, name: str):
    (picture,) = choose(Report.of(read_sweep(folder)), [name]).pictures
    return picture, draw.figure(picture)


def labelled(ax) -> dict:
    return {line.get_label(): line for line in ax.get_lines() if not line.get_label().startswith("_")}


def test_the_metric_against_bytes_has_a_line_for_each_mixer_through_its_widths(whole):
    _, figure = drawn(whole, "accuracy_by_state_bytes")
    (ax,) = figure.axes
    assert (ax.get_xlabel(), ax.get_xscale()) == ("state per layer and sequence (bytes)", "log")
    assert ax.get_ylabel() == "accuracy (share of positions), held out"
    lines = labelled(ax)
    assert list(lines) == MIXERS
    assert [text.get_text() for text in figure.legends[0].get_texts()] == MIXERS
    for mixer, line in lines.items():
        rows = [row for row in rows_of(whole) if row.axes["mixer"] == mixer]
        assert list(line.get_xdata()) == [2 * 32**2, 2 * 64**2]
        np.testing.assert_allclose(line.get_ydata(), [row.mean for row in rows])
    bars = ax.containers
    assert len(bars) == len(MIXERS)  # from the least to the most over seeds


def test_curves_have_panels_for_other_axes_and_shades_for_seeds(whole):
    picture, figure = drawn(whole, "loss_by_flops")
    assert [ax.get_title() for ax in figure.axes] == ["d_model 32", "d_model 64"]
    assert figure.axes[0].get_ylabel() == "loss (nats per position), held out"
    for ax, width in zip(figure.axes, (32, 64)):
        assert ax.get_xlabel() == "training compute (FLOPs)"
        assert list(labelled(ax)) == MIXERS and len(ax.collections) == len(MIXERS)
        tokens = np.arange(EVERY, STEPS + 1, EVERY) * BATCH * LENGTH
        for line in labelled(ax).values():
            np.testing.assert_allclose(line.get_xdata(), 3 * 1000.0 * width * tokens)
    low, high = (getattr(picture.panels[0].lines[0], end) for end in ("low", "high"))
    values = [2 - accuracy(MIXERS[0], 32, 0.01, seed) for seed in range(3)]
    assert (low[-1], high[-1]) == (pytest.approx(min(values)), pytest.approx(max(values)))


def test_an_evaluation_is_drawn_over_its_x(whole):
    picture, figure = drawn(whole, "perplexity")
    ax = figure.axes[0]
    assert (ax.get_xscale(), ax.get_ylabel()) == ("log", "perplexity")
    assert figure.axes[-1].get_xlabel() == "length (tokens)"
    line = labelled(ax)[MIXERS[1]]
    assert list(line.get_xdata()) == [16, 32, 64]
    np.testing.assert_allclose(line.get_ydata(), [n * 0.003 + 1 for n in (16, 32, 64)])
    assert "mean over seeds" in picture.caption


def needle(mixer: str, with_y: bool) -> dict:
    rows = [{"length": n, "depth": d, "score": 50.0 + d} for n in (64, 128) for d in (0, 25, 50, 100)]
    return {"x": "length", "units": {"length": "tokens", "score": "%"}, "rows": rows} | (
        {"y": "depth"} if with_y else {}
    )


@pytest.mark.parametrize("with_y", [True, False])
def test_an_evaluation_with_two_keys_is_a_map_for_each_run(tmp_path, with_y):
    make_sweep(tmp_path, {"mixer": MIXERS[:2]}, lambda mixer: 0.5)
    for mixer in MIXERS[:2]:
        add_evaluation(tmp_path / mixer, "needle", **needle(mixer, with_y))
    (picture,) = [x for x in Report.of(read_sweep(tmp_path)).pictures if x.name.startswith("needle")]
    assert isinstance(picture, HeatMaps)
    values = [[50, 50], [75, 75], [100, 100], [150, 150]]
    assert picture.maps[1] == Map("based", [64, 128], [0, 25, 50, 100], values)
    figure = draw.figure(picture)
    first, second, bar = figure.axes
    assert (first.get_title(), second.get_title()) == ("softmax_attention", "based")
    assert (first.get_xlabel(), first.get_ylabel(), bar.get_ylabel()) == ("length (tokens)", "depth", "score (%)")
    np.testing.assert_array_equal(second.get_images()[0].get_array(), values)


def test_a_key_that_is_no_number_gives_pictures_and_a_row_may_lack_a_number(tmp_path):
    make_sweep(tmp_path, {"mixer": MIXERS[:1]}, lambda mixer: 0.5)
    rows = [{"length": n, "task": task, "score": n} for n in (8, 16) for task in ("a b", "c")]
    add_evaluation(tmp_path / MIXERS[0], "recall", x="length", y=None, rows=[*rows[:3], {"length": 16, "task": "c"}])
    found = {x.name: x for x in Report.of(read_sweep(tmp_path)).pictures if x.name.startswith("recall")}
    assert list(found) == ["recall_score_a_b", "recall_score_c"]
    (line,) = found["recall_score_c"].panels[0].lines
    assert (list(line.x), list(line.y)) == ([8], [8])


def test_what_is_not_known_is_left_out_and_not_guessed(tmp_path):
    make_sweep(tmp_path, {"mixer": MIXERS[:2]}, lambda mixer: 0.5)
    for mixer in MIXERS[:2]:
        (tmp_path / mixer / "costs.json").unlink()
        shutil.rmtree(tmp_path / mixer / "tensorboard")
    names = [picture.name for picture in Report.of(read_sweep(tmp_path)).pictures]
    assert names == ["accuracy_by_tokens", "loss_by_tokens"]
    assert program.main([str(tmp_path), "--no_pictures"]) == 0
    assert {row["parameters"] + row["seconds"] for row in read_csv(tmp_path / "report" / "points.csv")} == {""}


def test_21_lines_differ_without_their_colours_and_with_them():
    looks = [draw.look(i) for i in range(21)]
    assert len({(x.marker, x.filled) for x in looks}) == 21
    assert len({(x.colour, x.dashes) for x in looks}) == 21


def test_names_of_ticks_are_powers_of_two():
    assert [_pictures.bytes_text(x) for x in (512, 2**10, 3 * 2**20, 2**31)] == ["512 B", "1 KiB", "3 MiB", "2 GiB"]
    assert [draw._size(x) for x in (64, 1000, 1024, 2**17, 2**21, 0.5)] == ["64", "1,000", "1k", "128k", "2M", "0.5"]
    assert _pictures._powers([9_000, 190_000], 5) == [2.0**power for power in range(14, 18)]
    assert draw._apart([64, 65, 128, 1024], 4) == [64, 128, 1024]


# What is refused


def damaged(folder: Path, file: str, text: str) -> None:
    make_sweep(folder, {"mixer": MIXERS[:1]}, lambda mixer: 0.5)
    path = folder / MIXERS[0] / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("point.json", '{\n "name": "a",\n}', "point.json, line 3: expected JSON"),
        ("point.json", '{"name": "a"}', "point.json: expected 'sweep', a str, found None"),
        ("costs.json", '{"mixers":\n', "costs.json, line 2: expected JSON"),
        ("costs.json", "[]", "costs.json, line 1: expected an object, found '[]'"),
        ("environment.json", "{}", "environment.json, line 1: expected a list"),
        ("DONE", "", "DONE, line 1: expected JSON"),
        ("metrics.jsonl", '{"step": 1}\n{"loss": 1}\n', "metrics.jsonl, line 2: expected a JSON object with a step"),
        (
            "evaluations/x.json",
            '{"x": "n", "rows": [{"n": 1}, {"m": 2}]}',
            "x.json: expected rows with 'n', found {'m': 2}",
        ),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path, file, text, words):
    damaged(tmp_path, file, text)
    with pytest.raises(InputError, match=re.escape(words)) as error:
        program.main([str(tmp_path)])
    assert "\n" not in str(error.value) and not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{}/nowhere"], "has no points: no folder in it has a point.json"),
        (["{}/softmax_attention"], "is one point of a sweep; expected the folder above it"),
        (["{}", "--metric", "acuracy"], "has the metric 'acuracy'; did you mean 'accuracy'?"),
        (["{}", "--pictures", "accuracy_by_tokns"], "--pictures has 'accuracy_by_tokns'"),
        (["{}", "--markdown", "/dev/null/file.md"], "--markdown /dev/null/file.md cannot be written"),
        (["{}", "--out", "/dev/null/report"], "cannot write /dev/null/report"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, arguments, words):
    make_sweep(tmp_path, {"mixer": MIXERS[:1]}, lambda mixer: 0.5)
    with pytest.raises(InputError, match=re.escape(words)) as error:
        program.main([*(x.format(tmp_path) for x in arguments), *(["--no_pictures"] if "--out" in arguments else [])])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "order", "words"),
    [
        (
            {"sweep": "other.gin"},
            {"mixer": MIXERS},
            "sweep is 'configs/experiments/recall.gin' in based and 'other.gin'",
        ),
        ({"metric": "loss"}, {"mixer": MIXERS}, "metric is 'accuracy' in based and 'loss' in mamba2"),
        ({}, {"mixer": MIXERS, "seed": [1]}, "the axes are mixer in based and mixer, seed in mamba2-1"),
    ],
)
def test_points_of_different_sweeps_are_refused(tmp_path, changes, order, words):
    write_point(tmp_path, {"mixer": "based"}, {"mixer": MIXERS})
    write_point(tmp_path, {"mixer": "mamba2", **{axis: 1 for axis in order if axis != "mixer"}}, order, **changes)
    with pytest.raises(InputError, match="points of different sweeps") as error:
        read_sweep(tmp_path)
    assert words in str(error.value)


def test_a_copied_point_is_refused(tmp_path):
    make_sweep(tmp_path, {"mixer": MIXERS[:1]}, lambda mixer: 0.5)
    shutil.copytree(tmp_path / MIXERS[0], tmp_path / "copy")
    with pytest.raises(InputError, match="copy and softmax_attention are the same point"):
        read_sweep(tmp_path)


def test_without_matplotlib_there_are_tables_and_a_word_about_pictures(tmp_path, monkeypatch):
    make_sweep(tmp_path, {"mixer": MIXERS[:1]}, lambda mixer: 0.5)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"need matplotlib: install it with .*--no_pictures"):
        program.main([str(tmp_path)])
    assert not (tmp_path / "report").exists()
    assert program.main([str(tmp_path), "--no_pictures"]) == 0
    assert sorted(os.listdir(tmp_path / "report")) == [
        "points.csv", "report.html", "report.md", "results.csv", "summary.csv",
    ]  # fmt: skip


def test_a_sweep_in_a_bucket_has_the_same_report(gcs, tmp_path):
    make_sweep(tmp_path, {"mixer": MIXERS[:2]}, lambda mixer: 0.5)
    add_evaluation(tmp_path / MIXERS[0], "perplexity", x="length", rows=[{"length": 8, "loss": 2.0}])
    copy_folder(tmp_path, "gs://bucket/sweep_with_report")
    for folder in ("gs://bucket/sweep_with_report", str(tmp_path)):
        assert program.main([folder, "--no_pictures"]) == 0
    for name in ("points.csv", "report.md", "report.html"):
        assert gcs.objects[f"sweep_with_report/report/{name}"] == (tmp_path / "report" / name).read_bytes()


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        program.main(["--help"])
    assert end.value.code == 0
    assert "--markdown" in capsys.readouterr().out
