"""Names of classes, where the head of a classifier was cut or grew.

`id2label` names the rows of the head, so it has to follow them. Which rows were
kept is known from their values alone, and a wrong name would be worse than
none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
  from surgery.model.checkpoint import Leaf
  from surgery.naming.paths import Path

  Tensors = Mapping[Path, Leaf]

NAMES = 'id2label'
_NUMBERS = 'label2id'
# Heads of transformers' classifiers, by the ends of their paths.
_HEADS = (
  ('classifier', 'weight'),
  ('classifier', 'out_proj', 'weight'),
  ('score', 'weight'),
)
# What transformers takes where nothing is stated.
_DEFAULT = 2
# Heads with more numbers than this are not read to compare their rows.
_MOST = 1 << 26


@dataclasses.dataclass(frozen=True)
class Followed:
  """What a configuration has to state of the classes.

  Attributes:
    stated: keys and values.
    why: the tensor that decides it.
    warnings: names that could not be kept.
  """

  stated: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  why: str = ''
  warnings: tuple[str, ...] = ()


def followed(
  config: Mapping[str, Any], before: Tensors, after: Tensors
) -> Followed:
  """Returns the names of the classes that there are now.

  Args:
    config: the configuration that was read.
    before: the tensors that it described.
    after: the tensors that are written.
  """
  for path, leaf in before.items():
    new = after.get(path)
    if path[-3:] not in _HEADS and path[-2:] not in _HEADS:
      continue
    if new is None or len(leaf.shape or ()) != 2 or len(new.shape or ()) != 2:
      continue
    assert leaf.shape is not None and new.shape is not None
    names = _names(config)
    if leaf.shape[0] == len(names) and leaf.shape != new.shape:
      return _followed(config, names, '/'.join(path), leaf, new)
  return Followed()


def _names(config: Mapping[str, Any]) -> list[str]:
  """Returns the names of the classes in the order of their numbers."""
  said = config.get(NAMES)
  if isinstance(said, dict):
    numbers = {str(k): k for k in said}
    if set(numbers) == set(map(str, range(len(said)))):
      return [str(said[numbers[str(k)]]) for k in range(len(said))]
    return []  # Nobody knows which rows they are of.
  count = config.get('num_labels', _DEFAULT)
  return [_unnamed(k) for k in range(count)] if type(count) is int else []


def _unnamed(number: int) -> str:
  """Returns what transformers calls a class without a name."""
  return f'LABEL_{number}'


def _followed(
  config: Mapping[str, Any], old: list[str], path: str, was: Leaf, now: Leaf
) -> Followed:
  assert now.shape is not None
  rows = now.shape[0]
  if rows == len(old):
    return Followed()  # Its inputs are others; the classes are the same.
  sources = _sources(was, now)
  names = [
    _unnamed(k) if source is None else old[source]
    for k, source in enumerate(sources)
  ]
  warnings = []
  named = old != [_unnamed(k) for k in range(len(old))]
  lost = [k for k, source in enumerate(sources) if source is None]
  if named and lost and (rows <= len(old) or len(lost) == rows):
    warnings.append(
      f'{NAMES}: {len(lost)} of the {rows} rows of {path} are none of the '
      f'{len(old)} that config.json has names for, or like several, so their '
      f'classes are called {names[lost[0]]} and so on. State names with '
      f'--config {NAMES}=\'{{"0": …}}\'.'
    )
  elif len(set(names)) != rows:
    names = [_unnamed(k) for k in range(rows)]
    warnings.append(
      f'{NAMES}: two rows of {path} would have the same name, so the classes '
      f'are called {_unnamed(0)} and so on. State their names with --config '
      f'{NAMES}=\'{{"0": …}}\'.'
    )
  stated: dict[str, Any] = {
    NAMES: {str(k): name for k, name in enumerate(names)},
    _NUMBERS: {name: k for k, name in enumerate(names)},
  }
  if 'num_labels' in config:
    stated['num_labels'] = rows
  return Followed(stated, f'rows of {path}', tuple(warnings))


def _sources(was: Leaf, now: Leaf) -> list[int | None]:
  """Returns which row each one was, as far as values tell."""
  assert was.shape is not None and now.shape is not None
  unknown: list[int | None] = [None] * now.shape[0]
  if was.shape[1] != now.shape[1] or max(was.size, now.size) > _MOST:
    return unknown
  new = np.asarray(now.load())
  # A cast rounds; what was read is rounded likewise.
  old = np.asarray(was.load()).astype(new.dtype)
  if len(new) > len(old) and new[: len(old)].tobytes() == old.tobytes():
    return [*range(len(old)), *unknown[len(old) :]]
  places: dict[bytes, list[int]] = {}
  for k, row in enumerate(old):
    places.setdefault(row.tobytes(), []).append(k)
  # Rows that are alike, as those of a head of zeros, tell no names.
  found = (places.get(row.tobytes(), []) for row in new)
  return [some[0] if len(some) == 1 else None for some in found]
