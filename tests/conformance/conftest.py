"""Compiled programs live as long as the tests of their case."""

import jax
import pytest

from tests.conformance.cases import Case


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if _case(item) is not None and _case(item) is not _case(nextitem):
        for cached in (Case.span, Case.forward, Case.differentiated):
            cached.cache_clear()
        jax.clear_caches()


def _case(item: pytest.Item | None) -> Case | None:
    return item.callspec.params.get("case") if hasattr(item, "callspec") else None
