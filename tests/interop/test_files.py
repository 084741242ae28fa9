"""Folders written by our own names tables: round trips, and every way in which a folder can be wrong."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import interop
from seqmodels.errors import InputError
from seqmodels.interop._names import channels_together, fused_experts, heads_together
from seqmodels.layers import SwiGLU
from seqmodels.models import LanguageModel
from tests.interop import published
from tests.interop.families import CASES


def config_of(name: str) -> dict[str, Any]:
    _, architecture, fields = CASES[name]
    return {"architectures": [architecture], **fields}


def model_of(name: str) -> tuple[LanguageModel, Any]:
    """The model of a case, with random parameters."""
    config = config_of(name)
    model = interop.build(interop.family_of(config).fields(config))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), np.int32))["params"]
    random = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(leaf.dtype), shapes)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sound folder of a tied Mamba-2."""
    interop.save(tmp_path / "model", *model_of("mamba2"))
    return tmp_path / "model"


def rewrite(folder: Path, change: Any = None, **config: Any) -> None:
    """Write the folder anew, its tensors changed in place by `change`, and entries of its config replaced."""
    weights = published.tensors(folder)
    if change is not None:
        change(weights)
    published.write_tensors(folder, weights, {**json.loads((folder / "config.json").read_text()), **config})


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shard_bytes", [2**30, 5000])
def test_what_is_saved_is_read_again(name, shard_bytes, tmp_path):
    model, params = model_of(name)
    family = interop.save(tmp_path / "model", model, params, shard_bytes=shard_bytes)
    assert family.name == CASES[name][0]
    assert (tmp_path / "model" / "model.safetensors.index.json").exists() == (shard_bytes == 5000)
    loaded = interop.load(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_scanned_and_unrolled_stacks_have_the_same_weights(tmp_path):
    model, params = model_of("recurrent_gemma")
    interop.save(tmp_path / "scanned", model, params)
    stack = params["stack"]
    rounds = {f"round_{i}": jax.tree.map(lambda x, i=i: x[i], stack["rounds"]) for i in range(1)}
    unrolled = {**params, "stack": {**rounds, "remainder": stack["remainder"]}}
    interop.save(tmp_path / "unrolled", model.clone(scan=False), unrolled)
    before, after = (published.tensors(tmp_path / name) for name in ("scanned", "unrolled"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def misshape(weights):
    weights["backbone.norm_f.weight"] = weights["backbone.norm_f.weight"][:-1]


def misname(weights):
    weights["backbone.norm_f.wieght"] = weights.pop("backbone.norm_f.weight")


def untie(weights):
    weights["lm_head.weight"] = weights["backbone.embeddings.weight"] + 1


def count(weights):
    weights["backbone.norm_f.weight"] = np.arange(16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("backbone.layers.1.mixer.A_log"), "weight 'backbone.layers.1.mixer.A_log' is missing"),
        (misname, "'backbone.norm_f.weight' is missing; did you mean 'backbone.norm_f.wieght'"),
        (lambda w: w.update(extra=np.ones(1, np.float32)), "weight 'extra' is not one of a Mamba2ForCausalLM"),
        (misshape, r"'backbone.norm_f.weight' has shape \(15,\); this model's config makes it \(16,\)"),
        (untie, "'lm_head.weight' differs from 'backbone.embeddings.weight'"),
        (count, "'backbone.norm_f.weight' in .* is I64; expected one of float32"),
    ],
)
def test_a_weight_that_is_wrong_is_named(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(InputError, match=message):
        interop.load(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["Mamba2ForCausalML"]}, "did you mean 'Mamba2ForCausalLM'"),
        ({"architectures": None, "model_type": None}, "names no architecture"),
        ({"hidden_size": None}, "has no 'hidden_size'"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu'; expected 'silu'"),
        ({"num_hidden_layers": 3}, "weight 'backbone.layers.2.mixer.A_log' is missing, and"),
    ],
)
def test_a_config_that_is_wrong_is_told(folder, config, message):
    rewrite(folder, **config)
    with pytest.raises(InputError, match=message):
        interop.load(folder)


def test_a_tied_head_may_lie_beside_the_embedding(folder):
    rewrite(folder, lambda w: w.update({"lm_head.weight": w["backbone.embeddings.weight"]}))
    interop.load(folder)


def test_rotary_positions_of_another_kind_are_refused(tmp_path):
    interop.save(tmp_path / "model", *model_of("llama"))
    rewrite(tmp_path / "model", rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0})
    with pytest.raises(InputError, match="type 'llama3'; expected 'default'"):
        interop.load(tmp_path / "model")


