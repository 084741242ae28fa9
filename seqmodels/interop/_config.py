"""Reading the config.json of a published model: what must be there, and what this framework has."""

from collections.abc import Mapping, Sequence
from typing import Any

from seqmodels.errors import InputError

Config = Mapping[str, Any]


def need(config: Config, key: str) -> Any:
    """The value of a key that has no default."""
    if config.get(key) is None:
        raise InputError(f"config.json has no {key!r}; expected one of a {config.get('model_type', 'known')} model")
    return config[key]


def number(value: Any) -> float:
    """A float, also where it is one that JSON has no sign for and transformers writes as {"__float__": "Infinity"}."""
    return float(value["__float__"] if isinstance(value, Mapping) else value)


def expect(config: Config, key: str, only: Any, default: Any = None) -> None:
    """Refuse a value other than the one that the layers here compute; None and a missing key are the default's."""
    value = config.get(key)
    value = (only if default is None else default) if value is None else value
    if value != only:
        raise InputError(f"config.json has {key} = {value!r}; expected {only!r}, the only one that is supported")


def rotary(config: Config, base: float, fraction: float = 1.0) -> tuple[float, float]:
    """Base of the rotary angles, and the share of a head's channels that turn; both as newer and as older files say."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputError(f"config.json has rotary positions of type {kind!r}; expected 'default', the only one here")

    def value(key: str, default: float) -> float:
        given = rope.get(key, config.get(key))
        return float(default if given is None else given)

    return value("rope_theta", base), value("partial_rotary_factor", fraction)


def shortest_pattern(kinds: Sequence[str]) -> tuple[str, ...]:
    """The shortest beginning that, repeated and cut off at the end, gives the whole."""
    length = next(n for n in range(1, len(kinds) + 1) if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    return tuple(kinds[:length])


def whole(value: float) -> int | float:
    """The same number, an int where it is one, as config files write it."""
    return int(value) if float(value).is_integer() else value
