"""Where the modules of a PEFT folder are in a model.

PEFT calls a module as its model does, behind `base_model.model.`. A saved base
may lack the name that a head's class puts in front of it (`transformer.h.0`
beside `h.0`), or have one more; a JAX model may call all otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from surgery import errors
from surgery.contract.adapter import DEFAULT_PARAMS
from surgery.host.manager import Host
from surgery.interop import maps
from surgery.naming import paths, renaming
from surgery.naming.paths import Path

PREFIX = 'base_model.model.'
# What PEFT puts between a module and what it wraps.
_WRAPPED = re.compile(r'\.base_layer(?=\.|$)')
# How many names may be missing or superfluous in front.
_DEEPEST = 2

# The parameter of a module that is adapted, the most likely first.
_PARAMS = ('weight', *DEFAULT_PARAMS, 'in_proj_weight')
# Those that may be saved along, too.
_ANY = (*_PARAMS, 'scale', 'bias')


def name_of(path: Path) -> str:
  """Returns a path as torch writes names."""
  return '.'.join(path)


def plain(name: str) -> str:
  """Returns a module's name without the wrappers of PEFT."""
  return _WRAPPED.sub('', name)


class Places:
  """Finds modules and parameters of a base by their names in PEFT.

  Args:
    base: the parameters of the base.
    modules: names of all modules that have weights.
    params: names of parameters that are adapted beside those that modules are
      known for.
    names: what they are called in the base, if anything was said of it.
    origin: the folder, for messages.
    host: whose maps of names there are.

  Raises:
    FormatError: if some have no place, or several places are as good.
    RenameError: for a rule of `names` that decides nothing, or an unknown map.
  """

  def __init__(
    self,
    base: Iterable[Path],
    modules: Sequence[str],
    names: Any,
    origin: str,
    params: Iterable[str] = (),
    *,
    host: Host,
  ) -> None:
    self._params = (*_PARAMS, *params)
    self._base = list(base)
    self._known = {name_of(path): path for path in self._base}
    self._origin = origin
    plains = [plain(module) for module in modules]
    self._there: Callable[[str], str] = _same
    self._back: Callable[[str], str | None] = _same
    table = map_of(names, host)
    if names is None:
      self._there, self._back = self._prefixed(plains)
    elif table is None:
      self._there, self._back = _named(names, modules)
    else:
      # A tree may lie beneath a name that no map knows: flax's `params`.
      there, back = _mapped(table)
      split = [tuple(one.split('.')) for one in plains]
      lost = [one for one in split if not _has_place(table, one, 'jax')]
      if lost:
        raise table.lacking(lost, split, 'jax')
      front, behind = self._prefixed([there(one) for one in plains])
      self._there = lambda name: front(there(name))
      self._back = lambda name: back(behind(name))

  def param(self, module: str) -> Path | None:
    """Returns the parameter of a module that is adapted, if there is one."""
    layer = self._there(plain(module))
    for name in self._params:
      if f'{layer}.{name}' in self._known:
        return self._known[f'{layer}.{name}']
    return None

  def params(self) -> dict[str, Path]:
    """Returns all parameters of the base by their names in the folder."""
    found: dict[str, Path] = {}
    for path in self._base:
      layer = self._back(name_of(path[:-1]))
      if layer is not None:
        found.setdefault(f'{layer}.{path[-1]}' if layer else path[-1], path)
    return found

  def tensor(self, name: str) -> Path | None:
    """Returns the parameter that a tensor of the base's own is, if any."""
    module, _, param = plain(name).rpartition('.')
    # A head may lie beside what has another name in front.
    for layer in dict.fromkeys((self._there(module), module)):
      front = f'{layer}.' if layer else ''
      for one in (param, *_ALIKE.get(param, ())):
        if f'{front}{one}' in self._known:
          return self._known[f'{front}{one}']
    return None

  def modules(self) -> dict[str, Path]:
    """Returns the parameters that can be adapted, by their module's name."""
    found: dict[str, Path] = {}
    for path in self._base:
      adapted = path[-1] in _PARAMS
      name = self._back(name_of(path[:-1])) if adapted else None
      if name is not None:
        found.setdefault(name, path)
    return found

  def _prefixed(
    self, plains: Sequence[str]
  ) -> tuple[Callable[[str], str], Callable[[str], str]]:
    """Sees which name in front is missing, or one too many.

    Returns:
      What modules are called in the base, and back.

    Raises:
      FormatError: if no change of it, or more than one, gives all modules a
        place.
    """
    if all(map(self._has, plains)):
      return _same, _same
    counts = {('', ''): sum(map(self._has, plains))}
    for old, new in self._prefixes(plains):
      there = _replacing(old, new)
      counts[old, new] = sum(self._has(there(one)) for one in plains)
    most = max(counts.values())
    fitting = [change for change, count in counts.items() if count == most]
    if most == len(plains) and len(fitting) > 1:
      shown = ' or '.join(f'{old!r} is {new!r}' for old, new in fitting)
      raise errors.FormatError(
        f'{self._origin}: modules have no place in the base under their names, '
        f'and several as good if the part in front {shown}. Say which by names='
        " (--names), e.g. 'encoder/** -> model/encoder/**'."
      )
    if not most:
      return _same, _same
    # Where some are missing, messages are about these alone.
    old, new = fitting[0]
    return _replacing(old, new), _replacing(new, old)

  def _prefixes(self, names: Sequence[str]) -> list[tuple[str, str]]:
    """Returns what may stand in front, in the folder and in the base."""
    split = [tuple(name.split('.')) for name in names]
    fronts = {
      name_of(one[:n]) + '.'
      for one in split
      for n in range(1, _DEEPEST + 1)
      if n < len(one)
    }
    ours = {
      name_of(path[:n]) + '.'
      for path in self._base
      for n in range(1, _DEEPEST + 1)
      if n < len(path)
    }
    # One is taken away, or one is added; both at once would be a guess.
    return [(one, '') for one in sorted(fronts)] + [
      ('', one) for one in sorted(ours)
    ]

  def _has(self, layer: str) -> bool:
    return any(f'{layer}.{name}' in self._known for name in self._params)


