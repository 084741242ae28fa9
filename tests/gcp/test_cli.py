"""The command line against a cloud of its own: what is sent, when nothing is, and what a person is told."""

import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
import types
from pathlib import Path

import pytest

from gcp.cli import COMMANDS, main
from gcp.gke import Gke
from gcp.job import make_job
from gcp.job_text import is_same_job, is_same_run, job_of_text
from gcp.programs import Answer
from gcp.queued import Queued
from seqmodels.errors import EXIT_DEFECT, EXIT_DONE, EXIT_INPUT, InputError
from tests.gcp.gcloud import lint, requires_gcloud
from tests.gcp.jobs import EVERYTHING, job

JOB = f"""\
name = "gla"
config = "configs/quickstart.gin"
gin = ["train.steps=100", "train.batch_size=64"]
tpu = "v5e-16"
capacity = "spot"
project = "my-project"
image = "us-docker.pkg.dev/p/r/seqmodels@sha256:{"0" * 64}"
out = "gs://my-bucket/runs"
max_restarts = 3
"""
GKE = JOB + 'location = "us-west4"\ncluster = "pods"\n'
QUEUED = JOB + 'location = "us-west4-a"\nbackend = "queued_resources"\n'
PATH = os.environ["PATH"]
RUN = "gs://my-bucket/runs/gla"
BACKENDS = {"gke": GKE, "queued_resources": QUEUED}


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.fixture
def command(tmp_path, capsys):
    """Run a command on a job file with this text; returns its exit code and all that it printed."""

    def run(name: str, text: str, *flags: str) -> tuple[int, str]:
        file = tmp_path / "job.toml"
        file.write_text(text)
        try:
            code = main([name, str(file), *flags])
        except InputError as error:
            assert "\n" not in str(error)
            print(f"error: {error}")
            code = EXIT_INPUT
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def text_of(job_file: str) -> str:
    return make_job(tomllib.loads(job_file)).text()


NOT_LOGGED_IN = "ERROR: (gcloud.x) You do not currently have an active account selected.\nPlease run:\n"
# A JobSet that waits, with lists of nothing in the same object.
FOUND = json.dumps(
    {
        "metadata": {"creationTimestamp": ""},
        "spec": {"replicatedJobs": [{"replicas": 1, "template": {"spec": {"parallelism": 4}}}]},
        "items": [],
    }
)
CREATE = {
    "gke": "kubectl create",
    "queued_resources": "gcloud compute tpus queued-resources create",
}
DELETE = {
    "gke": "kubectl delete",
    "queued_resources": "gcloud compute tpus queued-resources delete",
}


# What sends, and what does not


@pytest.mark.parametrize("name", ["plan", "status", "logs"])
def test_nothing_is_sent_by_commands_that_look(name, backend, cloud, command):
    command(name, BACKENDS[backend])
    assert not cloud.sent()


def test_plan_and_a_dry_run_run_no_program(backend, cloud, command):
    _, planned = command("plan", BACKENDS[backend])
    assert command("up", BACKENDS[backend], "--dry_run") == (EXIT_DONE, planned)
    assert not cloud.calls


def test_up_sends_a_job_once(backend, cloud, command):
    code, printed = command("up", BACKENDS[backend])
    assert code == EXIT_DONE and "16 chips" in printed and "16 chip hours an hour" in printed
    assert cloud.sent().count(CREATE[backend]) == 1
    cloud.calls.clear()
    code, printed = command("up", BACKENDS[backend])
    assert code == EXIT_DONE and "already there" in printed
    assert not cloud.sent()


def test_up_tells_what_goes_on_costing_money(cloud, command):
    _, printed = command("up", QUEUED)
    assert "goes on costing money, until `down` deletes it, or a `watch`" in printed


def test_what_up_runs_is_what_plan_prints(backend, cloud, command):
    _, planned = command("plan", BACKENDS[backend])
    command("up", BACKENDS[backend])
    (made,) = [call for call in cloud.calls if call.startswith(CREATE[backend])]
    flags = {word for word in made.split() if "metadata-from-file" not in word}
    assert flags <= set(planned.split())


