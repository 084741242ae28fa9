"""Neural memory: the weights of a small network, trained by gradient descent on the sequence as it is read.

With M the network (`_memory_network`), W its weights, and l(W; k, v) = loss_scale |M_W(k) - v|^2,

    u_t = grad l(R; k_t, v_t)                                          surprise                                   (1)
    S_t = eta_t S_{t-1} - theta_t u_t                                  momentum                                   (2)
    W_t = (1 - alpha_t) W_{t-1} + S_t                                  forgetting                                 (3)
    o_t = M_{W_t}(q_t)                                                 read after writing                         (4)

(Titans: Behrouz, Zhong, Mirrokni 2024, arXiv 2501.00663.) R are the weights at the start of the current mini-batch of
`mini_batch` tokens, counted from the document's start: R becomes W_t after every `mini_batch`-th token. With
mini_batch = 1, R = W_{t-1} and this is the paper's recurrence; a longer mini-batch is another function, which can be
computed many tokens at a time. Where `reach` is given, (4) reads at R + reach_t (W_t - R) instead of at W_t, and so it
is these weights that the last token of a mini-batch leaves.

    code     symbol       shape             range, dtype
    q, k     q, k         [b, t, h, k]      any float; keys of length 1 keep the memory stable
    v        v            [b, t, h, v]      any float; v = k where the network has a residual connection
    theta    theta        [b, t, h]         step, >= 0, float32
    alpha    alpha        [b, t, h]         forgetting, in [0, 1], float32; None is 0
    eta      eta          [b, t, h]         momentum, in [0, 1], float32; None is 0, and the state has no S
    reach    a            [b, t, h]         float32; None is 1
    weights  W_0          Linear per layer  A [h, i, o], c [h, o] or None: the memory of a document not yet read
    momentum S_0          as weights        None is 0
    norm     gamma, beta  [h, v] each       of the network's norm, which the memory does not change; None for no norm

TTT-Linear and TTT-MLP (Sun et al. 2024, arXiv 2407.04620) are this memory with alpha and eta None, residual, a norm,
biases, loss_scale = 1/2, theta_j the learning rate of token j and reach_t the scale of place t in the mini-batch: their
target v - k and output q + norm(f(q)) are the residual connection. Their step of size eta_tj = reach_t theta_j is (4).

The linear memory with alpha, eta None and mini_batch = 1 is `delta_rule` with beta = 2 theta, which is stable while
beta |k|^2 <= 2. In general, a linear memory without forgetting and momentum that reads a mini-batch over and over
diverges if and only if the largest eigenvalue of sum_j 2 theta_j k_j^T k_j over it exceeds 2: with keys of length 1,
thetas that sum up to 1 are safe.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from seqmodels.errors import InputError, nearest
from seqmodels.notation import Array, Keys, Queries, SegmentIds, Values
from seqmodels.ops import _dispatch, _neural_memory_kernel, _scan, _tiles
from seqmodels.ops._arguments import check_values
from seqmodels.ops._chunks import positions_per_token
from seqmodels.ops._memory_network import ACTIVATIONS, Linear, Norm, Weights, loss, matrix_size, read
from seqmodels.ops._neural_memory_chunked import Memory, MiniBatch, in_order, in_tiles
from seqmodels.ops._op import Example, Inputs, Kernel, Options, SeqOp
from seqmodels.ops._scan import Documents

Gate = Float[Array, "b t h"]


TIME_ARGS = ("q", "k", "v", "theta", "alpha", "eta", "reach")
LEARNED = ("weights", "momentum", "reference")
ON_TPU, ON_GPU = (f"pallas_kernels.{platform}.neural_memory" for platform in ("tpu", "gpu"))


class NeuralMemoryState(NamedTuple):
    """W, S and R of equations (1) to (3), each a `Linear` per layer with A [b, h, i, o] and c [b, h, o], in float32.

    momentum is None where there is none. place [b] int32: tokens of the current mini-batch seen so far.
    """

    weights: Weights
    momentum: Weights | None
    reference: Weights
    place: Int[Array, " b"]


def neural_memory(
    q: Queries,
    k: Keys,
    v: Values,
    theta: Gate,
    alpha: Gate | None = None,
    eta: Gate | None = None,
    *,
    weights: Weights,
    momentum: Weights | None = None,
    norm: Norm | None = None,
    reach: Gate | None = None,
    mini_batch: int = 16,
    activation: str = "gelu",
    residual: bool = False,
    loss_scale: float = 1.0,
    epsilon: float = 1e-6,
    initial_state: NeuralMemoryState | None = None,
    segment_ids: SegmentIds | Documents | None = None,
    form: str = "chunked",
    chunk_size: int | None = None,
    backend: str = "auto",
    exchange: str = "auto",
) -> tuple[Values, NeuralMemoryState]:
    """A memory that learns as it reads, equations (1) to (4).

    Returns o [b, t, h, v] in v's dtype and the final `NeuralMemoryState`.

    theta, alpha, eta, reach: step, forgetting, momentum, and the share of a mini-batch's change that a token reads.
    weights, momentum: what a document starts from, without a batch axis; differentiable. `fresh_start` makes them from
        the state after a prefix that all documents share.
    norm: scale and bias of a norm at the network's end, epsilon its epsilon.
    mini_batch: tokens whose gradients are taken at the same weights. Part of the function, unlike chunk_size.
    activation: between linear layers: "gelu" (by tanh), "gelu_exact" (by erf), "silu".
    residual: M(x) = x + ...; needs values of the width of keys.
    loss_scale: factor of the loss.
    initial_state: a final state, possibly inside a mini-batch; it belongs to the document of the first real token.
    segment_ids: [b, t] document numbers; the memory starts afresh where they change, 0 is padding.
    form: "recurrent" (`lax.scan` of the definition), "chunked" (training).
    chunk_size: tokens between states that are kept for the backward pass, rounded up to whole mini-batches; None is
        one mini-batch.

    Raises InputError where shapes disagree or an option does not exist, and outside of jit for theta below 0 and for
    alpha or eta outside of [0, 1].
    """
    _check(q, k, v, {"theta": theta, "alpha": alpha, "eta": eta, "reach": reach})
    _check_network(k, v, weights, momentum, eta, norm, residual)
    if activation not in ACTIVATIONS:
        raise InputError(f"neural_memory: activation={activation!r} does not exist; {nearest(activation, ACTIVATIONS)}")
    if mini_batch < 1:
        raise InputError(f"neural_memory: mini_batch={mini_batch}; expected a positive number of tokens")
    gates = {"theta": theta, "alpha": alpha, "eta": eta, "reach": reach}
    gates = {name: None if x is None else x.astype(_scan.state_dtype(x)) for name, x in gates.items()}
    return _dispatch.run(
        NEURAL_MEMORY,
        {"q": q, "k": k, "v": v, **gates, "weights": weights, "momentum": momentum, "norm": norm},
        {
            "mini_batch": mini_batch,
            "activation": activation,
            "residual": residual,
            "loss_scale": loss_scale,
            "epsilon": epsilon,
        },
        initial_state=initial_state,
        segment_ids=segment_ids,
        form=form,
        chunk_size=chunk_size,
        backend=backend,
        exchange=exchange,
    )


def recall_flops(heads: int, widths: Sequence[int]) -> float:
    """FLOPs of M(q) for a token; widths as for `neural_memory_flops`."""
    return 2 * heads * matrix_size(widths)


def neural_memory_flops(
    length: int,
    *,
    heads: int,
    widths: Sequence[int],
    mini_batch: int,
    has_momentum: bool,
    has_reach: bool = False,
    decoding: bool = False,
) -> float:
    """FLOPs of matrix products for a token, in the chunked form over `length` tokens, or in a step.

    widths: channels of the keys, of each hidden layer, and of the values. Forgetting, momentum and steps are
    element-wise work on the weights, which does not count.
    """
    size = matrix_size(widths)
    # The keys forward through R, and the error back to the second layer.
    signals = 2 * size + 2 * (size - widths[0] * widths[1])
    if decoding:
        return heads * (signals + 2 * size + 2 * size)  # the gradient, x^T d of every layer; M(q)
    memories = 1 + has_momentum  # W and S
    # Where a mini-batch may be a part of one, R is kept beside W, and read where there is `reach`.
    read = 2 * size * (memories + (has_reach and length % mini_batch > 0))
    pairs = 2 * mini_batch * sum(i + o for i, o in pairwise(widths))  # Y X^T and its product with D
    write = 2 * size * memories
    gates = 2 * mini_batch * (mini_batch + 1) if has_momentum else 0  # N [m, M]
    return positions_per_token(length, mini_batch) * heads * (signals + gates + read + pairs + write)


def recall(
    q: Queries,
    weights: Weights,
    *,
    norm: Norm | None = None,
    activation: str = "gelu",
    residual: bool = False,
    epsilon: float = 1e-6,
) -> Values:
    """What a memory answers, without a write: M(q) [b, t, h, v] in q's dtype.

    q [b, t, h, k]; weights are those of a state, A [b, h, i, o]; the rest as for `neural_memory`.
    """
    options = {"activation": activation, "residual": residual, "epsilon": epsilon}
    by_head = jax.vmap(lambda w, x, n: read(w, x, n, options), in_axes=(0, 1, 0), out_axes=1)
    by_row = jax.vmap(by_head, in_axes=(0, 0, None))
    return by_row(weights, q.astype(_scan.state_dtype(q)), norm).astype(q.dtype)


def fresh_state(batch: int, weights: Weights, momentum: Weights | None, *, has_momentum: bool) -> NeuralMemoryState:
    """The state before the first token of a document: the arguments `weights` and `momentum`, for every row."""

    def for_each_row(x: Array) -> Array:
        return jnp.broadcast_to(x.astype(_scan.state_dtype(x)), (batch, *x.shape))

    W = jax.tree.map(for_each_row, weights)
    S = None
    if has_momentum:
        S = jax.tree.map(jnp.zeros_like, W) if momentum is None else jax.tree.map(for_each_row, momentum)
    return NeuralMemoryState(W, S, W, jnp.zeros(batch, jnp.int32))


def fresh_start(state: NeuralMemoryState) -> tuple[Weights, Weights | None]:
    """`weights` and `momentum` of documents that start from this state of one row, with a mini-batch of their own."""
    return jax.tree.map(lambda x: x[0], (state.weights, state.momentum))


def _check(q: Array, k: Array, v: Array, gates: Inputs) -> None:
    if q.ndim != 4:
        raise InputError(f"neural_memory: q has shape {q.shape}; expected [batch, time, heads, key channels]")
    if k.shape != q.shape:
        raise InputError(f"neural_memory: k has shape {k.shape}; expected {q.shape} as q has")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise InputError(f"neural_memory: v has shape {v.shape}; expected {(*q.shape[:3], 'value channels')}")
    for name, x in gates.items():
        if x is not None and x.shape != q.shape[:3]:
            raise InputError(f"neural_memory: {name} has shape {x.shape}; expected {q.shape[:3]}, a number per head")
    check_values("neural_memory", "theta", gates["theta"], "step sizes, >= 0", low=0)
    for name in ("alpha", "eta"):
        check_values("neural_memory", name, gates[name], "gates from 0 to 1", low=0, high=1)


def _check_network(
    k: Array,
    v: Array,
    weights: Weights,
    momentum: Weights | None,
    eta: Array | None,
    norm: Norm | None,
    residual: bool,
) -> None:
    heads, width = k.shape[2:]
    if not weights:
        raise InputError("neural_memory: weights is empty; expected a Linear for every layer of the memory")
    for place, (A, c) in enumerate(weights):
        if A.ndim != 3 or A.shape[:2] != (heads, width):
            raise InputError(
                f"neural_memory: weights[{place}].A has shape {A.shape}; expected {(heads, width, 'outputs')}"
            )
        width = A.shape[2]
        if c is not None and c.shape != (heads, width):
            raise InputError(f"neural_memory: weights[{place}].c has shape {c.shape}; expected {(heads, width)}")
    if width != v.shape[3]:
        raise InputError(f"neural_memory: the last of weights gives {width} channels; expected {v.shape[3]} as v has")
    if residual and k.shape[3] != v.shape[3]:
        raise InputError(
            f"neural_memory: residual=True with keys of {k.shape[3]} and values of {v.shape[3]} channels; "
            "expected as many of both"
        )
    for place, x in enumerate(norm or ()):
        if x.shape != (heads, width):
            raise InputError(
                f"neural_memory: norm.{Norm._fields[place]} has shape {x.shape}; expected {(heads, width)}"
            )
    if momentum is None:
        return
    if eta is None:
        raise InputError("neural_memory: momentum is given without eta; expected both, or neither")
    shapes = [jax.tree.map(jnp.shape, x) for x in (momentum, weights)]
    if shapes[0] != shapes[1]:
        raise InputError(f"neural_memory: momentum has shapes {shapes[0]}; expected {shapes[1]} as weights has")


def _initial_state(arrays: Inputs, options: Options) -> NeuralMemoryState:
    start = arrays["weights"], arrays["momentum"]
    state = fresh_state(arrays["q"].shape[0], *start, has_momentum=arrays["eta"] is not None)
    dtype = _scan.state_dtype(*jax.tree.leaves(arrays))
    return state._replace(**{name: jax.tree.map(lambda x: x.astype(dtype), getattr(state, name)) for name in LEARNED})


def _step(state: NeuralMemoryState, arrays: Inputs, options: Options) -> tuple[NeuralMemoryState, Array]:
    W, S, R, place = state
    dtype = W[0].A.dtype
    norm = jax.tree.map(lambda x: x.astype(dtype), arrays["norm"])
    q, k, v = (arrays[name].astype(dtype) for name in "qkv")

    def each_head(f, *args):
        """f(args of one head of one row, norm of that head), for all."""
        return jax.vmap(jax.vmap(f), in_axes=(0,) * len(args) + (None,))(*args, norm)

    def per_head(name: str, x: Array) -> Array:
        gate = arrays[name]
        return gate.reshape(gate.shape + (1,) * (x.ndim - 2))

    u = each_head(lambda R, k, v, norm: jax.grad(lambda R: loss(read(R, k, norm, options), v, options))(R), R, k, v)
    change = jax.tree.map(lambda u: -per_head("theta", u) * u, u)
    if S is not None:
        S = change = jax.tree.map(lambda S, x: per_head("eta", S) * S + x, S, change)
    if arrays["alpha"] is not None:
        W = jax.tree.map(lambda W: (1 - per_head("alpha", W)) * W, W)
    W = now = jax.tree.map(jnp.add, W, change)
    if arrays["reach"] is not None:
        now = jax.tree.map(lambda W, R: R + per_head("reach", W) * (W - R), W, R)
    o = each_head(lambda W, q, norm: read(W, q, norm, options), now, q)
    is_last = place + 1 == options["mini_batch"]
    W, R = _scan.where_row(is_last, (now, now), (W, R))
    return NeuralMemoryState(W, S, R, jnp.where(is_last, 0, place + 1)), o.astype(arrays["v"].dtype)


def _chunked(
    arrays: Inputs, state: NeuralMemoryState, docs: Documents | None, chunk_size: int | None, options: Options
) -> tuple[Array, NeuralMemoryState]:
    how = {"norm": arrays["norm"], "options": options, "group": -(-(chunk_size or 1) // options["mini_batch"])}
    return _by_mini_batches(arrays, state, docs, options, partial(in_order, **how), partial(in_tiles, **how))


def _by_mini_batches(
    arrays: Inputs,
    state: NeuralMemoryState,
    docs: Documents | None,
    options: Options,
    in_order: Callable[[MiniBatch, Memory], tuple[Array, Memory]],
    in_tiles: Callable[[MiniBatch, Memory, Memory | None, _tiles.Tiles], tuple[Array, Memory]],
) -> tuple[Array, NeuralMemoryState]:
    """`in_order` where mini-batches follow one another from the first token, else `in_tiles`."""
    size, length = options["mini_batch"], arrays["q"].shape[1]
    inputs, start = MiniBatch(*(arrays[name] for name in MiniBatch._fields)), Memory(*state[:3])
    if docs is None and options["fresh"]:
        o, memory = in_order(inputs, start)
        return o, NeuralMemoryState(*memory, state.place + length % size)
    fresh = _initial_state(arrays, options)
    tiles = _tiles.lay(docs, state.place, length, size)

    def by_tiles() -> tuple[Array, NeuralMemoryState]:
        one_row = None if docs is None else jax.tree.map(lambda x: x[0], Memory(*fresh[:3]))
        o, memory = in_tiles(inputs, start, one_row, tiles)
        return o, NeuralMemoryState(*memory, tiles.place)

    def by_tokens() -> tuple[Array, NeuralMemoryState]:
        return _scan.recurrent_in_spans(_step, fresh, arrays, TIME_ARGS, state, docs, options)

    return by_tiles() if tiles.fit is None else jax.lax.cond(tiles.fit, by_tiles, by_tokens)


def _kernel(
    arrays: Inputs,
    state: NeuralMemoryState,
    docs: Documents | None,
    *,
    chunk_size: int | None,
    options: Options,
    **how: Any,
) -> tuple[Array, NeuralMemoryState]:
    if arrays["q"].shape[1] < options["mini_batch"]:
        return _chunked(arrays, state, docs, chunk_size, options)
    how = {"options": options, "chunk_size": chunk_size, **how}
    ways = partial(_neural_memory_kernel.in_order, **how), partial(_neural_memory_kernel.in_tiles, **how)
    return _by_mini_batches(arrays, state, docs, options, *ways)


def _kernel_of(platform: str, module: str, **options: bool) -> Kernel:
    supports = partial(_neural_memory_kernel.supports, platform=platform, module=module)
    return Kernel(platform, supports, partial(_kernel, module=module), **options)


def _examples(key: Array, batch: int, length: int) -> dict[str, Example]:
    keys = iter(jax.random.split(key, 24))
    heads, dim, hidden = 2, 8, 6

    def normal(*shape: int, scale: float = 1.0) -> Array:
        return scale * jax.random.normal(next(keys), shape)

    def gate(bias: float) -> Array:
        return jax.nn.sigmoid(normal(batch, length, heads) + bias)

    q, k = (normal(batch, length, heads, dim) for _ in range(2))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    values = normal(batch, length, heads, dim)
    alpha, eta = gate(-2), gate(0)
    theta = gate(0) * (1 - eta) / 4  # with momentum, the steps of a mini-batch of 4 add up to less than 1
    matrix = (Linear(normal(heads, dim, dim, scale=0.5)),)
    two_layers = (
        Linear(normal(heads, dim, hidden, scale=0.5), normal(heads, hidden, scale=0.1)),
        Linear(normal(heads, hidden, dim, scale=0.5), normal(heads, dim, scale=0.1)),
    )
    momentum = (Linear(normal(heads, dim, dim, scale=0.1)),)
    norm = Norm(1 + normal(heads, dim, scale=0.1), normal(heads, dim, scale=0.1))
    deep = {"q": q, "k": k, "v": values, "theta": theta, "alpha": alpha, "eta": eta, "weights": two_layers}
    # A norm divides by a deviation that may be small: larger steps would magnify rounding errors without end.
    with_norm = {"theta": theta / 8, "norm": norm}
    ttt = {"q": q, "k": k, "v": values, "reach": gate(0), "weights": two_layers, **with_norm}
    one_layer = {**deep, "weights": matrix, "momentum": momentum, **with_norm}
    at_limits = jnp.arange(length)[:, None] // jnp.array([1, 2]) % 2
    at_limits = jnp.broadcast_to(at_limits, theta.shape).astype(theta.dtype)
    limits = {"theta": at_limits, "alpha": jnp.roll(at_limits, 1, axis=1), "eta": 1 - at_limits}
    return {
        "two layers": Example({**deep, "momentum": None}, {"mini_batch": 4, "activation": "silu"}),
        "test-time training": Example(ttt, {"mini_batch": 5, "residual": True, "loss_scale": 0.5}),
        "a matrix, norm, residual": Example(one_layer, {"mini_batch": 4, "residual": True}),
        "gates at 0 and 1": Example({**one_layer, **limits}, {"mini_batch": 4, "residual": True}, extreme=True),
    }


NEURAL_MEMORY = SeqOp(
    name="neural_memory",
    call=neural_memory,
    time_args=TIME_ARGS,
    step=_step,
    initial_state=_initial_state,
    forms={"chunked": _chunked},
    kernels={
        "pallas_tpu": _kernel_of("tpu", "pallas_kernels.tpu.neural_memory"),
        "pallas_gpu": _kernel_of("cuda", "pallas_kernels.gpu.neural_memory", automatic=False),
    },
    summary_kind="relay",
    head_axes={**dict.fromkeys(TIME_ARGS, 2), "weights": 0, "momentum": 0, "norm": 0},
    examples=_examples,
    known_gaps={"summary": "the gradients of a mini-batch depend on the state at its start: a span has no summary"},
)
