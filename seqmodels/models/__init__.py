"""Stacks of mixers: the residual block, the language model built from it, and models with other ends."""

from seqmodels.models.block import Block, Stack
from seqmodels.models.language_model import LanguageModel
from seqmodels.models.readouts import Autoencoder, Regressor, input_shape

__all__ = ["Autoencoder", "Block", "LanguageModel", "Regressor", "Stack", "input_shape"]
