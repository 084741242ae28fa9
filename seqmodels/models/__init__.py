"""Stacks of mixers: the residual block, and the language model built from it."""

from seqmodels.models.block import Block, Stack
from seqmodels.models.language_model import LanguageModel

__all__ = ["Block", "LanguageModel", "Stack"]
