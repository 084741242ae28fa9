"""Subquadratic sequence models in JAX and Flax: operators, layers, models, training."""

__version__ = "0.1.0"
