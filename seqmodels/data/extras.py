"""Packages that only some inputs need."""

import importlib
from types import ModuleType

from seqmodels.errors import InputError


def import_extra(module: str, purpose: str) -> ModuleType:
    """Import a module of the `text` extra; where it is missing, say what needs it and how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{purpose} needs the package {error.name!r}: pip install 'seqmodels[text]'"
        ) from error
