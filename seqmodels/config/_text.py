"""Values and bindings as gin text: one binding a line, in an order that depends on their names alone."""

import math
from collections.abc import Mapping
from typing import Any

from seqmodels.config._constructors import CONSTANTS, Constant, Group, constructors, short_name, short_names
from seqmodels.config._reading import Macro, Reference


def groups_text(groups: Mapping[Group, Mapping[str, Any]]) -> str:
    """A gin file of these bindings; a value that gin cannot express is left out."""
    blocks = {}
    for (scope, selector), values in groups.items():
        texts = {name: value_text(value) for name, value in sorted(values.items())}
        prefix = scoped(scope, short_name(selector))
        lines = [f"{prefix}.{name} = {text}\n" for name, text in texts.items() if text is not None]
        blocks[short_name(selector), scope] = "".join(lines)
    return "\n".join(block for _, block in sorted(blocks.items()) if block)


def value_text(value: Any) -> str | None:
    """The value as it stands in a gin file; None where gin has no way to write it."""
    if isinstance(value, Reference):
        name = short_name(value.selector) if value.selector in constructors else value.selector
        return f"@{scoped(value.scope, name)}{'()' if value.called else ''}"
    if isinstance(value, Macro | Constant):
        return f"%{value.name}"
    if type(value) is float and not math.isfinite(value):
        return None if math.isnan(value) else repr(value).replace("inf", "1e999")
    if value is None or type(value) in (bool, int, float, str):
        return repr(value)
    if type(value) in (tuple, list):
        elements = [value_text(element) for element in value]
        if None in elements:
            return None
        inside = ", ".join(elements)
        if type(value) is list:
            return f"[{inside}]"
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if type(value) is dict:
        items = [(value_text(key), value_text(element)) for key, element in value.items()]
        return None if any(None in item for item in items) else f"{{{', '.join(map(': '.join, items))}}}"
    # Defaults stand in signatures as the objects themselves.
    named = {f"%{name}": constant for name, constant in CONSTANTS.items()}
    named |= {f"@{name}": constructor.configured for name, constructor in short_names().items()}
    return next((name for name, known in named.items() if known is value), None)


def scoped(scope: str, name: str) -> str:
    return f"{scope}/{name}" if scope else name