def test_kubectl_is_always_told_the_cluster_and_the_namespace(cloud, command):
    for name in ("up", "status", "logs", "up"):
        command(name, GKE)
    command("down", GKE, "--yes")
    calls = [call for call in cloud.calls if call.startswith("kubectl")]
    assert len(calls) > 6
    assert all("--context gke_my-project_us-west4_pods --namespace default" in call for call in calls)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_kubectl_knows_all_flags(tmp_path):
    """Of a cluster that is not known, it says so only after it has read the command line."""
    gke = Gke(make_job(tomllib.loads(GKE)))
    recorded = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gcp.gke.run", lambda command, **_: recorded.append(command) or Answer(command, 0, FOUND, ""))
        gke.observe()
        gke.send()
        gke.delete()
    recorded.append(gke.logs_command(follow=True, slice=0, host=0))
    assert len(recorded) == 6
    for words in [*recorded, gke.command("get", "jobset", "--no_such_flag")]:
        environment = {"KUBECONFIG": str(tmp_path / "none"), "HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        said = subprocess.run(words, env=environment, input="", capture_output=True, text=True, check=False).stderr
        assert ("unknown flag" if "--no_such_flag" in words else f'context "{gke.context}" does not exist') in said


def test_a_key_that_only_a_person_reads_may_change(backend, cloud, command):
    command("up", BACKENDS[backend])
    cloud.calls.clear()
    code, printed = command("up", BACKENDS[backend] + "hours = 3\n")
    assert code == EXIT_DONE and "already there" in printed
    assert not cloud.sent()


def test_another_job_under_the_same_name_is_refused_with_a_difference(backend, cloud, command):
    command("up", BACKENDS[backend])
    cloud.calls.clear()
    code, printed = command("up", BACKENDS[backend].replace("steps=100", "steps=200"))
    assert code == EXIT_INPUT
    assert '-gin = ["train.steps=100"' in printed and '+gin = ["train.steps=200"' in printed
    assert "another name" in printed
    assert not cloud.sent()


def test_another_job_after_the_first_was_taken_down_is_refused_too(backend, cloud, command):
    command("up", BACKENDS[backend])
    command("down", BACKENDS[backend], "--yes")
    cloud.calls.clear()
    other = BACKENDS[backend].replace("steps=100", "steps=200")
    for flags in ([], ["--resume"]):
        code, printed = command("up", other, *flags)
        assert code == EXIT_INPUT and "+gin" in printed and "another name" in printed
    assert not cloud.sent()


def test_another_job_may_take_the_name_of_one_that_trained_nothing(backend, cloud, command):
    cloud.tell(["no capacity" if backend == "gke" else "WAITING_FOR_RESOURCES"])
    command("up", BACKENDS[backend])
    command("down", BACKENDS[backend], "--yes")
    other = BACKENDS[backend].replace("steps=100", "steps=200")
    assert command("up", other)[0] == EXIT_DONE
    assert "steps=200" in cloud.file(f"{RUN}/logs/job.txt").read_text()


def test_other_machines_go_on_with_a_run_only_when_asked_to(backend, cloud, command):
    command("up", BACKENDS[backend])
    other = BACKENDS[backend].replace("v5e-16", "v5e-32")
    code, printed = command("up", other)
    assert code == EXIT_INPUT and "`down` first" in printed
    command("down", other, "--yes")
    code, printed = command("up", other)
    assert code == EXIT_INPUT and "--resume" in printed
    assert not cloud.jobs
    code, printed = command("up", other, "--resume")
    assert code == EXIT_DONE and '+tpu = "v5e-32"' in printed
    assert len(cloud.places("gla")) == 1


def test_a_job_that_is_finished_is_not_sent_again(backend, cloud, command):
    cloud.tell(["running", "done"])
    command("up", BACKENDS[backend])
    cloud.tick()
    cloud.calls.clear()
    code, printed = command("up", BACKENDS[backend])
    assert code == EXIT_DONE and "finished" in printed
    command("down", BACKENDS[backend], "--yes")
    cloud.calls.clear()
    code, printed = command("up", BACKENDS[backend])
    assert code == EXIT_DONE and "finished, at step 100" in printed
    assert not cloud.sent()


def test_a_job_that_somebody_else_makes_meanwhile_is_told_of(cloud, command):
    cloud.race(text_of(GKE))
    code, printed = command("up", GKE)
    assert code == EXIT_DONE and "already there" in printed
    assert cloud.sent().count("kubectl create") == 1
    command("down", GKE, "--yes")


def test_another_job_that_somebody_makes_meanwhile_is_refused(cloud, command):
    cloud.race(text_of(GKE.replace("steps=100", "steps=200")))
    code, printed = command("up", GKE)
    assert code == EXIT_INPUT and "-gin" in printed
    assert "steps=200" in cloud.file(f"{RUN}/logs/job.txt").read_text()


def test_a_failed_job_is_sent_again_only_when_asked_to(backend, cloud, command):
    cloud.tell(["running", "bug"], ["running"])
    command("up", BACKENDS[backend])
    cloud.tick()
    cloud.calls.clear()
    code, printed = command("up", BACKENDS[backend])
    assert code == EXIT_DEFECT and "a defect" in printed and "--again" in printed
    assert not cloud.sent()
    assert command("up", BACKENDS[backend], "--again")[0] == EXIT_DONE
    assert cloud.sent()[0] == DELETE[backend]
    code, printed = command("status", BACKENDS[backend])
    assert code == EXIT_DONE and "running" in printed


@pytest.mark.parametrize("scene", ["running", "done"])
def test_again_leaves_a_job_that_runs_or_is_finished(scene, backend, cloud, command):
    cloud.tell(["running", scene])
    command("up", BACKENDS[backend])
    cloud.tick()
    cloud.calls.clear()
    assert command("up", BACKENDS[backend], "--again")[0] == EXIT_DONE
    assert not cloud.sent()


def test_again_leaves_a_failed_job_of_another_file(backend, cloud, command):
    cloud.tell(["running", "bug"])
    command("up", BACKENDS[backend])
    cloud.tick()
    cloud.calls.clear()
    for flags in (["--again"], ["--again", "--resume"]):
        code, printed = command("up", BACKENDS[backend].replace("steps=100", "steps=200"), *flags)
        assert code == EXIT_INPUT and "another name" in printed
    assert not cloud.sent()


@pytest.mark.parametrize("change", [("0" * 64, "1" * 64), ("v5e-16", "v5e-32")], ids=["image", "machines"])
def test_again_sends_a_failed_job_with_what_mends_it(change, backend, cloud, command):
    cloud.tell(["running", "bug"], ["running"])
    command("up", BACKENDS[backend])
    mended = BACKENDS[backend].replace(*change)
    code, printed = command("up", mended, "--again")
    assert code == EXIT_INPUT and "`down` first" in printed, "it runs"
    cloud.tick()
    code, printed = command("up", mended)
    assert code == EXIT_INPUT and "`up --again`" in printed
    assert command("up", mended, "--again")[0] == EXIT_DONE
    assert cloud.file(f"{RUN}/logs/job.txt").read_text() == text_of(mended)
    code, printed = command("status", mended)
    assert code == EXIT_DONE and "running" in printed and "note" not in printed


@pytest.mark.parametrize("scene", ["running", "bug"])
def test_what_up_did_not_make_is_left_alone(scene, backend, cloud, command):
    cloud.tell([scene])
    command("up", BACKENDS[backend])
    if backend == "gke":
        del cloud.job("gla")["manifest"]["metadata"]["annotations"]
    else:
        del cloud.job("gla")["node"]["metadata"]
    cloud.calls.clear()
    for name, *flags in (["up"], ["up", "--again"], ["down", "--yes"]):
        code, printed = command(name, BACKENDS[backend], *flags)
        assert code == EXIT_INPUT and "not made by `up`" in printed
    assert not cloud.sent()


def test_what_hosts_said_before_is_not_taken_for_what_they_do_now(cloud, command):
    cloud.tell(["running", "bug"], ["booting"])
    command("up", QUEUED)
    cloud.tick()
    command("up", QUEUED, "--again")
    code, printed = command("status", QUEUED)
    assert code == EXIT_DONE and "state        waiting" in printed and "4 silent" in printed


def test_what_may_change_when_a_run_goes_on():
    text = text_of(GKE)
    changes = {
        "config": ("quickstart", "base"),
        "gin": ("steps=100", "steps=200"),
        "out": ("my-bucket", "other-bucket"),
        "tpu": ("v5e-16", "v5e-32"),
        "image": ("0" * 64, "1" * 64),
        "capacity": ("spot", "on-demand"),
    }
    added = {
        "slices": "slices = 2",
        "program": 'program = "other.py"',
        "data": '[data]\n"/data" = "gs://my-bucket/data"',
        "env": '[env]\nX = "1"',
        "namespace": 'namespace = "team"',
        "hours": "hours = 3",
    }
    others = {key: text_of(GKE.replace(*change)) for key, change in changes.items()}
    others |= {key: text_of(f"{GKE}{line}\n") for key, line in added.items()}
    assert {key for key, other in others.items() if not is_same_run(text, other)} == {
        *("config", "gin", "out", "slices", "program", "data")
    }
    assert {key for key, other in others.items() if is_same_job(text, other)} == {"hours"}


# One run, and two places


ELSEWHERE = {
    "gke": GKE.replace("us-west4", "us-east5"),
    "queued_resources": QUEUED.replace("us-west4-a", "us-east5-a"),
    "the other backend": GKE,
}
BEFORE = {**BACKENDS, "the other backend": QUEUED}
CONTEXTS = [f"gke_my-project_{location}_pods" for location in ("us-west4", "us-east5")]


@pytest.fixture(params=ELSEWHERE)
def move(request, cloud) -> tuple[str, str]:
    """A job file, and the same with another place; there is a cluster in both."""
    cloud.contexts = CONTEXTS
    return BEFORE[request.param], ELSEWHERE[request.param]


@pytest.mark.parametrize("scene", ["waits", "running"])
@pytest.mark.parametrize("flags", [[], ["--resume", "--again"]])
def test_a_job_is_not_sent_to_a_second_place(scene, flags, move, cloud, command):
    before, after = move
    waits = "WAITING_FOR_RESOURCES" if before == QUEUED else "no capacity"
    cloud.tell([{"waits": waits}.get(scene, scene)])
    command("up", before)
    there = cloud.places("gla")
    cloud.calls.clear()
    code, printed = command("up", after, *flags)
    assert code == EXIT_INPUT and not cloud.sent()
    where = "a queued resource in us-west4-a" if before == QUEUED else "the cluster pods in us-west4"
    assert where in printed and {"waits": "waiting"}.get(scene, scene) in printed and "down JOB.toml" in printed
    assert cloud.places("gla") == there


def test_status_names_the_place_where_a_job_was_sent(move, cloud, command):
    before, after = move
    assert "last sent" not in command("status", after)[1]
    command("up", before)
    assert "last sent" not in command("status", before)[1]
    code, printed = command("status", after)
    where = "a queued resource in us-west4-a" if before == QUEUED else "the cluster pods in us-west4"
    assert code == EXIT_INPUT and f"it was last sent to {where}" in printed


def test_down_takes_a_job_down_where_it_was_sent(move, cloud, command):
    before, after = move
    command("up", before)
    code, printed = command("down", after, "--yes")
    assert code == EXIT_DONE and "gla is gone" in printed
    assert not cloud.jobs
    assert command("up", after)[0] == EXIT_INPUT, "it has trained elsewhere"
    there = cloud.places("gla")
    assert command("up", after, "--resume")[0] == EXIT_DONE
    assert (there, len(cloud.places("gla"))) == ([], 1)


def test_down_names_the_place_before_it_takes_a_job_down(cloud, command, monkeypatch):
    cloud.contexts = CONTEXTS
    command("up", GKE)
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "n")
    assert command("down", ELSEWHERE["gke"])[0] == EXIT_INPUT
    assert "the cluster pods in us-west4, namespace default, project my-project" in asked[0] and len(asked) == 1
    assert len(cloud.places("gla")) == 1


