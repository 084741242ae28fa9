"""Compiled programs live as long as the tests of their case; `--law_table` writes down what became of every law."""

from pathlib import Path

import jax
import pytest

from tests.conformance.cases import Case
from tests.conformance.law_table import Recorder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--law_table",
        metavar="FILE",
        help='write the table of laws as markdown; complete with -m "slow or not slow"',
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("law_table", None)
    if path is None:
        return
    if Path(path).is_dir():
        raise pytest.UsageError(f"--law_table {path} is a folder; expected the name of a file")
    config.pluginmanager.register(Recorder(Path(path)), "law_table")


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if _case(item) is not None and _case(item) is not _case(nextitem):
        for cached in (Case.span, Case.forward, Case.differentiated):
            cached.cache_clear()
        jax.clear_caches()


def _case(item: pytest.Item | None) -> Case | None:
    return item.callspec.params.get("case") if hasattr(item, "callspec") else None
