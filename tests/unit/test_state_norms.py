"""Norms of a model's state after a text."""

import jax
import numpy as np

from seqmodels.evaluation.state_norms import state_norms
from seqmodels.models import LanguageModel
from tests.operators import assert_close


def test_norm_of_the_largest_row():
    model = LanguageModel(vocab_size=7, d_model=16, n_layers=2, pattern=("linear_attention",))
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 7)
    params = jax.jit(model.init)(jax.random.key(1), tokens)["params"]
    found = jax.jit(lambda params, tokens: state_norms(model, params, tokens))(params, tokens)
    rows = [jax.jit(model.apply)({"params": params}, row[None])[1] for row in tokens]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(rows[0])]
    norms = [[np.linalg.norm(np.ravel(x)) for x in jax.tree.leaves(row)] for row in rows]
    expected = dict(zip(paths, np.max(norms, axis=0), strict=True))
    assert found and not any("cursor" in path for path in found)
    assert_close(list(found.values()), [expected[path] for path in found], "layer")
