"""The registered mixers, as what a test of whole models or of Flax's side of a layer is tried on."""

import pytest

from seqmodels.registry import MIXERS


def every_mixer(group: str) -> list:
    """A parameter for each mixer, by name; the tests of one `group` and mixer share what they compile.

    A plain run tries one mixer of every operator, the first; the rest is left to `pytest -m slow`.
    """
    first = {entry.op.name: name for name, entry in reversed(MIXERS.items())}

    def marks(name: str) -> list[pytest.MarkDecorator]:
        slow = [] if first[MIXERS[name].op.name] == name else [pytest.mark.slow]
        return [pytest.mark.xdist_group(f"{group} of {name}"), *slow]

    return [pytest.param(name, id=name, marks=marks(name)) for name in MIXERS]
