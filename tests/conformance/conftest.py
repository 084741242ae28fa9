"""Compiled programs live as long as the tests of their case or operator; `--law_table` writes down what became of laws.

(A process may map so many pieces of memory, 65,530 on Linux, and every compiled program takes some: beyond, it dies.)
"""

from pathlib import Path

import jax
import pytest

from seqmodels.ops._op import SeqOp
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
    if _subject(item) is not None and _subject(item) is not _subject(nextitem):
        for cached in (Case.span, Case.forward, Case.differentiated):
            cached.cache_clear()
        jax.clear_caches()


def _subject(item: pytest.Item | None) -> Case | SeqOp | None:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("case", parameters.get("op"))
