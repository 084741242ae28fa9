"""The exceptions that a person is meant to read, and how a program ends when one is raised.

Exit codes are a contract with whatever starts our programs (a shell, a scheduler, a pod):

    0   done
    1   a defect in the code: a traceback is printed
    2   an input is wrong (config, path, shape, data, disk): one line says which, and what is expected
    42  stopped on request after saving, or what it needs could not be reached, or other processes of the job are lost:
        start the same command again and it continues
    130 interrupted by Ctrl-C where nothing was to be saved

A job of several processes has one exit code: see `seqmodels.parallel.ending`.
"""

import difflib
import sys
from collections.abc import Callable, Iterable

EXIT_DONE, EXIT_DEFECT, EXIT_INPUT, EXIT_RESTART, EXIT_INTERRUPTED = 0, 1, 2, 42, 130


class ToldError(Exception):
    """An error whose message says all there is to say; no traceback is printed.

    exit_code: what the program ends with.
    """

    exit_code = EXIT_DEFECT


class InputError(ToldError, ValueError):
    """An input is wrong. The message is one line: what was wrong, where, what was expected."""

    exit_code = EXIT_INPUT


class LostContactError(ToldError):
    """Other processes of the job are gone, or never came."""

    exit_code = EXIT_RESTART


class UnreachableError(InputError):
    """Something outside cannot be reached just now, such as a bucket; the same command may succeed later."""

    exit_code = EXIT_RESTART


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of an error message: the closest of the valid names, or all of them when none is close."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(valid)}"


def run_main(main: Callable[[list[str]], int | None]) -> None:
    """Run `main(argv)` and leave the process with the exit code that its outcome stands for."""
    try:
        code = main(sys.argv[1:])
    except ToldError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    sys.stdout.flush()
    sys.exit(code or EXIT_DONE)
