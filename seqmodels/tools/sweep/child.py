"""The first thing that a point's process runs: python child.py CORES PARENT PROGRAM ARGUMENTS...

It keeps itself to the cores (their numbers, with commas; - for all), sees to it that it is killed when the process that
started it is gone, and becomes `python PROGRAM ARGUMENTS...`. It imports nothing that takes time.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(cores: str, parent: str, *command: str) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):
            os._exit(1)  # it went before it could be watched
        if cores != "-":
            os.sched_setaffinity(0, map(int, cores.split(",")))
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    main(*sys.argv[1:])
