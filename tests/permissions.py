"""What tests of permissions share."""

import contextlib
import os


@contextlib.contextmanager
def unprivileged():
    """Permissions mean nothing to root, so be somebody else for a moment."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
