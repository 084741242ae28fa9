"""The command line of `python -m gcp`: one command for each step of a job's way, from its file to a finished run."""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from seqmodels.errors import EXIT_DONE, InputError

DESCRIPTION = """\
Training jobs on TPU pods: from a job file to a running job that survives preemption. Only up, down and watch send
anything; all of it can be printed first, with plan. gcp/README.md has the whole way."""

EPILOG = """\
examples, in the order of a job's life:
  python -m gcp check gcp/examples/v5e_256.toml
  python -m gcp local gcp/examples/v5e_256.toml --processes 4 --run_dir runs/local
  python -m gcp preflight gcp/examples/v5e_256.toml
  python -m gcp plan gcp/examples/v5e_256.toml
  python -m gcp up gcp/examples/v5e_256.toml
  python -m gcp status gcp/examples/v5e_256.toml
  python -m gcp logs gcp/examples/v5e_256.toml --follow
  python -m gcp down gcp/examples/v5e_256.toml

exit codes:
  0   done; for up: the job is there, or finished
  1   the job has failed, does not fit, or is not finished when watch ends; or a defect
  2   an input is wrong, the job is not there, or another job has its name; one line says which"""


class Command(NamedTuple):
    """
    Args:
        help: a line in the list of commands. description: on top of the command's own help.
        overrides: whether those of the config, --gin.NAME.PARAMETER=VALUE, may stand on the command line; `run` finds
            them as `arguments.overrides`, without their --gin.
    """

    help: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    overrides: bool = False


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gcp",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        own = subparsers.add_parser(
            name,
            help=command.help,
            description=command.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        # Two commands need modules that take long to import.
        if argv[:1] == [name]:
            command.add_arguments(own)
    overrides: list[str] = []
    if argv and argv[0] in COMMANDS and COMMANDS[argv[0]].overrides:
        from seqmodels.config import split_overrides

        argv, overrides = split_overrides(argv)
    arguments = parser.parse_args(argv, argparse.Namespace(overrides=overrides))
    return COMMANDS[arguments.command].run(arguments)


def _job_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB.toml", type=Path, help="the job file; gcp/examples has some")


def _module(name: str, help: str, overrides: bool = False) -> Command:
    """A command that is a module of its own."""
    return Command(
        help,
        help,
        lambda parser: importlib.import_module(f"gcp.{name}").add_arguments(parser),
        lambda arguments: importlib.import_module(f"gcp.{name}").run(arguments),
        overrides,
    )


def _check(arguments: argparse.Namespace) -> int:
    from gcp.checks import check
    from gcp.job import read_job

    return check(read_job(arguments.job))


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _job_file(parser)
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write what is sent there: the manifest, or the startup script"
    )


def _plan(arguments: argparse.Namespace) -> int:
    from gcp.job import read_job
    from gcp.plan import backend_of, plan

    job = read_job(arguments.job)
    print(plan(job), end="")
    if arguments.output is not None:
        _, text = backend_of(job).documents()[0]
        try:
            arguments.output.write_text(text)
        except OSError as error:
            raise InputError(f"--output: cannot write {arguments.output}: {error.strerror}") from error
    return EXIT_DONE


def _up_arguments(parser: argparse.ArgumentParser) -> None:
    _job_file(parser)
    parser.add_argument("--dry_run", action="store_true", help="as `plan`: print everything, send nothing")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with a run whose job file has changed in machines, places, image or environment; never in what is "
        "trained",
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="where the job is there and has failed, delete it and send it as the job file has it now, which may have "
        "changed as for --resume",
    )


def _up(arguments: argparse.Namespace) -> int:
    from gcp.job import read_job
    from gcp.plan import plan
    from gcp.submit import up

    job = read_job(arguments.job)
    if arguments.dry_run:
        print(plan(job), end="")
        return EXIT_DONE
    return up(job, resume=arguments.resume, again=arguments.again)


def _status(arguments: argparse.Namespace) -> int:
    from gcp.job import read_job
    from gcp.status import status

    return status(read_job(arguments.job))


