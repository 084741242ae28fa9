"""The vocabulary of the whole code: axis letters, array aliases, fixed names.

    letter  axis                             name    meaning
    b       batch                            q k v   queries, keys, values (rows)
    t       time (position in the span)      g       natural-log decay, <= 0, float32
    h       heads                            beta    write strength of delta rules
    k       key channels of a head           S       state of a head, [k, v], float32
    v       value channels of a head         z       normaliser of a head, [k], float32
    c       positions of one chunk           o       what an operator puts out
    d       model width                      scale   factor on the queries; None means k ** -0.5

Tensors are laid out [b, t, h, d] everywhere. Segment ids number the documents packed into a row; 0 is padding.

    axis of the mesh   splits
    data               rows; parameters are copied
    fsdp               rows, and parameters with them
    seq                time
    tensor             heads, and features
"""

from jax import Array
from jaxtyping import Float, Int

Activations = Float[Array, "b t d"]
Queries = Float[Array, "b t h k"]
Keys = Float[Array, "b t h k"]
Values = Float[Array, "b t h v"]
HeadDecay = Float[Array, "h"]
ScalarDecay = Float[Array, "b t h"]
ChannelDecay = Float[Array, "b t h k"]
WriteStrength = Float[Array, "b t h"]
MatrixState = Float[Array, "b h k v"]
Normaliser = Float[Array, "b h k"]
SegmentIds = Int[Array, "b t"]
Tokens = Int[Array, "b t"]
Logits = Float[Array, "b t vocabulary"]

ROW_AXES = ("data", "fsdp")
TIME_AXIS = "seq"
HEAD_AXIS = "tensor"
MESH_AXES = (*ROW_AXES, TIME_AXIS, HEAD_AXIS)

# Flax collection of what layers set aside for whoever asks for it, and what is found there, [b, t, h] float32: how much
# a query weighs the first token of its row.
SOWN = "intermediates"
FIRST_WEIGHT = "first_weight"

__all__ = [
    "FIRST_WEIGHT",
    "HEAD_AXIS",
    "MESH_AXES",
    "ROW_AXES",
    "SOWN",
    "TIME_AXIS",
    "Activations",
    "Array",
    "ChannelDecay",
    "HeadDecay",
    "Keys",
    "Logits",
    "MatrixState",
    "Normaliser",
    "Queries",
    "ScalarDecay",
    "SegmentIds",
    "Tokens",
    "Values",
    "WriteStrength",
]
