"""Tasks that are made up as they are needed, one file per family."""

from seqmodels.data.synthetic.bigram_backcopy import BigramBackcopy
from seqmodels.data.synthetic.induction_heads import InductionHeads
from seqmodels.data.synthetic.linear_regression import LinearRegression
from seqmodels.data.synthetic.listops import ListOps
from seqmodels.data.synthetic.mad import (
    MADCompression,
    MADFuzzyRecall,
    MADInContextRecall,
    MADMemorization,
    MADNoisyRecall,
    MADSelectiveCopying,
)
from seqmodels.data.synthetic.mqar import MQAR
from seqmodels.data.synthetic.needle import NeedleInAHaystack, Passkey
from seqmodels.data.synthetic.selective_copying import SelectiveCopying

__all__ = [
    "MQAR",
    "BigramBackcopy",
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
]
