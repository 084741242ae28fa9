"""What JAX and PyTorch do differently: placing arrays, preparing programs, waiting for the device, and its clock."""

import contextlib
import gc
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from seqmodels.tools._measuring import Span, span
from seqmodels.tools.benchmark.cases import Inputs, Workload
from seqmodels.tools.benchmark.gpu.messages import Key
from seqmodels.tools.benchmark.gpu.tuning import compile_side_by_side
from seqmodels.tools.benchmark.programs import Values, jax_step, torch_step

IN_FLOAT32 = frozenset({"g", "A", "dt", "D"})  # arrays that make decays, and the skip, a few numbers in float32 as A is
SAMPLES = 4096  # positions of a sequence at which values are compared, about


class Placed(NamedTuple):
    """A workload on the device.

    one_cotangent: that of the output, zero but for the last sequence. Gradients of what all sequences share are then
    those of this one, and can be compared with a reference that has it alone.
    sequences: names of the arrays that have a batch and a time axis
    """

    arrays: dict[str, Any]
    cotangent: Any
    one_cotangent: Any
    sequences: frozenset[str]


class Function(NamedTuple):
    """A function of an operator's arrays. form: of ours, None for a peer's. alone: to be called on the last sequence
    in float32, at the highest precision."""

    call: Callable[..., Any]
    form: str | None = None
    alone: bool = False


Load = Callable[[], Function]


class Program(NamedTuple):
    """`call` queues one call on a cotangent and returns its values, or what stands for them."""

    call: Callable[[Any], Values]
    seconds: float
    temporary_bytes: int | None = None
    form: str | None = None


class Library(Protocol):
    """device: the name of the GPU, or of what stands for it."""

    device: str

    def place(self, given: Inputs, workload: Workload) -> Placed: ...

    def prepare(self, functions: Mapping[Key, Load], placed: Placed) -> dict[Key, Callable[[], Program]]:
        """Programs, each behind a function that waits for it, or raises what preparing it raised."""
        ...

    def wait(self, values: Values) -> None: ...

    def span(self, call: Callable[[], Values], calls: int) -> Span: ...

    def to_numpy(self, x: Any) -> np.ndarray: ...

    def check(self) -> None:
        """Raises where the device no longer works in this process, as after a kernel that wrote where it must not."""
        ...

    def free(self) -> None:
        """Gives memory back for the other library."""
        ...