def test_namespaces_are_places(cloud, command):
    command("up", GKE)
    code, printed = command("up", GKE + 'namespace = "team"\n')
    assert code == EXIT_INPUT and "namespace default" in printed
    assert len(cloud.places("gla")) == 1


def test_a_job_that_has_ended_in_one_place_goes_on_in_another(cloud, command):
    cloud.contexts = CONTEXTS
    cloud.tell(["running", "bug"], ["running"])
    command("up", GKE)
    cloud.tick()
    assert command("up", ELSEWHERE["gke"], "--resume")[0] == EXIT_DONE
    assert len(cloud.places("gla")) == 2
    code, printed = command("up", GKE)
    assert code == EXIT_INPUT and "the cluster pods in us-east5" in printed


def test_a_queued_resource_whose_machines_may_be_there_or_made_again_has_not_ended(cloud, command):
    after = ELSEWHERE["queued_resources"]
    cloud.tell(["running", "SUSPENDED", "bug"])
    command("up", QUEUED)
    for state in ("suspended", "failed"):
        cloud.tick()
        code, printed = command("up", after, "--resume")
        assert code == EXIT_INPUT and state in printed
    assert len(cloud.places("gla")) == 1


@pytest.mark.parametrize("foreign", [True, False])
def test_another_job_of_that_name_in_the_former_place_is_left_alone(foreign, cloud, command):
    """One that writes another run, or that `up` did not make."""
    cloud.contexts = CONTEXTS
    command("up", GKE)
    command("down", GKE, "--yes")
    command("up", GKE.replace("my-bucket", "other-bucket"))
    if foreign:
        del cloud.job("gla")["manifest"]["metadata"]["annotations"]
    assert command("up", ELSEWHERE["gke"], "--resume")[0] == EXIT_DONE
    command("down", ELSEWHERE["gke"], "--yes")
    cloud.file(f"{RUN}/logs/job.txt").write_text(text_of(GKE))
    assert command("down", ELSEWHERE["gke"], "--yes")[0] == EXIT_DONE
    assert cloud.places("gla") == [f"{CONTEXTS[0]}/default"]


