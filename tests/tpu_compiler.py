"""Whether the TPU compiler can be had here, for the tests that ask it."""

import importlib.util

import pytest

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler, libtpu, is not installed"
)
