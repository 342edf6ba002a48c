"""Options of a method, for each tensor: by model, by depth, by selector."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from surgery import errors
from surgery.contract import config
from surgery.contract.method import Method, option
from surgery.editing import choosing
from surgery.host.manager import Host
from surgery.model.checkpoint import Checkpoint
from surgery.naming import paths, selectors
from surgery.naming.paths import Path

Values = Callable[[Path], Any]

# In the place of a selector: values over the depth of the model.
DEPTH = 'depth'
_NUMBER = re.compile(r'(.*?)(\d+)')
_NONE = object()


def depths(some: Iterable[Path]) -> dict[Path, float]:
  """Returns how deep tensors lie: 0 is the first layer, 1 the last.

  The first part of a path that ends in a number tells the layer, as in
  `model/layers/3/mlp/kernel` and `net/h3/mlp/kernel`; the others are its like
  whose paths are the same up to the number. Tensors without one have no depth.
  """
  families: dict[Path, set[int]] = {}
  where: dict[Path, tuple[Path, int]] = {}
  for path in some:
    for k, segment in enumerate(path[:-1]):
      match = _NUMBER.fullmatch(segment)
      if match:
        family = (*path[:k], match[1])
        families.setdefault(family, set()).add(int(match[2]))
        where[path] = family, int(match[2])
        break
  order = {
    family: {n: k for k, n in enumerate(sorted(numbers))}
    for family, numbers in families.items()
  }
  return {
    path: order[family][n] / max(1, len(order[family]) - 1)
    for path, (family, n) in where.items()
  }


class Parameters:
  """The options of a method, as people give them for a whole model.

  Args:
    cls: the method.
    given: options by name. A value is one for all tensors and models; or a list
      with one for each model, of options that have that; or a list over the
      depth of the model, of others; or a mapping by selector, of which the
      first that matches decides; or `{'depth': […]}`.
    count: number of models.
    model: the tensors.
    host: whose hooks answer terms of selectors.

  Raises:
    ConfigError: for an unknown option, or a value that cannot be.
    SelectorError: for a selector that matches or decides nothing.
  """

  def __init__(
    self,
    cls: type[Method],
    given: Mapping[str, Any],
    count: int,
    model: Checkpoint,
    host: Host,
  ) -> None:
    self._cls, self._count, self._model, self._host = cls, count, model, host
    self._depths: dict[Path, float] | None = None
    self._made: dict[Any, Method] = {}
    known = {option(name): name for name in config.options(cls)}
    for key in given:
      if option(key) not in known:
        hint = errors.suggest(key, known) or ' It has no options.'
        raise errors.ConfigError(
          f"{config.called(cls)} has no option '{key}'.{hint}"
        )
    self._values = {
      known[option(key)]: self._compiled(known[option(key)], value)
      for key, value in given.items()
    }

  @property
  def varies(self) -> bool:
    """Whether options differ among tensors."""
    return len(self._made) > 1

  def at(self, path: Path) -> Method:
    """Returns the method with the options that hold for a tensor.

    Raises:
      ConfigError: for a value of another type or out of range.
    """
    found = {}
    for name, values in self._values.items():
      value = values(path)
      if value is not _NONE:
        found[name] = value
    for name, field in config.options(self._cls).items():
      if name not in found and config.is_required(field):
        raise errors.ConfigError(
          f'{config.called(self._cls)}, option {option(name)!r}: a value is '
          f'required, and nothing gives it for {paths.show(path)}.'
        )
      if self._is_each(name):
        # Defaults, too, are one for each model.
        value = found.get(name, field.default)
        found[name] = self._each(value)
    key = tuple(sorted(found.items()))
    if key not in self._made:
      self._made[key] = self._cls(**found)
    return self._made[key]

  def _is_each(self, name: str) -> bool:
    return config.is_tuple(self._cls, name)

  def _each(self, value: Any) -> Any:
    if not isinstance(value, tuple):
      return (value,) * self._count
    return value * self._count if len(value) == 1 else value

  def _compiled(self, name: str, value: Any, within: bool = False) -> Values:
    """Returns a function from paths to what is given for them.

    Args:
      name: the option.
      value: what is given.
      within: whether it is what is given for one model.
    """
    if isinstance(value, Mapping):
      if set(value) == {DEPTH}:
        return self._gradient(name, value[DEPTH])
      return self._selected(name, value, within)
    if isinstance(value, (list, tuple)):
      if self._is_each(name) and not within:
        return self._by_model(name, value)
      return self._gradient(name, value)
    return lambda path: value

  def _by_model(self, name: str, value: Sequence[Any]) -> Values:
    if len(value) != self._count:
      raise errors.ConfigError(
        f'{self._where(name)}: expected a value for each of {self._count} '
        f'models, or one for all, found {len(value)}: {list(value)}. A list '
        f'over the depth of the model is {{{DEPTH}: [0, 1]}} here.'
      )
    each = [self._compiled(name, one, True) for one in value]

    def values(path: Path) -> Any:
      found = tuple(one(path) for one in each)
      if any(one is _NONE for one in found):
        raise errors.ConfigError(
          f'{self._where(name)}: nothing gives it for {paths.show(path)} of '
          "each model. Add '**' to the selectors."
        )
      return found

    return values

  def _where(self, name: str) -> str:
    return f"{config.called(self._cls)}, option '{option(name)}'"

  def _selected(
    self, name: str, value: Mapping[str, Any], within: bool
  ) -> Values:
    """Returns values by selector, of which the first that matches decides."""
    types = self._model.manifest.layer_types
    decided: dict[Path, tuple[str, Values]] = {}
    for selector, inner in value.items():
      with errors.within(self._where(name)):
        found = choosing.chosen(self._model, selector, types, self._host)
      if all(path in decided for path in found):
        first = found[0]
        raise selectors.shadowed(
          selector, first, decided[first][0], self._where(name)
        )
      values = self._compiled(name, inner, within)
      for path in found:
        decided.setdefault(path, (selector, values))

    def at(path: Path) -> Any:
      return decided[path][1](path) if path in decided else _NONE

    return at

  def _gradient(self, name: str, value: Any) -> Values:
    """Returns values over the depth, interpolated linearly."""
    numbers = isinstance(value, (list, tuple)) and all(
      isinstance(one, (int, float)) and not isinstance(one, bool)
      for one in value
    )
    if not numbers or not value or not config.takes_floats(self._cls, name):
      raise errors.ConfigError(
        f'{self._where(name)}: expected a value, or numbers over the depth of '
        f'the model, found {value!r}.'
      )
    if self._depths is None:
      self._depths = depths(self._model)
    known = self._depths

    def at(path: Path) -> Any:
      if path not in known:
        raise errors.ConfigError(
          f'{self._where(name)}: {paths.show(path)} lies in no numbered layer, '
          'so a list over the depth of the model has no value for it. Give it '
          f"one by selector: {{'{paths.show(path)}': …, '**': {list(value)}}}."
        )
      place = known[path] * (len(value) - 1)
      return float(np.interp(place, range(len(value)), value))

    return at
