"""The survey: what it calls a failure, how it counts, what it writes, how it ends."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.errors import InputError
from seqmodels.models import LanguageModel
from seqmodels.ops.linear_attention import LINEAR_ATTENTION
from seqmodels.registry import MIXERS
from seqmodels.tools._documents import put_section
from seqmodels.tools.survey import __main__ as program
from seqmodels.tools.survey import costs, decode, plots, precision, process, quickstart, report, train
from seqmodels.tools.survey.views import Table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def quiet(share: float, doing: str) -> None:
    assert 0 <= share <= 1 and doing


def trained(**changes) -> dict:
    losses = {"first_loss": 5.5, "last_loss": 4.0, "held_out_loss": 4.1}
    numbers = {"parameters": 10, "state_bytes": 8, "tokens_per_second": 1e3, "peak_bytes": 2**20}
    return {**losses, **numbers, "steps": 50, "exit_code": 0, "error": None, **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"last_loss": 5.6}, "does not fall"),
        ({"last_loss": float("nan")}, "not finite"),
        ({"first_loss": None, "last_loss": None}, "not finite"),
        ({"exit_code": 1, "error": "the loss is nan"}, "exit code 1: the loss is nan"),
    ],
)
def test_a_run_that_does_not_learn_is_a_failure(changes, words):
    results = {"good": trained(), "bad": trained(**changes)}
    (line,) = train.failures(results)
    assert line.startswith("bad: ") and words in line
    options = program._parser().parse_args(["train"])
    marks = [row[-1] for row in train.tables(results, options)[0].rows]
    assert marks == ["falls", "FAILED"]


def model_of(mixer: str) -> tuple[LanguageModel, dict]:
    model = LanguageModel(vocab_size=32, d_model=16, n_layers=1, pattern=(mixer,), mlp=None)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


@pytest.mark.parametrize("mixer", ["rglru", "softmax_attention"])
def test_decoding_tells_bytes_and_time_along_the_text(mixer):
    tokens, grows = 4 * decode.FEWEST, MIXERS[mixer].op.state_grows
    model, params = model_of(mixer)
    found = json.loads(json.dumps(decode.measure_model(model, params, tokens, quiet))) | {"declared_to_grow": grows}
    positions = [point["position"] for point in found["points"]]
    assert positions == sorted(set(positions)) and positions[-1] == tokens
    assert all(point["us"] > 0 for point in found["points"])
    sizes = {point["bytes"] for point in found["points"]}
    assert found["grows"] == grows == (len(sizes) > 1)
    if not grows:
        state = jax.eval_shape(lambda: model.initial_state(1))
        assert sizes == {sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))}
    assert decode.failures({mixer: found}) == []
    options = program._parser().parse_args(["decode", "--tokens", str(tokens)])
    (row,) = decode.tables({mixer: found}, options)[0].rows
    assert row[-1] == ("grows" if grows else "constant")


def test_a_state_that_changes_its_size_is_a_failure():
    points = [{"position": 2, "bytes": 8, "us": 1.0}, {"position": 9, "bytes": 12, "us": 1.0}]
    result = {"grows": False, "declared_to_grow": False, "points": points, "memory_growth": 0}
    assert decode.failures({"leaky": result}) == ["leaky: its state does not stay as large as it is: 8 to 12 bytes"]
    (line,) = decode.failures({"secret": {**result, "grows": True}})
    assert "does not declare" in line
    assert decode.failures({"cache": {**result, "grows": True, "declared_to_grow": True}}) == []


def test_errors_are_told_by_tenths():
    truth = np.ones((1, 40, 2))
    truth[0, 30:] = 4
    found = truth.copy()
    found[0, 5, 1] += 0.5
    found[0, 38, 0] -= 1
    assert precision.by_tenths(found, truth) == [0, 0.5, 0, 0, 0, 0, 0, 0, 0, 0.25]


def test_errors_of_low_precision_are_small_and_not_zero():
    found = precision.op_errors(LINEAR_ATTENTION, 40, quiet)
    ordinary = [name for name, x in LINEAR_ATTENTION.examples(jax.random.key(0), 1, 2).items() if not x.extreme]
    assert list(found) == ordinary
    assert all(0 < max(errors) < 1e-4 and len(errors) == 10 for errors in found.values())
    errors = precision.layer_errors(MIXERS["retention"].layer, 16, 40, quiet)["errors"]
    assert all(1e-4 < error < 0.2 for error in errors)


def test_an_error_that_is_not_a_number_is_a_failure():
    result = {"op": "an op", "op_errors": {"an example": [0.1, float("nan")]}, "layer_errors": [0.1, 0.2]}
    assert precision.failures({"bad": result}) == ["an op, an example: an error is not finite"]


def test_every_mixer_takes_the_place_of_the_quickstarts(tmp_path):
    for mixer in MIXERS:
        text = quickstart.write_config(mixer, tmp_path).read_text()
        assert f"include 'configs/mixers/{mixer}.gin'" in text
        assert text.count("configs/mixers/") == 1
    assert "train.batch_size" in text


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_table_of_the_readme_is_true(mixer):
    (row,) = re.findall(rf"^\| `{mixer}` \|(.*)\|$", README, re.MULTILINE)
    cells = [cell.strip() for cell in row.split("|")]
    assert tuple(cells[-len(costs.COLUMNS) :]) == costs.cost(MIXERS[mixer])


def test_costs_are_counted():
    """Of softmax attention by hand: four projections, and for a token the products with keys and with values: with all
    2,048 of them, and in training with those of its block of 128 and of the blocks before."""
    found = costs.cost(MIXERS["softmax_attention"])
    projections, a_key, mean = 4 * 2 * 512 * 512, 2 * 2 * 512, 128 * (1 + 16) / 2
    assert found.decode == f"{(projections + 2048 * a_key) / 1e6:.2f}"
    assert found.train == f"{3 * (projections + mean * a_key) / 1e6:.2f}"
    assert found.state_bytes == f"{2 * 512 * 4 + 4:,} a token"


def test_a_table_is_updated_where_it_stands(monkeypatch, tmp_path):
    counted = {"rglru": costs.Cost("r c", "8", "1.0", "3.0"), "retention": costs.Cost("r c p", "16", "2.0", "6.0")}
    monkeypatch.setattr(costs, "MIXERS", {name: name for name in MIXERS})
    monkeypatch.setattr(costs, "cost", counted.get)
    file = tmp_path / "table.md"
    titles = " | ".join(costs.COLUMNS)
    head = f"before\n\n| mixer | paper | {titles} |\n|---|---|---|---|---|---|\n"
    rows = "| `rglru` | a | r | 1 | 2 | 3 |\n| `retention` | b |\n| `aaren` | too | few | cells |\n"
    file.write_text(f"{head}{rows}\nafter\n")
    assert costs.update(file, ["rglru", "retention", "aaren", "based"]) == ["aaren", "based"]
    text = file.read_text()
    assert f"| `rglru` | a | {' | '.join(counted['rglru'])} |\n" in text
    assert f"| `retention` | b | {' | '.join(counted['retention'])} |\n" in text
    assert text.startswith(head) and text.endswith("| `aaren` | too | few | cells |\n\nafter\n")
    file.write_text("no table")
    with pytest.raises(InputError, match="has no table"):
        costs.update(file, ["rglru"])


def test_a_section_of_markdown_is_replaced(tmp_path):
    file = tmp_path / "survey.md"
    table = Table("a title", ("mixer", "number"), [("rglru", "7")])

    def put(view, heading):
        put_section(file, view, report.section(view, "a command", heading, "what", [table], [], ""), start=report.START)

    put("train", "first")
    put("decode", "second")
    put("train", "third \\1")
    text = file.read_text()
    assert "first" not in text
    assert text.index("third \\1") < text.index("second")
    assert text.count("| `rglru` | 7 |") == 2


def test_a_picture_is_drawn(tmp_path):
    points = [{"x": 1, "y": 2.0}, {"x": 4, "y": 3.0}]
    panels = [plots.Panel("a", "at", "y", 1), plots.Panel("b", "at", "y", 0.5)]
    for other in ("one", "two"):
        plots.draw(tmp_path / f"{other}.png", panels, {0: {"one": points}, 1: {other: points}}, x="x", log_x=True)
        assert (tmp_path / f"{other}.png").read_bytes().startswith(b"\x89PNG")


def test_a_process_is_heard_and_its_end_told(tmp_path):
    said = []
    script = "import sys; print('one'); print('two'); sys.exit('three')"
    ended = process.run(["-c", script], said.append, threads=1, folder=tmp_path)
    assert (said, ended.code, ended.errors) == (["one", "two"], 1, "three")
    assert ended.peak_bytes > 2**20


def test_a_worker_that_fails_says_why():
    with pytest.raises(RuntimeError, match="KeyError: 'no such operator'"):
        process.in_worker("operator precision", "no such operator", {"length": 10}, quiet)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--mixers", "retentoin"], "did you mean 'retention'"),
        (["train", "--steps", "1"], "--steps is 1; expected at least 2"),
        (["train", "--threads", "0"], "--threads is 0"),
        (["decode", "--tokens", "5"], "--tokens is 5"),
        (["precision", "--length", "3"], "--length is 3"),
        (["train", "--json", "/dev/null/file.json"], "--json /dev/null/file.json cannot be written"),
        (["decode", "--plot", "/dev/null/plot.png"], "--plot /dev/null/plot.png cannot be written"),
        (["decode", "--plot", "plot.jpeg"], "--plot plot.jpeg ends with '.jpeg'; expected one of .png, .svg, .pdf"),
        (["table", "--update", "/no/such/file.md"], "--update /no/such/file.md is not a file"),
    ],
)
def test_bad_arguments_are_one_line_before_anything_runs(arguments, words):
    with pytest.raises(InputError, match=re.escape(words)) as error:
        program.main(arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("view", [*program.VIEWS, "table"])
def test_help(view, capsys):
    with pytest.raises(SystemExit) as end:
        program.main([view, "--help"])
    assert end.value.code == 0
    assert "--mixers" in capsys.readouterr().out


def test_a_mixer_that_fails_leaves_the_others(monkeypatch, capsys, tmp_path):
    def measure(mixer, options, progress):
        if mixer == "retention":
            raise RuntimeError("its program ended:\nthe reason")
        return trained()

    monkeypatch.setitem(program.VIEWS, "train", train.VIEW._replace(measure=measure))
    file = tmp_path / "result.json"
    assert program.main(["train", "--mixers", "retention", "rglru", "--json", str(file)]) == 1
    assert "FAILED retention: the reason" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert list(found["results"]) == ["rglru"] and found["failures"] == ["retention: the reason"]


@pytest.mark.slow
def test_train_from_the_command_line(tmp_path, capsys):
    files = {name: tmp_path / f"result.{name}" for name in ("json", "markdown")}
    options = [x for name, file in files.items() for x in (f"--{name}", str(file))]
    assert program.main(["train", "--mixers", "rglru", "--steps", "10", *options]) == 0
    found = json.loads(files["json"].read_text())
    result = found["results"]["rglru"]
    assert result["first_loss"] > result["last_loss"] and found["failures"] == []
    assert result["tokens_per_second"] > 0 and result["peak_bytes"] > 2**20
    assert "falls" in files["markdown"].read_text()
    assert "falls" in capsys.readouterr().out
