"""Checks of arguments that several operators share."""

import jax
import numpy as np

from seqmodels.errors import InputError
from seqmodels.notation import Array


def check_qkv(op: str, q: Array, k: Array, v: Array) -> None:
    """q and k [b, t, h, k], v [b, t, hv, v] with hv a multiple of h; InputError names what is not so."""
    if q.ndim != 4:
        raise InputError(f"{op}: q has shape {q.shape}; expected [batch, time, heads, key channels]")
    if k.shape != q.shape:
        raise InputError(f"{op}: k has shape {k.shape}; expected {q.shape} as q has")
    if v.ndim != 4 or v.shape[:2] != q.shape[:2] or v.shape[2] % q.shape[2]:
        raise InputError(
            f"{op}: v has shape {v.shape}; expected [{q.shape[0]}, {q.shape[1]}, a multiple of {q.shape[2]} heads, "
            "value channels]"
        )


def check_values(op: str, name: str, x: Array | None, what: str, low: float = -np.inf, high: float = np.inf) -> None:
    """InputError where a value is not in low..high. Inside of jit values are not known, and not looked at."""
    if x is None or isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
        return
    values = np.asarray(x)
    if values.size and not (low <= values.min() and values.max() <= high):
        raise InputError(f"{op}: {name} has values from {values.min():g} to {values.max():g}; expected {what}")


def check_log_decay(op: str, g: Array | None) -> None:
    """`check_values` of a log decay."""
    check_values(op, "g", g, "natural logarithms of decays, <= 0", high=0)
