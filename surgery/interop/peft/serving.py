"""What vLLM makes of a folder of LoRA that is written.

It reads PEFT's files with a reader of its own: `PEFTHelper` and
`parse_fine_tuned_lora_name`, here as in vLLM 0.33. What it refuses, and what
releases before it read otherwise, is noted in plans; PEFT loads all of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from surgery import errors
from surgery.interop.peft import config as configs
from surgery.model.checkpoint import Leaf

# Tensors that it takes for weights, or leaves unread.
_KNOWN = re.compile(
  r'.*\.(lora_[AB]\.weight|lora_embedding_[AB]'
  r'|(embed_tokens|lm_head)\.base_layer\.weight'
  r'|(score|classifier)\.(weight|bias))'
)
_MODULES = ('classifier', 'score')
_BEGINS = ('gaussian', 'eva', 'orthogonal', 'mica', 'lora_ga')


def notes(said: Mapping[str, Any], tensors: Mapping[str, Leaf]) -> list[str]:
  """Returns what vLLM does not load of a folder, a sentence each.

  Args:
    said: the configuration.
    tensors: its tensors, by name.
  """
  if said.get('peft_type') != 'LORA':
    return []  # Nobody expects it of other methods.
  return [
    f'vLLM does not load this folder: {why}' for why in _refused(said)
  ] + [f'vLLM {what}' for what in _otherwise(said, tensors)]


def _refused(said: Mapping[str, Any]) -> Iterator[str]:
  for key in ('use_dora', 'lora_bias', 'layer_replication'):
    if not configs.is_nothing(said.get(key)):
      yield f'{key} is not supported'
  begins = said.get('init_lora_weights', True)
  if isinstance(begins, str) and begins not in _BEGINS:
    yield f'init_lora_weights is {begins!r}, which changes the base'
  saved = [n for n in said.get('modules_to_save') or () if n not in _MODULES]
  if saved:
    yield f'modules_to_save has {errors.listed(saved)}'


def _otherwise(
  said: Mapping[str, Any], tensors: Mapping[str, Leaf]
) -> Iterator[str]:
  whole = said.get('modules_to_save') or ()
  odd = [
    name
    for name in tensors
    if not _KNOWN.fullmatch(name)
    and not any(f'.{module}.' in name for module in whole)
    and not (said.get('use_dora') or said.get('lora_bias'))
  ]
  if odd:
    yield f'does not know the tensors {errors.listed(odd, 3)}'
  moved = [n for n, leaf in tensors.items() if len(leaf.shape or ()) > 2]
  if moved:
    yield f'adapts no convolutions: {errors.listed(moved, 3)}'
  if said.get('rank_pattern') or said.get('alpha_pattern'):
    yield (
      'reads rank_pattern and alpha_pattern since a late release alone (0.33 '
      'does): 0.10 takes r and lora_alpha for all modules without a word'
    )
