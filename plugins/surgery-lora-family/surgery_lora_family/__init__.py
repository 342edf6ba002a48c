"""Relatives of LoRA: other beginnings, a magnitude, a bias."""

from __future__ import annotations

from surgery_lora_family.bias import BiasLoRA
from surgery_lora_family.decompositions import OLoRA, PiSSA
from surgery_lora_family.dora import DoRA
from surgery_lora_family.orthogonal import OrthogonalLoRA

__all__ = [
  'BiasLoRA',
  'DoRA',
  'OLoRA',
  'OrthogonalLoRA',
  'PiSSA',
]
