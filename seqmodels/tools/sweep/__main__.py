"""python -m seqmodels.tools.sweep: the command line."""

import argparse
import os
from pathlib import Path

# Before NumPy is loaded: with several threads, small linear algebra on the CPU is a hundred times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from seqmodels.errors import run_main

DESCRIPTION = """\
Run all points of a sweep: a config file that also says what is varied. Every point is a run of train.py with a run
directory of its own, DIR/NAME. The same command goes on where a sweep was stopped or killed: what is done is
skipped, what was interrupted continues, what has failed is reported and left alone."""

EPILOG = """\
a sweep's file is a config with bindings of `sweep`, all of whose axes are multiplied:
  include 'configs/base.gin'
  include 'configs/tasks/mqar.gin'
  train.steps = 1000
  sweep.list = {
      'mixer': {'attention': ["include 'configs/mixers/softmax_attention.gin'"],
                'Based': ["include 'configs/mixers/based.gin'", "Based.feature_dim = 8"]}}
  sweep.zip = {'task': {'train.seq_len': [64, 128], 'MQAR.num_kv_pairs': [4, 16]}}
  sweep.product = {'LanguageModel.d_model': [32, 64], 'train.seed': [0, 1]}
  sweep.overrides = [({'mixer': 'Based', 'd_model': 32}, ["Based.num_heads = 1"])]
  sweep.evaluate = ["perplexity --lengths 512 2048"]
  sweep.metric = 'accuracy'

examples:
  python -m seqmodels.tools.sweep my_sweep.gin --dry_run
  python -m seqmodels.tools.sweep my_sweep.gin --sweep_dir sweeps/mine --jobs 2
  python -m seqmodels.tools.sweep my_sweep.gin --sweep_dir sweeps/mine --pod gcp/examples/v5e_256.toml
  python -m seqmodels.tools.sweep my_sweep.gin --sweep_dir sweeps/mine --only mixer=Based --gin.train.steps=100

With --jobs N the points divide the CPU's cores: for small models, two processes of one core each are much faster than
two of two cores each. Points with equal shapes share compiled programs, which are kept from one start to the next.

exit codes:
  0   all points are done
  1   points have failed: which, and why, stands at the end; or a defect
  2   an input is wrong, and nothing was run; a line says which, and of which point
  42  stopped by SIGTERM or Ctrl-C after the points have saved, or a point is to be started again; the same command
      continues"""


def main(argv: list[str]) -> int:
    from seqmodels import config

    parser = argparse.ArgumentParser(
        prog="python -m seqmodels.tools.sweep",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE.gin", help="the sweep; --gin.X.y=v beats it at every point")
    parser.add_argument("--sweep_dir", type=Path, metavar="DIR", help="folder of the sweep; made when it is not there")
    parser.add_argument("--dry_run", action="store_true", help="list the points and check them; run and write nothing")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="points at a time (default: 1)")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="FILTER",
        help="AXIS=VALUE, or a part of a name: run these points only; several must all hold",
    )
    parser.add_argument("--retry", action="store_true", help="try again what has failed before")
    pods = parser.add_argument_group("points as jobs of their own on TPU pods, see gcp/README.md")
    pods.add_argument("--pod", type=Path, metavar="JOB.toml", help="write a job file like this one for every point")
    pods.add_argument("--up", action="store_true", help="send them; what is there already is left as it is")
    rest, overrides = config.split_overrides(argv)
    options = parser.parse_args(rest)

    from seqmodels.tools.sweep import command

    return command.run(options, overrides)


if __name__ == "__main__":
    run_main(main)
