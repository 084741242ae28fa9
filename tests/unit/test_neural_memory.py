"""Neural memory: against loops over tokens in NumPy whose gradients are written by hand, and where it may diverge."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from seqmodels.errors import InputError
from seqmodels.layers import TTT, TitansMemory
from seqmodels.ops._memory_network import Linear, Norm
from seqmodels.ops.delta_rule import delta_rule
from seqmodels.ops.neural_memory import NEURAL_MEMORY, NeuralMemoryState, fresh_start, neural_memory, recall
from tests.conformance.cases import described_by
from tests.hopper import on_gpu_or_interpreted
from tests.operators import LENGTH, SEGMENTS, assert_close

HEADS, DIM, HIDDEN, MINI_BATCH = 2, 4, 6, 5
EPSILON = 1e-6
FORMS = ("recurrent", "chunked")
SETTINGS = ("mini_batch", "activation", "residual", "loss_scale", "epsilon", "form", "chunk_size")

memory = jax.jit(neural_memory, static_argnames=SETTINGS)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def silu_slope(x):
    return sigmoid(x) * (1 + x * (1 - sigmoid(x)))


def arguments(random, batch=2):
    """Inputs, gates and the weights of a network of two layers, without bias."""
    shape = (batch, LENGTH, HEADS)
    arrays = {name: random.normal(size=(*shape, DIM)) for name in "qkv"}
    arrays["k"] /= np.linalg.norm(arrays["k"], axis=-1, keepdims=True)
    arrays |= {name: sigmoid(random.normal(size=shape)) for name in ("theta", "alpha", "eta")}
    arrays["theta"] = arrays["theta"] / MINI_BATCH
    first, second = random.normal(size=(HEADS, DIM, HIDDEN)), random.normal(size=(HEADS, HIDDEN, DIM))
    return arrays, (Linear(first / 2), Linear(second / 2))


def titans_by_hand(arrays, first, second, starts, ends):
    """One row and head: M(k) = silu(k A) B with momentum and forgetting; A, B and their momenta token by token.

    starts: tokens with which a document begins. ends: tokens after which gradients are taken at new weights.
    """
    outputs = np.zeros((LENGTH, DIM))
    for t in range(LENGTH):
        if t in starts:
            A, B, SA, SB = first, second, 0 * first, 0 * second
            at_A, at_B = A, B
        if t in starts.padding:
            continue
        q, k, v, theta, alpha, eta = (arrays[name][t] for name in ("q", "k", "v", "theta", "alpha", "eta"))
        z = k @ at_A
        error = 2 * (silu(z) @ at_B - v)
        by_B = np.outer(silu(z), error)
        by_A = np.outer(k, silu_slope(z) * (at_B @ error))
        SA, SB = eta * SA - theta * by_A, eta * SB - theta * by_B
        A, B = (1 - alpha) * A + SA, (1 - alpha) * B + SB
        outputs[t] = silu(q @ A) @ B
        if t in ends:
            at_A, at_B = A, B
    return outputs, (A, B), (SA, SB)


class Starts(set):
    """Where documents start, and which positions are padding."""

    padding: frozenset = frozenset()


def layout(segment_ids, mini_batch):
    """Starts of documents and ends of mini-batches of a row, read off token by token."""
    starts, ends, current, count = Starts(), set(), None, 0
    starts.padding = frozenset(t for t, segment in enumerate(segment_ids) if segment == 0)
    for t, segment in enumerate(segment_ids):
        if segment == 0:
            continue
        if segment != current:
            starts.add(t)
            current, count = segment, 0
        count += 1
        if count % mini_batch == 0:
            ends.add(t)
    return starts, ends


def head(arrays, row, head):
    return {name: x[row, :, head] for name, x in arrays.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mini_batch", [1, MINI_BATCH])
def test_equals_loop_over_tokens(float64, form, mini_batch):
    arrays, weights = arguments(np.random.default_rng(0))
    settings = {"activation": "silu", "mini_batch": mini_batch, "form": form}
    o, state = memory(**arrays, weights=weights, segment_ids=SEGMENTS, **settings)
    for row in range(2):
        starts, ends = layout(SEGMENTS[row], mini_batch)
        for h in range(HEADS):
            A, B = (layer.A[h] for layer in weights)
            outputs, final, momentum = titans_by_hand(head(arrays, row, h), A, B, starts, ends)
            assert_close(o[row, :, h], outputs)
            assert_close([layer.A[row, h] for layer in state.weights], list(final))
            assert_close([layer.A[row, h] for layer in state.momentum], list(momentum))
    count = [11, LENGTH]  # tokens of the last document of each row
    assert [int(x) for x in state.place] == [x % mini_batch for x in count]


def ttt_linear_by_hand(q, k, v, theta, reach, W, c, scale, bias):
    """One head of TTT-Linear in its dual form, mini-batch by mini-batch; the backward of the norm written out."""
    outputs = []
    for start in range(0, LENGTH, MINI_BATCH):
        Q, K, V = (x[start : start + MINI_BATCH] for x in (q, k, v))
        eta = np.tril(reach[start : start + MINI_BATCH, None] * theta[None, start : start + MINI_BATCH])

        def normed(z):
            mean, std = z.mean(axis=-1, keepdims=True), np.sqrt(z.var(axis=-1, keepdims=True) + EPSILON)
            return (z - mean) / std, std

        hat, std = normed(K @ W + c)
        g = (scale * hat + bias - (V - K)) * scale
        by_z = DIM * g - g.sum(axis=-1, keepdims=True) - hat * (g * hat).sum(axis=-1, keepdims=True)
        by_z = by_z / (DIM * std)
        z = Q @ W - (eta * (Q @ K.T)) @ by_z + c - eta @ by_z
        outputs.append(Q + scale * normed(z)[0] + bias)
        W, c = W - (eta[-1][:, None] * K).T @ by_z, c - eta[-1] @ by_z
    return np.concatenate(outputs)


@pytest.mark.parametrize("form", FORMS)
def test_is_ttt_linear(float64, form):
    random = np.random.default_rng(1)
    arrays, _ = arguments(random, batch=1)
    arrays = {name: arrays[name] for name in ("q", "k", "v", "theta")}
    W, c, scale, bias = (random.normal(size=(HEADS, *shape)) for shape in ((DIM, DIM), (DIM,), (DIM,), (DIM,)))
    reach = np.tile(1 / (1 + np.arange(LENGTH) % MINI_BATCH), (1, HEADS, 1)).swapaxes(1, 2)
    o, _ = memory(
        **arrays,
        reach=jnp.array(reach),
        weights=(Linear(W, c),),
        norm=Norm(scale, bias),
        residual=True,
        loss_scale=0.5,
        mini_batch=MINI_BATCH,
        epsilon=EPSILON,
        form=form,
    )
    for h in range(HEADS):
        given = (x[0, :, h] for x in (*arrays.values(), reach))
        assert_close(o[0, :, h], ttt_linear_by_hand(*given, W[h], c[h], scale[h], bias[h]))


@pytest.mark.parametrize("form", FORMS)
def test_linear_memory_of_single_tokens_is_the_delta_rule(float64, form):
    arrays, _ = arguments(np.random.default_rng(2))
    q, k, v, theta = (arrays[name] for name in ("q", "k", "v", "theta"))
    zero = jnp.zeros((HEADS, DIM, DIM))
    o, state = memory(q, k, v, theta, weights=(Linear(zero),), mini_batch=1, segment_ids=SEGMENTS, form=form)
    expected, S = delta_rule(q, k, v, 2 * theta, scale=1.0, segment_ids=SEGMENTS, form="recurrent")
    assert_close((o, state.weights[0].A), (expected, S))
    assert_close(state.reference, state.weights)


@pytest.mark.parametrize(("share", "diverges"), [(0.9, False), (1.1, True)])
def test_diverges_where_the_step_is_too_long(float64, share, diverges):
    """The same mini-batch over and over, its steps so long that the largest eigenvalue is `share` times 2."""
    random, repeats = np.random.default_rng(3), 200
    k = random.normal(size=(MINI_BATCH, DIM))
    theta = share / np.linalg.eigvalsh(k.T @ k).max()
    q, k, v = (np.tile(x, (1, repeats, 1, 1)) for x in (k[:, None],) * 3)
    weights = (Linear(random.normal(size=(1, DIM, DIM))),)
    o, state = memory(q, k, v, np.full(q.shape[:3], theta), weights=weights, mini_batch=MINI_BATCH)
    before, after = (float(jnp.linalg.norm(o[0, t] - v[0, t])) for t in (MINI_BATCH, -MINI_BATCH))
    assert after > 1e3 * before if diverges else after < before
    assert (float(jnp.linalg.norm(state.weights[0].A)) > 1e3) == diverges


def test_starts_from_the_memory_of_a_prefix(float64):
    """Weights and momentum after a prefix, as what every document starts from."""
    arrays, weights = arguments(np.random.default_rng(4), batch=1)
    prefix, rest = ({name: x[:, part] for name, x in arrays.items()} for part in (slice(10), slice(10, None)))
    settings = {"mini_batch": MINI_BATCH, "activation": "silu"}
    whole, final = memory(**arrays, weights=weights, **settings)
    _, state = memory(**prefix, weights=weights, **settings)
    start = dict(zip(("weights", "momentum"), fresh_start(state), strict=True))
    o, state = memory(**rest, **start, **settings)
    assert_close((o, state), (whole[:, 10:], final))
    packed, _ = memory(
        **{name: np.tile(x, (1, 2, *(1,) * (x.ndim - 2))) for name, x in rest.items()},
        **start,
        **settings,
        segment_ids=np.repeat([[1, 2]], LENGTH - 10, axis=1),
    )
    assert_close(packed, np.tile(o, (1, 2, 1, 1)))


def test_recall_reads_without_a_write(float64):
    arrays, weights = arguments(np.random.default_rng(5))
    _, state = memory(**arrays, weights=weights, activation="silu")
    A, B = (np.asarray(layer.A) for layer in state.weights)
    expected = silu(arrays["q"].swapaxes(1, 2) @ A) @ B
    assert_close(recall(arrays["q"], state.weights, activation="silu"), expected.swapaxes(1, 2))


def test_layer_starts_documents_from_its_persistent_tokens():
    layer = TitansMemory(d_model=8, num_heads=2, persistent=3, mini_batch=4)
    x = jax.random.normal(jax.random.key(0), (1, 6, 8))
    variables, apply = jax.jit(layer.init)(jax.random.key(1), x), jax.jit(layer.apply)
    y, _ = apply(variables, x)
    packed, _ = apply(variables, jnp.tile(x, (1, 2, 1)), None, np.repeat([[1, 2]], 6, axis=1))
    assert_close(packed, jnp.tile(y, (1, 2, 1)), "layer")
    params = variables["params"]
    other = {"params": {**params, "persistent_tokens": 1 + params["persistent_tokens"]}}
    assert np.abs(np.asarray(apply(other, x)[0] - y)).max() > 1e-3


@pytest.mark.slow
def test_default_memory_is_bounded_and_its_gradient_finite():
    """A deep memory over 4,096 tokens of a few values again and again, with gates as they start."""
    layer = TitansMemory(d_model=16, num_heads=2)
    tokens = jax.random.normal(jax.random.key(0), (4, 16))
    x = tokens[jax.random.randint(jax.random.key(1), (1, 4096), 0, 4)]
    variables = layer.init(jax.random.key(2), x[:, :32])

    def run(variables, length):
        y, state = layer.apply(variables, x[:, :length])
        return jnp.mean(y**2), norm_of_all(state["memory"].weights)

    gradient, after = jax.jit(jax.grad(lambda v: run(v, 4096), has_aux=True))(variables)
    _, before = jax.jit(lambda v: run(v, 256))(variables)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert float(after) < 2 * float(before)


def norm_of_all(tree):
    return jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree)))


X = np.zeros((1, 3, HEADS, DIM))
GATE = np.zeros((1, 3, HEADS))
WEIGHTS = (Linear(np.zeros((HEADS, DIM, DIM))),)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": X[0]}, r"q has shape \(3, 2, 4\); expected \[batch, time"),
        ({"k": X[:, :2]}, r"k has shape \(1, 2, 2, 4\); expected \(1, 3, 2, 4\)"),
        ({"v": X[:, :, :1]}, "v has shape"),
        ({"theta": GATE[..., :1]}, r"theta has shape \(1, 3, 1\); expected \(1, 3, 2\)"),
        ({"weights": ()}, "weights is empty"),
        ({"weights": (Linear(np.zeros((HEADS, 3, DIM))),)}, r"weights\[0\].A has shape \(2, 3, 4\)"),
        ({"weights": (Linear(np.zeros((HEADS, DIM, 3))),)}, "the last of weights gives 3 channels; expected 4"),
        ({"weights": (Linear(WEIGHTS[0].A, np.zeros(DIM)),)}, r"weights\[0\].c has shape \(4,\); expected \(2, 4\)"),
        ({"norm": Norm(np.zeros(DIM), np.zeros(DIM))}, r"norm.scale has shape \(4,\)"),
        ({"momentum": WEIGHTS}, "momentum is given without eta"),
        ({"activation": "gleu"}, "did you mean 'gelu'"),
        ({"mini_batch": 0}, "mini_batch=0"),
        ({"form": "chunk"}, "did you mean 'chunked'"),
    ],
)
def test_bad_arguments(changed, message):
    arguments = {"q": X, "k": X, "v": X, "theta": GATE, "weights": WEIGHTS}
    with pytest.raises(InputError, match=message):
        neural_memory(**{**arguments, **changed})


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (TTT(d_model=8, inner_model="liner"), "did you mean 'linear'"),
        (TTT(d_model=12, num_heads=4), "expected an even number"),
        (TitansMemory(d_model=8, memory_depth=0), "memory_depth = 0"),
    ],
)
def test_bad_fields(layer, message):
    with pytest.raises(InputError, match=message):
        layer.init(jax.random.key(0), jnp.zeros((1, 2, layer.d_model)))


def by_kernel(how=True):
    """The operator with its TPU kernel interpreted."""
    kernel = NEURAL_MEMORY.kernels["pallas_tpu"]
    kernel = dataclasses.replace(kernel, call=functools.partial(kernel.call, interpret=how))
    return described_by(dataclasses.replace(NEURAL_MEMORY, kernels={"pallas_tpu": kernel}))


def of_one_matrix(dtype, length: int = 72, **without) -> dict:
    """Arrays of a memory of one matrix, 16 tokens a mini-batch; the last one is not full."""
    rng = np.random.default_rng(3)
    heads, dim = 2, 24
    q, k, v = (rng.normal(size=(2, length, heads, dim)).astype(dtype) for _ in range(3))
    k = (k / np.linalg.norm(k, axis=-1, keepdims=True)).astype(dtype)
    largest = {"theta": 0.1, "alpha": 0.2, "eta": 0.9}
    gates = {name: rng.uniform(0.0, x, (2, length, heads)) for name, x in largest.items()}
    matrices = [(Linear(jnp.asarray(scale * rng.normal(size=(heads, dim, dim)), dtype)),) for scale in (0.5, 0.1)]
    arrays = {"q": q, "k": k, "v": v, **{name: x.astype(dtype) for name, x in gates.items()}}
    arrays |= {"weights": matrices[0], "momentum": matrices[1]}
    return jax.tree.map(jnp.asarray, {name: x for name, x in arrays.items() if name not in without})


def outputs_and_gradients(arrays, place=None, **options):
    """arrays may have W, S and R of a state, of which `place` [b] tokens of a mini-batch have been read."""

    def loss(arrays):
        arrays = dict(arrays)
        if place is not None:
            options["initial_state"] = NeuralMemoryState(*arrays.pop("state"), place)
        o, state = neural_memory(**arrays, mini_batch=16, **options)
        total = sum(jnp.sum(jnp.cos(x)) for x in jax.tree.leaves(state[:3]))
        return jnp.sum(jnp.sin(o)) + total, (o, state)

    (_, found), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return found, gradients


@pytest.mark.parametrize("without", [(), ("alpha",), ("eta", "momentum"), ("momentum",)], ids=str)
def test_the_kernel_equals_the_recurrent_form(float64, without):
    without = dict.fromkeys(without)
    expected = outputs_and_gradients(of_one_matrix(np.float64, **without), form="recurrent")
    with by_kernel():
        found = outputs_and_gradients(of_one_matrix(np.float32, **without), backend="pallas_tpu")
    assert_close(found, expected, "kernel")


# Of 16 tokens a mini-batch, of which a step of the kernel has 8: one that was begun is finished; a document of one
# token; padding; a document that begins with a step; a row in which nothing but the begun mini-batch goes on.
PACKED = np.array([[1] * 30 + [2] + [0] * 2 + [3] * 49 + [4] * 70, [0] * 40 + [1] * 4 + [0] * 108])


def begun(dtype, momentum: bool) -> tuple:
    """W, S and R of two rows inside a mini-batch."""
    rng = np.random.default_rng(4)
    W, S, R = ((Linear(jnp.asarray(scale * rng.normal(size=(2, 2, 24, 24)), dtype)),) for scale in (0.5, 0.1, 0.5))
    return W, S if momentum else None, R


@pytest.mark.parametrize(
    ("segment_ids", "without", "goes_on"),
    [
        pytest.param(PACKED, (), True, id="documents, a state"),
        pytest.param(None, ("eta", "momentum"), True, id="a state"),
        pytest.param(PACKED, ("alpha",), False, id="documents", marks=pytest.mark.slow),
    ],
)
def test_the_kernel_takes_documents_and_states(float64, segment_ids, without, goes_on):
    def arrays(dtype):
        state = {"state": begun(dtype, "eta" not in without)} if goes_on else {}
        return {**of_one_matrix(dtype, PACKED.shape[1], **dict.fromkeys(without)), **state}

    how = {"segment_ids": segment_ids, "place": jnp.array([5, 9]) if goes_on else None}
    expected = outputs_and_gradients(arrays(np.float64), **how, form="recurrent")
    with by_kernel():
        found = outputs_and_gradients(arrays(np.float32), **how, backend="pallas_tpu")
    assert_close(found, expected, "kernel")


def test_the_kernel_as_a_tpu_would_run_it():
    """Copies and steps of the grid in any order that a TPU may take; memory that nobody wrote is NaN."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    interpreter.reset_tpu_interpret_mode_state()
    arrays, found = of_one_matrix(np.float32), []
    for how in (pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise"), True):
        with by_kernel(how):
            found.append(outputs_and_gradients(arrays, segment_ids=PACKED[:, :72], backend="pallas_tpu"))
    assert not interpreter.races.races_found
    assert_close(*found, "jit")


def test_a_second_derivative_of_the_kernel_is_an_error():
    arrays = of_one_matrix(np.float32, 16)

    def loss(v):
        with by_kernel():
            return jnp.sum(neural_memory(**{**arrays, "v": v}, mini_batch=16, backend="pallas_tpu")[0])

    with pytest.raises(NotImplementedError, match=r"can be differentiated once.*backend='xla'"):
        jax.grad(lambda v: jnp.sum(jax.grad(loss)(v) ** 2))(arrays["v"])


@pytest.mark.parametrize("without", [(), ("alpha", "eta", "momentum")], ids=str)
def test_lowers_for_a_gpu_by_its_kernel(without):
    """A span whose last mini-batch is not full."""
    arrays = of_one_matrix(jnp.bfloat16, **dict.fromkeys(without))
    program = jax.jit(functools.partial(outputs_and_gradients, backend="pallas_gpu"))
    assert program.trace(arrays).lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 2


def test_the_gpu_kernel_equals_the_recurrent_form(float64):
    arrays = of_one_matrix(jnp.bfloat16, 24)
    with jax.enable_x64(False), on_gpu_or_interpreted():
        found = neural_memory(**arrays, mini_batch=16, backend="pallas_gpu")
    exact = jax.tree.map(lambda x: x.astype(jnp.float64), arrays)
    expected = neural_memory(**exact, mini_batch=16, form="recurrent")
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        y = np.asarray(y, np.float64)
        assert np.linalg.norm(np.asarray(x, np.float64) - y) <= 2**-7 * np.linalg.norm(y)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": np.float32}, "q, k and v must be bfloat16"),
        ({"chunk_size": 64}, "chunk_size=64; the states of every mini-batch are kept"),
        ({"segment_ids": np.ones((2, 72), int)}, "segment_ids came in; expected rows of one document"),
    ],
    ids=str,
)
def test_what_the_gpu_kernel_cannot_do(change, reason):
    arrays = of_one_matrix(change.pop("dtype", jnp.bfloat16))
    with pytest.raises(InputError, match=f"backend 'pallas_gpu' cannot run this: {reason}"):
        neural_memory(**arrays, mini_batch=16, **change, backend="pallas_gpu")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mini_batch": 5}, "mini_batch=5; expected one of"),
        ({"residual": True}, "there is a norm, a residual or reach"),
    ],
    ids=str,
)
def test_what_the_kernel_cannot_do(change, reason):
    arrays = of_one_matrix(np.float32)
    options = {"mini_batch": 16, **change}
    with pytest.raises(InputError, match=f"backend 'pallas_tpu' cannot run this: {reason}"):
        neural_memory(**arrays, **options, backend="pallas_tpu")
    assert np.isfinite(neural_memory(**arrays, **options)[0]).all()
