r"""Rules for renaming: `OLD -> NEW`.

| written | on the left | on the right |
| --- | --- | --- |
| `net/head` | that path, or a layer with all beneath it | the new path |
| `*`, `?`, `[ab]` | as in selectors, within a segment | what that matched |
| `**` | any number of segments | what that matched |
| `{a,b}` | `a` or `b` | `{x,y}`: `x` for `a`, `y` for `b` |
| `<i>` | a whole number | `<i>`, `<i+1>`, `<i-1>`, `<i*2>`, `<i//2>`, `<i%2>` |
| `re:…` | a regular expression that matches the whole path | `\1`, `\g<name>` |

Each wildcard of the left stands on the right once, in order, brackets as they
are written on the left. Each name in braces, and each alternative of a regular
expression, has to match something. A `\` takes a character's meaning away. A
number that was written with leading zeros keeps its width. Where `**` can match
in several ways, the first takes all that it can.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NoReturn, TypeVar

from surgery import errors
from surgery.naming import paths, selectors
from surgery.naming.paths import Path

_ARROW = re.compile(r'(?<!\\)->')
_NUMBER = re.compile(r'<\s*([a-zA-Z_]\w*)\s*(?:(//|[-+*%])\s*([0-9]+)\s*)?>')
_TERM = re.compile(r're:|[a-zA-Z_][\w-]*:(?!\\)')
_SHOWN = 20

# These two characters do not occur in names, so that a regex over joined paths
# needs no escapes.
# Between segments, and behind the last, where a path is matched.
END = '\0'
# What a name cannot hold, for the place of a number.
HOLE = '\1'


@dataclasses.dataclass(frozen=True)
class Text:
  """Characters that stand for themselves."""

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
class Braces:
  """`{a,b}`; the number counts those of a side."""

  number: int
  words: tuple[str, ...]

  @property
  def group(self) -> str:
    """The group of a regex that holds what it matched."""
    return f'braces{self.number}'


@dataclasses.dataclass(frozen=True)
class Number:
  """`<i>`, or on the right something computed of it."""

  name: str
  operator: str = ''
  operand: int = 0

  @property
  def group(self) -> str:
    """The group of a regex that holds what it matched."""
    return f'number_{self.name}'

  def of(self, value: int, rule: str, where: str = 'a path') -> int:
    """Returns the number for a value of `i`.

    Args:
      value: the value.
      rule: the whole rule, for messages.
      where: what gets the number, for messages.

    Raises:
      RenameError: if it gets negative.
    """
    by = self.operand
    result = {
      '': lambda: value,
      '+': lambda: value + by,
      '-': lambda: value - by,
      '*': lambda: value * by,
      '//': lambda: value // by,
      '%': lambda: value % by,
    }[self.operator]()
    if result < 0:
      raise errors.RenameError(
        f'rule {rule!r}: {where} would get the number {result}, and numbers in '
        'names cannot be negative.'
      )
    return result


Part = Text | _Wild | Braces | Number
_GROUPS = {'*': 'star', '?': 'one', '**': 'any', '[…]': 'class'}
_Kind = TypeVar('_Kind', Text, _Wild, Braces, Number)


def _of(kind: type[_Kind], side: Iterable[Iterable[Part]]) -> list[_Kind]:
  """Returns the parts of a kind on a side, in order."""
  return [p for segment in side for p in segment if isinstance(p, kind)]


class Reader:
  """Reads one side of a rule into segments, each a list of parts.

  Args:
    text: the side.
    rule: the whole rule, for messages.
  """

  def __init__(self, text: str, rule: str) -> None:
    try:
      self._text = text = selectors.ranged(text)
    except errors.SelectorError as error:
      raise errors.RenameError(f'rule {rule!r}: {error}') from None
    self._rule = rule
    self._at = 0
    self.counts = {'*': 0, '**': 0, '?': 0, '[…]': 0, '{…}': 0}
    self.segments: list[list[Part]] = [[]]
    while self._at < len(text):
      self._part()
    for segment in self.segments:
      wild = [p for p in segment if isinstance(p, _Wild) and p.kind == '**']
      if wild and len(segment) > 1:
        self._fail("a '**' stands alone between slashes. Write '*' for a part")

  @property
  def braces(self) -> list[Braces]:
    """All braces, in order."""
    return _of(Braces, self.segments)

  @property
  def numbers(self) -> dict[str, Number]:
    """Numbers by their names."""
    return {p.name: p for p in _of(Number, self.segments)}

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
      self._class(rest)
    elif first == '{':
      self._braces(rest)
    elif first == '}':
      self._fail("a '}' without its '{'. Write '\\}' for the character")
    elif first == '<':
      self._number(rest)
    else:
      escaped = first == '\\' and len(rest) > 1
      self._add(1 + escaped, Text(rest[escaped]))

  def _count(self, kind: str) -> int:
    self.counts[kind] += 1
    return self.counts[kind] - 1

  def _add(self, length: int, part: Part) -> None:
    self._at += length
    self.segments[-1].append(part)

  def _class(self, rest: str) -> None:
    end = selectors.class_end(rest, 0)
    # A slash ends a segment, so brackets around it are never closed.
    if end < 0 or re.search(r'(?<!\\)/', rest[:end]):
      self._fail("a '[' without its ']'. Write '\\[' for the character")
    self._add(end + 1, _Wild('[…]', self._count('[…]'), rest[: end + 1]))

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
    self._add(len(match[0]), Number(match[1], operator, operand))

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
        word += END if char == '/' else char
      at += 1
    if at == len(rest):
      self._fail("a '{' without its '}'. Write '\\{' for the character")
    self._add(at + 1, Braces(self._count('{…}'), (*words, word)))


@dataclasses.dataclass(frozen=True)
class Rule:
  """A rule that has been read.

  Attributes:
    text: as it was written.
    regex: matches a path that is joined, or one that is shown for `re:`.
    left: what stands on the left, in segments; None for `re:`.
    right: what stands on the right, in segments; text for `re:`, or None if
      names stay.
  """

  text: str
  regex: re.Pattern[str] = dataclasses.field(compare=False)
  left: tuple[tuple[Part, ...], ...] | None = dataclasses.field(compare=False)
  right: tuple[tuple[Part, ...], ...] | str | None = dataclasses.field(
    compare=False
  )

  @property
  def old(self) -> str:
    """The left side as it was written."""
    return sides(self.text)[0]

  def apply(self, path: Path) -> Path | None:
    """Returns the new name of a path; None if the rule does not match it.

    Raises:
      RenameError: if a number gets negative, or a name empty.
    """
    if self.right is None:
      return path if self.regex.fullmatch(paths.show(path)) else None
    if isinstance(self.right, str):
      new = self._expanded(path)
    else:
      new = self._built(path, self.right)
    # A `**` or a group that matched nothing leaves an empty segment. One that
    # the old name has already is kept.
    if new is not None and (not new or ('' in new and '' not in path)):
      raise errors.RenameError(
        f'rule {self.text!r}: {paths.show(path)} would get the name '
        f'{paths.show(new)!r}, which has an empty part.'
      )
    return new

  def match(self, path: Path) -> re.Match[str] | None:
    """Returns how a rule of patterns matches a path."""
    return self.regex.fullmatch(joined(path))

  def unmet(self, universe: Iterable[Path]) -> list[str]:
    """Returns the alternatives of the left that match none of some paths."""
    if self.left is None:
      return self._unmet_choices(universe)
    braces = _of(Braces, self.left)
    if not braces:
      return []
    matches = [m for m in map(self.match, universe) if m is not None]
    met = {(p.group, m[p.group]) for m in matches for p in braces}
    named = [(p.group, word) for p in braces for word in p.words]
    return [one[1].replace(END, '/') for one in named if one not in met]

  def _unmet_choices(self, universe: Iterable[Path]) -> list[str]:
    shown = [paths.show(path) for path in universe]
    choices = selectors.regex_choices(self.regex)
    return [c.text for c in choices if not any(map(c.matches, shown))]

  def _expanded(self, path: Path) -> Path | None:
    match = self.regex.fullmatch(paths.show(path))
    if match is None:
      return None
    try:
      return paths.parse(match.expand(str(self.right)))
    except (re.error, IndexError) as error:
      raise errors.RenameError(f'rule {self.text!r}: {error}.') from None

  def _built(
    self, path: Path, right: tuple[tuple[Part, ...], ...]
  ) -> Path | None:
    match = self.match(path)
    if match is None:
      return None
    new = ''
    for segment in right:
      new += ''.join(self._value(part, match, path) for part in segment)
      if not (segment and _is_any(segment[0])):
        new += END
    return separated(new + match['rest'])

  def _value(self, part: Part, match: re.Match[str], path: Path) -> str:
    if isinstance(part, Text):
      return part.text
    found = match[part.group]
    if isinstance(part, Braces):
      return part.words[self._words[part.number].index(found)]
    if isinstance(part, Number) and part.operator:
      return self._computed(part, found, path)
    return found

  @functools.cached_property
  def _words(self) -> list[tuple[str, ...]]:
    """What the braces of the left hold."""
    return [p.words for p in _of(Braces, self.left or ())]

  def _computed(self, part: Number, found: str, path: Path) -> str:
    result = part.of(int(found), self.text, paths.show(path))
    # `08` becomes `09`, and `8` becomes `9`: the width is kept where zeros
    # show that names have one.
    return str(result).zfill(len(found) if found.startswith('0') else 0)


def joined(path: Path) -> str:
  """Returns a path as rules match it."""
  return ''.join(segment + END for segment in path)


def separated(text: str) -> Path:
  """Returns the path that was joined."""
  return tuple(text.split(END)[:-1])


def _is_any(part: Part) -> bool:
  return isinstance(part, _Wild) and part.kind == '**'


def _stripped(side: str) -> str:
  """Returns a side without spaces around it, but for one that is escaped."""
  body = side.strip()
  escapes = len(body) - len(body.rstrip('\\'))
  last = side.lstrip()[len(body) : len(body) + 1]
  return body + last if escapes % 2 else body


def has_arrow(text: str) -> bool:
  """Whether a text has the arrow of a rule."""
  return _ARROW.search(text) is not None


def sides(text: str) -> tuple[str, str]:
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
  old, new = sides(text)
  if old.startswith('re:'):
    _check_template(text, new)
    return Rule(text, _read_regex(text, old), None, new)
  check_plain(text, old, new)
  left, right = Reader(old, text), Reader(new, text)
  _check(text, left, right)
  return built(text, left.segments, right.segments)


def staying(text: str) -> Rule:
  """Reads the left side of a rule alone: what it matches keeps its name.

  Raises:
    RenameError: if it cannot be read.
  """
  if text.startswith('re:'):
    return Rule(f'{text} -> {text}', _read_regex(text, text), None, None)
  return parse(f'{text} -> {text}')


def _read_regex(text: str, old: str) -> re.Pattern[str]:
  try:
    return re.compile(old[3:])
  except re.error as error:
    raise errors.RenameError(
      f'rule {text!r}: not a regular expression: {error}.'
    ) from None


def _check_template(text: str, new: str) -> None:
  """Raises for what stands for itself on the right of a regular expression.

  Raises:
    RenameError: naming the first such character.
  """
  check_plain(text, new)
  # `\\0` would put a NUL byte into a name without a word.
  control = re.search(r'\\[0abfnrtv]', re.sub(r'\\\\', '', new))
  if control is not None:
    raise errors.RenameError(
      f'rule {text!r}: {control[0]!r} is a control character on the right of a '
      "regular expression. Write '\\g<0>' for all that matched."
    )
  plain = re.sub(r'\\(?:g<\w+>|.)', '', new)
  found = re.search(r'[*?\[{}]|<\s*[a-zA-Z_]|\$(?=[0-9&])', plain)
  if found is not None:
    raise errors.RenameError(
      f"rule {text!r}: '{found[0][0]}' means nothing on the right of a regular "
      "expression, where '\\1' and '\\g<name>' stand for groups. Write "
      f"'\\{found[0][0]}' for the character itself."
    )


def name(text: str, rule: str) -> Path:
  """Reads the name of one tensor, without wildcards.

  Args:
    text: the name.
    rule: the whole rule, for messages.

  Raises:
    RenameError: for what could stand for several names, or for none.
  """
  if has_arrow(text) or not text.strip():
    raise errors.RenameError(
      f"rule {rule!r}: expected the name of a tensor behind '->', found "
      f'{text.strip()!r}.'
    )
  side = _stripped(text)
  check_plain(rule, side)
  path = []
  for segment in Reader(side, rule).segments:
    for part in segment:
      if not isinstance(part, Text):
        raise errors.RenameError(
          f'rule {rule!r}: expected the name of one tensor, found {side!r}, '
          "which has wildcards or alternatives. A '\\' takes the meaning of "
          'a character away.'
        )
    path.append(''.join(p.text for p in segment if isinstance(p, Text)))
  return tuple(path)


def check_plain(text: str, *sides: str) -> None:
  """Raises unless the sides of a rule are patterns of paths.

  Raises:
    RenameError: naming the side.
  """
  for side in sides:
    if side.startswith('!') or _TERM.match(side):
      raise errors.RenameError(
        f'rule {text!r}: rules are about paths, found {side!r}. Write a '
        "pattern of paths, or 're:…' on the left; a name that has a ':' or "
        "'!' is written with '\\' before it."
      )


def built(
  text: str, left: Sequence[Sequence[Part]], right: Sequence[Sequence[Part]]
) -> Rule:
  """Returns the rule of two sides that have been read."""
  frozen = (tuple(map(tuple, side)) for side in (left, right))
  rule = Rule(text, _regex(text, left), *frozen)
  before, after = (
    {p.group: p.text for s in side for p in s if isinstance(p, _Wild)}
    for side in (left, right)
  )
  for group, written in after.items():
    if before.get(group, written) != written:
      raise errors.RenameError(
        f'rule {text!r}: {before[group]!r} on the left and {written!r} on the '
        'right. Brackets stand for what they matched, so write the same ones; '
        "for other names write braces, as '{a,b} -> {x,y}'."
      )
  return rule


def _check(text: str, left: Reader, right: Reader) -> None:
  """Raises unless the right says what becomes of all that the left matches."""
  for kind, count in left.counts.items():
    other = right.counts[kind]
    if count != other:
      raise errors.RenameError(
        f'rule {text!r}: {count} {kind!r} on the left and {other} on the '
        'right. Each has to stand on both sides, in order; for anything else '
        'write a regular expression (re:…).'
      )
  _check_braces(text, left, right)
  _check_numbers(text, left, right)
  if any(not segment for segment in right.segments):
    raise errors.RenameError(
      f'rule {text!r}: the new name has an empty part. Remove the slash.'
    )


def _check_braces(text: str, left: Reader, right: Reader) -> None:
  """Raises unless each pair of braces has a new name for each old one."""
  for a, b in zip(left.braces, right.braces, strict=True):
    if len(a.words) != len(b.words):
      raise errors.RenameError(
        f'rule {text!r}: braces with {len(a.words)} names on the left, and '
        f'with {len(b.words)} on the right.'
      )
    if len(set(a.words)) < len(a.words):
      raise errors.RenameError(
        f'rule {text!r}: braces on the left repeat a name.'
      )


def _check_numbers(text: str, left: Reader, right: Reader) -> None:
  """Raises unless each number of the right is captured by the left."""
  known = left.numbers
  for number in known.values():
    if number.operator:
      raise errors.RenameError(
        f"rule {text!r}: write '<{number.name}>' on the left; arithmetic "
        'belongs on the right.'
      )
  for name in right.numbers:
    if name not in known:
      raise errors.RenameError(
        f"rule {text!r}: '<{name}>' stands on the right but not on the left."
      )


def _regex(text: str, segments: Sequence[Sequence[Part]]) -> re.Pattern[str]:
  """Returns a regex over a joined path; what lies beneath is the group rest."""
  seen: set[str] = set()
  out = []
  for segment in segments:
    for part in segment:
      out.append(_part_regex(part, seen, text))
    # `**` brings the separators of the segments that it stands for.
    if not (segment and _is_any(segment[0])):
      out.append(END)
  try:
    return re.compile(''.join(out) + '(?P<rest>(?:[^\0]*\0)*)')
  except re.error as error:
    raise errors.RenameError(
      f'rule {text!r}: cannot be read ({error}).'
    ) from None


def _part_regex(part: Part, seen: set[str], text: str) -> str:
  if isinstance(part, Text):
    return re.escape(part.text)
  if part.group in seen:
    # The same number twice means the same number: a reference to what it
    # matched first.
    return f'(?P={part.group})'
  seen.add(part.group)
  if isinstance(part, Braces):
    body = '|'.join(map(re.escape, part.words))
  elif isinstance(part, Number):
    # Longer ones are no layer numbers, and Python refuses to convert very long
    # ones.
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


def resolved(
  rules: Sequence[Rule], universe: Iterable[Path]
) -> dict[Path, Path]:
  """Returns the new names of all paths, when all of the rules mean something.

  Args:
    rules: the rules; the first that matches a path decides.
    universe: the paths.

  Raises:
    RenameError: if a rule decides nothing, or an alternative of one matches
      nothing, with the nearest paths.
  """
  universe = list(universe)
  found = targets(rules, universe)
  for rule in rules:
    check_alternatives(rule, universe)
  return found


def check_alternatives(rule: Rule, universe: Sequence[Path]) -> None:
  """Raises if an alternative of a rule matches nothing.

  Raises:
    RenameError: naming the alternative and the nearest paths.
  """
  for word in rule.unmet(universe):
    raise errors.RenameError(
      f'rule {rule.text!r}: its alternative {word!r} matches nothing among '
      f'{len(universe)} tensors.{selectors.hint(word, universe, rule=True)}'
    )


def _unused(
  rule: Rule, rules: Sequence[Rule], universe: Sequence[Path]
) -> errors.RenameError:
  for path in universe:
    if rule.apply(path) is not None:
      before = first(rules, path)
      assert before is not None
      return errors.RenameError(
        f'rule {rule.text!r} has no effect: the earlier rule '
        f'{before[0].text!r} decides all that it matches, e.g. '
        f'{paths.show(path)}. Put it first.'
      )
  return nothing(rule.text, universe)


def nothing(text: str, universe: Sequence[Path]) -> errors.RenameError:
  """Returns the error for a rule that matches nothing."""
  if not universe:
    return errors.RenameError(
      f'rule {text!r} matches nothing: there are no tensors.'
    )
  near = selectors.hint(sides(text)[0], universe, rule=True)
  return errors.RenameError(
    f'rule {text!r} matches nothing among {len(universe)} tensors.{near}'
  )


def _beneath(path: Path, above: Path) -> bool:
  return path != above and path[: len(above)] == above


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
  lines = [line for new in sources for line in _clashes(new, sources)]
  if lines:
    shown = errors.listed(lines, _SHOWN, '; ')
    raise errors.RenameError(f'rename: {shown}. Change the rules.')


def _clashes(
  new: Path, sources: Mapping[Path, Sequence[Path]]
) -> Iterator[str]:
  """Yields why a path cannot be a new name, if it cannot.

  Args:
    new: the path.
    sources: for each new name the paths that would get it.
  """
  olds = sources[new]
  if len(olds) > 1:
    shown = ' and '.join(paths.show(old) for old in olds)
    yield f'{shown} would all be {paths.show(new)}'
  for other in (new[:n] for n in range(1, len(new))):
    # A clash that was there before renaming is allowed: `weight.absmax` of
    # bitsandbytes lies beneath `weight` whatever both are called.
    if other in sources and not _beneath(olds[0], sources[other][0]):
      yield (
        f'{paths.show(new)} (from {paths.show(olds[0])}) would lie beneath the '
        f'tensor {paths.show(other)} (from {paths.show(sources[other][0])})'
      )