def test_a_former_place_that_cannot_be_seen_sends_nothing(cloud, command):
    command("up", GKE)
    cloud.contexts = CONTEXTS[1:]
    cloud.calls.clear()
    code, printed = command("up", ELSEWHERE["gke"])
    assert code == EXIT_INPUT and "cannot be seen" in printed and f"remove {RUN}/logs/job.txt" in printed
    assert not cloud.sent()


def test_a_record_that_says_nothing_sends_nothing(cloud, command):
    cloud.file(f"{RUN}/logs/job.txt").write_text("half a li")
    code, printed = command("up", GKE)
    assert code == EXIT_INPUT and f"{RUN}/logs/job.txt" in printed and "remove it" in printed
    assert not cloud.sent()


def test_a_bucket_that_cannot_be_read_does_not_keep_a_job_up(cloud, command):
    command("up", GKE)
    cloud.fail("gcloud storage", "ERROR: (gcloud.storage.cat) HTTPError 403: no storage.objects.get access.")
    code, printed = command("down", GKE, "--yes")
    assert code == EXIT_DONE and not cloud.jobs
    assert "another place before is not known" in printed


@pytest.mark.parametrize("job", [job(), job(**EVERYTHING)], ids=["the least", "everything"])
def test_the_text_of_a_job_is_read_back(job):
    assert job_of_text(job.text()) == job


# Taking down


def test_down_deletes_the_job_and_leaves_the_run(backend, cloud, command):
    command("up", BACKENDS[backend])
    run = {x: x.read_text() for x in cloud.file(f"{RUN}/x").parent.rglob("*") if x.is_file()}
    cloud.calls.clear()
    code, printed = command("down", BACKENDS[backend], "--yes")
    assert code == EXIT_DONE and not cloud.jobs
    assert cloud.sent() == [DELETE[backend]]
    assert {x: x.read_text() for x in cloud.file(f"{RUN}/x").parent.rglob("*") if x.is_file()} == run
    look = "node-pools list" if backend == "gke" else "queued-resources list"
    assert look in printed
    cloud.calls.clear()
    code, printed = command("down", BACKENDS[backend], "--yes")
    assert code == EXIT_DONE and "not there" in printed
    assert not cloud.sent()


@pytest.mark.parametrize("answer", ["n", "", None])
def test_down_asks_first(answer, cloud, command, monkeypatch):
    def ask(question: str) -> str:
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr("builtins.input", ask)
    command("up", GKE)
    cloud.calls.clear()
    code, printed = command("down", GKE)
    assert code == EXIT_INPUT and "--yes" in printed
    assert not cloud.sent()


def test_down_goes_on_once_it_is_told_to(cloud, command, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question: "y")
    command("up", GKE)
    assert command("down", GKE)[0] == EXIT_DONE
    assert not cloud.jobs


# What a job waits for


@pytest.mark.parametrize(
    "scene, why",
    [
        ("no capacity", "no capacity: there are no free spot ct5lp-hightpu-4t machines"),
        ("quota", "no quota for 16 chips of v5e"),
        ("wrong topology", "there are no tpu-v5-lite-podslice nodes with topology 4x4 and capacity spot"),
        ("taken", "all TPUs of the node pool are taken"),
        ("growing", "the node pool is growing"),
        ("starting", "its containers are being made"),
        ("bad image", "the image cannot be pulled"),
        ("no secret", 'secret "wandb" not found'),
        ("no bucket", "a bucket of [data] cannot be mounted"),
    ],
)
def test_status_says_why_a_jobset_waits(scene, why, cloud, command):
    cloud.tell([scene])
    command("up", GKE)
    code, printed = command("status", GKE)
    assert code == EXIT_DONE
    assert "state        waiting" in printed and why in printed


def test_what_other_jobs_wait_for_is_not_told(cloud, command):
    cloud.tell(["no capacity"], ["quota"])
    command("up", GKE)
    command("up", GKE.replace('"gla"', '"gla-b"'))
    _, printed = command("status", GKE)
    assert "no capacity" in printed and "quota" not in printed


@pytest.mark.parametrize(
    "scene, why",
    [
        ("WAITING_FOR_RESOURCES", "waiting in the queue for capacity"),
        ("PROVISIONING", "machines are being made"),
        ("starting", "the program runs on 0 of 4"),
    ],
)
def test_status_says_why_a_queued_resource_waits(scene, why, cloud, command):
    cloud.tell([scene])
    command("up", QUEUED)
    code, printed = command("status", QUEUED)
    assert code == EXIT_DONE
    assert "state        waiting" in printed and why in printed


def test_a_queue_that_has_not_admitted_a_job_is_named(cloud, command):
    job = GKE + 'queue = "multislice-queue"\n'
    command("up", job)
    cloud.job("gla")["manifest"]["spec"]["suspend"] = True
    _, printed = command("status", job)
    assert "the queue multislice-queue has not admitted it" in printed


# What becomes of it


