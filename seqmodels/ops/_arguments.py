"""Checks of arguments that several operators share."""

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
