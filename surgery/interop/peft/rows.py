"""Rows of embeddings that PEFT trains beside an adapter, by token.

A folder has the rows that `trainable_token_indices` names, in place of the
base's. Here they are saved with the adapter as the whole parameter, of which
the other rows are the base's; so that nothing else can change without being
noticed, the adapter keeps a digest of these.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from surgery import errors
from surgery.files import digest as digests
from surgery.interop.peft import config as configs
from surgery.model.checkpoint import Leaf

KEY = 'trainable_token_indices'
# The tensor of a module, behind its name.
TENSOR = '.token_adapter.trainable_tokens_delta'


def indices(
  config: Mapping[str, Any], module: str, origin: str
) -> list[int] | None:
  """Returns the rows of a module that are trained; None if none are.

  Raises:
    ConfigError: for what is no list of numbers, by module or for the embedding.
  """
  said = config.get(KEY)
  if configs.is_nothing(said):
    return None
  if isinstance(said, Mapping):
    # PEFT compares ends of names, dots or not.
    found = [v for k, v in said.items() if module.endswith(k)]
  else:
    found = [said]
  if not found:
    return None
  one = found[0]
  numbers = isinstance(one, Sequence) and all(
    isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in one
  )
  if any(other != one for other in found) or not numbers:
    raise errors.ConfigError(
      f'{origin}: {KEY}: expected a list of row numbers for {module}, found '
      f'{" and ".join(map(repr, found))}.'
    )
  if len(set(one)) < len(one):
    raise errors.ConfigError(
      f'{origin}: {KEY}: a row of {module} is there twice in {one!r}.'
    )
  return list(one)


def axis(name: str) -> int:
  """Returns which axis numbers the rows of a parameter, by its name."""
  return -1 if name == 'kernel' else 0


def placed(base: Leaf, rows: Leaf, chosen: Sequence[int], where: int) -> Leaf:
  """Returns a parameter with some rows replaced.

  Args:
    base: the parameter, `(rows, features)`, or turned.
    rows: `(len(chosen), features)`.
    chosen: numbers of the rows.
    where: which axis numbers them.
  """
  load = functools.partial(_placed, base, rows, chosen, where)
  return Leaf(load, base.shape, base.dtype, False)


def _placed(base: Leaf, rows: Leaf, chosen: Sequence[int], where: int) -> Any:
  value = np.array(base.load())
  np.moveaxis(value, where, 0)[list(chosen)] = np.asarray(rows.load())
  return value


def taken(whole: Leaf, chosen: Sequence[int], where: int, dtype: str) -> Leaf:
  """Returns some rows of a parameter as PEFT has them, `(rows, features)`."""
  shape = list(whole.shape or ())
  del shape[where]
  load = functools.partial(_taken, whole, chosen, where, dtype)
  return Leaf(load, (len(chosen), *shape), dtype)


def _taken(whole: Leaf, chosen: Sequence[int], where: int, dtype: str) -> Any:
  value = np.moveaxis(np.asarray(whole.load()), where, 0)[list(chosen)]
  return np.ascontiguousarray(value).astype(dtype, copy=False)


def others(whole: Leaf, chosen: Sequence[int], where: int) -> str:
  """Returns a digest of all rows but some."""
  value = np.array(whole.load())
  np.moveaxis(value, where, 0)[list(chosen)] = 0
  return digests.digest(value)
