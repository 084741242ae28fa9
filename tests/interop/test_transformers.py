"""Models that transformers wrote: the same logits, at once and token by token, and the same bits on the way back."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import interop
from tests.interop import published
from tests.interop.families import CASES, VOCABULARY
from tests.tolerances import TOLERANCES

PROMPT, LENGTH = 9, 21
PARAMETERS = [
    pytest.param(name, marks=() if name == CASES[name][0] else pytest.mark.slow) for name in CASES
]


class Both(NamedTuple):
    """A model as transformers has it, as it was read here, and the folder that it was read from."""

    theirs: Any
    ours: interop.Loaded
    folder: Path


@pytest.fixture(scope="module", params=PARAMETERS)
def both(request, tmp_path_factory) -> Both:
    _, architecture, fields = CASES[request.param]
    folder = tmp_path_factory.mktemp("published")
    theirs = published.write(folder, architecture, **fields)
    return Both(theirs, interop.load(folder), folder)


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH)).astype(np.int32)


def agree(ours: Any, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=TOLERANCES["published"])


def test_logits_of_a_whole_sequence(both):
    ours, _ = jax.jit(both.ours.model.apply)({"params": both.ours.params}, jnp.asarray(tokens()))
    agree(ours, published.logits(both.theirs, tokens()))


def test_logits_of_a_prompt_and_of_decoding(both):
    model, variables, ids = both.ours.model, {"params": both.ours.params}, jnp.asarray(tokens())
    apply = jax.jit(model.apply)
    logits, state = apply(variables, ids[:, :PROMPT], model.initial_state(2, capacity=LENGTH))
    found = [logits]
    for i in range(PROMPT, LENGTH):
        logits, state = apply(variables, ids[:, i : i + 1], state)
        found.append(logits)
    agree(jnp.concatenate(found, axis=1), published.logits(both.theirs, tokens()))


def test_the_way_back_is_exact(both, tmp_path):
    ours = both.ours
    family = interop.save(tmp_path / "back", ours.model, ours.params, dtypes=ours.dtypes, extra=ours.config)
    assert family is ours.family
    before, after = (published.tensors(folder) for folder in (both.folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    recomputed = ours.family.recomputed(ours.config)
    for name, tensor in before.items():
        if name in recomputed:
            agree(after[name], tensor)
        else:
            assert after[name].dtype == tensor.dtype and after[name].tobytes() == tensor.tobytes(), name
    again = published.read(tmp_path / "back", ours.family.architecture)
    agree(published.logits(again, tokens()), published.logits(both.theirs, tokens()))


def test_a_config_of_our_own_is_read_by_transformers(both, tmp_path):
    """Nothing of the file that the model came from is handed over: what its config says follows from the model."""
    ours = both.ours
    family = interop.save(tmp_path / "own", ours.model, ours.params, shard_bytes=4000)
    theirs = published.read(tmp_path / "own", family.architecture)
    agree(published.logits(theirs, tokens()), published.logits(both.theirs, tokens()))


def test_bfloat16_keeps_its_bits(tmp_path):
    _, architecture, fields = CASES["mamba2"]
    published.write(tmp_path / "from", architecture, dtype="bfloat16", **fields)
    loaded = interop.load(tmp_path / "from")
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {np.dtype(np.float32)}
    interop.save(tmp_path / "to", loaded.model, loaded.params, dtypes=loaded.dtypes, extra=loaded.config)
    before, after = (published.tensors(tmp_path / name) for name in ("from", "to"))
    assert {name: x.tobytes() for name, x in before.items()} == {name: x.tobytes() for name, x in after.items()}


def test_the_authors_names_are_those_of_transformers_but_for_the_embedding(tmp_path):
    """As its authors' library saves a model: their config, their names, the head beside the embedding it is tied to."""
    _, architecture, fields = CASES["mamba2"]
    theirs = published.write(tmp_path / "hf", architecture, **fields)
    tensors = published.tensors(tmp_path / "hf")
    embedding = tensors.pop("backbone.embeddings.weight")
    ssm = {"layer": "Mamba2", "d_state": fields["state_size"], "headdim": fields["head_dim"]}
    config = {"d_model": 16, "n_layer": 2, "vocab_size": VOCABULARY, "ssm_cfg": ssm, "rms_norm": True}
    config |= {"pad_vocab_size_multiple": 1, "tie_embeddings": True, "attn_layer_idx": [], "d_intermediate": 0}
    published.write_tensors(
        tmp_path / "original", {**tensors, "backbone.embedding.weight": embedding, "lm_head.weight": embedding}, config
    )
    loaded = interop.load(tmp_path / "original")
    assert loaded.family.name == "mamba2_original"
    ours, _ = jax.jit(loaded.model.apply)({"params": loaded.params}, jnp.asarray(tokens()))
    agree(ours, published.logits(theirs, tokens()))
    interop.save(tmp_path / "back", loaded.model, loaded.params, family="mamba2_original")
    before, after = (published.tensors(tmp_path / name) for name in ("original", "back"))
    assert {name: x.tobytes() for name, x in before.items()} == {name: x.tobytes() for name, x in after.items()}
