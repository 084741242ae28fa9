"""Set-up of the whole test suite, made before jax is imported."""

import getpass
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

# Threads of linear algebra libraries fight for the cores that the test processes already use.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far longer than they compute. This drops optimisation of machine code, not of the program: sums
# keep their order and precision. Programs are kept for the next run.
flags = ["--xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):
    # The older of two code generators, which takes half the time. Later versions have one, and abort at this flag.
    flags.append("--xla_cpu_use_fusion_emitters=false")
# A device that waits for the others ends the process after this time: on a busy machine the default is too short.
flags.append("--xla_cpu_collective_call_terminate_timeout_seconds=600")
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("XLA_FLAGS", " ".join(flags))
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"seqmodels-tests-{getpass.getuser()}")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def _start_jax_with_eight_devices() -> None:
    """For meshes; what has no mesh runs on the first. Processes that a test starts have one, unless it says so."""
    flags = os.environ["XLA_FLAGS"]
    os.environ["XLA_FLAGS"] = f"{flags} {EIGHT_DEVICES}"
    import jax

    assert jax.device_count() == 8
    os.environ["XLA_FLAGS"] = flags


_start_jax_with_eight_devices()


@pytest.fixture(scope="session")
def gcs():
    """A bucket, gs://bucket, for this process and those that it starts. Every test has its own folder in it."""
    from tests.fake_gcs import FakeGCS

    with FakeGCS() as server:
        server.serve_this_process()
        yield server


@pytest.fixture(scope="session", autouse=True)
def one_device_for_jobs_that_name_no_mesh():
    """As in a process of their own."""
    import jax

    from seqmodels.training import DeviceMesh

    build, default = DeviceMesh.build, DeviceMesh()  # later, a config file may say what `DeviceMesh()` is

    def build_for_test(self, devices=None):
        return build(self, jax.devices()[:1] if self == default else devices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceMesh, "build", build_for_test)
        yield


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "xdist_group(name): tests that share compiled programs: for one worker"
    )
    if getattr(config.option, "dist", "no") == "load":
        config.option.dist = "loadgroup"


@pytest.fixture
def float64():
    """Arrays of float64 keep it."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture
def here(monkeypatch, capsys):
    """Run a program in this process: `here(program, *arguments)`."""
    from tests.program.programs import run_here

    return lambda program, *arguments: run_here(program, list(arguments), monkeypatch, capsys)
