"""Types that train a number an output, or an input: IA3, BitFit, LN tuning."""

from __future__ import annotations

from surgery_scaling.bitfit import BitFit
from surgery_scaling.ia3 import IA3
from surgery_scaling.norm import LNTuning

__all__ = ['IA3', 'BitFit', 'LNTuning']