def test_status_shows_hosts_steps_and_checkpoints(backend, cloud, command):
    command("up", BACKENDS[backend])
    rows = [{"step": step, "loss": 3 - step / 100} for step in range(10, 90, 10)] + [{"step": 80, "eval/loss": 1.0}]
    lines = [json.dumps(row) for row in rows]
    cloud.file(f"{RUN}/metrics.jsonl").write_text("\n".join([*lines, '{"step": 9']))
    for name in ("9/commit_success.txt", "75/commit_success.txt", "80/record", "damaged-78/commit_success.txt"):
        cloud.file(f"{RUN}/checkpoints/{name}").touch()
    code, printed = command("status", BACKENDS[backend])
    assert code == EXIT_DONE
    assert "running" in printed and "4 " in printed and "0 of 3 used" in printed
    assert "to step 80, loss 2.2" in printed and "of step 75" in printed


@pytest.mark.parametrize("seconds, ago", [(0, "0 min"), (250, "4 min"), (7500, "2 h 5 min")])
def test_status_shows_how_long_ago_a_step_was_written(seconds, ago, cloud, command):
    """A program that hangs runs on, and writes no more."""
    command("up", GKE)
    metrics = cloud.file(f"{RUN}/metrics.jsonl")
    metrics.write_text('{"step": 120, "loss": 3.2}\n')
    os.utime(metrics, (time.time() - seconds,) * 2)
    _, printed = command("status", GKE)
    assert f"trained      to step 120, loss 3.2, written {ago} ago\n" in printed


