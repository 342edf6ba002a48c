"""VeRA, VB-LoRA, MiSS and BAT: adapters that share weights."""

from surgery_shared.miss import BAT, MiSS
from surgery_shared.vb_lora import VBLoRA
from surgery_shared.vera import VeRA

__all__ = ['BAT', 'MiSS', 'VBLoRA', 'VeRA']
