"""Relatives of LoRA: other beginnings, a magnitude, a bias, two rates."""

from __future__ import annotations

from surgery_lora_family.bias import BiasLoRA
from surgery_lora_family.decompositions import OLoRA, PiSSA
from surgery_lora_family.dora import DoRA
from surgery_lora_family.orthogonal import OrthogonalLoRA
from surgery_lora_family.plus import lora_plus, lora_plus_labels

__all__ = [
  'BiasLoRA',
  'DoRA',
  'OLoRA',
  'OrthogonalLoRA',
  'PiSSA',
  'lora_plus',
  'lora_plus_labels',
]
