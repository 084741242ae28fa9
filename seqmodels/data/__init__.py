"""Data sets, and the transforms that make batches of them."""

from seqmodels.data.dataset import Dataset
from seqmodels.data.synthetic import (
    MQAR,
    BigramBackcopy,
    InductionHeads,
    LinearRegression,
    ListOps,
    MADCompression,
    MADFuzzyRecall,
    MADInContextRecall,
    MADMemorization,
    MADNoisyRecall,
    MADSelectiveCopying,
    NeedleInAHaystack,
    Passkey,
    SelectiveCopying,
)
from seqmodels.data.text import TextData
from seqmodels.data.transforms import mask_inputs, next_token_targets

__all__ = [
    "MQAR",
    "BigramBackcopy",
    "Dataset",
    "InductionHeads",
    "LinearRegression",
    "ListOps",
    "MADCompression",
    "MADFuzzyRecall",
    "MADInContextRecall",
    "MADMemorization",
    "MADNoisyRecall",
    "MADSelectiveCopying",
    "NeedleInAHaystack",
    "Passkey",
    "SelectiveCopying",
    "TextData",
    "mask_inputs",
    "next_token_targets",
]
