r"""Rules for renaming: `OLD -> NEW`.

| written | on the left | on the right |
| --- | --- | --- |
| `net/head` | that path, or a layer with all beneath it | the new path |
| `*`, `?`, `[ab]` | as in selectors, within a segment | what that matched |
| `**` | any number of segments | what that matched |
| `{a,b}` | `a` or `b` | `{x,y}`: `x` for `a`, `y` for `b` |
| `<i>` | a whole number | `<i>`, `<i+1>`, `<i-1>`, `<i*2>`, `<i//2>`, `<i%2>` |
| `re:…` | a regular expression that matches the whole path | `\1`, `\g<name>` |

Each wildcard of the left stands on the right once, in order. A `\` takes a
character's meaning away. A number that was written with leading zeros keeps its
width. Where `**` can match in several ways, the first takes all that it can.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

from surgery.core import errors, paths, selectors
from surgery.core.paths import Path

_ARROW = re.compile(r'(?<!\\)->')
_NUMBER = re.compile(r'<\s*([a-zA-Z_]\w*)\s*(?:(//|[-+*%])\s*([0-9]+)\s*)?>')
_TERM = re.compile(r'[a-zA-Z_][\w-]*:(?!\\)')
_SHOWN = 20

# Between segments, and behind the last, where a path is matched.
_END = '\0'


@dataclasses.dataclass(frozen=True)
class _Text:
  text: str


@dataclasses.dataclass(frozen=True)
class _Wild:
  """`*`, `?`, `**` or `[…]`; the number counts those of its kind."""

  kind: str
  number: int
  text: str = ''

  @property
  def group(self) -> str:
    return f'{_GROUPS[self.kind]}{self.number}'


@dataclasses.dataclass(frozen=True)
class _Braces:
  number: int
  words: tuple[str, ...]

  @property
  def group(self) -> str:
    return f'braces{self.number}'


@dataclasses.dataclass(frozen=True)
class _Number:
  name: str
  operator: str = ''
  operand: int = 0

  @property
  def group(self) -> str:
    return f'number_{self.name}'


_Part = _Text | _Wild | _Braces | _Number
_GROUPS = {'*': 'star', '?': 'one', '**': 'any', '[…]': 'class'}


class _Reader:
  """Reads one side of a rule into segments, each a list of parts.

  Args:
    text: the side.
    rule: the whole rule, for messages.
  """

  def __init__(self, text: str, rule: str) -> None:
    self._text = text
    self._rule = rule
    self._at = 0
    self.counts = {'*': 0, '**': 0, '?': 0, '[…]': 0, '{…}': 0}
    self.segments: list[list[_Part]] = [[]]
    while self._at < len(text):
      self._part()
    for segment in self.segments:
      wild = [p for p in segment if isinstance(p, _Wild) and p.kind == '**']
      if wild and len(segment) > 1:
        self._fail("a '**' stands alone between slashes. Write '*' for a part")

  def _fail(self, why: str) -> NoReturn:
    raise errors.RenameError(f'rule {self._rule!r}: {why}.')

  def _part(self) -> None:
    rest = self._text[self._at :]
    first = rest[0]
    if first == '/':
      self._at += 1
      self.segments.append([])
    elif rest.startswith('**'):
      self._add(2, _Wild('**', self._count('**')))
    elif first in '*?':
      self._add(1, _Wild(first, self._count(first)))
    elif first == '[':
      end = rest.find(']', 2)
      if end < 0:
        self._fail("a '[' without its ']'. Write '\\[' for the character")
      found = _Wild('[…]', self._count('[…]'), rest[: end + 1])
      self._add(end + 1, found)
    elif first == '{':
      self._braces(rest)
    elif first == '}':
      self._fail("a '}' without its '{'. Write '\\}' for the character")
    elif first == '<':
      self._number(rest)
    else:
      escaped = first == '\\' and len(rest) > 1
      self._add(1 + escaped, _Text(rest[escaped]))

  def _count(self, kind: str) -> int:
    self.counts[kind] += 1
    return self.counts[kind] - 1

  def _add(self, length: int, part: _Part) -> None:
    self._at += length
    self.segments[-1].append(part)

  def _number(self, rest: str) -> None:
    match = _NUMBER.match(rest)
    if match is None:
      self._fail(
        "expected '<i>', or '<i+1>', '<i-1>', '<i*2>', '<i//2>' or '<i%2>' on "
        f"the right, found {rest[:12]!r}. Write '\\<' for the character"
      )
    operator, operand = match[2] or '', int(match[3] or 0)
    if operator in ('//', '%') and not operand:
      self._fail(f'{match[0]!r} divides by 0')
    self._add(len(match[0]), _Number(match[1], operator, operand))

  def _braces(self, rest: str) -> None:
    words, word, at = [], '', 1
    while at < len(rest) and rest[at] != '}':
      char = rest[at]
      if char == '\\' and at + 1 < len(rest):
        at += 1
        word += rest[at]
      elif char == ',':
        words.append(word)
        word = ''
      elif char in '*?[{<':
        self._fail(
          f'braces hold names, found {char!r} in them. Write several rules, or '
          'a regular expression (re:…)'
        )
      else:
        word += _END if char == '/' else char
      at += 1
    if at == len(rest):
      self._fail("a '{' without its '}'. Write '\\{' for the character")
    self._add(at + 1, _Braces(self._count('{…}'), (*words, word)))


@dataclasses.dataclass(frozen=True)
class Rule:
  """A rule that has been read.

  Attributes:
    text: as it was written.
    regex: matches a path that is joined, or one that is shown for `re:`.
    left: what stands on the left, in segments; None for `re:`.
    right: what stands on the right, in segments; text for `re:`.
  """

  text: str
  regex: re.Pattern[str] = dataclasses.field(compare=False)
  left: tuple[tuple[_Part, ...], ...] | None = dataclasses.field(compare=False)
  right: tuple[tuple[_Part, ...], ...] | str = dataclasses.field(compare=False)

  @property
  def old(self) -> str:
    """The left side as it was written."""
    return _sides(self.text)[0]

  def apply(self, path: Path) -> Path | None:
    """Returns the new name of a path; None if the rule does not match it.

    Raises:
      RenameError: if a number gets negative, or a name empty.
    """
    if isinstance(self.right, str):
      new = self._expanded(path)
    else:
      new = self._built(path, self.right)
    if new is not None and (not new or ('' in new and '' not in path)):
      raise errors.RenameError(
        f'rule {self.text!r}: {paths.show(path)} would get the name '
        f'{paths.show(new)!r}, which has an empty part.'
      )
    return new

  def _expanded(self, path: Path) -> Path | None:
    match = self.regex.fullmatch(paths.show(path))
    if match is None:
      return None
    try:
      return paths.parse(match.expand(str(self.right)))
    except (re.error, IndexError) as error:
      raise errors.RenameError(f'rule {self.text!r}: {error}.') from None

  def _built(
    self, path: Path, right: tuple[tuple[_Part, ...], ...]
  ) -> Path | None:
    match = self.regex.fullmatch(''.join(s + _END for s in path))
    if match is None:
      return None
    joined = ''
    for segment in right:
      joined += ''.join(self._value(part, match, path) for part in segment)
      if not (segment and _is_any(segment[0])):
        joined += _END
    joined += match['rest']
    return tuple(joined.split(_END)[:-1])

  def _value(self, part: _Part, match: re.Match[str], path: Path) -> str:
    if isinstance(part, _Text):
      return part.text
    found = match[part.group]
    if isinstance(part, _Braces):
      return part.words[self._words[part.number].index(found)]
    if isinstance(part, _Number) and part.operator:
      return self._computed(part, found, path)
    return found

  @functools.cached_property
  def _words(self) -> list[tuple[str, ...]]:
    """What the braces of the left hold."""
    parts = (p for segment in self.left or () for p in segment)
    return [p.words for p in parts if isinstance(p, _Braces)]

  def _computed(self, part: _Number, found: str, path: Path) -> str:
    value, by = int(found), part.operand
    result = {
      '+': lambda: value + by,
      '-': lambda: value - by,
      '*': lambda: value * by,
      '//': lambda: value // by,
      '%': lambda: value % by,
    }[part.operator]()
    if result < 0:
      raise errors.RenameError(
        f'rule {self.text!r}: {paths.show(path)} would get the number {result}'
        ', and numbers in names cannot be negative.'
      )
    return str(result).zfill(len(found) if found.startswith('0') else 0)


def _is_any(part: _Part) -> bool:
  return isinstance(part, _Wild) and part.kind == '**'


def _stripped(side: str) -> str:
  """Returns a side without spaces around it, but for one that is escaped."""
  body = side.strip()
  escapes = len(body) - len(body.rstrip('\\'))
  last = side.lstrip()[len(body) : len(body) + 1]
  return body + last if escapes % 2 else body


def _sides(text: str) -> tuple[str, str]:
  """Returns both sides of a rule.

  Raises:
    RenameError: if there are not two.
  """
  sides = [_stripped(side) for side in _ARROW.split(text)]
  if len(sides) != 2 or not sides[0]:
    raise errors.RenameError(
      f"rule {text!r}: expected 'OLD -> NEW', found {len(sides) - 1} arrows "
      "('->')."
      if len(sides) != 2
      else f"rule {text!r}: expected 'OLD -> NEW', found nothing on the left."
    )
  old, new = sides
  if not new:
    raise errors.RenameError(
      f"rule {text!r}: expected 'OLD -> NEW', found nothing on the right. To "
      f"take a level away write '{old}/** -> **'."
    )
  return old, new


def parse(text: str) -> Rule:
  """Reads a rule.

  Raises:
    RenameError: if it cannot be read.
  """
  if not isinstance(text, str):
    raise errors.RenameError(
      f"a rule is text, 'OLD -> NEW', found {text!r} ({type(text).__name__})."
    )
  old, new = _sides(text)
  if old.startswith('re:'):
    try:
      return Rule(text, re.compile(old[3:]), None, new)
    except re.error as error:
      raise errors.RenameError(
        f'rule {text!r}: not a regular expression: {error}.'
      ) from None
  for side in (old, new):
    if side.startswith('!') or _TERM.match(side):
      raise errors.RenameError(
        f'rule {text!r}: rules are about paths, found {side!r}. Write a '
        "pattern of paths, or 're:…' on the left; a name that has a ':' or "
        "'!' is written with '\\' before it."
      )
  left, right = _Reader(old, text), _Reader(new, text)
  _check(text, left, right)
  return Rule(text, _regex(text, left.segments), *map(_frozen, (left, right)))


def _frozen(side: _Reader) -> tuple[tuple[_Part, ...], ...]:
  return tuple(map(tuple, side.segments))


def _check(text: str, left: _Reader, right: _Reader) -> None:
  """Raises unless the right says what becomes of all that the left matches."""
  for kind, count in left.counts.items():
    other = right.counts[kind]
    if count != other:
      raise errors.RenameError(
        f'rule {text!r}: {count} {kind!r} on the left and {other} on the '
        'right. Each has to stand on both sides, in order; for anything else '
        'write a regular expression (re:…).'
      )
  parts = lambda side: [p for segment in side.segments for p in segment]
  for a, b in zip(
    [p for p in parts(left) if isinstance(p, _Braces)],
    [p for p in parts(right) if isinstance(p, _Braces)],
    strict=True,
  ):
    if len(a.words) != len(b.words):
      raise errors.RenameError(
        f'rule {text!r}: braces with {len(a.words)} names on the left, and '
        f'with {len(b.words)} on the right.'
      )
  known = {p.name: p for p in parts(left) if isinstance(p, _Number)}
  for number in known.values():
    if number.operator:
      raise errors.RenameError(
        f"rule {text!r}: on the left write '<{number.name}>'; what is computed "
        'stands on the right.'
      )
  for part in parts(right):
    if isinstance(part, _Number) and part.name not in known:
      raise errors.RenameError(
        f"rule {text!r}: '<{part.name}>' stands on the right and not on the "
        'left.'
      )
  if any(not segment for segment in right.segments):
    raise errors.RenameError(
      f'rule {text!r}: the new name has an empty part. Take the slash away.'
    )


def _regex(text: str, segments: Sequence[Sequence[_Part]]) -> re.Pattern[str]:
  """Returns a regex over a joined path; what lies beneath is the group rest."""
  seen: set[str] = set()
  out = []
  for segment in segments:
    for part in segment:
      out.append(_part_regex(part, seen, text))
    if not (segment and _is_any(segment[0])):
      out.append(_END)
  try:
    return re.compile(''.join(out) + '(?P<rest>(?:[^\0]*\0)*)')
  except re.error as error:
    raise errors.RenameError(
      f'rule {text!r}: cannot be read ({error}).'
    ) from None


def _part_regex(part: _Part, seen: set[str], text: str) -> str:
  if isinstance(part, _Text):
    return re.escape(part.text)
  if part.group in seen:
    return f'(?P={part.group})'
  seen.add(part.group)
  if isinstance(part, _Braces):
    body = '|'.join(map(re.escape, part.words))
  elif isinstance(part, _Number):
    body = '[0-9]{1,100}'
  elif part.kind == '[…]':
    body, _ = selectors.segment_regex(part.text, text)
  else:
    body = {'*': '[^\0]*', '?': '[^\0]', '**': '(?:[^\0]*\0)*'}[part.kind]
  return f'(?P<{part.group}>{body})'


def first(rules: Iterable[Rule], path: Path) -> tuple[Rule, Path] | None:
  """Returns the first rule that matches a path, and the new name."""
  for rule in rules:
    new = rule.apply(path)
    if new is not None:
      return rule, new
  return None


def targets(
  rules: Sequence[Rule], universe: Iterable[Path]
) -> dict[Path, Path]:
  """Returns the new names of all paths that a rule matches.

  Args:
    rules: the rules; the first that matches a path decides.
    universe: the paths.

  Raises:
    RenameError: if a rule decides nothing, with the nearest paths.
  """
  universe = list(universe)
  used: set[Rule] = set()
  found = {}
  for path in universe:
    one = first(rules, path)
    if one is not None:
      used.add(one[0])
      found[path] = one[1]
  for rule in rules:
    if rule not in used:
      raise _unused(rule, rules, universe)
  return found


def _unused(
  rule: Rule, rules: Sequence[Rule], universe: Sequence[Path]
) -> errors.RenameError:
  for path in universe:
    if rule.apply(path) is not None:
      before = first(rules, path)
      assert before is not None
      return errors.RenameError(
        f'rule {rule.text!r} decides nothing: what it matches, e.g. '
        f'{paths.show(path)}, an earlier rule does, {before[0].text!r}. Put it '
        'first.'
      )
  if not universe:
    return errors.RenameError(
      f'rule {rule.text!r} matches nothing: there are no tensors.'
    )
  near = ', '.join(selectors.nearest(rule.old, universe))
  return errors.RenameError(
    f'rule {rule.text!r} matches nothing among {len(universe)} tensors. '
    f'Nearest: {near}.'
  )


def check_targets(where: Mapping[Path, Path]) -> None:
  """Raises if two paths become one, or one lies beneath another.

  Args:
    where: for each path its new name; for those that stay, their own.

  Raises:
    RenameError: naming all of them.
  """
  sources: dict[Path, list[Path]] = {}
  for old, new in where.items():
    sources.setdefault(new, []).append(old)
  lines = []
  for new, olds in sources.items():
    if len(olds) > 1:
      shown = ' and '.join(paths.show(old) for old in olds)
      lines.append(f'{shown} would all be {paths.show(new)}')
    above = (new[:n] for n in range(1, len(new)))
    for other in above:
      # What was so before is no business of ours.
      if other in sources and (olds[0] != new or sources[other][0] != other):
        shown = f'{paths.show(new)} (from {paths.show(olds[0])})'
        lines.append(
          f'{shown} would lie beneath the tensor {paths.show(other)} (from '
          f'{paths.show(sources[other][0])})'
        )
  if lines:
    more = len(lines) - _SHOWN
    shown = '; '.join(lines[:_SHOWN])
    shown += f'; and {more} more' if more > 0 else ''
    raise errors.RenameError(f'rename: {shown}. Change the rules.')
