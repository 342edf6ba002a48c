"""Renumber and repeat: layers that are told apart by a number."""

from __future__ import annotations

import re

from surgery import errors
from surgery.adapting.beneath import handles_adapters
from surgery.editing import following, tensors
from surgery.host.manager import Host
from surgery.model import quantised
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.naming import paths, renaming
from surgery.naming.paths import Path
from surgery.naming.renaming import Reader, Rule
from surgery.passes.rename import renamed
from surgery.passes.slicing import Places, places


class Numbered:
  """Layers that a pattern with one `<i>` matches.

  Args:
    layers: the pattern.
    verb: the pass, for messages.
    universe: the paths.

  Attributes:
    numbers: for each place in the model, all but the number, the numbers that
      there are.

  Raises:
    RenameError: for a pattern that has not one number, or matches nothing.
  """

  def __init__(self, layers: str, universe: list[Path]) -> None:
    found = Reader(layers, layers).numbers
    if len(found) != 1 or re.search(r'(?<!\\)->', layers):
      raise errors.RenameError(
        f'{layers!r}: expected a pattern with one number, as '
        f"'**/block<i>', found {len(found)}."
      )
    ((self._name, number),) = found.items()
    if number.operator:
      raise errors.RenameError(f"{layers!r}: write '<{number.name}>' alone.")
    self._group = number.group
    self._rule = renaming.parse(f'{layers} -> {layers}')
    self.text = layers
    self.numbers: dict[Path, set[int]] = {}
    self._width = 0
    for path in universe:
      one = self.found(path)
      if one is not None:
        self.numbers.setdefault(one[0], set()).add(one[1])
        written = self._written(path)
        if written.startswith('0'):
          self._width = max(self._width, len(written))
    if not self.numbers:
      raise renaming.nothing(f'{layers} -> {layers}', universe)
    renaming.check_alternatives(self._rule, universe)

  def found(self, path: Path) -> tuple[Path, int] | None:
    """Returns where a path is, all but the number, and the number."""
    match = self._rule.match(path)
    if match is None:
      return None
    start, stop = match.span(self._group)
    joined = renaming.joined(path)
    front = renaming.separated(joined[:start] + renaming.HOLE + joined[stop:])
    # Layers of one place are alike but for what lies beneath them.
    beneath = match['rest'].count(renaming.END)
    return front[: len(front) - beneath], int(match[self._group])

  def _written(self, path: Path) -> str:
    """Returns the number as it is written, maybe with leading zeros."""
    match = self._rule.match(path)
    assert match is not None
    return match[self._group]

  def to(self, path: Path, number: int) -> Path:
    """Returns a path with another number."""
    match = self._rule.match(path)
    assert match is not None
    start, stop = match.span(self._group)
    joined = renaming.joined(path)
    text = str(number).zfill(self._width)
    return renaming.separated(joined[:start] + text + joined[stop:])


class _Renumbering(Rule):
  """A rule that gives layers other numbers, by a table."""

  # A rule's fields are set once; this one adds what it needs to apply itself.
  def __init__(
    self, layers: Numbered, tables: dict[Path, dict[int, int]]
  ) -> None:
    like = layers._rule
    super().__init__(layers.text, like.regex, like.left, like.right)
    object.__setattr__(self, '_layers', layers)
    object.__setattr__(self, '_tables', tables)

  def apply(self, path: Path) -> Path | None:
    layers: Numbered = self._layers  # type: ignore[attr-defined]
    tables: dict[Path, dict[int, int]] = self._tables  # type: ignore[attr-defined]
    one = layers.found(path)
    if one is None or one[0] not in tables:
      return None
    return layers.to(path, tables[one[0]].get(one[1], one[1]))


@handles_adapters
def renumber(
  checkpoint: Checkpoint, layers: str, start: int = 0, *, host: Host
) -> Checkpoint:
  """Gives layers consecutive numbers, in the order that they have.

  Adapters go along.

  Args:
    checkpoint: the model.
    layers: a pattern with one `<i>`, as `'**/block<i>'`. Where other wildcards
      match differently, layers are numbered apart.
    start: the first number.
    host: knows the adapters' types.

  Raises:
    RenameError: for a pattern that matches nothing, or if no number changes.
    AdapterError: for an adapter that cannot follow.

  Example:
    renumber: 'transformer/h/<i>'
  """
  if start < 0:
    raise errors.RenameError(f'no number: {start}.')
  found = Numbered(layers, list(following.with_empty(checkpoint)))
  tables = {
    place: {old: start + k for k, old in enumerate(sorted(numbers))}
    for place, numbers in found.numbers.items()
  }
  if all(old == new for t in tables.values() for old, new in t.items()):
    raise errors.RenameError(
      f'{layers!r}: the numbers are consecutive already.'
    )
  return renamed(checkpoint, [_Renumbering(found, tables)], host=host)