def test_folders_that_hold_no_model(folder, tmp_path):
    with pytest.raises(InputError, match="is no folder"):
        interop.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"there is no file .*config.json"):
        interop.load(tmp_path / "empty")
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="is damaged or no safetensors file"):
        interop.load(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"has no weights: .*; it has pytorch_model.bin"):
        interop.load(folder)


def test_a_missing_shard_is_named(tmp_path):
    interop.save(tmp_path / "model", *model_of("llama"), shard_bytes=5000)
    shard = min((tmp_path / "model").glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name} is missing"):
        interop.load(tmp_path / "model")


def test_nothing_is_overwritten_and_nothing_half_written_stays(folder, tmp_path):
    before = published.tensors(folder)
    model, params = model_of("mamba2")
    with pytest.raises(InputError, match="is there already"):
        interop.save(folder, model, params)
    assert all(np.array_equal(before[name], x) for name, x in published.tensors(folder).items())
    with pytest.raises(InputError, match="dtype 'int8' cannot be written"):
        interop.save(tmp_path / "new", model, params, dtype="int8")
    with pytest.raises(KeyError):
        interop.save(tmp_path / "new", model, {"embed": params["embed"]})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": ("retention",)}, "mamba2: it has no Mamba2"),
        ({"pattern": ("mamba2",), "mlp": SwiGLU}, "none of a published architecture"),
        ({"pattern": ("mamba2",), "mlp": None, "embedding_scale": 2.0}, "embedding_scale = 2.0 where a mamba2 has 1.0"),
    ],
)
def test_a_model_that_nobody_publishes_is_refused(fields, message, tmp_path):
    model = LanguageModel(vocab_size=11, d_model=32, n_layers=1, **fields)
    with pytest.raises(InputError, match=message):
        interop.save(tmp_path / "model", model, {})


def test_lower_precision_on_demand(folder, tmp_path):
    model, params = model_of("mamba2")
    interop.save(tmp_path / "half", model, params, dtype="bfloat16", dtypes={"backbone.norm_f.weight": "float32"})
    dtypes = {name: str(x.dtype) for name, x in published.tensors(tmp_path / "half").items()}
    assert dtypes.pop("backbone.norm_f.weight") == "float32" and set(dtypes.values()) == {"bfloat16"}
    assert jnp.allclose(interop.load(tmp_path / "half").params["final_norm"]["scale"], params["final_norm"]["scale"])


def test_fused_experts_are_the_separate_ones(tmp_path):
    """A file with the experts as transformers holds them in memory gives the same model as one with each its own."""
    model, params = model_of("minimax")
    interop.save(tmp_path / "separate", model, params)
    weights = published.tensors(tmp_path / "separate")
    for i in range(5):
        old, new = f"model.layers.{i}.block_sparse_moe", f"model.layers.{i}.mlp"
        weights[f"{new}.gate.weight"] = weights.pop(f"{old}.gate.weight")
        w1, w3, w2 = (
            np.stack([weights.pop(f"{old}.experts.{e}.{name}.weight") for e in range(4)]) for name in ("w1", "w3", "w2")
        )
        weights[f"{new}.experts.gate_up_proj"] = np.concatenate([w1, w3], axis=1)
        weights[f"{new}.experts.down_proj"] = w2
    config = json.loads((tmp_path / "separate" / "config.json").read_text())
    published.write_tensors(tmp_path / "fused", weights, config)
    jax.tree.map(np.testing.assert_array_equal, interop.load(tmp_path / "fused").params, params)


@pytest.mark.parametrize(
    ("change", "shape"), [(heads_together(3, (2, 1, 4)), (21, 5)), (channels_together((2, 1, 4)), (7, 1, 4))]
)
def test_changes_are_bijections(change, shape):
    theirs = np.random.default_rng(0).normal(size=shape)
    (back,) = change.to_theirs(change.to_ours([theirs]))
    np.testing.assert_array_equal(back, theirs)


def test_rows_that_go_head_by_head():
    """By hand: head 0 has rows 0 1 | 2, head 1 rows 3 4 | 5."""
    rows = np.arange(6.0)[:, None] * np.ones((1, 2))
    first, second = heads_together(2, (2, 1)).to_ours([rows])
    np.testing.assert_array_equal(first[0], [0, 1, 3, 4])
    np.testing.assert_array_equal(second[0], [2, 5])


def test_fused_rows_of_gate_come_before_those_of_up():
    (gate_up, _) = fused_experts("x", "y")
    theirs = np.arange(12.0).reshape(1, 4, 3)
    gate, up = gate_up.change.to_ours([theirs])
    np.testing.assert_array_equal(gate[0].T, theirs[0, :2])
    np.testing.assert_array_equal(up[0].T, theirs[0, 2:])
