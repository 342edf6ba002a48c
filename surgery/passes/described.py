"""What `config.json` beside models says otherwise of one than of another.

Two models may have the same shapes and mean other things by them: other
frequencies of positions, other heads, another activation. Combined, the
result is described by the first model's configuration.
"""

from __future__ import annotations

import json
import pathlib
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

# What may differ between models that compute alike.
_FREE = re.compile(
  r'_.*|.*token_id|.*dropout.*|.*_pdrop|(torch_)?dtype|transformers_version|'
  r'use_cache|vocab_size|architectures|auto_map|id2label|label2id|'
  r'initializer_range|pretraining_tp|max_position_embeddings|max_length'
)
# What counts where only one model states it, too.
_STATED = re.compile(r'rope_.*|.*_eps|.*window.*|.*softcap.*')
_MOST = 16_000_000


def differing(models: Sequence[tuple[str, str]]) -> list[str]:
  """Returns in what the configurations of models differ, and warns of it.

  Args:
    models: what messages call each, and its file.
  """
  said = [(name, _read(origin)) for name, origin in models]
  first_name, first = said[0]
  found = []
  for name, one in said[1:]:
    if first is None or one is None:
      continue
    keys = [key for key in {**first, **one} if _is_other(key, first, one)]
    if keys:
      shown = ', '.join(
        f'{k} ({_shown(first, k)} and {_shown(one, k)})' for k in keys[:5]
      )
      more = f' and {len(keys) - 5} more' if len(keys) > 5 else ''
      found.append(
        f'config.json of {first_name} and of {name} differ in {shown}{more}; '
        'the result is described by the first'
      )
  for text in found:
    warnings.warn(f'{text}.', UserWarning, stacklevel=2)
  return found


def _read(origin: str) -> Mapping[str, Any] | None:
  """Returns the configuration beside a model, if it can be read."""
  path = pathlib.Path(origin).parent / 'config.json'
  try:
    if not origin or path.stat().st_size > _MOST:
      return None
    said = json.loads(path.read_bytes())
  except (OSError, ValueError, RecursionError):
    # Nobody asked for it; who writes a folder is told.
    return None
  telling = isinstance(said, dict) and 'model_type' in said
  return said if telling else None


def _is_other(
  key: str, first: Mapping[str, Any], one: Mapping[str, Any]
) -> bool:
  if _FREE.fullmatch(key):
    return False
  both = key in first and key in one
  # Null and no statement are the same.
  a, b = first.get(key), one.get(key)
  return (both or bool(_STATED.fullmatch(key))) and a != b


def _shown(said: Mapping[str, Any], key: str) -> str:
  return json.dumps(said[key])[:60] if key in said else 'not stated'
