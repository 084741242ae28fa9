"""What long sequences cost, measured on short ones."""

import re

import pytest

from seqmodels.errors import EXIT_DONE, EXIT_INPUT
from seqmodels.tools.long_context import __main__ as long_context
from seqmodels.tools.long_context import exchanges, views

REPORT = [
    exchanges.COLUMNS,
    ("v5e:8x8", "LASP-2", "32", "2,016", "23.5", "11.7", "1,128.7", "641.6", "1,518.7", "8.64"),
    ("v5e:8x8", "LASP-1", "3,024", "3,024", "70.5", "1.0", "1,128.7", "641.6", "1,600.0", "8.64"),
    ("v5e:8x8", "ring attention", "RESOURCE_EXHAUSTED", *["-"] * 7),
]


def test_states_sent_in_float32_cost_nothing_and_in_bfloat16_they_do(here, tmp_path):
    file = tmp_path / "long.md"
    ended = here(long_context.main, "payload", "--length", "256", "--markdown", file)
    assert ended.code == EXIT_DONE, ended
    rows = re.findall(r"^\| ([^|]+) \| (outputs|gradients) \|(.*)\|$", file.read_text(), re.MULTILINE)
    assert len(rows) == 8
    for _, _, errors in rows:
        alone, float32, bfloat16, inputs = map(float, errors.split("|"))
        assert float32 < 3 * alone < 1e-4 < bfloat16 < inputs


def test_the_picture_of_exchanges(tmp_path):
    file = tmp_path / "picture.png"
    exchanges.draw(REPORT, file)
    assert file.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exchanges", "--topology", "v7:8x8"], "there is no TPU generation 'v7'"),
        (["exchanges", "--plot", "picture.txt"], "--plot picture.txt ends with '.txt'"),
        (["memory", "--markdown", "/dev/null/long.md"], "cannot be written"),
    ],
)
def test_wrong_inputs(here, arguments, message):
    ended = here(long_context.main, *arguments)
    assert ended.code == EXIT_INPUT and message in ended.err, ended


def test_outside_a_checkout(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="expected to run in the checkout"):
        views.experiment("million_tokens")
