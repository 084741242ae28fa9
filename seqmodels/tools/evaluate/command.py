"""What `python -m seqmodels.tools.evaluate` does: opens a run, lets a suite measure it, keeps what was found."""

import argparse
import importlib
import json
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

from seqmodels.errors import InputError, nearest

DESCRIPTION = """\
Evaluate the model of a run directory that train.py made. What is found is printed, and kept in the run directory, in
evaluations/NAME.json and, where matplotlib is installed, in evaluations/NAME.png."""

EXAMPLES = """\
examples:
  python -m seqmodels.tools.evaluate runs/quickstart --suite perplexity --lengths 256 1024 4096
  python -m seqmodels.tools.evaluate runs/passkey --suite needle --lengths 512 1024 --examples 50
  python -m seqmodels.tools.evaluate runs/mqar --suite recall --vary num_kv_pairs=4,8,16 --lengths 64 128

exit codes:
  0   done
  1   a defect
  2   an input is wrong; one line says which"""


class Suite(NamedTuple):
    """module: imported only when the suite is asked for. summary: a line for the help."""

    module: str
    summary: str


SUITES = {
    "perplexity": Suite("seqmodels.tools.evaluate.perplexity", "loss on held-out text by length and by position"),
    "needle": Suite("seqmodels.tools.evaluate.needle", "what is hidden in a text, by length and depth"),
    "recall": Suite("seqmodels.tools.evaluate.recall", "the run's synthetic task, at other lengths and sizes"),
    "throughput": Suite("seqmodels.tools.evaluate.throughput", "speed and memory of training and decoding, by length"),
    "lm_eval": Suite("seqmodels.tools.evaluate.lm_eval", "tasks of lm-evaluation-harness (an optional extra)"),
}


def main(argv: list[str]) -> None:
    suite, options = read_arguments(argv)

    # After the command line is known to be right: these imports take seconds.
    from seqmodels.start_up import prepare_jax
    from seqmodels.tools._runs import open_run
    from seqmodels.tools.evaluate.evaluation import Evaluation
    from seqmodels.tools.evaluate.results import as_markdown, folder_of, write

    prepare_jax()
    run = open_run(options.run, options.step)
    folder = folder_of(options.run)
    found = suite.evaluate(run, options)
    parts = {"": found} if isinstance(found, Evaluation) else found
    for evaluation in parts.values():
        print(f"\n{as_markdown(evaluation)}")
    # The one by whose name a sweep knows that all is done comes last.
    for addition, evaluation in reversed(parts.items()):
        written = write(folder, f"{options.name}{addition}", run.step, given_to_suite(options), evaluation)
        print(f"\n{written}")


def read_arguments(argv: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """The suite's module, which is imported, and all options. The run is not looked at."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--suite", action="append", default=[])
    names = first.parse_known_args(argv)[0].suite
    if not names and not {"-h", "--help"} & set(argv):
        raise InputError(f"--suite is missing; expected one of {', '.join(SUITES)}")
    if len(names) > 1:
        raise InputError(f"--suite is given {len(names)} times; expected one suite")
    name = names[0] if names else None
    if name is not None and name not in SUITES:
        raise InputError(f"--suite {name!r} does not exist; {nearest(name, SUITES)}")
    suite = importlib.import_module(SUITES[name].module) if name else None
    options = _parser(name, suite).parse_args(argv)
    options.name = options.name or options.suite
    return suite, options


def given_to_suite(options: argparse.Namespace) -> dict[str, Any]:
    """The suite's own options, as JSON has them; a path is a string."""
    own = {name: value for name, value in vars(options).items() if name not in ("run", "suite", "step", "name")}
    return json.loads(json.dumps(own, default=str))


def _parser(name: str | None, suite: ModuleType | None) -> argparse.ArgumentParser:
    described = DESCRIPTION
    if suite is not None:
        described += f"\n\n{name}\n\n{suite.DESCRIPTION}"
    parser = argparse.ArgumentParser(
        prog="python -m seqmodels.tools.evaluate",
        usage=None if suite else "%(prog)s RUN --suite NAME [--step N] [--name NAME] [options of the suite]",
        description=described,
        epilog=EXAMPLES if suite is None else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a run directory, here or gs://BUCKET/FOLDER")
    width = max(map(len, SUITES))
    listed = "\n".join(f"  {key:<{width}}  {value.summary}" for key, value in SUITES.items())
    parser.add_argument("--suite", required=True, metavar="NAME", help="what to measure")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to use (default: the newest)")
    parser.add_argument("--name", metavar="NAME", help="of the files that are written (default: the suite's)")
    if suite is None:
        parser.description += f"\n\nsuites (--suite NAME --help shows the options of one):\n{listed}"
    else:
        suite.add_arguments(parser)
    return parser
