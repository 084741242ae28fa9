"""gcp/README.md does not lie: its journey runs, its commands have real flags, and the files that it names are there."""

import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gcp.accelerators import SLICES
from gcp.cli import main
from gcp.job import make_job, read_job
from seqmodels.errors import EXIT_DONE
from tests.gcp.gcloud import lint, requires_gcloud
from tests.gcp.golden import EXAMPLES, golden_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "gcp" / "README.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
JOURNEY = [words[3:] for words in COMMANDS if words[:3] == ["python", "-m", "gcp"]]
# These take minutes, and have tests of their own.
LONG = ("local", "preflight")


@pytest.fixture
def here(monkeypatch):
    """At the root of the repository, where the commands are to be run."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_journey_runs_with_every_example(example, cloud, here, capsys, monkeypatch):
    for name in LONG:
        monkeypatch.setattr(importlib.import_module(f"gcp.{name}"), "run", lambda arguments: EXIT_DONE)
    monkeypatch.setattr("builtins.input", lambda question: "y")
    job = read_job(example)
    cloud.contexts = [f"gke_{job.project}_{job.location}_{job.cluster}"]
    ran = []
    for name, file, *flags in JOURNEY:
        assert (ROOT / file).is_file()
        capsys.readouterr()
        assert main([name, str(example), *flags]) == EXIT_DONE, (name, capsys.readouterr())
        if name == "plan":
            assert capsys.readouterr().out == golden_of(example).read_text()
        if name == "up":
            cloud.tick()
        ran.append(name)
    assert set(ran) >= {"check", "local", "preflight", "plan", "up", "status", "logs", "down"}
    made = [call for call in cloud.sent() if call == "kubectl create"]
    assert made == ["kubectl create"], "two `up` in the README are one job"


@pytest.mark.slow
def test_the_pod_of_this_machine_runs(tmp_path):
    (words,) = [words for words in JOURNEY if words[0] == "local"]
    words[words.index("--run_dir") + 1] = str(tmp_path / "run")
    done = subprocess.run([sys.executable, "-m", "gcp", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_DONE, done.stdout
    assert "finished: step 20" in done.stdout and (tmp_path / "run" / "DONE").exists()


@requires_gcloud
def test_every_command_of_gcloud_has_real_flags():
    commands = [words for words in COMMANDS if words[:1] == ["gcloud"]]
    assert len(commands) > 10
    assert not lint(commands)


def test_the_job_file_is_one():
    text = re.search(r"```toml\n(.*?)```", README, re.DOTALL).group(1)
    job = make_job(tomllib.loads(text.replace("sha256:...", f"sha256:{'0' * 64}")))
    assert (ROOT / job.config).is_file()


def test_the_node_pools_are_those_of_the_table():
    rows = re.findall(r"^\| (v\w+-\d+) \| (\S+) \| (\S+) \| (\d+) \|$", README, re.MULTILINE)
    assert len(rows) >= 3
    for name, machine_type, topology, hosts in rows:
        row = SLICES[name]
        assert (row.machine_type, row.topology, row.hosts) == (machine_type, topology, int(hosts))


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:configs|seqmodels|gcp)/[\w/]*\w+\.\w+", README))))
def test_files_exist(path):
    assert (ROOT / path).is_file()
