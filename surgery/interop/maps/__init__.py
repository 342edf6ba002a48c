"""Maps of names between PyTorch's checkpoints and trees of JAX.

A map is a list of rules that are read from left to right, and from right to
left: PyTorch's names stand on the left, those of the tree on the right. So one
text says both ways, and the way back gives what there was.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from surgery import errors
from surgery.naming import paths, renaming

if TYPE_CHECKING:
  from surgery.host.manager import Host
  from surgery.naming.paths import Path

Way = Literal['jax', 'torch']

_KEYS = ('names', 'about', 'rules', 'left-out')
_RULE = ('rule', 'axes')
_ARROW = '<->'
_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a tensor goes.

  Attributes:
    path: its path there.
    axes: which axis here each of its axes there is; None if they stay.
  """

  path: Path
  axes: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class Entry:
  """One rule of a map.

  Attributes:
    text: as it was written.
    rules: the rule for each way.
    axes: of a tensor of PyTorch's the axes in the tree's order; None if they
      stay.
  """

  text: str
  rules: Mapping[str, renaming.Rule]
  axes: tuple[int, ...] | None

  def place(self, path: Path, to: Way) -> Place | None:
    """Returns where a tensor goes; None if the rule does not match it."""
    new = self.rules[to].apply(path)
    if new is None:
      return None
    axes = self.axes
    if axes is not None and to == 'torch':
      axes = tuple(axes.index(axis) for axis in range(len(axes)))
    return Place(new, axes)


@dataclasses.dataclass(frozen=True)
class Map:
  """A map of names.

  Attributes:
    name: its name.
    about: which models it is for.
    entries: its rules; the first that matches a tensor decides.
    left_out: rules for tensors of PyTorch's that models compute by themselves.
  """

  name: str
  about: str
  entries: tuple[Entry, ...]
  left_out: tuple[renaming.Rule, ...] = ()

  def place(self, path: Path, to: Way) -> Place | None:
    """Returns where a tensor goes; None if no rule matches it."""
    for entry in self.entries:
      found = entry.place(path, to)
      if found is not None:
        return found
    return None

  def is_left_out(self, path: Path, to: Way) -> bool:
    """Whether a tensor has no place, and needs none."""
    return to == 'jax' and any(
      rule.apply(path) is not None for rule in self.left_out
    )

  def homeless(self, universe: Iterable[Path], to: Way) -> list[Path]:
    """Returns the tensors that find no place."""
    return [
      path
      for path in universe
      if not self.is_left_out(path, to) and self.place(path, to) is None
    ]

  def way(self, universe: Sequence[Path]) -> Way:
    """Returns which way all of some tensors find a place.

    Raises:
      RenameError: if they do neither way, or both.
    """
    lost = {way: self.homeless(universe, way) for way in _WAYS}
    fits: list[Way] = [way for way in _WAYS if not lost[way]]
    if len(fits) == 1:
      return fits[0]
    if fits:
      raise errors.RenameError(
        f'map {self.name!r} matches all tensors both ways. Say which is meant: '
        'to: jax, or to: torch.'
      )
    nearest = min(_WAYS, key=lambda way: len(lost[way]))
    raise self.lacking(lost[nearest], universe, nearest)

  def lacking(
    self, lost: Sequence[Path], universe: Sequence[Path], to: Way
  ) -> errors.RenameError:
    """Returns the error for tensors that find no place."""
    shown = ', '.join(map(paths.show, lost[:_SHOWN]))
    more = f' and {len(lost) - _SHOWN} more' if len(lost) > _SHOWN else ''
    side = 'left' if to == 'jax' else 'right'
    return errors.RenameError(
      f'map {self.name!r}, to {to}: {len(lost)} of {len(universe)} tensors '
      f'have no place: {shown}{more}. Its rules have other names on the '
      f'{side} (surgery maps {self.name}). Take another map, drop these '
      'tensors first, or write a map of your own.'
    )


_WAYS: tuple[Way, Way] = ('jax', 'torch')


def parse(name: str, data: Any, root: str | None = None) -> Map:
  """Reads a map.

  Args:
    name: its name, for messages.
    data: what its YAML says: `rules`, and where there are some `about`, `names`
      and `left-out`.
    root: path in the tree beneath which all lies, e.g. `params`.

  Raises:
    RenameError: for what cannot be a map.
  """
  where = f'map {name!r}'
  if not isinstance(data, Mapping) or not isinstance(data.get('rules'), list):
    raise errors.RenameError(
      f"{where}: expected a mapping with 'rules', a list, found {data!r:.80}."
    )
  for key in data:
    if key not in _KEYS:
      raise errors.RenameError(
        f'{where}: a map has no {key!r}.{errors.suggest(str(key), _KEYS)}'
      )
  out = data.get('left-out') or []
  if not isinstance(out, list) or not all(isinstance(t, str) for t in out):
    raise errors.RenameError(
      f'{where}: left-out: expected a list of patterns, found {out!r:.80}.'
    )
  with errors.within(where):
    above = '' if root is None else f'{paths.literal(paths.parse(root))}/'
    entries = tuple(_entry(one, above) for one in data['rules'])
    left_out = tuple(renaming.staying(text) for text in out)
  return Map(name, str(data.get('about', '')), entries, left_out)


