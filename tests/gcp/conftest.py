import types
from collections.abc import Iterator

import pytest

from tests.gcp.fake_cloud import FakeCloud


@pytest.fixture
def cloud(tmp_path, monkeypatch) -> Iterator[FakeCloud]:
    """A cloud whose programs are all that is on PATH. Where a command waits, the next scene comes."""
    cloud = FakeCloud(tmp_path / "cloud")
    cloud.waited = []  # seconds

    def sleep(seconds: float) -> None:
        assert len(cloud.waited) < 100, "waits for ever"
        cloud.waited.append(seconds)
        cloud.tick()

    monkeypatch.setenv("PATH", str(cloud.programs))
    for module in ("gcp.watch", "gcp.queued"):
        monkeypatch.setattr(f"{module}.time", types.SimpleNamespace(sleep=sleep))
    yield cloud
    cloud.close()