@requires_gcloud
def test_gcloud_has_all_flags_with_which_a_bucket_is_read_and_written(cloud, command):
    command("up", GKE)
    cloud.file(f"{RUN}/metrics.jsonl").write_text('{"step": 120, "loss": 3.2}\n')
    command("status", GKE)
    command("down", GKE, "--yes")
    used = [call.split() for call in cloud.calls if call.startswith("gcloud storage")]
    kinds = {" ".join(words[2:-2] if "objects" in words else words[2:3]) for words in used}
    assert kinds == {"cat", "cp", "ls", "objects describe"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", PATH)
        assert lint(used) == {}
        wrong = [[*words, "--made-up=1"] for words in used]
        assert len(lint(wrong)) == len({*map(tuple, wrong)})


@pytest.mark.parametrize(
    "scene, used, why", [("preempted", 0, "a machine was taken back"), ("host lost", 1, "a host was lost")]
)
def test_status_tells_restarts_that_count_from_those_that_do_not(scene, used, why, cloud, command):
    cloud.tell(["running", scene, "running"])
    command("up", GKE)
    cloud.tick()
    _, printed = command("status", GKE)
    assert "restarting" in printed and why in printed
    assert "there are no tpu-v5-lite-podslice nodes" in printed, "what it waits for now"
    cloud.tick()
    _, printed = command("status", GKE)
    assert "running" in printed and f"{used} of 3 used; attempt 1" in printed


@pytest.mark.parametrize(
    "scene, why",
    [("bug", "a defect"), ("bad input", "a wrong input"), ("used up", "it has used its 3 restarts")],
)
def test_status_says_why_a_jobset_has_failed(scene, why, cloud, command):
    cloud.tell(["running", scene])
    command("up", GKE)
    cloud.tick()
    code, printed = command("status", GKE)
    assert code == EXIT_DEFECT and why in printed


def test_the_machines_restart_a_program_by_themselves(cloud, command):
    cloud.tell(["running", "restarting", "running"])
    command("up", QUEUED)
    cloud.tick()
    _, printed = command("status", QUEUED)
    assert "restarting" in printed and "exit 42" in printed
    cloud.tick()
    code, printed = command("status", QUEUED)
    assert code == EXIT_DONE and "running" in printed and "1 of 3 used; attempt 1" in printed


def test_a_finished_run_whose_job_is_gone_is_finished(backend, cloud, command):
    cloud.tell(["running", "done"])
    command("up", BACKENDS[backend])
    cloud.tick()
    command("down", BACKENDS[backend], "--yes")
    for name in ("status", "watch"):
        code, printed = command(name, BACKENDS[backend])
        assert code == EXIT_DONE and "not there" in printed


@pytest.mark.parametrize("hosts, state", [(1, "running"), (4, "failed")])
def test_programs_that_end_and_leave_no_finished_run(hosts, state, cloud, command):
    command("up", QUEUED)
    for host in range(hosts):
        report = cloud.file(f"{RUN}/logs/hosts/slice-0-host-{host}")
        report.write_text(f"slice 0 host {host} attempt 0: exit 0, stopped\n")
    _, printed = command("status", QUEUED)
    assert f"state        {state}" in printed


def test_the_host_whose_program_was_at_fault_is_named(cloud, command):
    command("up", QUEUED)
    for host, text in enumerate(["exit 137, stopped: no restarts are left", "exit 1, stopped"]):
        cloud.file(f"{RUN}/logs/hosts/slice-0-host-{host}").write_text(f"slice 0 host {host} attempt 0: {text}\n")
    code, printed = command("status", QUEUED)
    assert code == EXIT_DEFECT and "host 1 attempt 0: exit 1, stopped: a defect" in printed


def test_status_of_what_is_not_there(backend, cloud, command):
    code, printed = command("status", BACKENDS[backend])
    assert code == EXIT_INPUT and "not there" in printed


@pytest.mark.parametrize("flags", [[], ["--follow"], ["--host", "3"]])
def test_logs_are_those_of_one_host(flags, cloud, command):
    command("up", GKE)
    code, printed = command("logs", GKE, *flags)
    host = flags[1] if flags[1:] else "0"
    assert code == EXIT_DONE and f"{RUN}/logs" in printed
    assert f"jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index={host}" in cloud.calls[-1]
    assert ("--follow" in cloud.calls[-1]) == ("--follow" in flags)


@pytest.mark.parametrize("flags", [["--host", "4"], ["--slice", "1"], ["--host", "-1"]])
def test_logs_of_hosts_that_do_not_exist_are_refused(flags, cloud, command):
    assert command("logs", GKE, *flags)[0] == EXIT_INPUT
    assert not cloud.calls


def test_a_job_that_waits_has_no_logs(cloud, command):
    cloud.tell(["no capacity"])
    command("up", GKE)
    code, printed = command("logs", GKE)
    assert code == EXIT_INPUT and "no capacity" in printed and f"{RUN}/logs" in printed


# Watching


def test_watching_a_jobset_tells_changes_alone_until_it_is_finished(cloud, command):
    cloud.tell(["no capacity", "no capacity", "running", "preempted", "running", "running", "done"])
    command("up", GKE)
    cloud.calls.clear()
    code, printed = command("watch", GKE)
    states = [line.split("  ")[1].partition(":")[0] for line in printed.splitlines()]
    assert code == EXIT_DONE
    assert states == ["waiting", "running", "restarting", "running", "finished"]
    assert set(cloud.waited) == {30}
    assert not cloud.sent()


@pytest.mark.parametrize("scene, code", [("bug", EXIT_DEFECT), ("used up", EXIT_DEFECT)])
def test_watching_a_jobset_ends_as_it_does(scene, code, cloud, command):
    cloud.tell(["running", scene])
    command("up", GKE)
    assert command("watch", GKE)[0] == code
    assert len(cloud.places("gla")) == 1


def test_a_queued_resource_that_is_taken_back_is_made_again(cloud, command):
    cloud.tell(["WAITING_FOR_RESOURCES", "running", "SUSPENDED"], ["running", "SUSPENDED"], ["running", "done"])
    command("up", QUEUED)
    cloud.calls.clear()
    code, printed = command("watch", QUEUED)
    assert code == EXIT_DONE
    made = [call for call in cloud.calls if call.startswith(CREATE["queued_resources"])]
    assert ["--metadata=attempt=1" in made[0], "--metadata=attempt=2" in made[1]] == [True, True]
    assert len(made) == 2
    assert "only while it runs" in printed
    assert not cloud.jobs, "it would go on costing money"
    assert cloud.sent()[-1] == DELETE["queued_resources"]


def test_it_is_made_again_so_often_and_not_more(cloud, command):
    cloud.tell(["running", "SUSPENDED"])
    command("up", QUEUED)
    cloud.calls.clear()
    code, printed = command("watch", QUEUED)
    assert code == EXIT_DEFECT and "all 3 restarts are used" in printed
    assert cloud.sent().count(CREATE["queued_resources"]) == 3
    assert not cloud.jobs


def test_pauses_grow_while_there_is_no_capacity(cloud, command):
    cloud.tell(["running", "SUSPENDED"], ["no capacity"], ["no capacity"], ["no capacity"], ["running", "done"])
    command("up", QUEUED)
    assert command("watch", QUEUED)[0] == EXIT_DONE
    assert [x for x in cloud.waited if x > 30] == [60, 120]


def test_pauses_are_short_again_once_there_was_capacity(cloud, command):
    lost = ["running", "running", "SUSPENDED"]
    cloud.tell(lost, ["no capacity"], lost, ["no capacity"], ["running", "done"])
    command("up", QUEUED)
    assert command("watch", QUEUED)[0] == EXIT_DONE
    assert set(cloud.waited) == {30}


def test_a_request_that_is_refused_for_want_of_machines_is_made_again(cloud, command):
    cloud.tell(["running", "SUSPENDED"], ["running", "done"])
    command("up", QUEUED)
    refusal = "ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota limit has been exceeded."
    cloud.fail(CREATE["queued_resources"], refusal, times=3)
    code, printed = command("watch", QUEUED)
    assert code == EXIT_DONE and "RESOURCE_EXHAUSTED" in printed


def test_a_request_that_was_not_served_in_time_is_made_again(cloud, command):
    cloud.tell(["running", "SUSPENDED"], ["WAITING_FOR_RESOURCES", "not served"], ["running", "done"])
    command("up", QUEUED)
    assert command("watch", QUEUED)[0] == EXIT_DONE
    cloud.tell(["not served"])
    command("up", longer := QUEUED.replace('"gla"', '"gla-b"') + "valid_hours = 48\n")
    assert command("watch", longer)[0] == EXIT_DEFECT, "it failed before"


@pytest.mark.parametrize("scene", ["bug", "bad input"])
def test_a_defect_does_not_burn_restarts(scene, cloud, command):
    cloud.tell(["running", scene])
    command("up", QUEUED)
    cloud.calls.clear()
    code, printed = command("watch", QUEUED)
    assert code == EXIT_DEFECT and "not made again" in printed
    assert cloud.sent() == [DELETE["queued_resources"]]


def test_the_machines_of_a_failed_job_are_kept_when_asked_for(cloud, command):
    cloud.tell(["running", "bug"])
    command("up", QUEUED)
    code, printed = command("watch", QUEUED, "--keep")
    assert code == EXIT_DEFECT and "may cost money" in printed
    assert len(cloud.places("gla")) == 1


@pytest.mark.parametrize("scene", ["quota", "suspended by a user"])
def test_what_another_request_would_not_mend_is_not_made_again(scene, cloud, command):
    cloud.tell([scene])
    command("up", QUEUED)
    cloud.calls.clear()
    assert command("watch", QUEUED)[0] == EXIT_DEFECT
    assert CREATE["queued_resources"] not in cloud.sent()


def kill_while_it_is_made_again(command, monkeypatch) -> None:
    """`watch`, between what it takes down and what it makes anew."""
    with monkeypatch.context() as patch:

        def killed(self, attempt: int) -> None:
            raise KeyboardInterrupt

        patch.setattr(Queued, "_create", killed)
        with pytest.raises(KeyboardInterrupt):
            command("watch", QUEUED)


def test_a_watch_that_was_killed_goes_on_and_counts_nothing_twice(cloud, command, monkeypatch):
    """At the worst moment: the job is deleted, and not made again."""
    cloud.tell(["running", "SUSPENDED"], ["running", "SUSPENDED"], ["running", "done"])
    command("up", QUEUED)
    kill_while_it_is_made_again(command, monkeypatch)
    assert not cloud.jobs
    code, printed = command("status", QUEUED)
    assert code == EXIT_DONE and "to be made again" in printed
    cloud.calls.clear()
    code, printed = command("up", QUEUED)
    assert "already there: restarting" in printed
    assert not cloud.sent()
    assert command("watch", QUEUED)[0] == EXIT_DONE
    made = [call for call in cloud.calls if call.startswith(CREATE["queued_resources"])]
    assert ["--metadata=attempt=1" in made[0], "--metadata=attempt=2" in made[1]] == [True, True]


def test_what_is_taken_down_while_it_is_being_made_again_stays_down(cloud, command, monkeypatch):
    cloud.tell(["running", "SUSPENDED"])
    command("up", QUEUED)
    kill_while_it_is_made_again(command, monkeypatch)
    command("down", QUEUED, "--yes")
    assert command("watch", QUEUED)[0] == EXIT_INPUT
    assert not cloud.jobs


def test_what_is_being_made_again_is_in_its_own_place_alone(cloud, command, monkeypatch):
    cloud.tell(["running", "SUSPENDED"])
    command("up", QUEUED)
    kill_while_it_is_made_again(command, monkeypatch)
    after = ELSEWHERE["queued_resources"]
    code, printed = command("up", after, "--resume")
    assert code == EXIT_INPUT and "us-west4-a" in printed and "restarting" in printed
    assert not cloud.jobs
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    assert command("down", after)[0] == EXIT_DONE
    assert len(asked) == 1 and "restarting" in asked[0] and "us-west4-a" in asked[0]
    assert command("up", after, "--resume")[0] == EXIT_DONE


def test_what_is_taken_down_while_a_watch_waits_for_capacity_stays_down(cloud, command, monkeypatch):
    cloud.tell(["running", "SUSPENDED"])
    command("up", QUEUED)
    refusal = "ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: no more capacity"
    cloud.fail(CREATE["queued_resources"], refusal)

    def sleep(seconds: float) -> None:
        cloud.tick()
        if cloud.calls[-1].startswith(CREATE["queued_resources"]):
            cloud.faults.clear()
            command("down", QUEUED, "--yes")

    monkeypatch.setattr("gcp.watch.time", types.SimpleNamespace(sleep=sleep))
    assert command("watch", QUEUED)[0] == EXIT_INPUT
    assert not cloud.jobs


def test_a_job_that_is_sent_again_starts_with_all_its_restarts(cloud, command):
    cloud.tell(["running", "SUSPENDED"])
    command("up", QUEUED)
    command("watch", QUEUED)
    cloud.tell(["running"])
    command("up", QUEUED)
    _, printed = command("status", QUEUED)
    assert "0 of 3 used; attempt 4" in printed


def test_a_watch_ends_when_the_job_is_taken_down(backend, cloud, command, monkeypatch):
    command("up", BACKENDS[backend])
    down = types.SimpleNamespace(sleep=lambda seconds: command("down", BACKENDS[backend], "--yes"))
    monkeypatch.setattr("gcp.watch.time", down)
    code, printed = command("watch", BACKENDS[backend])
    assert code == EXIT_INPUT and "not there" in printed


ASKS = {"gke": "kubectl get jobset", "queued_resources": "gcloud compute tpus queued-resources describe"}


@pytest.mark.parametrize("error", ["Unable to connect to the server: dial tcp: i/o timeout", "HTTPError 503: x"])
def test_a_watch_outlives_a_network_that_is_away(error, backend, cloud, command):
    cloud.tell(["running", "done"])
    command("up", BACKENDS[backend])
    cloud.fail(ASKS[backend], error, times=4)
    code, printed = command("watch", BACKENDS[backend])
    assert code == EXIT_DONE and printed.count("no answer, trying on") == 1


def test_a_watch_makes_nothing_of_another_job_file(cloud, command):
    cloud.tell(["running", "SUSPENDED"])
    command("up", QUEUED)
    cloud.calls.clear()
    code, printed = command("watch", QUEUED.replace("v5e-16", "v5e-32"))
    assert code == EXIT_INPUT and "was not made from this job file" in printed
    assert not cloud.sent()


def test_a_watch_ends_where_waiting_does_not_help(cloud, command):
    command("up", GKE)
    cloud.fail("kubectl", f"{NOT_LOGGED_IN}\nUnable to connect to the server: getting credentials")
    code, printed = command("watch", GKE)
    assert code == EXIT_INPUT and "gcloud auth login" in printed
    assert not cloud.waited


# What can be wrong with this machine, and with one's rights


def test_a_program_that_is_missing_is_named_with_how_to_get_it(cloud, command):
    cloud.uninstall("kubectl")
    code, printed = command("up", GKE)
    assert code == EXIT_INPUT and "kubectl is not on PATH" in printed and "gcloud components install" in printed
    assert not cloud.calls


@pytest.mark.parametrize(
    "call, error, remedy",
    [
        ("kubectl", 'error: context "gke_x" does not exist', "gcloud container clusters get-credentials pods"),
        ("kubectl", "error: You must be logged in to the server (Unauthorized)", "gcloud auth login"),
        ("kubectl", f"{NOT_LOGGED_IN}\nUnable to connect to the server: getting credentials", "gcloud auth login"),
        ("kubectl", 'error: the server doesn\'t have a resource type "jobset"', "JobSet is not installed"),
        ("gcloud", NOT_LOGGED_IN, "gcloud auth login"),
        (
            "gcloud storage cat",
            "ERROR: (gcloud.storage.cat) HTTPError 403: me@x.org does not have storage.objects.get access.",
            "roles/storage.objectUser",
        ),
        (
            "gcloud storage cp",
            "ERROR: (gcloud.storage.cp) HTTPError 403: me@x.org does not have storage.objects.create access.",
            "roles/storage.objectUser",
        ),
    ],
)
def test_errors_of_programs_say_what_to_do_and_nothing_is_sent(call, error, remedy, cloud, command):
    cloud.fail(call, error)
    code, printed = command("up", GKE)
    assert code == EXIT_INPUT and remedy in printed
    assert error.splitlines()[0] in printed
    assert "kubectl create" not in cloud.sent()


def test_status_does_without_a_bucket_that_cannot_be_read(cloud, command):
    command("up", GKE)
    cloud.fail("gcloud storage", "ERROR: (gcloud.storage.cat) HTTPError 403: no storage.objects.get access.")
    code, printed = command("status", GKE)
    assert code == EXIT_DONE and "running" in printed and "it cannot be read" in printed


def test_a_quota_that_is_refused_at_once_is_passed_on(cloud, command):
    refusal = "ERROR: (gcloud.x) RESOURCE_EXHAUSTED: Quota limit 'TPUV5s' has been exceeded. Limit: 0."
    cloud.fail(CREATE["queued_resources"], refusal)
    code, printed = command("up", QUEUED)
    assert code == EXIT_INPUT and "Quota limit 'TPUV5s'" in printed and "console.cloud.google.com" in printed


# Checks, plans, help


def test_check_lists_what_is_wrong(cloud, command):
    cloud.uninstall("gke-gcloud-auth-plugin")
    code, printed = command("check", GKE.replace("batch_size=64", "batch_size=63"))
    marks = [line.split()[0] for line in printed.splitlines()]
    assert code == EXIT_INPUT and marks.count("WRONG") == 2
    assert "gke-gcloud-auth-plugin is not on PATH" in printed
    assert "train.batch_size is 63: expected a multiple of 16" in printed


def test_check_finds_paths_that_the_hosts_do_not_have(cloud, command):
    corpus = GKE.replace('"train.steps=100"', "\"TextData.paths='/data/corpus'\"")
    code, printed = command("check", corpus)
    assert code == EXIT_INPUT and "/data/corpus, of the config, is under no path of [data]" in printed
    code, printed = command("check", corpus + '[data]\n"/data" = "gs://my-bucket/data"\n')
    assert code == EXIT_DONE, printed


def test_check_of_a_good_job(cloud, command):
    code, printed = command("check", GKE)
    assert code == EXIT_DONE and "WRONG" not in printed
    assert "batches of 64 x 256 on data=16" in printed
    assert "gs://my-bucket" in printed and "us-west4" in printed
    assert not cloud.calls


def test_secrets_are_masked_everywhere(backend, cloud, command):
    place = {"gke": "wandb-secret:the-key", "queued_resources": "wandb-secret"}[backend]
    code, printed = command("plan", BACKENDS[backend] + f'[secrets]\nWANDB_API_KEY = "{place}"\n')
    assert code == EXIT_DONE and "WANDB_API_KEY = ***  (masked; from" in printed


def test_a_sum_of_money_stands_only_where_there_is_a_price(cloud, command):
    assert "$" not in command("plan", GKE + "hours = 10\n")[1].partition("manifest:")[0]
    _, printed = command("plan", GKE + "hours = 10\nusd_per_chip_hour = 0.5\n")
    assert "16 chip hours an hour ($8.00), 160 chip hours in 10 hours ($80.00)" in printed


def test_plan_writes_the_manifest(cloud, command, tmp_path):
    code, printed = command("plan", GKE, "--output", str(tmp_path / "manifest.yaml"))
    assert code == EXIT_DONE
    assert all(line in printed for line in (tmp_path / "manifest.yaml").read_text().splitlines())
    assert command("plan", GKE, "--output", str(tmp_path / "no" / "manifest.yaml"))[0] == EXIT_INPUT


def test_overrides_stand_anywhere_on_the_command_line(monkeypatch):
    given = []
    monkeypatch.setattr("gcp.local.run", lambda arguments: given.append(arguments) or EXIT_DONE)
    words = ["local", "--gin.a.b=1", "job.toml", "--processes", "2", "--gin.c=x y", "--run_dir", "run"]
    assert main(words) == EXIT_DONE
    (arguments,) = given
    assert arguments.overrides == ["a.b=1", "c=x y"] and arguments.job == Path("job.toml") and arguments.processes == 2
    with pytest.raises(InputError, match="is not an override"):
        main([*words, "--gin.d"])


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"local"}))
def test_commands_that_take_no_overrides_refuse_them(name, cloud, command, capsys):
    with pytest.raises(SystemExit) as ended:
        command(name, GKE, "--gin.a.b=1")
    assert ended.value.code == EXIT_INPUT and "--gin.a.b=1" in capsys.readouterr().err
    assert not cloud.calls


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*filter(None, [name]), "--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert ("JOB.toml" if name else "examples, in the order of a job's life") in printed
    assert all(len(line) <= 120 for line in printed.splitlines())


def test_a_job_file_that_is_wrong_is_refused_by_every_command(cloud, command):
    for name in COMMANDS.keys() - {"local", "preflight"}:
        code, printed = command(name, GKE.replace("tpu =", "tup ="))
        assert code == EXIT_INPUT and "did you mean 'tpu'" in printed
    assert not cloud.calls


def test_the_command_line_starts_without_jax():
    """On a laptop it is to start in a blink."""
    program = "import sys, gcp.cli, gcp.submit, gcp.status, gcp.watch, gcp.checks; sys.exit('jax' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0
