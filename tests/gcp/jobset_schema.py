"""The schema of JobSets, made strict: `kubectl` would drop a field that it does not know, or only warn.

The file is a third party's (kubernetes-sigs/jobset, Apache-2.0), and no part of this repository: $JOBSET_SCHEMA says
where it is, or it lies in `shared/data` beside the checkout.
"""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
BESIDE = REPOSITORY.parent / "shared" / "data" / "jobset-v1alpha2.schema.json.gz"

_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
# The schema of a custom resource leaves this part to Kubernetes.
_METADATA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string", "maxLength": 63}},
        "annotations": _STRINGS,
    },
    "required": ["name"],
}


def strict_validator():
    """A validator of manifests; skips the test where the file or jsonschema is not there."""
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed; it comes with the extra 'dev'")
    path = Path(os.environ.get("JOBSET_SCHEMA", BESIDE))
    if not path.exists():
        pytest.skip(f"the schema of JobSets is not there: expected it at $JOBSET_SCHEMA or {BESIDE}")
    schema = json.loads(gzip.decompress(path.read_bytes()))
    properties = {
        **schema["properties"],
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": _METADATA,
    }
    required = ["apiVersion", "kind", "metadata", "spec"]
    return jsonschema.Draft202012Validator(strict({**schema, "properties": properties, "required": required}))


def strict(schema: Any) -> Any:
    """The same, but that no object has other properties than those named."""
    schema = dict(schema)
    if "properties" in schema:
        schema["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
        schema.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            schema[key] = strict(schema[key])
    if schema.get("x-kubernetes-int-or-string"):
        schema.setdefault("type", ["integer", "string"])
    return schema


def errors(validator, manifest: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]
