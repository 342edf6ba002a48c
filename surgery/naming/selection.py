"""A selection: the parameters (or layers) that selectors chose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from surgery import errors, html
from surgery.naming import paths
from surgery.naming.paths import Path

_SHOWN = 20


class Selection:
  """Paths chosen from a model, with set operations.

  Args:
    universe: what there was to choose from, with a description of each.
    chosen: what was chosen.

  Example:
    sel = surgery.select(params, '**/kernel') - surgery.select(params, 'head')
    len(sel), list(sel), sel.paths
  """

  def __init__(
    self, universe: Mapping[Path, str], chosen: Iterable[Path]
  ) -> None:
    chosen = set(chosen)
    self._universe = universe
    self._paths = tuple(p for p in universe if p in chosen)
    self._chosen = frozenset(self._paths)

  @property
  def paths(self) -> tuple[Path, ...]:
    """The chosen paths, in the order of the model."""
    return self._paths

  def __len__(self) -> int:
    return len(self._paths)

  def __iter__(self) -> Iterator[Path]:
    return iter(self._paths)

  def __contains__(self, path: object) -> bool:
    return path in self._chosen

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, Selection):
      return NotImplemented
    return self._chosen == other._chosen

  def __hash__(self) -> int:
    return hash(self._chosen)

  def _combined(
    self, other: Selection, keep: Callable[[bool, bool], bool]
  ) -> Selection:
    if not isinstance(other, Selection):
      return NotImplemented
    if self._universe.keys() != other._universe.keys():
      raise errors.SelectorError(
        f'two selections from different models cannot be combined: '
        f'{len(self._universe)} against {len(other._universe)} paths.'
      )
    return Selection(
      self._universe, (p for p in self._universe if keep(p in self, p in other))
    )

  def __or__(self, other: Selection) -> Selection:
    return self._combined(other, lambda a, b: a or b)

  def __and__(self, other: Selection) -> Selection:
    return self._combined(other, lambda a, b: a and b)

  def __sub__(self, other: Selection) -> Selection:
    return self._combined(other, lambda a, b: a and not b)

  def __invert__(self) -> Selection:
    return Selection(
      self._universe, (p for p in self._universe if p not in self)
    )

  def __repr__(self) -> str:
    lines = [f'Selection({len(self)} of {len(self._universe)}):']
    for path in self._paths[:_SHOWN]:
      lines.append(f'  {paths.show(path)}  {self._universe[path]}'.rstrip())
    if len(self) > _SHOWN:
      lines.append(f'  … and {len(self) - _SHOWN} more')
    return '\n'.join(lines)

  def _repr_html_(self) -> str:
    return html.table(
      f'Selection: {len(self)} of {len(self._universe)}',
      ('path', 'is'),
      [(paths.show(p), self._universe[p]) for p in self._paths],
    )


def describe(value: Any) -> str:
  """Returns shape and dtype of a parameter in a few characters."""
  shape, dtype = getattr(value, 'shape', None), getattr(value, 'dtype', None)
  if shape is None or dtype is None:
    return type(value).__name__
  return f'{dtype}[{",".join(map(str, shape))}]'