def _logs_arguments(parser: argparse.ArgumentParser) -> None:
    _job_file(parser)
    parser.add_argument("--follow", "-f", action="store_true", help="go on with what is written, until Ctrl-C")
    parser.add_argument("--slice", type=int, default=0, metavar="I", help="of several slices which, from 0")
    parser.add_argument("--host", type=int, default=0, metavar="I", help="which host of the slice, from 0")


def _logs(arguments: argparse.Namespace) -> int:
    from gcp.job import read_job
    from gcp.status import logs

    return logs(read_job(arguments.job), follow=arguments.follow, slice=arguments.slice, host=arguments.host)


def _down_arguments(parser: argparse.ArgumentParser) -> None:
    _job_file(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask")


def _down(arguments: argparse.Namespace) -> int:
    from gcp.job import read_job
    from gcp.submit import down

    return down(read_job(arguments.job), yes=arguments.yes)


def _watch_arguments(parser: argparse.ArgumentParser) -> None:
    _job_file(parser)
    parser.add_argument("--every", type=float, default=30, metavar="SECONDS", help="from one look to the next (30)")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="leave the queued resource of a failed job, to look into its machines; it goes on costing money",
    )


def _watch(arguments: argparse.Namespace) -> int:
    from gcp.job import read_job
    from gcp.watch import watch

    if not arguments.every >= 1:
        raise InputError(f"--every is {arguments.every:g}: expected at least 1 second")
    return watch(read_job(arguments.job), every=arguments.every, keep=arguments.keep)


COMMANDS = {
    "check": Command(
        "offline: tools, job file, slice, manifest, config",
        """\
Look at all that can be known of a job without a network: the programs that are needed, the slice, the manifest, the
config with the job's overrides on a mesh of that many devices. Nothing is sent and no data is read. What only the cloud
knows is listed, with the command that shows it. Ends with 0, or with 2 where something is wrong.""",
        _job_file,
        _check,
    ),
    "local": _module("local", "the same command, as processes on this machine", overrides=True),
    "preflight": _module("preflight", "compile the training step for the job's slices, without a TPU"),
    "plan": Command(
        "print all that would be sent; changes nothing",
        """\
Print the job: what it takes in chips and chip hours, its environment with secrets masked, the manifest or the startup
script, and the commands that `up` runs. Runs no program; the same job file gives the same text.""",
        _plan_arguments,
        _plan,
    ),
    "up": Command(
        "send the job; a second time changes nothing",
        """\
Send the job, unless it is there or finished. A job's name is its identity: where another job file has been sent under
that name, `up` shows what differs and sends nothing. The job's text is recorded in the run directory: where it was sent
to another place, and is there, nothing is sent. Ends with 0 where the job is there or finished, 1 where it is there and
has failed, 2 where it was refused.""",
        _up_arguments,
        _up,
    ),
    "status": Command(
        "what the job does, and why it waits",
        """\
Print one screen: the job's state and why it is in it, hosts, restarts, the last step and how long ago it was written,
which shows a program that hangs, the newest checkpoint. Ends with 0, 1 where the job has failed, 2 where it is not
there.""",
        _job_file,
        _status,
    ),
    "logs": Command(
        "what a host writes",
        "Print what the program writes on one host, the first by default. The run directory has the logs of all.",
        _logs_arguments,
        _logs,
    ),
    "down": Command(
        "delete the job; the run directory stays",
        """\
Delete the job, wait until it is gone, and print what may go on costing money; where the job was sent to another place
than the job file has now, it is deleted there, too. The run directory is not touched, so that `up` goes on from the
last checkpoint. Where the job is not there, says so and ends with 0.""",
        _down_arguments,
        _down,
    ),
    "watch": Command(
        "tell what happens until the job ends; restarts queued resources",
        """\
Print every change of the job's state, with the time, until it ends: with 0 where it is finished, 1 where it has failed,
2 where it is not there. On GKE this is for people only. A queued resource that is preempted never comes back: there
this command deletes it and makes it again, at most `max_restarts` times, with growing pauses while there is no
capacity, and only as long as it runs. A program that ended with 1 or 2 is not started again. When the job has ended the
queued resource, which costs money, is deleted.""",
        _watch_arguments,
        _watch,
    ),
}
