"""LoRA's relatives: other beginnings, directions and magnitudes."""

from __future__ import annotations

from surgery_lora_family.decompositions import OLoRA, PiSSA
from surgery_lora_family.dora import DoRA

__all__ = ['DoRA', 'OLoRA', 'PiSSA']
