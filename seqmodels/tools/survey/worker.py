"""One measurement in a process of its own: python -m seqmodels.tools.survey.worker MEASUREMENT SUBJECT OPTIONS.

What is printed is said in process.py, which starts this.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from seqmodels.errors import run_main
from seqmodels.registry import MIXERS, ops
from seqmodels.start_up import prepare_jax
from seqmodels.tools.survey import decode, precision, quickstart
from seqmodels.tools.survey.views import Progress, Result


def main(argv: list[str]) -> None:
    measurement, subject, options = argv
    prepare_jax()
    result = MEASUREMENTS[measurement](subject, json.loads(options), _say_progress)
    print("result", json.dumps(result), flush=True)


def _say_progress(share: float, doing: str) -> None:
    print(f"progress {share:.4f} {doing}", flush=True)


def _decode(mixer: str, options: dict[str, Any], progress: Progress) -> Result:
    model = _job(mixer).model
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return decode.measure_model(model, params, options["tokens"], progress)


def _layer_precision(mixer: str, options: dict[str, Any], progress: Progress) -> Result:
    # The layer's own fields are those of its config, which reach whoever makes it.
    width = _job(mixer).model.d_model
    return precision.layer_errors(MIXERS[mixer].layer, width, options["length"], progress)


def _op_precision(op: str, options: dict[str, Any], progress: Progress) -> Result:
    return precision.op_errors(ops()[op], options["length"], progress)


def _job(mixer: str):
    with tempfile.TemporaryDirectory() as folder:
        return quickstart.read_job(quickstart.write_config(mixer, Path(folder)))


MEASUREMENTS: dict[str, Callable[[str, dict[str, Any], Progress], Result]] = {
    "decode": _decode,
    "layer precision": _layer_precision,
    "operator precision": _op_precision,
}

if __name__ == "__main__":
    run_main(main)
