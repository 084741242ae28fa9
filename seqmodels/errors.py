"""The one exception for what a person can mend, and how a program ends when it is raised.

Exit codes are a contract with whatever starts our programs (a shell, a scheduler, a pod):

    0   done
    1   a defect in the code: a traceback is printed
    2   an input is wrong (config, path, shape, data, disk): one line says which, and what is expected
    42  stopped on request after saving, or what it needs could not be reached: start the same command again and it
        continues
"""

import difflib
import sys
from collections.abc import Callable, Iterable

EXIT_DONE, EXIT_DEFECT, EXIT_INPUT, EXIT_RESTART = 0, 1, 2, 42


class InputError(ValueError):
    """An input is wrong. The message is one line: what was wrong, where, what was expected."""


class UnreachableError(InputError):
    """Something outside cannot be reached just now, such as a bucket; the same command may succeed later."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of an error message: the closest of the valid names, or all of them when none is close."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(valid)}"


def run_main(main: Callable[[list[str]], int | None]) -> None:
    """Run `main(argv)` and leave the process with the exit code that its outcome stands for."""
    try:
        code = main(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_RESTART if isinstance(error, UnreachableError) else EXIT_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.stdout.flush()
    sys.exit(code or EXIT_DONE)
