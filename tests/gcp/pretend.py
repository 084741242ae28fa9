"""A program that ends as it is told, without jax: for tests of what becomes of the other processes of a job.

ENDS is a list of "ATTEMPT.PROCESS=END", an exit code or a signal's name. In an attempt that is in the list the other
processes wait for SIGTERM and end with 42, or not at all where STUBBORN is set; in any other all end with 0.
"""

import json
import os
import signal
import sys
import time

hosts = len(os.environ["TPU_WORKER_HOSTNAMES"].split(","))
process = int(os.environ["MEGASCALE_SLICE_ID"] or 0) * hosts + int(os.environ["TPU_WORKER_ID"])
attempt = os.environ["SEQMODELS_ATTEMPT"]
ends = dict(item.split("=") for item in os.environ["ENDS"].split())
own = ends.get(f"{attempt}.{process}")

asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
names = ("TPU_", "MEGASCALE_", "JAX_", "XLA_", "WANDB_", "SEQMODELS_")
print(json.dumps({name: value for name, value in os.environ.items() if name.startswith(names)}))
print(json.dumps(sys.argv))
print("error: one that is shown" if own else "a line that is not shown of others than the first")
if own and own.isdecimal():
    sys.exit(int(own))
if own:
    os.kill(os.getpid(), getattr(signal, own))
while any(key.startswith(f"{attempt}.") for key in ends) and (not asked or "STUBBORN" in os.environ):
    time.sleep(0.01)
sys.exit(42 if asked else 0)
