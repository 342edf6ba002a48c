"""Rules between one tensor and several: `MANY -> ONE` and `ONE -> MANY`.

They are rules (`surgery.naming.renaming`) of which one side has one
pair of braces, or one number, more than the other:

    '**/{query,key,value}/kernel -> **/qkv/kernel'    several become one
    '**/qkv/kernel -> **/{query,key,value}/kernel'    one becomes several
    'h/<i>/** -> h/**'                                all numbers become one
    'h/** -> h/<i>/**'                                one becomes 0, 1, 2, …

Turned around, a rule undoes what it did.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

from surgery import errors
from surgery.naming import paths, renaming
from surgery.naming.paths import Path
from surgery.naming.renaming import Braces, Number, Part, Reader, Rule, Text

Key = int


@dataclasses.dataclass(frozen=True)
class Gather:
  """A rule by which several paths become one.

  Attributes:
    text: as it was written.
    words: what the braces hold, in order; None if numbers are gathered.
    rule: gives the one path.
    group: the group of the rule's regex that holds what tells paths apart.
  """

  text: str
  words: tuple[str, ...] | None
  rule: Rule
  group: str

  def apply(self, path: Path) -> tuple[Path, Key] | None:
    """Returns what a path becomes a part of, and its place in it.

    Args:
      path: a path.

    Returns:
      The new path, and the place of the word in the braces, or the number;
      None if the rule does not match.
    """
    target = self.rule.apply(path)
    if target is None:
      return None
    match = self.rule.match(path)
    assert match is not None
    found = match[self.group]
    place = int(found) if self.words is None else self.words.index(found)
    return target, place


@dataclasses.dataclass(frozen=True)
class Spread:
  """A rule by which one path becomes several.

  Attributes:
    text: as it was written.
    words: what the braces hold, in order; None if paths are numbered.
  """

  text: str
  words: tuple[str, ...] | None
  _left: Reader = dataclasses.field(compare=False, repr=False)
  _right: Reader = dataclasses.field(compare=False, repr=False)
  _extra: str | int = dataclasses.field(compare=False, repr=False)
  _rules: dict[int, Rule] = dataclasses.field(
    default_factory=dict, compare=False, repr=False
  )

  def apply(self, path: Path, count: int) -> list[Path] | None:
    """Returns the paths that one becomes; None if the rule does not match.

    Args:
      path: a path.
      count: how many there are to be, if they are numbered.
    """
    number = len(self.words) if self.words is not None else count
    found = [self._rule(k).apply(path) for k in range(number)]
    return None if any(p is None for p in found) else list(filter(None, found))

  def matches(self, path: Path) -> bool:
    """Whether the rule is about a path."""
    return self._rule(0).apply(path) is not None

  def check_alternatives(self, universe: Sequence[Path]) -> None:
    """Raises if an alternative of the left matches nothing.

    Raises:
      RenameError: naming it and the nearest paths.
    """
    renaming.check_alternatives(self._rule(0), universe)

  def _rule(self, place: int) -> Rule:
    # A rule is compiled for each place, once: a path is matched against all of
    # them.
    if place not in self._rules:
      segments = [
        [self._placed(part, place) for part in segment]
        for segment in self._right.segments
      ]
      rule = renaming.built(self.text, self._left.segments, segments)
      self._rules[place] = rule
    return self._rules[place]

  def _placed(self, part: Part, place: int) -> Part:
    if isinstance(part, Number) and part.name == self._extra:
      return Text(str(part.of(place, self.text)))
    if isinstance(part, Braces) and isinstance(self._extra, int):
      if part.number == self._extra:
        return Text(part.words[place])
      return _without(part, self._extra)
    return part


def parse(text: str) -> Gather | Spread:
  """Reads a rule between one and several.

  Raises:
    RenameError: if it cannot be read, or both sides have as many braces and
      numbers.
  """
  old, new = renaming.sides(text)
  renaming.check_plain(text, old, new)
  left, right = Reader(old, text), Reader(new, text)
  braces = len(left.braces) - len(right.braces)
  numbers = (
    [n for n in left.numbers if n not in right.numbers],
    [n for n in right.numbers if n not in left.numbers],
  )
  extra = abs(braces) + len(numbers[0]) + len(numbers[1])
  if extra != 1:
    _fail(
      text,
      'one side must have one pair of braces, or one number, more than the '
      "other, as in '{a,b} -> ab' and 'h/<i> -> h'",
    )
  if braces:
    return _of_braces(text, left, right, braces > 0)
  if numbers[0]:
    _check_rest(text, left, right)
    rule = renaming.built(text, left.segments, right.segments)
    return Gather(text, None, rule, left.numbers[numbers[0][0]].group)
  _check_rest(text, left, right)
  return Spread(text, None, left, right, numbers[1][0])


def _of_braces(
  text: str, left: Reader, right: Reader, gathers: bool
) -> Gather | Spread:
  many, one = (left, right) if gathers else (right, left)
  extra = _extra_of(text, many.braces, one.braces)
  words = many.braces[extra].words
  if len(set(words)) < len(words):
    _fail(text, 'braces hold a name twice')
  _check_rest(text, left, right, {'{…}'})
  if not gathers:
    return Spread(text, words, left, right, extra)
  # Braces are counted from the left on each side, so behind the one that the
  # other side lacks the numbers differ by one.
  segments = [
    [_shifted(part, extra) for part in segment] for segment in right.segments
  ]
  rule = renaming.built(text, left.segments, segments)
  return Gather(text, words, rule, many.braces[extra].group)


def _extra_of(text: str, many: Sequence[Braces], one: Sequence[Braces]) -> int:
  """Returns which braces stand on one side only."""
  found = []
  # Each pair is left out in turn: what is left has to fit the other side pair
  # by pair. Of several that fit, the one whose names agree best is meant, as
  # in `{q,k}/{w,b} -> {w,b}`.
  for k in range(len(many)):
    rest = [*many[:k], *many[k + 1 :]]
    pairs = list(zip(rest, one, strict=True))
    if all(len(a.words) == len(b.words) for a, b in pairs):
      found.append((sum(a.words != b.words for a, b in pairs), k))
  found.sort()
  if not found:
    _fail(text, 'braces on both sides must have the same number of names')
  if len(found) > 1 and found[0][0] == found[1][0]:
    _fail(text, 'it is ambiguous which braces stand on one side only')
  return found[0][1]


def _shifted(part: Part, extra: int) -> Part:
  """Counts braces of the one side as those of the other."""
  if isinstance(part, Braces) and part.number >= extra:
    return dataclasses.replace(part, number=part.number + 1)
  return part


def _without(part: Braces, extra: int) -> Braces:
  if part.number > extra:
    return dataclasses.replace(part, number=part.number - 1)
  return part


def _check_rest(
  text: str, left: Reader, right: Reader, besides: Iterable[str] = ()
) -> None:
  """Raises unless everything else stands on both sides."""
  for kind, count in left.counts.items():
    if kind not in besides and count != right.counts[kind]:
      _fail(
        text,
        f'{count} {kind!r} on the left and {right.counts[kind]} on the right',
      )
  computed = [n for n in left.numbers.values() if n.operator]
  if computed:
    _fail(text, f"on the left write '<{computed[0].name}>'")
  if any(not segment for segment in right.segments):
    _fail(text, 'the new name has an empty part. Remove the slash')


def _fail(text: str, why: str) -> NoReturn:
  raise errors.RenameError(f'rule {text!r}: {why}.')


def gathered(
  rule: Gather, universe: Iterable[Path]
) -> Mapping[Path, Mapping[Key, Path]]:
  """Returns what becomes one, by its new path and by place.

  Args:
    rule: the rule.
    universe: the paths.

  Raises:
    RenameError: if nothing matches, or an alternative does not, or a place is
      taken twice, or missing.
  """
  universe = list(universe)
  found: dict[Path, dict[Key, Path]] = {}
  for path in universe:
    one = rule.apply(path)
    if one is None:
      continue
    target, place = one
    other = found.setdefault(target, {}).setdefault(place, path)
    # Two paths may get one place by wildcards that the right leaves out.
    if other != path:
      _fail(
        rule.text,
        f'{paths.show(other)} and {paths.show(path)} would be the same part of '
        f'{paths.show(target)}',
      )
  if not found:
    raise renaming.nothing(rule.text, universe)
  for target, parts in found.items():
    _check_complete(rule, target, parts)
  renaming.check_alternatives(rule.rule, universe)
  return {
    target: {k: parts[k] for k in sorted(parts)}
    for target, parts in found.items()
  }


def _check_complete(
  rule: Gather, target: Path, parts: Mapping[Key, Path]
) -> None:
  """Raises if a part of what becomes one is missing."""
  wanted = range(max(parts) + 1 if rule.words is None else len(rule.words))
  missing = [k for k in wanted if k not in parts]
  if missing:
    named = ', '.join(_shown(rule, k) for k in missing[:5])
    hint = ' Renumber first.' if rule.words is None else ''
    _fail(
      rule.text,
      f'{paths.show(target)} would be made of {len(parts)} parts, and '
      f'{named} is missing.{hint}'.rstrip('.'),
    )


def _shown(rule: Gather, place: int) -> str:
  """Returns what a place is called in a rule."""
  if rule.words is None:
    return str(place)
  return rule.words[place].replace(renaming.END, '/')


def one_to_many(rule: Spread, universe: Iterable[Path]) -> list[Path]:
  """Returns the paths that a rule spreads.

  Raises:
    RenameError: if there are none, or none for an alternative of the left.
  """
  universe = list(universe)
  found = [path for path in universe if rule.matches(path)]
  if not found:
    raise renaming.nothing(rule.text, universe)
  rule.check_alternatives(universe)
  return found