def stride(length: int) -> int:
    """Between positions that are compared: odd, so that they fall on every place within a chunk."""
    return max(1, length // SAMPLES) | 1


def sample(name: str, x: Any, sequences: frozenset[str]) -> Any:
    """What is compared of a value: positions of its last sequence, or all of it where it has no sequences."""
    if name == "o" or name.removeprefix("d") in sequences:
        return x[-1, :: stride(x.shape[1])]
    return x


def _sequences(given: Inputs, workload: Workload) -> frozenset[str]:
    """Of the arrays that may have a time axis those that have one: a decay may be per head alone."""
    from seqmodels.registry import ops

    names = [name for name in ops()[workload.op].time_args if name in given.arrays]
    return frozenset(name for name in names if given.arrays[name].shape[:2] == given.cotangent.shape[:2])


class JaxLibrary:
    def __init__(self, platform: str):
        import jax

        (device,) = jax.devices(platform)[:1]
        self.device = device.device_kind
        self._pool = ThreadPoolExecutor(8)

    def place(self, given: Inputs, workload: Workload) -> Placed:
        import jax
        import jax.numpy as jnp

        def put(name: str, x: np.ndarray) -> Any:
            return jnp.asarray(jax.device_put(x), "float32" if name in IN_FLOAT32 else workload.dtype)

        arrays = {name: jax.tree.map(partial(put, name), x) for name, x in given.arrays.items()}
        cotangent = put("o", given.cotangent)
        one = jnp.zeros_like(cotangent).at[-1].set(cotangent[-1])
        return Placed(arrays, cotangent, one, _sequences(given, workload))

    def prepare(self, functions: Mapping[Key, Load], placed: Placed) -> dict[Key, Callable[[], Program]]:
        """Traced one after the other, compiled at once: compilers use the device in turns, and cores side by side."""
        return {key: self._program(load, key.backward, placed).result for key, load in functions.items()}

    def _program(self, load: Load, backward: bool, placed: Placed) -> Future:
        import jax

        start = time.perf_counter()
        try:
            function = load()
            arrays, cotangent, precision = placed.arrays, placed.cotangent, contextlib.nullcontext()
            if function.alone:
                arrays, cotangent = _alone(arrays, placed.sequences), _last_sequence(cotangent)
                precision = jax.default_matmul_precision("highest")
            with precision:
                lowered = jax.jit(jax_step(function.call, backward)).lower(arrays, cotangent)
        except Exception as error:
            # Told to whoever asks for this program; the others are prepared all the same.
            failed: Future = Future()
            failed.set_exception(error)
            return failed

        def compiled() -> Program:
            run = lowered.compile()

            def call(cotangent: Any) -> Values:
                return run(arrays, _last_sequence(cotangent) if function.alone else cotangent)

            temporary = run.memory_analysis().temp_size_in_bytes
            return Program(call, time.perf_counter() - start, temporary, function.form)

        return self._pool.submit(compiled)

    def wait(self, values: Values) -> None:
        import jax

        jax.block_until_ready(values)

    def span(self, call: Callable[[], Values], calls: int) -> Span:
        return span(call, calls, self.wait)

    def to_numpy(self, x: Any) -> np.ndarray:
        return np.asarray(x, np.float32)

    def check(self) -> None:
        import jax.numpy as jnp

        (jnp.zeros(8) + 1).block_until_ready()

    def free(self) -> None:
        gc.collect()


def _alone(arrays: dict[str, Any], sequences: frozenset[str]) -> dict[str, Any]:
    """The arrays in float32, and of those that have sequences the last one."""
    import jax

    return {
        name: _last_sequence(x) if name in sequences else jax.tree.map(lambda y: y.astype("float32"), x)
        for name, x in arrays.items()
    }


def _last_sequence(x: Any) -> Any:
    return x[-1:].astype("float32")


class TorchLibrary:
    def __init__(self, platform: str):
        import torch

        if platform == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} finds no GPU")
        self._on = platform
        self.device = torch.cuda.get_device_name() if platform == "cuda" else "cpu"
        compile_side_by_side()

    def place(self, given: Inputs, workload: Workload) -> Placed:
        import torch
        from jax import tree

        def put(name: str, x: np.ndarray) -> torch.Tensor:
            dtype = torch.float32 if name in IN_FLOAT32 else getattr(torch, workload.dtype)
            return torch.from_numpy(np.ascontiguousarray(x)).to(self._on).to(dtype)

        def trained(name: str, x: np.ndarray) -> torch.Tensor:
            return put(name, x).requires_grad_()

        arrays = {name: tree.map(partial(trained, name), x) for name, x in given.arrays.items()}
        cotangent = put("o", given.cotangent)
        one = torch.zeros_like(cotangent)
        one[-1] = cotangent[-1]
        return Placed(arrays, cotangent, one, _sequences(given, workload))

    def prepare(self, functions: Mapping[Key, Load], placed: Placed) -> dict[Key, Callable[[], Program]]:
        """Nothing is compiled before the first call, so that is made here."""
        return {key: partial(self._program, load, key.backward, placed) for key, load in functions.items()}

    def _program(self, load: Load, backward: bool, placed: Placed) -> Program:
        step = torch_step(load().call, backward)
        start = time.perf_counter()
        self.wait(step(placed.arrays, placed.cotangent))
        return Program(partial(step, placed.arrays), time.perf_counter() - start)

    def wait(self, values: Values) -> None:
        import torch

        if self._on == "cuda":
            torch.cuda.synchronize()

    def span(self, call: Callable[[], Values], calls: int) -> Span:
        import torch

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if self._on == "cuda" else (None, None)
        start = time.perf_counter()
        if begin is not None:
            begin.record()
        for _ in range(calls):
            call()
        if end is None:
            seconds = time.perf_counter() - start
            return Span(seconds, seconds)
        end.record()
        started = time.perf_counter()
        end.synchronize()
        return Span(begin.elapsed_time(end) / 1e3, started - start)

    def to_numpy(self, x: Any) -> np.ndarray:
        return x.detach().float().cpu().numpy()

    def check(self) -> None:
        import torch

        (torch.zeros(8, device=self._on) + 1).cpu()

    def free(self) -> None:
        import torch

        gc.collect()
        if self._on == "cuda":
            torch.cuda.empty_cache()


LIBRARIES: dict[str, type[Library]] = {"jax": JaxLibrary, "torch": TorchLibrary}
