"""What tests of one operator against a loop over tokens share. The fixture `float64` is in conftest.py."""

import jax
import numpy as np

from tests.tolerances import TOLERANCES

LENGTH = 24
# Padding on the left, between and on the right, a document of one token; and a full row.
SEGMENTS = np.array([[0] * 2 + [3] * 7 + [7] + [0] + [2] * 11 + [0] * 2, [1] * LENGTH])


def assert_close(found, expected, tolerance="forms"):
    """Array by array, within the tolerance times the largest value expected, or times 1 where that is larger."""
    for have, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        have, want = np.asarray(have), np.asarray(want)
        assert have.shape == want.shape
        assert np.abs(have - want).max() <= TOLERANCES[tolerance] * max(np.abs(want).max(), 1)
