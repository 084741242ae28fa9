"""Triton's search for the fastest configuration of a kernel, within minutes for all kernels of a library.

At a kernel's first call Triton compiles every configuration, one after the other, and times each for an eighth of a
second: with a hundred of them for one function of fla, that is minutes of a device that waits. Here they are compiled
on all cores before they are timed, and timed for a quarter as long. The search and its choice are Triton's.
"""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

WARM_UP, TIMED = 5, 25  # milliseconds; Triton's own are 25 and 100


def compile_side_by_side() -> None:
    """Change Triton's tuner, in this process. Without Triton, or with one that cannot do it, nothing is changed."""
    try:
        from triton.runtime._async_compile import AsyncCompileMode
        from triton.runtime.autotuner import Autotuner
        from triton.testing import do_bench
    except ImportError:
        return
    # The last step before configurations are timed.
    prune = Autotuner.prune_configs

    def prune_configs(self: Any, kwargs: dict[str, Any]) -> list:
        configs = prune(self, kwargs)
        if self._do_bench is None:
            self._do_bench = partial(do_bench, warmup=WARM_UP, rep=TIMED)
        # Whatever goes wrong shows again, and is dealt with, where the configuration is timed.
        with (
            contextlib.suppress(Exception),
            ThreadPoolExecutor(os.cpu_count()) as pool,
            AsyncCompileMode(pool, ignore_errors=True),
        ):
            for config in configs:
                with contextlib.suppress(Exception):
                    self.fn.run(*self.nargs.values(), **{**kwargs, "warmup": True, **config.all_kwargs()})
        return configs

    Autotuner.prune_configs = prune_configs
