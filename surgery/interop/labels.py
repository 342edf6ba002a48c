"""Names of classes, if the head of a classifier was cut or has grown.

`id2label` names the rows of the head, so it has to follow them. The values of
rows tell which of them were kept. A wrong name would be worse than none.
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
# The number of classes that transformers assumes by default.
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
  names = _names(config)
  for path, leaf in before.items():
    if path[-3:] not in _HEADS and path[-2:] not in _HEADS:
      continue
    new = after.get(path)
    was, now = leaf.shape or (), (new.shape if new else None) or ()
    if new is None or not len(was) == len(now) == 2:
      continue
    if was[0] == len(names) and was != now:
      return _followed(config, names, '/'.join(path), leaf, new)
  return Followed()


def _names(config: Mapping[str, Any]) -> list[str]:
  """Returns the names of the classes in the order of their numbers."""
  said = config.get(NAMES)
  if isinstance(said, dict):
    numbers = {str(k): k for k in said}
    if set(numbers) == set(map(str, range(len(said)))):
      return [str(said[numbers[str(k)]]) for k in range(len(said))]
    return []  # It is not known which rows they name.
  count = config.get('num_labels', _DEFAULT)
  return [_unnamed(k) for k in range(count)] if type(count) is int else []


def _unnamed(number: int) -> str:
  """Returns the name that transformers gives to a class without one."""
  return f'LABEL_{number}'


def _followed(
  config: Mapping[str, Any], old: list[str], path: str, was: Leaf, now: Leaf
) -> Followed:
  assert now.shape is not None
  rows = now.shape[0]
  if rows == len(old):
    return Followed()  # Only its inputs differ; the classes are the same.
  sources = _sources(was, now)
  names = [
    _unnamed(k) if source is None else old[source]
    for k, source in enumerate(sources)
  ]
  doubt = _unknown_rows(old, sources, names, path)
  if not doubt and len(set(names)) != rows:
    names = [_unnamed(k) for k in range(rows)]
    doubt = (
      f'two rows of {path} would have the same name, so the classes are called '
      f'{_unnamed(0)} and so on.'
    )
  advice = f'State names with --config {NAMES}=\'{{"0": …}}\'.'
  warnings = (f'{NAMES}: {doubt} {advice}',) if doubt else ()
  stated: dict[str, Any] = {
    NAMES: {str(k): name for k, name in enumerate(names)},
    _NUMBERS: {name: k for k, name in enumerate(names)},
  }
  if 'num_labels' in config:
    stated['num_labels'] = rows
  return Followed(stated, f'rows of {path}', warnings)


def _unknown_rows(
  old: list[str], sources: list[int | None], names: list[str], path: str
) -> str:
  """Returns the warning about rows whose names are lost; empty if none are."""
  rows = len(names)
  named = old != [_unnamed(k) for k in range(len(old))]
  lost = [k for k, source in enumerate(sources) if source is None]
  # Rows that were added behind all others are new classes: no reason to warn.
  if not named or not lost or (rows > len(old) and len(lost) != rows):
    return ''
  return (
    f'{len(lost)} of the {rows} rows of {path} equal none, or several, of '
    f'the {len(old)} rows whose names config.json has, so their classes are '
    f'called {names[lost[0]]} and so on.'
  )


def _sources(was: Leaf, now: Leaf) -> list[int | None]:
  """Returns the number that each row had before, by comparing values."""
  assert was.shape is not None and now.shape is not None
  unknown: list[int | None] = [None] * now.shape[0]
  if was.shape[1] != now.shape[1] or max(was.size, now.size) > _MOST:
    return unknown
  new = np.asarray(now.load())
  # A cast rounds, so the old values are rounded as well.
  old = np.asarray(was.load()).astype(new.dtype)
  if len(new) > len(old) and new[: len(old)].tobytes() == old.tobytes():
    return [*range(len(old)), *unknown[len(old) :]]
  places: dict[bytes, list[int]] = {}
  for k, row in enumerate(old):
    places.setdefault(row.tobytes(), []).append(k)
  # Equal rows, as of a head of zeros, do not tell which is which.
  found = (places.get(row.tobytes(), []) for row in new)
  return [some[0] if len(some) == 1 else None for some in found]
