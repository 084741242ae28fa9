"""Functions without derivatives, which say so: what a kernel runs where it is differentiated."""

from collections.abc import Callable

import jax


def differentiated_once(name: str, rule: Callable) -> Callable:
    """`rule`, the forward or backward rule of the kernel `name`, which raises where somebody differentiates it."""

    @jax.custom_vjp
    def last(*arguments):
        return rule(*arguments)

    def refuse(*arguments):
        raise NotImplementedError(
            f"{name}: the kernel can be differentiated once, and this is its second derivative; "
            "expected backend='xla', which has all of them"
        )

    last.defvjp(refuse, refuse)
    return last
