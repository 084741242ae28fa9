"""How far two computations of the same thing may lie apart: the one table of numeric tolerances.

Differences are measured relative to the largest value of the reference. Every entry is the machine epsilon of the
dtype in use times a growth factor, and the factor has a reason: adding n terms in another order moves the sum by at
most n epsilon, and a gradient is a few such sums one after the other. References are float64; what a float32 program
is compared to carries no error of its own at that scale.
"""

import jax.numpy as jnp

FLOAT64 = float(jnp.finfo(jnp.float64).eps)
FLOAT32 = float(jnp.finfo(jnp.float32).eps)

TOLERANCES: dict[str, float] = {
    # Forms of one operator in float64. Sums over 32 positions times 8 channels in another order: 2**8; outputs,
    # final state and gradient are chains of at most 2**3 such sums, of values up to 2**2 larger than the result.
    "forms": 2**13 * FLOAT64,
    # The same in float32 against float64, at gates and scores where neighbouring terms differ by many magnitudes.
    # Scores of 2**12 (attention) lose 12 of the 23 bits in their exponential; sums as above are less than that.
    "extreme": 2**12 * FLOAT32,
    # A layer in float32 against itself: projections over 16 channels and the operator's sums, 2**8, gradients 2**2.
    "layer": 2**10 * FLOAT32,
    # A kernel in float32 against the chunked form: sums over 256 positions, 2**8, gradients 2**2.
    "kernel": 2**10 * FLOAT32,
    # Another library in float32 against ours in float32. Both err, by sums over 128 positions and up to 32 channels or
    # partners of a position, 2**8; gradients are chains of a few such sums, 2**4.
    "peer": 2**12 * FLOAT32,
    # A stack of layers with norms: each of its few layers adds to the error of a layer, and a norm may magnify it.
    "model": 2**12 * FLOAT32,
    # Another library's model in float32 against ours: logits of size 2, each side off by the error of a stack.
    "published": 1e-4,
    # Declared FLOPs against those counted of the program: both are sums of whole numbers, divided by the tokens.
    "flops": 2**5 * FLOAT64,
    # One program with and without fusion, in float32: contraction of products and sums, and their order, 2**5.
    "jit": 2**5 * FLOAT32,
}

# Low precision: a form's error may be this many times that of the recurrent form at the same precision, plus a floor.
# The floor is the rounding of arguments and results, one epsilon of their dtype, and that of a log decay summed over a
# chunk before it is exponentiated: the sum's size, about 2**6, times half an epsilon of float32.
PRECISION_MULTIPLE = 4.0


def precision_floor(dtype: jnp.dtype) -> float:
    return float(jnp.finfo(dtype).eps) + 2**5 * FLOAT32

# What a layer declares of its FLOPs, products alone, against what XLA counts, which is never less and has element-wise
# work too. An element of a product over n terms takes 2 n FLOPs, with n at least 64 (a chunk), and meets at most 8
# element-wise operations. In a step these are on the state as well, up to 12 for each of its elements: decay, momentum,
# write, and the choice of what a mini-batch starts from.
ELEMENTWISE_SHARE = 8 / (2 * 64)
ELEMENTWISE_OF_STATE = 12
