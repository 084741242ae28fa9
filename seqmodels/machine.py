"""What a process has of the machine that it runs on."""

import os


def usable_cores() -> int:
    """Of the machine's cores, those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores() -> float:
    """The part of the machine's cores that `usable_cores` are; programs that run side by side divide them."""
    return usable_cores() / (os.cpu_count() or 1)