# What torch and JAX call the same parameter.
_ALIKE = {'weight': ('kernel', 'embedding', 'scale')}


def _replacing(old: str, new: str) -> Callable[[str], str]:
  """Returns a function that puts one name in front in another's place."""

  def replaced(name: str) -> str:
    if not name.startswith(old):
      return name
    return new + name[len(old) :]

  return replaced


def _same(name: str) -> str:
  return name


def map_of(names: Any, host: Host) -> maps.Map | None:
  """Returns the map of names that is meant; None for rules and mappings.

  Args:
    names: the name of a map (`llama-flax`), the name of a file (`my.yaml`),
      what such a file says, or a mapping with `name` and `root` as the step
      `map` takes it.
    host: whose maps there are.

  Raises:
    RenameError: for a map that there is not, with those that there are.
  """
  if isinstance(names, Mapping):
    if isinstance(names.get('rules'), list):
      return maps.parse('of names', names)
    if set(names) != {'name', 'root'}:
      return None
    return maps.find(names['name'], host, names['root'])
  if isinstance(names, (list, tuple)) and len(names) == 1:
    names = names[0]
  if isinstance(names, str) and '->' not in names:
    return maps.find(names, host)
  return None


def _mapped(
  table: maps.Map,
) -> tuple[Callable[[str], str], Callable[[str], str]]:
  """Returns what modules are called by a map, and back.

  A map names parameters, so a module is called as its weight is.
  """

  def there(name: str) -> str:
    place = table.place((*name.split('.'), 'weight'), 'jax')
    return name if place is None else name_of(place.path[:-1])

  def back(name: str) -> str:
    for param in _ANY:
      place = table.place((*name.split('.'), param), 'torch')
      if place is not None:
        return name_of(place.path[:-1])
    return name

  return there, back


