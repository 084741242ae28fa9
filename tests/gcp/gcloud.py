"""gcloud without a cloud: the SDK's own linter (no login, no network, nothing sent), and what it would print."""

import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

requires_gcloud = pytest.mark.skipif(
    shutil.which("gcloud") is None, reason="gcloud is not installed: its linter knows the flags"
)


def lint(commands: Sequence[Sequence[str]]) -> dict[str, str]:
    """The commands that gcloud would refuse, as a shell would read them, each with the reason.

    Each is a list of arguments, beginning with "gcloud", with values as --flag=value. The linter sees unknown commands
    and flags, missing and mutually exclusive ones, and bad choices; it sees no values, zones and names, and not that
    spot machines are not reserved. Starting it takes a second or more, a command 0.02: ask it once for many.
    """
    # It joins a flag and a word that follows with =. Flags go last for it.
    strings = list(dict.fromkeys(shlex.join(sorted(x, key=lambda word: word.startswith("--"))) for x in commands))
    for string in strings:
        # It takes the rest for a comment, and says nothing of a command whose help is asked for.
        if "#" in string or "--help" in string or not string.startswith("gcloud "):
            raise ValueError(f"the linter would not read all of: {string}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "commands.json"
        file.write_text(json.dumps([{"command_string": x, "id": i + 1} for i, x in enumerate(strings)]))
        # An empty configuration: whoever runs the tests may be logged in.
        environment = {**os.environ, "CLOUDSDK_CONFIG": folder, "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
        ran = subprocess.run(
            ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={file}", "--serialize"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if ran.returncode:
        raise RuntimeError(f"gcloud's linter failed: {ran.stderr}")
    results = {int(number): result for number, (result,) in json.loads(ran.stdout).items()}
    # One that is missing in its answer was not checked: an error here.
    answers = {string: results[i + 1] for i, string in enumerate(strings)}
    return {x: " ".join(answer["error_message"].split()) for x, answer in answers.items() if not answer["success"]}


def described(create: Sequence[str], state: str = "ACTIVE", **facts: Any) -> dict[str, Any]:
    """What `gcloud compute tpus queued-resources describe --format=json` prints of what that command created. facts:
    others of the state, such as stateInitiator="SERVICE". Made as the SDK 528 makes its request of the flags."""
    flags = dict(x.removeprefix("--").partition("=")[::2] for x in create if x.startswith("--"))
    pairs = {
        key: dict(x.split("=", 1) for x in flags.get(key, "").split(",") if x)
        for key in ("labels", "metadata", "metadata-from-file")
    }
    files = {key: Path(file).read_text() for key, file in pairs["metadata-from-file"].items()}
    place = f"projects/{flags['project']}/locations/{flags['zone']}"
    name = create[create.index("create") + 1]
    specification: dict[str, Any] = {
        "parent": place,
        "node": {
            "acceleratorType": flags["accelerator-type"],
            "runtimeVersion": flags["runtime-version"],
            "labels": pairs["labels"],
            "metadata": pairs["metadata"] | files,
            "networkConfig": {"enableExternalIps": True},
            "serviceAccount": {"email": flags["service-account"]} if "service-account" in flags else {},
        },
    }
    if "node-id" in flags:
        specification["nodeId"] = flags["node-id"]
    else:
        several = {"nodeCount": int(flags["node-count"]), "nodeIdPrefix": flags["node-prefix"]}
        specification["multisliceParams"] = several
    resource = {
        "name": f"{place}/queuedResources/{name}",
        "state": {"state": state, **facts},
        "tpu": {"nodeSpec": [specification]},
    }
    if "spot" in flags:
        resource["spot"] = {}
    if "reservation" in flags:
        resource["reservationName"] = f"{place}/reservations/{flags['reservation']}"
    return resource
