"""VeRA and VB-LoRA: adapters whose layers share weights."""

from surgery_shared.vb_lora import VBLoRA
from surgery_shared.vera import VeRA

__all__ = ['VBLoRA', 'VeRA']