def _named(
  names: Any, modules: Sequence[str]
) -> tuple[Callable[[str], str], Callable[[str], str | None]]:
  """Returns what modules are called by what somebody said, and back.

  Raises:
    ConfigError: if it is neither a mapping nor rules.
    RenameError: for a rule that decides nothing.
  """
  if isinstance(names, Mapping):
    table = {_dotted(old): _dotted(new) for old, new in names.items()}
  elif isinstance(names, str) or (
    isinstance(names, Sequence) and all(isinstance(n, str) for n in names)
  ):
    rules = [
      renaming.parse(rule)
      for rule in ([names] if isinstance(names, str) else names)
    ]
    # Rules are for parameters, as in `rename`: a module stands for its weight.
    universe = {(*plain(m).split('.'), 'weight'): plain(m) for m in modules}
    found = renaming.targets(rules, universe)
    table = {universe[old]: name_of(new[:-1]) for old, new in found.items()}
    for rule in rules:
      for old in universe:
        new = rule.apply(old[:-1])
        if new is not None:
          table.setdefault(universe[old], name_of(new))
  else:
    raise errors.ConfigError(
      'names: expected a map of names, names by name, or rules OLD -> NEW, '
      f'found {names!r}.'
    )
  # Ends of names that are said stand for all beneath them.
  back = {new: old for old, new in table.items()}
  return _beneath(table), _beneath(back)


def called(names: Any, layers: Iterable[Path], host: Host) -> dict[Path, str]:
  """Returns what PEFT calls layers of a model.

  Args:
    names: what modules are called in the model, as for reading: a map of names,
      a mapping, or rules OLD -> NEW, which are read the other way round here.
    layers: paths of the layers.
    host: whose maps of names there are.

  Raises:
    ConfigError: if it is none of these.
    RenameError: for a rule that decides nothing, an unknown map, or layers that
      have no place in it.
  """
  layers = list(layers)
  table = map_of(names, host)
  if table is not None:
    _, back = _mapped(table)
    lost = [path for path in layers if not _has_place(table, path, 'torch')]
    if lost:
      raise table.lacking(lost, layers, 'torch')
    return {path: back(name_of(path)) for path in layers}
  if isinstance(names, Mapping):
    back = _beneath({_dotted(new): _dotted(old) for old, new in names.items()})
    return {path: back(name_of(path)) for path in layers}
  some = [names] if isinstance(names, str) else names
  if not isinstance(some, Sequence) or not all(
    isinstance(one, str) for one in some
  ):
    raise errors.ConfigError(
      'names: expected a map of names, names by name, or rules OLD -> NEW, '
      f'found {names!r}.'
    )
  rules = [
    renaming.parse(f'{new} -> {old}') for old, new in map(renaming.sides, some)
  ]
  found = renaming.targets(rules, layers)
  return {path: name_of(found.get(path, path)) for path in layers}


def _has_place(table: maps.Map, layer: Path, to: maps.Way) -> bool:
  params = ('weight',) if to == 'jax' else _ANY
  return any(table.place((*layer, one), to) is not None for one in params)


def _beneath(table: Mapping[str, str]) -> Callable[[str], str]:
  def replaced(name: str) -> str:
    parts = name.split('.')
    for n in range(len(parts), 0, -1):
      front = '.'.join(parts[:n])
      if front in table:
        return '.'.join((table[front], *parts[n:]))
    return name

  return replaced


def _dotted(text: str) -> str:
  """Returns a module's name, however it is written."""
  path = paths.parse(text) if '/' in text else tuple(text.split('.'))
  if path and path[-1] in _PARAMS:
    path = path[:-1]
  return name_of(path)
