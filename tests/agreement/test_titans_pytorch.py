"""`neural_memory` computes what titans-pytorch's `NeuralMemory` does, where their functions meet.

That library has one momentum and one forgetting per chunk, after the sum of the chunk's gradients, and reads with the
weights of the last complete chunk. With chunks of one token this is the recurrence of the paper, and its `batch_size`
is our mini-batch. Its loss is the mean over channels: loss_scale = 1 / channels.
"""

import numpy as np
import pytest

from seqmodels.ops._memory_network import Linear
from seqmodels.ops.neural_memory import neural_memory
from seqmodels.tools.benchmark.cases import Workload, inputs
from seqmodels.tools.benchmark.peers import peers
from tests.agreement.side_by_side import SIZES, assert_agree
from tests.operators import assert_close

torch = pytest.importorskip("torch", reason="titans-pytorch needs torch")
titans = pytest.importorskip("titans_pytorch", reason="titans-pytorch is not installed")

WIDTH, HEADS, DIM, MINI_BATCH, LENGTH = 12, 2, 6, 4, 14


@pytest.mark.parametrize("depth", [1, 2])
def test_neural_memory(float64, depth):
    torch.manual_seed(0)
    module = titans.NeuralMemory(
        dim=WIDTH,
        heads=HEADS,
        dim_head=DIM,
        chunk_size=1,
        batch_size=MINI_BATCH,
        model=titans.MemoryMLP(DIM, depth, expansion_factor=2.0),
        mem_model_norm_add_residual=False,
        default_step_transform_max_lr=0.5,
    ).double()
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)

    def heads(y):
        return y.unflatten(-1, (HEADS, -1)).numpy()

    with torch.no_grad():
        expected, _ = module(x)
        stored, read = module.store_norm(x), module.retrieve_norm(x)
        arrays = {"q": module.to_queries(read), "k": module.to_keys(stored), "v": module.to_values(stored)}
        arrays = {name: heads(y) for name, y in arrays.items()}
        gates = {"theta": module.to_adaptive_step, "alpha": module.to_decay_factor, "eta": module.to_momentum}
        arrays |= {name: torch.sigmoid(gate[0](stored)).numpy() for name, gate in gates.items()}
        arrays["theta"] = arrays["theta"] * 0.5
        weights = tuple(Linear(A.numpy()) for A in module.memory_model_parameters)
        for form in ("recurrent", "chunked"):
            o, _ = neural_memory(
                **arrays,
                weights=weights,
                mini_batch=MINI_BATCH,
                loss_scale=1 / DIM,
                activation="gelu_exact",
                form=form,
            )
            gate = torch.sigmoid(module.retrieve_gate[0](read)).numpy()
            merged = torch.from_numpy(np.array(o) * gate[..., None]).flatten(2)
            assert_close(module.combine_heads(merged).numpy(), expected.numpy())


def test_the_peer_of_the_benchmark():
    """With a mini-batch of one token it computes what ours does, and so it is handed the right arrays."""
    (peer,) = peers("neural_memory", "matrix")
    given = inputs(Workload("neural_memory", "matrix", **SIZES))
    larger_steps = {"theta": given.arrays["theta"] * 8}
    given = given._replace(options={"mini_batch": 1}, arrays=given.arrays | larger_steps)
    assert_agree(lambda **arrays: neural_memory(**arrays, mini_batch=1)[0], peer.load(given), given.arrays)
