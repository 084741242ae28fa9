"""What the kernels of linear attention share: sizes, layouts, and the pieces of one chunk. For the equations see
`linear_attention`.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Array = jax.Array

CHUNK = 64  # positions that are taken at once: the rows of one matrix instruction
TILE = 64  # channels of a block of the state: the width of a swizzled row in shared memory
SPAN = 8 * CHUNK  # positions over which the terms of the decay gradient are summed
LOG_DECAY, ENTER, LEAVE, THROUGH, INDEX = range(5)  # rows of `weights`
# The H100: multiprocessors, and the shared memory that one block of threads can have.
MULTIPROCESSORS, SHARED_MEMORY = 132, 232448
SHORTEST_SEGMENT = 8  # chunks: enough to pay for the state of a segment

# How a matrix, a vector over its rows and a vector over its columns lie in the registers of a warpgroup.
MATRIX = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)
# Shared memory as the matrix instructions read it. Exponentials are the hardware's, with a relative error of 2^-22.
# No barriers are added around loads and stores: each loop says where its warps must have met.
TILED = (plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(2 * TILE))
COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
)


def segments_of(chunks: int, wanted: int) -> int:
    """As many segments of one length as wanted, or fewer, so that each is long enough and none is left empty."""
    segments = max(1, min(wanted, chunks // SHORTEST_SEGMENT))
    return -(-chunks // -(-chunks // segments))


def load(ref, layout, **options) -> Array:
    """A matrix or vector in registers, as `layout` says."""
    # Until jax 0.11 `plgpu.load` asked for an index too.
    index = ((),) if jax.__version_info__ < (0, 11) else ()
    return plgpu.load(ref, *index, layout=layout, **options)


def divide(x: Array, by: int) -> tuple[Array, Array]:
    """Quotient and remainder, which stay int32 whatever JAX's default is."""
    return lax.div(x, jnp.int32(by)), lax.rem(x, jnp.int32(by))


def accumulate(multiply, count: int) -> list[Array]:
    """The results of `multiply`, which is given `count` accumulators [C, C] of zeros."""
    return pl.run_scoped(multiply, *[plgpu.ACC((CHUNK, TILE), jnp.float32)] * count)


def over(vector: Array, axis: int) -> Array:
    """A vector over one axis of a matrix [C, C], for every position of the other."""
    return lax.broadcast_in_dim(vector, (CHUNK, TILE), [axis])


def pair_weights(weights, reverse: bool) -> Array:
    """L of (2), transposed if `reverse`: rows are then the earlier positions of a pair."""
    i, j = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=MATRIX) for axis in (0, 1))

    def of_pair(row):
        return (over(load(weights.at[row], layout), n) for n, layout in enumerate((BY_ROW, BY_COLUMN)))

    b_i, b_j = of_pair(LOG_DECAY)
    exponent = jnp.minimum(b_j - b_i if reverse else b_i - b_j, 0)
    pairs = (j >= i) if reverse else (j <= i)
    if weights.shape[0] > INDEX:
        document_i, document_j = of_pair(INDEX)
        pairs &= document_i == document_j
    return jnp.where(pairs, jnp.exp2(exponent), 0)
