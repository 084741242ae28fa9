"""Ours and theirs on the same numbers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.registry import ops
from seqmodels.tools.benchmark.cases import Workload, inputs
from seqmodels.tools.benchmark.peers import PEERS, Peer
from tests.operators import assert_close

Arrays = dict[str, Any]
SIZES = {"batch": 2, "length": 128, "heads": 2, "key_dim": 16, "value_dim": 16}


def peers_of(library: str) -> list[tuple[Peer, str]]:
    """The functions of a library that the benchmark names as computing the same, each with its cases."""
    of_library = [peer for peer in PEERS if peer.name.split()[0] == library and peer.differs is None]
    return [(peer, case) for peer in of_library for case in peer.cases]


def named(pairs: list[tuple[Peer, str]]) -> list[str]:
    return [f"{peer.name}, {case}" for peer, case in pairs]


def assert_peer_agrees(peer: Peer, case: str, *, grads: bool = True) -> None:
    given = inputs(Workload(peer.op, case, **SIZES))
    call = ops()[peer.op].call
    assert_agree(
        lambda **arrays: call(**arrays, **given.options)[0],
        peer.load(given),
        given.arrays,
        framework=peer.framework,
        grads=grads,
    )


def assert_agree(ours: Callable, theirs: Callable, arrays: Arrays, *, framework: str = "torch", grads: bool = True):
    """Outputs, however many, and the gradient of every array that theirs depends on.

    ours takes jax's arrays, or trees of them, by name, theirs those of its framework; both return an array or a tuple.
    """
    run = partial(_torch, theirs) if framework == "torch" else partial(_jax, theirs)
    shapes = jax.tree.leaves(jax.eval_shape(lambda x: ours(**x), arrays))
    random = np.random.default_rng(1)
    cotangents = [random.standard_normal(x.shape, np.float32) for x in shapes] if grads else None
    (outputs, gradients), (want, want_gradients) = _jax(ours, arrays, cotangents), run(arrays, cotangents)
    assert_close(outputs, want, "peer")
    assert not grads or any(x is not None for x in want_gradients.values())
    for name, x in want_gradients.items():
        if x is not None:
            assert_close(gradients[name], x, "peer")


def _jax(function: Callable, arrays: Arrays, cotangents: list[np.ndarray] | None) -> tuple[list, dict[str, Any]]:
    def both(arrays: dict, cotangents: list | None) -> tuple[list, dict]:
        if cotangents is None:
            return jax.tree.leaves(function(**arrays)), {}
        outputs, pull_back = jax.vjp(lambda x: jax.tree.leaves(function(**x)), arrays)
        return outputs, _by_path(pull_back(cotangents)[0])

    return jax.jit(both)(jax.tree.map(jnp.asarray, arrays), cotangents)


def _torch(function: Callable, arrays: Arrays, cotangents: list[np.ndarray] | None) -> tuple[list, dict[str, Any]]:
    import torch

    torch.set_num_threads(1)  # more of them wait for one another in loops over tokens
    tensors = jax.tree.map(lambda x: torch.from_numpy(x).requires_grad_(cotangents is not None), arrays)
    outputs = function(**tensors)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    values = [x.detach().numpy() for x in outputs]
    if cotangents is None:
        return values, {}
    by_path = _by_path(tensors)
    grads = torch.autograd.grad(
        outputs, list(by_path.values()), [torch.from_numpy(x) for x in cotangents], allow_unused=True
    )
    return values, {name: None if x is None else x.numpy() for name, x in zip(by_path, grads)}


def _by_path(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(tree)}


def with_state(op: str, case: str, shape: tuple[int, ...]) -> tuple[Arrays, dict[str, Any]]:
    """Arrays of a case with an `initial_state` among them, and the options."""
    given = inputs(Workload(op, case, **SIZES))
    state = np.random.default_rng(2).standard_normal(shape, np.float32)
    return {**given.arrays, "initial_state": state}, given.options