@handles_adapters
def repeat(
  checkpoint: Checkpoint,
  layers: str,
  numbers: Places,
  *,
  times: int = 2,
  interleave: bool = False,
  host: Host,
) -> Checkpoint:
  """Repeats layers: depth up-scaling. Those behind get higher numbers.

  Bytes are copied unread.

  Args:
    checkpoint: the model.
    layers: a pattern with one `<i>`, as `'**/block<i>'`; numbers have no gaps.
    numbers: which are repeated, together: `'4:8'`, `[4, 5, 6, 7]`.
    times: how often they are there afterwards.
    interleave: whether each is followed by its own copies (4 4 5 5), not by all
      others (4 5 4 5).
    host: knows the adapters' types.

  Raises:
    RenameError: for a pattern that matches nothing, or numbers with gaps.
    AdapterError: for a model with adapters.

  Example:
    repeat: {layers: 'transformer/h/<i>', numbers: '4:8'}
  """
  if times < 2:
    raise errors.SurgeryError(f'times: expected at least 2, found {times}.')
  records = following.settled(checkpoint, host)
  if records.adapters:
    raise errors.AdapterError(
      f'copies have no adapters, and {records.names[0]!r} is attached. '
      'Merge or detach it first.'
    )
  found = Numbered(layers, list(checkpoint))
  orders = {
    place: _order(known, numbers, times, interleave, layers)
    for place, known in found.numbers.items()
  }
  return _arranged(checkpoint, found, orders)


def _order(
  known: set[int], numbers: Places, times: int, interleave: bool, layers: str
) -> list[int]:
  """Returns which layer each number gets."""
  count = len(known)
  if known != set(range(count)):
    raise errors.RenameError(
      f'{layers!r}: expected the numbers 0 to {count - 1}, found '
      f'{sorted(known)}. Renumber first.'
    )
  wanted = places(numbers, count, f'repeat: {layers!r}')
  if wanted != list(range(wanted[0], wanted[-1] + 1)):
    raise errors.SurgeryError(
      f'numbers: expected one range, found {wanted}. Repeat ranges '
      'one by one, the last first.'
    )
  if interleave:
    block = [k for k in wanted for _ in range(times)]
  else:
    block = wanted * times
  return [*range(wanted[0]), *block, *range(wanted[-1] + 1, count)]


def _arranged(
  checkpoint: Checkpoint, found: Numbered, orders: dict[Path, list[int]]
) -> Checkpoint:
  """Returns a checkpoint whose layers are those of an order."""
  # By place, for each old number the new ones: none if the layer is left out,
  # several if it is repeated.
  where: dict[Path, dict[int, list[int]]] = {}
  for place, order in orders.items():
    for new, old in enumerate(order):
      where.setdefault(place, {}).setdefault(old, []).append(new)
  ordered: dict[Path, Leaf] = {}
  names: dict[Path, list[Path]] = {}
  for path, leaf in checkpoint.items():
    one = found.found(path)
    numbers = None if one is None else where[one[0]][one[1]]
    names[path] = (
      [path] if numbers is None else [found.to(path, n) for n in numbers]
    )
    for target in names[path]:
      if target in ordered:
        raise errors.RenameError(f'two tensors would be {paths.show(target)}.')
      # A layer that is repeated is the same leaf under several names: it is
      # read several times, and held once.
      ordered[target] = _recoded(leaf, path, target)
  before = list(checkpoint)
  if before == sorted(before):
    ordered = {p: ordered[p] for p in sorted(ordered)}
  else:
    ordered = _by_layer(checkpoint, found, names, ordered)
  said = checkpoint.manifest
  trees = {
    to: tree
    for path, tree in said.trees.items()
    for to in _names_of(path, found, where)
  }
  types = {
    to: kind
    for layer, kind in said.layer_types.items()
    for to in _names_of(layer, found, where)
  }
  tensors.check_new(checkpoint.replace(leaves=ordered), {}, ())
  return checkpoint.replace(
    leaves=ordered, manifest=said.replace(trees=trees, layer_types=types)
  )


def _recoded(leaf: Leaf, old: Path, new: Path) -> Leaf:
  """Returns a leaf whose codes are those in the same copy of its layer."""
  if leaf.codes is None:
    return leaf
  # The two paths differ in a number alone; the same number at the same place in
  # the path of the codes is replaced.
  to = list(leaf.codes.of)
  for k, (a, b) in enumerate(zip(old, new, strict=True)):
    if k < len(to) and to[k] == a:
      to[k] = b
  return quantised.moved(leaf, tuple(to))


def _names_of(
  path: Path, found: Numbered, where: dict[Path, dict[int, list[int]]]
) -> list[Path]:
  one = found.found(path)
  if one is None or one[0] not in where or one[1] not in where[one[0]]:
    return [path]
  return [found.to(path, n) for n in where[one[0]][one[1]]]


def _by_layer(
  checkpoint: Checkpoint,
  found: Numbered,
  names: dict[Path, list[Path]],
  leaves: dict[Path, Leaf],
) -> dict[Path, Leaf]:
  """Returns leaves in their order, layers in that of their numbers."""
  # Layers stand where the first of them stood, sorted by their new numbers;
  # within a layer the order is the old one.
  keys: dict[Path, tuple[int, int, int]] = {}
  first: dict[Path, int] = {}
  for k, path in enumerate(checkpoint):
    one = found.found(path)
    if one is None:
      keys[path] = (k, 0, 0)
      continue
    at = first.setdefault(one[0], k)
    for new in names[path]:
      number = found.found(new)
      assert number is not None
      keys[new] = (at, number[1], k)
  return {path: leaves[path] for path in sorted(leaves, key=keys.__getitem__)}