def _entry(raw: Any, above: str) -> Entry:
  """Reads a rule: `TORCH <-> JAX`, or that with the order of axes.

  Args:
    raw: the rule.
    above: what stands in front of names of the tree.

  Raises:
    RenameError: for what cannot be one.
  """
  if isinstance(raw, str):
    raw = {'rule': raw}
  if not isinstance(raw, Mapping) or not isinstance(raw.get('rule'), str):
    raise errors.RenameError(
      f"expected 'TORCH {_ARROW} JAX', or rule and axes, found {raw!r:.80}."
    )
  for key in raw:
    if key not in _RULE:
      raise errors.RenameError(
        f'a rule has no {key!r}.{errors.suggest(str(key), _RULE)}'
      )
  sides = raw['rule'].split(_ARROW)
  if len(sides) != 2:
    raise errors.RenameError(
      f"rule {raw['rule']!r}: expected one '{_ARROW}', found {len(sides) - 1}."
    )
  left, right = sides[0].strip(), above + sides[1].strip()
  rules = {
    'jax': renaming.parse(f'{left} -> {right}'),
    'torch': renaming.parse(f'{right} -> {left}'),
  }
  axes = raw.get('axes')
  if axes is None:
    return Entry(raw['rule'], rules, None)
  if not isinstance(axes, list) or sorted(map(repr, axes)) != sorted(
    map(repr, range(len(axes)))
  ):
    raise errors.RenameError(
      f'rule {raw["rule"]!r}: axes: expected all axes in the order of the '
      f'tree, as [1, 0], found {axes!r}.'
    )
  return Entry(raw['rule'], rules, tuple(axes))


def read(text: str, name: str) -> dict[str, Any]:
  """Reads a map from YAML.

  Raises:
    RenameError: if it is none.
  """
  import yaml

  try:
    data = yaml.safe_load(text)
  except (yaml.YAMLError, RecursionError, ValueError) as error:
    said = ' '.join(str(error).split())
    raise errors.RenameError(
      f"map {name!r}: not YAML: {said}. Put rules that begin with a '*' or a "
      "'{' in quotes."
    ) from None
  parse(name, data)
  return dict(data)


def load(path: pathlib.Path) -> dict[str, Any]:
  """Reads a map from a file of YAML.

  Raises:
    RenameError: if it is none.
    OSError: if the file cannot be read.
  """
  try:
    text = path.read_text(encoding='utf-8')
  except UnicodeDecodeError as error:
    raise errors.RenameError(f'{path}: not UTF-8 text: {error}.') from None
  return read(text, str(path))


def find(
  value: str | Mapping[str, Any], host: Host, root: str | None = None
) -> Map:
  """Returns a map.

  Args:
    value: its name, the name of a file (`my.yaml`), or what its YAML says.
    host: whose maps there are.
    root: path in the tree beneath which all lies.

  Raises:
    RenameError: if there is none, with suggestions.
  """
  if isinstance(value, Mapping):
    return parse('of the recipe', value, root)
  return parse(value, data(value, host), root)


def data(name: str, host: Host) -> Mapping[str, Any]:
  """Returns what the YAML of a map says, by name or by file.

  Raises:
    RenameError: if there is none, with suggestions.
  """
  if is_file(name):
    return load(pathlib.Path(name))
  if name not in host.maps:
    raise errors.RenameError(
      f'no map is called {name!r}.{errors.suggest(name, host.maps)} There are '
      f'{", ".join(sorted(host.maps)) or "none"}; a file is named with its '
      'suffix, my.yaml.'
    )
  found: Mapping[str, Any] = host.maps[name]
  return found


def is_file(name: str) -> bool:
  """Whether a name is that of a file."""
  return name.endswith(('.yaml', '.yml', '.json'))


def shipped() -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields the maps that come with the library, by name."""
  for path in sorted(pathlib.Path(__file__).parent.glob('*.yaml')):
    data = read(path.read_text(encoding='utf-8'), path.stem)
    for name in data.get('names', [path.stem]):
      yield name, data
