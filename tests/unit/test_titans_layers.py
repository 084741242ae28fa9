"""The three architectures of Titans against the paper's equations in NumPy, token by token, gradients by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.errors import InputError
from seqmodels.layers import TitansMAC, TitansMAG, TitansMAL
from tests.by_hand import convolution, random_variables, rmsnorm, sigmoid, silu
from tests.operators import assert_close

WIDTH, HEADS, DIM, LENGTH, PERSISTENT, MINI_BATCH = 8, 2, 4, 15, 2, 3
SETTINGS = {"num_heads": HEADS, "persistent": PERSISTENT, "mini_batch": MINI_BATCH, "activation": "silu"}
X = np.random.default_rng(1).standard_normal((1, LENGTH, WIDTH), np.float32)


class Memory:
    """M(k) = silu(k A) B per head; A, B, their momenta, and the weights at which gradients are taken."""

    def __init__(self, p):
        self.weights = [p["memory_kernel_1"], p["memory_kernel_2"]]
        self.momenta = [np.zeros_like(A) for A in self.weights]
        self.turn()

    def turn(self):
        """Begin a mini-batch."""
        self.reference, self.count = list(self.weights), 0

    def write(self, k, v, theta, alpha, eta):
        A, B = self.reference
        z = np.einsum("hk,hkm->hm", k, A)
        error = 2 * (np.einsum("hm,hmv->hv", silu(z), B) - v)
        slope = sigmoid(z) * (1 + z * (1 - sigmoid(z)))
        back = slope * np.einsum("hmv,hv->hm", B, error)
        gradients = k[:, :, None] * back[:, None], silu(z)[:, :, None] * error[:, None]
        theta, alpha, eta = (gate[:, None, None] for gate in (theta, alpha, eta))
        self.momenta = [eta * S - theta * u for S, u in zip(self.momenta, gradients)]
        self.weights = [(1 - alpha) * W + S for W, S in zip(self.weights, self.momenta)]
        self.count += 1
        if self.count == MINI_BATCH:
            self.turn()


def recalled(weights, q):
    return np.einsum("hm,hmv->hv", silu(np.einsum("hk,hkm->hm", q, weights[0])), weights[1])


def unit(x):
    return x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + 1e-6)


def by_head(x):
    return x.reshape(*x.shape[:-1], HEADS, DIM)


def turned(x, position):
    """Rotary: channel c with channel c + DIM / 2, [h, k] at a position."""
    angle = position * 10_000.0 ** (-np.arange(DIM // 2) / (DIM // 2))
    a, b = x[:, : DIM // 2], x[:, DIM // 2 :]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=1)


def attention(q, keys, values):
    """One query [h, k] over lists of keys and values."""
    s = np.einsum("hk,jhk->hj", q, np.stack(keys)) * DIM**-0.5
    p = np.exp(s - s.max(axis=1, keepdims=True))
    return np.einsum("hj,jhv->hv", p / p.sum(axis=1, keepdims=True), np.stack(values)).reshape(-1)


def written(p, x, conv):
    """q, k, v and gates of tokens x [t, d], as lists over tokens of what `Memory.write` takes."""
    q, k, v = (x @ p[f"{name}_proj/kernel"] for name in "qkv")
    if conv:
        q, k, v = (
            convolution(y[None], p[f"{name}_conv1d/kernel"], 0)[0] for name, y in zip("qkv", (q, k, v), strict=True)
        )
    q, k, v = (by_head(silu(y)) for y in (q, k, v))
    theta, alpha, eta = (
        sigmoid(x @ p[f"{name}_proj/kernel"] + p[f"{name}_proj/bias"]) for name in ("theta", "alpha", "eta")
    )
    return unit(q), list(zip(unit(k), v, theta / 2 / MINI_BATCH * (1 - eta), alpha, eta, strict=True))


def read_all(p, x, memory, conv):
    """M(x) [t, d], each token read after it is written."""
    q, writes = written(p, x, conv)
    outputs = []
    for q_t, write in zip(q, writes, strict=True):
        memory.write(*write)
        outputs.append(recalled(memory.weights, q_t).reshape(-1))
    return np.stack(outputs)


def after_persistent(p, conv):
    memory = Memory(p)
    answers = read_all(p, p["persistent_tokens"], memory, conv)
    memory.turn()
    return memory, answers


def normed(p, name, x):
    return rmsnorm(x, 1e-5) * p[f"{name}/scale"]


def windowed(p, x, front, window):
    """Attention over [front | x]: all of front, and the last `window` of x."""
    q, k, v = (by_head(x @ p[f"attention/{name}_proj/kernel"]) for name in "qkv")
    front_k, front_v = (by_head(front @ p[f"attention/{name}_proj/kernel"]) for name in "kv")
    front_k = [turned(y, position - len(front)) for position, y in enumerate(front_k)]
    k = [turned(y, t) for t, y in enumerate(k)]
    outputs = []
    for t in range(len(x)):
        seen = slice(max(0, t - window + 1), t + 1)
        outputs.append(attention(turned(q[t], t), [*front_k, *k[seen]], [*front_v, *v[seen]]))
    return np.stack(outputs) @ p["attention/o_proj/kernel"]


def gated(p, y, m):
    return silu(normed(p, "y_norm", y)) * silu(normed(p, "m_norm", m)) @ p["o_proj/kernel"]


def memory_as_gate(p, x, layer):
    memory, _ = after_persistent(p, layer.conv_size)
    m = read_all(p, x, memory, layer.conv_size)
    return gated(p, windowed(p, x, p["persistent_tokens"], layer.window), m)


def memory_as_layer(p, x, layer):
    memory, answers = after_persistent(p, layer.conv_size)
    m = read_all(p, x, memory, layer.conv_size)
    return windowed(p, normed(p, "m_norm", m), normed(p, "m_norm", answers), layer.window)


def memory_as_context(p, x, layer):
    memory, outputs = Memory(p), []
    attended = {name: x @ p[f"attention/{name}_proj/kernel"] for name in "qkv"}
    if layer.conv_size:
        attended = {
            name: silu(convolution(y[None], p[f"attention/{name}_conv1d/kernel"], 0)[0]) for name, y in attended.items()
        }
    q, k, v = (by_head(attended[name]) for name in "qkv")
    front_k, front_v = (list(by_head(p["persistent_tokens"] @ p[f"attention/{name}_proj/kernel"])) for name in "kv")
    r = unit(by_head(silu(x @ p["q_proj/kernel"])))
    for t in range(len(x)):
        place = t % layer.segment
        if place == 0:
            past, keys, values = memory.weights, list(front_k), list(front_v)
        h = normed(p, "h_norm", recalled(past, r[t]).reshape(-1))
        h_k, h_v = (by_head(h @ p[f"attention/{name}_proj/kernel"]) for name in "kv")
        keys += [h_k, turned(k[t], 1 + place)]
        values += [h_v, v[t]]
        y = attention(turned(q[t], 1 + place), keys, values) @ p["attention/o_proj/kernel"]
        m = read_all(p, normed(p, "y_norm", y)[None], memory, conv=None)[0]
        outputs.append(gated(p, y, m))
    return np.stack(outputs)


LAYERS = {
    "mag": (TitansMAG(WIDTH, window=4, conv_size=3, **SETTINGS), memory_as_gate),
    "mal": (TitansMAL(WIDTH, window=4, conv_size=3, **SETTINGS), memory_as_layer),
    "mac": (TitansMAC(WIDTH, segment=6, **SETTINGS), memory_as_context),
    "mac, convolutions": (TitansMAC(WIDTH, segment=6, conv_size=3, **SETTINGS), memory_as_context),
}


@functools.cache
def variables_of(name):
    return random_variables(LAYERS[name][0], X)


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_equations(name, form):
    layer, by_hand = LAYERS[name]
    variables, p = variables_of(name)
    found, _ = jax.jit(layer.clone(form=form).apply)(variables, X)
    assert_close(found[0], by_hand(p, X[0].astype(np.float64), layer), "layer")


@pytest.mark.parametrize("name", ["mag", "mal", "mac"])
def test_persistent_tokens_and_the_memory_matter(name):
    layer, _ = LAYERS[name]
    variables, _ = variables_of(name)

    def loss(variables):
        return jnp.sum(layer.apply(variables, X)[0] ** 2)

    gradient = jax.jit(jax.grad(loss))(variables)["params"]
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient))


def test_without_persistent_tokens():
    layer = TitansMAG(WIDTH, **{**SETTINGS, "persistent": 0})
    variables, p = random_variables(layer, X)
    assert "persistent_tokens" not in p
    p["persistent_tokens"] = np.zeros((0, WIDTH))
    m = read_all(p, X[0].astype(np.float64), Memory(p), conv=True)
    expected = gated(p, windowed(p, X[0].astype(np.float64), p["persistent_tokens"], layer.window), m)
    assert_close(layer.apply(variables, X)[0][0], expected, "layer")


def test_a_segment_of_part_mini_batches_is_refused():
    with pytest.raises(InputError, match=r"segment=8, mini_batch=3; expected a segment of whole mini-batches"):
        TitansMAC(WIDTH, segment=8, **SETTINGS).init(jax.random.key(0), X)
