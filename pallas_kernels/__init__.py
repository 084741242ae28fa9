"""Kernels for TPU (Pallas, Mosaic) and GPU (Pallas, Mosaic GPU): functions of jax arrays that import jax alone."""
