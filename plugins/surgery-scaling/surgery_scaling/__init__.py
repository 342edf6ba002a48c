"""Types that train few of a layer's numbers: IA3, BitFit, LN tuning, tokens."""

from __future__ import annotations

from surgery_scaling.bitfit import BitFit
from surgery_scaling.ia3 import IA3
from surgery_scaling.norm import LNTuning
from surgery_scaling.tokens import TrainableTokens

__all__ = ['IA3', 'BitFit', 'LNTuning', 'TrainableTokens']
