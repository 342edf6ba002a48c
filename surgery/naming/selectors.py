r"""Selectors: saying which parameters of a model are meant.

| written | means |
| --- | --- |
| `net/mlp/hidden0` | that path; a layer stands for all beneath it |
| `**/attention/{query,value}` | glob by segment: `*`, `?`, `[ab]`, `{a,b}`, and
  `**` for any number of segments; `{8..15}` for numbers |
| `re:.*/h\d+/kernel` | regular expression that matches the whole path |
| `type:Linear` | layers of a class of that name or derived from one |
| `adapter:NAME` | the weights of an adapter; NAME may be a glob |
| `word:rest` | a term that a plugin answers (`surgery_match_layer`) |
| `!…` | all that … matches is taken out |
| a list | any of its items, less what its `!` items match |
| `all` | everything |

A `\` takes a character's meaning away: `a\/b` is one segment. Each item has to
match something, and so has each alternative of a pair of braces or of a group
of a regular expression, as in `(a|b)`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from surgery import errors
from surgery.naming import paths
from surgery.naming.paths import Path

Text = str | Sequence[str]
Types = Callable[[Path], tuple[str, ...]]
Term = Callable[[str, Path], bool]
Owner = Callable[[Path], str | None]

ALL = 'all'
ADAPTER = 'adapter'
# `word:` in front of an item. A `\:` is the colon of a name, except behind
# `re`, since a regular expression may begin with a backslash.
_TERM = re.compile(r'(re(?=:)|[a-zA-Z_][\w-]*(?=:(?!\\))):')
# Braces multiply: `{0..999}/{0..999}` would be a million patterns.
_MOST_ALTERNATIVES = 1000


def _no_owner(path: Path) -> str | None:
  del path
  return None


def _no_types(layer: Path) -> tuple[str, ...]:
  del layer
  return ()


@dataclasses.dataclass(frozen=True)
class Choice:
  """One alternative of a selector: of braces, or of a regular expression.

  Attributes:
    text: the alternative, as it was written.
    alone: the selector with the others left out, for near misses.
    source: regex that matches what the alternative takes part in.
    kind: `glob` or `re`, as of the item.
  """

  text: str
  alone: str
  source: str = dataclasses.field(repr=False)
  kind: str

  @functools.cached_property
  def _regex(self) -> re.Pattern[str]:
    return re.compile(self.source)

  def matches(self, text: str) -> bool:
    """Whether it takes part in matching a path, joined or shown."""
    return self._regex.fullmatch(text) is not None

  def meets(self, path: Path) -> bool:
    """Whether it takes part in matching a path, or a layer of it."""
    if self.kind == 'glob':
      # The regex of a glob goes on beneath what it names.
      return self.matches(_joined(path))
    above = (path[:n] for n in range(len(path), 0, -1))
    return any(self.matches(paths.show(a)) for a in above)


def unmet(choices: Iterable[Choice], met: Iterable[Path]) -> list[Choice]:
  """Returns the alternatives that take part in matching none of some paths."""
  left = list(choices)
  for path in met:
    if not left:
      break
    left = [one for one in left if not one.meets(path)]
  return left


@dataclasses.dataclass(frozen=True)
class _Pattern:
  """A pattern without braces, and the alternatives that made it.

  Attributes:
    text: the pattern.
    chosen: where in the whole the alternatives stand: start and end of the
      braces, and start and end of the alternative.
  """

  text: str
  chosen: frozenset[tuple[int, int, int, int]] = frozenset()


# A range as an item of braces: `{8..15}`, `{a,3..5}`, `{08..15}`.
_RANGE = re.compile(r'(?<=(?<!\\)[{,])(\d+)\.\.(\d+)(?=[,}])')


def ranged(text: str) -> str:
  """Returns a pattern in which ranges of numbers in braces are written out.

  `{8..10}` is `{8,9,10}`, `{10..8}` goes down, and `{08..10}` keeps the zeros.

  Raises:
    SelectorError: for a range of very many numbers.
  """

  def written(match: re.Match[str]) -> str:
    first, last = int(match[1]), int(match[2])
    if abs(last - first) >= _MOST_ALTERNATIVES:
      raise errors.SelectorError(
        f'{text!r}: the range {match[0]} stands for more than '
        f'{_MOST_ALTERNATIVES} numbers. Use a wildcard, or a regular '
        'expression (re:…).'
      )
    step = 1 if last >= first else -1
    padded = any(len(n) > 1 and n.startswith('0') for n in match.groups())
    width = max(map(len, match.groups())) if padded else 0
    numbers = range(first, last + step, step)
    return ','.join(str(n).zfill(width) for n in numbers)

  return _RANGE.sub(written, text) if '..' in text else text


def _braces(text: str, whole: str, offset: int = 0) -> list[_Pattern]:
  """Expands `a{b,c}d` into `abd` and `acd`, nested and repeated.

  Args:
    text: a part of the selector.
    whole: the selector, for messages.
    offset: where in the whole the part begins.
  """
  cuts = _cuts(text, whole)
  if not cuts:
    return [_Pattern(text)]
  start, end = cuts[0], cuts[-1] + 1
  # What stands behind the pair is expanded once, and follows each alternative.
  tails = _braces(text[end:], whole, offset + end)
  result = []
  for low, high in itertools.pairwise(cuts):
    # Places are of the whole selector, since an alternative that matches
    # nothing is found by its place: `{a,b}/{a,c}` has two called `a`.
    place = (offset + start, offset + end, offset + low + 1, offset + high)
    mine = frozenset({place})
    for part in _braces(text[low + 1 : high], whole, offset + low + 1):
      result += [
        _Pattern(
          text[:start] + part.text + tail.text,
          mine | part.chosen | tail.chosen,
        )
        for tail in tails
      ]
  if len(result) > _MOST_ALTERNATIVES:
    raise errors.SelectorError(
      f'selector {whole!r}: its braces stand for more than '
      f'{_MOST_ALTERNATIVES} patterns. Use a regular expression (re:…).'
    )
  return result


# What braces are made of; an escaped character is none of it.
_BRACE = re.compile(r'\\.|[{},]', re.DOTALL)


def _cuts(text: str, whole: str) -> list[int]:
  """Returns where the first pair of braces and its commas stand, in order.

  Args:
    text: a part of the selector.
    whole: the selector, for messages.

  Raises:
    SelectorError: for a brace without its counterpart.
  """
  depth, cuts = 0, list[int]()
  for match in _BRACE.finditer(text):
    char = match[0]
    depth += (char == '{') - (char == '}')
    if depth < 0:
      raise errors.SelectorError(
        f"selector {whole!r}: a '}}' without its '{{'. Write '\\}}' for the "
        'character itself.'
      )
    # Commas of pairs further in belong to these, which are expanded later.
    if (not cuts and char == '{') or (char == ',' and depth == 1):
      cuts.append(match.start())
    if char == '}' and not depth:
      return [*cuts, match.start()]
  if depth:
    raise errors.SelectorError(
      f"selector {whole!r}: a '{{' without its '}}'. Write '\\{{' for the "
      'character itself.'
    )
  return []


def _segments(text: str) -> list[str]:
  parts, start, i = [], 0, 0
  while i < len(text):
    if text[i] == '\\':
      i += 1
    elif text[i] == '/':
      parts.append(text[start:i])
      start = i + 1
    i += 1
  return [*parts, text[start:]]


def segment_regex(segment: str, whole: str) -> tuple[str, bool]:
  """Returns a regex for a segment, and whether it has a wildcard.

  Raises:
    SelectorError: for brackets that are not closed, or hold nothing.
  """
  out, wild, i = [], False, 0
  while i < len(segment):
    char = segment[i]
    if char == '\\' and i + 1 < len(segment):
      i += 1
      out.append(re.escape(segment[i]))
    elif char == '*':
      out.append('[^\0]*')
      wild = True
    elif char == '?':
      out.append('[^\0]')
      wild = True
    elif char == '[':
      regex, i = _class(segment, i, whole)
      out.append(regex)
      wild = True
    else:
      out.append(re.escape(char))
    i += 1
  return ''.join(out), wild


def class_end(text: str, start: int) -> int:
  """Returns where the `]` of the `[` at `start` is; -1 if there is none.

  One that stands first is a character, as in shells, and so is one behind a
  backslash.
  """
  i = start + 1
  if text[i : i + 1] in ('!', '^'):
    i += 1
  if text[i : i + 1] == ']':
    i += 1
  while i < len(text) and text[i] != ']':
    i += 1 + (text[i] == '\\')
  return i if i < len(text) else -1


def _class(segment: str, start: int, whole: str) -> tuple[str, int]:
  """Returns a regex for the brackets at `start`, and where they end.

  Raises:
    SelectorError: if they do not end.
  """
  end = class_end(segment, start)
  if end < 0:
    raise errors.SelectorError(
      f"selector {whole!r}: a '[' without its ']'. Write '\\[' for the "
      'character itself.'
    )
  body = segment[start + 1 : end]
  negated = body.startswith(('!', '^'))
  body = body[1:] if negated else body
  out, i = [], 0
  while i < len(body):
    if body[i] == '\\' and i + 1 < len(body):
      i += 1
      out.append(re.escape(body[i]))
    elif body[i] == '-' and 0 < i < len(body) - 1:
      out.append('-')  # A range, `[a-z]`: not to be escaped.
    else:
      out.append(re.escape(body[i]))
    i += 1
  # What is negated must not match the separator, or a class would span two
  # segments.
  inner = ''.join(out)
  return (f'[^\0{inner}]' if negated else f'[{inner}]'), end


# What matches layers and all beneath them goes on like this.
_BENEATH = '(?:[^\0]*\0)*'


def _pattern(one: str, whole: str) -> tuple[str, bool]:
  """Returns a regex for a glob without braces, and whether it ends wild."""
  regex, wild = [], False
  for segment in _segments(one):
    if segment == '**':
      # It brings its own separators, so that it can stand for no segment at
      # all.
      regex.append(_BENEATH)
      wild = True
    else:
      _check_stars(segment, whole)
      part, wild = segment_regex(segment, whole)
      regex.append(part + '\0')
  return ''.join(regex), wild


def _glob(text: str) -> tuple[re.Pattern[str], bool, tuple[Choice, ...]]:
  r"""Returns a regex over `a\0b\0`, whether it is literal, and alternatives.

  Raises:
    SelectorError: if it cannot be read.
  """
  text = ranged(text)
  patterns, literal = [], True
  # For each alternative the patterns that it takes part in: it is met if one
  # of them is.
  sources: dict[tuple[int, int, int, int], list[str]] = {}
  for one in _braces(text, text):
    regex, wild = _pattern(one.text, text)
    literal = literal and not wild
    source = f'(?:{regex})'
    patterns.append(source)
    for place in one.chosen:
      sources.setdefault(place, []).append(source)
  choices = tuple(
    Choice(
      text[low:high],
      text[:start] + text[low:high] + text[end:],
      f'(?:{"|".join(sources[start, end, low, high])}){_BENEATH}',
      'glob',
    )
    for start, end, low, high in sorted(sources)
  )
  try:
    return re.compile('|'.join(patterns)), literal, choices
  except re.error as error:
    raise errors.SelectorError(
      f'selector {text!r}: cannot be read as a glob ({error}).'
    ) from None


def _check_stars(segment: str, whole: str) -> None:
  """Raises for a `**` that does not stand alone, and would mean `*`.

  Raises:
    SelectorError: naming the segment.
  """
  if re.search(r'(?<!\\)(?:\\\\)*\*\*', segment):
    raise errors.SelectorError(
      f"selector {whole!r}: a '**' stands alone between slashes, found "
      f"{segment!r}. Write '*' for a part of a name."
    )


# Regular expressions.

# What decides where the alternatives of a regular expression are. Escapes,
# classes, comments and `(?P=name)` come first, since a bar or a parenthesis in
# them is none; so all else that is found is one.
_TOKEN = re.compile(
  r'\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?(?:#[^)]*|P=\w+)\)'
  r'|(?P<open>\((?:\?(?:P<\w+>'
  r'|[aiLmsu]*(?P<verbose>x)?[aiLmsux]*(?:-[imsx]+)?:|<?=|>'
  # Negative lookaheads are there so as not to match, and conditions choose by
  # whether a group took part: both have nothing that has to match.
  r'|(?P<other><?!|\([^)]*\))))?)'
  r'|(?P<bar>\|)|(?P<close>\))',
  re.DOTALL,
)
_FLAGS = re.compile(r'\(\?[aiLmsux]+\)')
_NUMBERED = re.compile(r'\\[1-9]|\(\?\([0-9]')
_MARK = 'surgery_taken'


def regex_choices(regex: re.Pattern[str]) -> tuple[Choice, ...]:
  """Returns the alternatives of a regular expression's groups.

  Those in negative lookaheads, which are there so as not to match, and in
  conditions are left out, and all of a verbose expression.

  Args:
    regex: matches a path that is shown, as a whole.
  """
  text = regex.pattern
  if regex.flags & re.VERBOSE or '|' not in text:
    return ()
  flags = _FLAGS.match(text)
  head = flags.end() if flags else 0
  return tuple(
    _regex_choice(text, head, bounds, k)
    for bounds in _alternations(text, head)
    for k in range(len(bounds) - 1)
  )


def _alternations(text: str, head: int) -> list[list[int]]:
  """Returns where the alternatives of each group begin, and where it ends.

  Args:
    text: the whole expression.
    head: where it begins behind global flags.
  """
  # Each open group: where its alternatives begin, and whether they count. The
  # whole expression is the first group, and is never closed.
  groups: list[tuple[list[int], bool]] = [([head], True)]
  found: list[list[int]] = []
  for token in _TOKEN.finditer(text, head):
    kind = token.lastgroup
    if kind == 'open':
      if token['verbose']:
        return []  # Spaces and comments in it would be taken for names.
      counts = groups[-1][1] and token['other'] is None
      groups.append(([token.end()], counts))
    elif kind == 'bar':
      groups[-1][0].append(token.end())
    elif kind == 'close':
      starts, counts = groups.pop()
      if counts:
        found.append([*starts, token.end()])
  found.append([*groups[0][0], len(text) + 1])
  return sorted(bounds for bounds in found if len(bounds) > 2)


def _regex_choice(text: str, head: int, bounds: list[int], k: int) -> Choice:
  """Returns an alternative of a regular expression.

  Args:
    text: the whole expression.
    head: where it begins behind global flags.
    bounds: where the alternatives of its group begin, and the end behind.
    k: which of them.
  """
  low, high = bounds[k], bounds[k + 1] - 1
  if _NUMBERED.search(text):
    # A further group would change what `\1` means, so the other alternatives
    # get something in front that never matches.
    source = text
    for other in reversed(bounds[:-1]):
      if other != low:
        source = f'{source[:other]}(?!){source[other:]}'
  else:
    # An empty group marks the alternative, and a condition at the end asks
    # whether the mark was met, also where the group is repeated or optional.
    source = (
      f'{text[:head]}(?:{text[head:low]}(?P<{_MARK}>){text[low:]})'
      f'(?({_MARK})|(?!))'
    )
  alone = f're:{text[: bounds[0]]}{text[low:high]}{text[bounds[-1] - 1 :]}'
  return Choice(text[low:high], alone, source, 're')


def _joined(path: Path) -> str:
  return ''.join(segment + '\0' for segment in path)


@dataclasses.dataclass(frozen=True)
class Item:
  """One item of a selector.

  Attributes:
    text: as it was written, without a leading `!`.
    kind: `glob`, `re`, `type`, `adapter`, `term` or `all`.
    negate: whether what it matches is taken out.
    literal: whether it names parameters or layers one by one.
    choices: its alternatives, each of which has to match something.
  """

  # Compiled patterns follow from the text, so equality leaves them out.
  text: str
  kind: str
  negate: bool
  literal: bool = dataclasses.field(compare=False)
  regex: re.Pattern[str] | None = dataclasses.field(compare=False, repr=False)
  beneath: re.Pattern[str] | None = dataclasses.field(compare=False, repr=False)
  choices: tuple[Choice, ...] = dataclasses.field(
    default=(), compare=False, repr=False
  )

  @property
  def written(self) -> str:
    """The item as it was written."""
    return ('!' if self.negate else '') + self.text

  def layer(
    self, layer: Path, types: Types = _no_types, term: Term | None = None
  ) -> bool:
    """Whether the item matches a layer or one that it lies in."""
    if self.kind in (ALL, ADAPTER):
      return self.kind == ALL  # The other is about weights, not about layers.
    if self.beneath is not None:
      return self.beneath.fullmatch(_joined(layer)) is not None
    if self.kind == 'term':
      # A plugin decides by itself whether what lies in a layer is meant.
      return self.itself(layer, types, term)
    # The model itself may be a layer, as one of equinox alone; it has no path.
    last = -1 if self.kind == 'type' else 0
    above = (layer[:n] for n in range(len(layer), last, -1))
    return any(self.itself(a, types, term) for a in above)

  def itself(self, layer: Path, types: Types, term: Term | None) -> bool:
    """Whether a regular expression, type or term matches that very layer."""
    if self.regex is not None:
      return self.regex.fullmatch(paths.show(layer)) is not None
    if self.kind == 'type':
      return self.text[5:] in types(layer)
    return term is not None and term(self.text, layer)

  def param(self, path: Path) -> bool:
    """Whether the item matches a parameter by its own name."""
    if self.kind == 'glob':
      assert self.regex is not None
      return self.regex.fullmatch(_joined(path)) is not None
    if self.kind == 're':
      assert self.regex is not None
      return self.regex.fullmatch(paths.show(path)) is not None
    return False

  def owned(self, name: str | None) -> bool:
    """Whether the item matches the weights of an adapter."""
    if self.kind != ADAPTER or name is None:
      return False
    assert self.regex is not None
    return self.regex.fullmatch(_joined((name,))) is not None


@functools.lru_cache(maxsize=1024)
def _alternatives(text: str) -> tuple[tuple[re.Pattern[str], str], ...]:
  """Returns the patterns that a glob's braces stand for, with how each names.

  See `naming` for the words.
  """
  found = []
  text = ranged(text)
  for one in _braces(text, text):
    regex, wild = _pattern(one.text, text)
    # The last segment decides: `**/h*` names layers by a part of their name.
    said = _segments(one.text)[-1].strip('*?')
    how = 'name' if not wild else 'part' if said else 'any'
    found.append((re.compile(regex), how))
  return tuple(found)


def naming(
  item: Item, layer: Path, types: Types = _no_types, term: Term | None = None
) -> str:
  """Returns how an item names a layer itself, not one that it lies in.

  Args:
    item: the item.
    layer: path of the layer.
    types: names of a layer's class and bases.
    term: answers terms of plugins for a layer.

  Returns:
    `name` if its last segment is written out, alone or in braces; `part` if it
    is a pattern with some text, a regular expression, a type or a term; `any`
    if it is a wildcard alone; empty if the item does not match the layer.
  """
  if item.kind == 'glob':
    text = _joined(layer)
    hows = [h for regex, h in _alternatives(item.text) if regex.fullmatch(text)]
    return next((h for h in ('name', 'part', 'any') if h in hows), '')
  if item.kind in (ALL, ADAPTER):
    return 'any' if item.kind == ALL else ''
  return 'part' if item.itself(layer, types, term) else ''


def _item(text: str) -> Item:
  negate, body = _body(text)
  if body == ALL:
    return Item(body, ALL, negate, False, None, None)
  term = _TERM.match(body)
  if term is None:
    regex, literal, choices = _glob(body)
    beneath = re.compile(f'(?:{regex.pattern}){_BENEATH}')
    return Item(body, 'glob', negate, literal, regex, beneath, choices)
  if term[1] == 're':
    regex, choices = _expression(body, text)
    return Item(body, 're', negate, False, regex, None, choices)
  if term[1] == ADAPTER:
    regex, _, choices = _glob(body.partition(':')[2])
    return Item(body, ADAPTER, negate, False, regex, None, choices)
  kind = 'type' if term[1] == 'type' else 'term'
  return Item(body, kind, negate, False, None, None)


def _expression(
  body: str, text: str
) -> tuple[re.Pattern[str], tuple[Choice, ...]]:
  """Returns the regex of a `re:` item, and its alternatives."""
  try:
    regex = re.compile(body[3:])
    return regex, regex_choices(regex)
  except re.error as error:
    raise errors.SelectorError(
      f'selector {text!r}: not a regular expression: {error}.'
    ) from None


def _body(text: str) -> tuple[bool, str]:
  """Returns whether an item takes out, and the rest of it.

  Raises:
    SelectorError: if nothing is left, or it is no text.
  """
  if not isinstance(text, str):
    raise errors.SelectorError(
      f'a selector is text or a list of texts, found {text!r} '
      f'({type(text).__name__}).'
    )
  negate = text.startswith('!')
  body = text[1:] if negate else text
  if not body:
    raise errors.SelectorError(
      f"selector {text!r}: it is empty. Write '**' or 'all' for everything."
    )
  if body.startswith('!'):
    raise errors.SelectorError(
      f"selector {text!r}: two '!'. Write one, or '\\!' for the character "
      'itself.'
    )
  return negate, body


@dataclasses.dataclass(frozen=True)
class Selector:
  """A selector that has been read; see the module for what may be written.

  Attributes:
    items: its items, in the order in which they were written.
  """

  items: tuple[Item, ...]

  @property
  def positive(self) -> tuple[Item, ...]:
    """The items that put something in; everything, where there is none."""
    return tuple(i for i in self.items if not i.negate) or (_item(ALL),)

  @property
  def negative(self) -> tuple[Item, ...]:
    """The items that take something out."""
    return tuple(i for i in self.items if i.negate)

  @property
  def text(self) -> str | list[str]:
    """The selector as it was written."""
    written = [i.written for i in self.items]
    return written[0] if len(written) == 1 else written

  def needs(self, *kinds: str) -> Item | None:
    """Returns the first item of one of these kinds."""
    return next((i for i in self.items if i.kind in kinds), None)

  def matches(self, path: Path, types: tuple[str, ...] = ()) -> bool:
    """Whether a parameter is meant.

    Args:
      path: path of the parameter.
      types: names of its layer's class and bases.
    """
    layer = path[:-1]
    known = {layer: types}

    def met(item: Item) -> bool:
      types_of = lambda a: known.get(a, ())
      return item.layer(layer, types_of) or item.param(path)

    return any(map(met, self.positive)) and not any(map(met, self.negative))


@functools.lru_cache(maxsize=1024)
def _parse(items: tuple[str, ...]) -> Selector:
  return Selector(tuple(_item(text) for text in items))


def parse(text: Text | Selector) -> Selector:
  """Reads a selector.

  Args:
    text: a selector or a list of them.

  Raises:
    SelectorError: if it cannot be read.
  """
  if isinstance(text, Selector):
    return text
  if isinstance(text, str):
    return _parse((text,))
  if not isinstance(text, Iterable):
    _item(text)  # Raises.
  items = tuple(text)
  if not items:
    raise errors.SelectorError('a selector is an empty list. Name something.')
  for one in items:
    if not isinstance(one, str):
      _item(one)  # Raises: lists may be unhashable.
  return _parse(items)


@dataclasses.dataclass(frozen=True)
class Match:
  """What a selector means among given paths.

  Attributes:
    levels: the paths that are meant, each with the item that put it in and
      whether that matched the path's layer (or one above it).
    by_item: for each positive item the paths that it put in.
  """

  levels: Mapping[Path, tuple[Item, bool]]
  by_item: Mapping[Item, tuple[Path, ...]]


def resolve(
  selector: Selector,
  universe: Iterable[Path],
  types: Types = _no_types,
  term: Term | None = None,
  *,
  owner: Owner = _no_owner,
  missing: str = 'error',
) -> Match:
  """Finds what a selector means.

  Args:
    selector: the selector.
    universe: the paths to choose from.
    types: names of a layer's class and bases.
    term: answers terms of plugins for a layer.
    owner: name of the adapter that a path is a weight of, or None.
    missing: `'error'` raises for an item, or an alternative of one, that
      matches nothing; `'pass'` does not.

  Returns:
    The paths that are meant, in the order of `universe`.

  Raises:
    SelectorError: for an item or an alternative that matches nothing, with the
      nearest paths.
  """
  universe = list(universe)
  taken: dict[Item, dict[Path, bool]] = {}
  for item in (*selector.positive, *selector.negative):
    taken[item] = _taken(item, universe, types, term, owner)
    if missing == 'error':
      _check_met(item, taken[item], universe, types, owner)
  levels: dict[Path, tuple[Item, bool]] = {}
  by_item: dict[Item, list[Path]] = {i: [] for i in selector.positive}
  for path in universe:
    # Items that take out win, wherever they stand in the list.
    if any(path in taken[i] for i in selector.negative):
      continue
    for item in selector.positive:
      if path in taken[item]:
        by_item[item].append(path)
        # A parameter that was named wins over the layer it is in.
        at_layer = taken[item][path]
        if path not in levels or (levels[path][1] and not at_layer):
          levels[path] = (item, at_layer)
  return Match(levels, {i: tuple(p) for i, p in by_item.items()})


def _taken(
  item: Item,
  universe: Sequence[Path],
  types: Types,
  term: Term | None,
  owner: Owner,
) -> dict[Path, bool]:
  """Returns the paths that an item matches, and whether by their layer."""
  # A layer has several parameters, and a plugin's term may take its time.
  layers: dict[Path, bool] = {}
  met: dict[Path, bool] = {}
  for path in universe:
    layer = path[:-1]
    if layer not in layers:
      layers[layer] = item.layer(layer, types, term)
    if layers[layer]:
      met[path] = True
    elif item.param(path) or (item.kind == ADAPTER and item.owned(owner(path))):
      met[path] = False
  return met


def _names(some: Iterable[Path], owner: Owner) -> list[Path]:
  """Returns the names of the adapters that own some paths, as paths."""
  names = (owner(path) for path in some)
  return list(dict.fromkeys((name,) for name in names if name is not None))


def _check_met(
  item: Item,
  met: Iterable[Path],
  universe: Sequence[Path],
  types: Types,
  owner: Owner,
) -> None:
  """Raises if an item, or an alternative of one, matches nothing.

  Raises:
    SelectorError: naming it, with near misses.
  """
  if item.kind == ADAPTER:
    # It is compared with names of adapters.
    universe, met = _names(universe, owner), _names(met, owner)
  if not met and (item.kind != ALL or not universe):
    raise nothing(item, universe, types)
  check_choices(item, met, universe)


def check_deciding(
  texts: Iterable[str],
  universe: Mapping[Path, tuple[str, ...]],
  what: str,
) -> None:
  """Raises unless each of several selectors decides something.

  The first selector that matches a path decides, as `Selector.matches` says.

  Args:
    texts: the selectors, in their order.
    universe: the paths, with the names of the types of their layers.
    what: what the selectors are for, for messages.

  Raises:
    SelectorError: for a selector, or an alternative of one, that matches
      nothing; and for one whose matches earlier ones all decide.
  """
  decided: dict[Path, str] = {}
  left = dict(universe)

  for text in texts:
    read = parse(text)
    new = [p for p, known in left.items() if read.matches(p, known)]
    met = new
    # There may be many that name one path each: look at all only where needed.
    if not new or any(item.choices for item in read.items):
      met = [p for p, known in universe.items() if read.matches(p, known)]
    try:
      _check_read(read, met, universe)
    except errors.SelectorError as error:
      raise errors.SelectorError(f'{what}: {error}') from None
    if not new:
      raise shadowed(text, met[0], decided[met[0]], what)
    for path in new:
      decided[path] = text
      del left[path]


def _check_read(
  read: Selector,
  met: Collection[Path],
  universe: Mapping[Path, tuple[str, ...]],
) -> None:
  """Raises if a selector, or an alternative of it, matches nothing."""

  def types(layer: Path) -> tuple[str, ...]:
    return next((t for p, t in universe.items() if p[:-1] == layer), ())

  if not met:
    raise nothing(read.items[0], list(universe), types)
  for item in read.items:
    check_choices(item, universe if item.negate else met, universe)


def shadowed(
  text: str, path: Path, earlier: str, what: str
) -> errors.SelectorError:
  """Returns the error for a selector that an earlier one leaves nothing.

  Args:
    text: the selector.
    path: something that it matches.
    earlier: the selector that decides that.
    what: what the selectors are for.
  """
  return errors.SelectorError(
    f'{what}: selector {text!r} has no effect: the earlier selector '
    f'{earlier!r} decides all that it matches, e.g. {paths.show(path)}. Put '
    'it first.'
  )


def check_choices(
  item: Item, met: Iterable[Path], universe: Collection[Path]
) -> None:
  """Raises if an alternative of an item matches nothing.

  Args:
    item: the item.
    met: the paths that it matches.
    universe: the paths that there are.

  Raises:
    SelectorError: naming the alternative and the nearest paths.
  """
  for choice in unmet(item.choices, met):
    near = hint(choice.alone, list(universe))
    kind = 'adapters' if item.kind == ADAPTER else 'parameters'
    raise errors.SelectorError(
      f'selector {item.written!r}: its alternative {choice.text!r} matches '
      f'nothing among {len(universe)} {kind}.{near}'
    )


def nothing(
  item: Item, universe: Sequence[Path], types: Types = _no_types
) -> errors.SelectorError:
  """Returns the error for an item that matches nothing, with near misses."""
  if item.kind == ADAPTER:
    known = [name for name, *rest in universe if not rest]
    return errors.SelectorError(
      f'selector {item.written!r} matches nothing: no parameter is a weight '
      'of such an adapter.'
      + (errors.suggest(item.text.partition(':')[2], known) if known else '')
    )
  if not universe:
    return errors.SelectorError(
      f'selector {item.written!r} matches nothing: there are no parameters.'
    )
  if item.kind == 'type':
    return _no_type(item, universe, types)
  if item.kind == 'term':
    word = item.text.partition(':')[0]
    return errors.SelectorError(
      f'selector {item.written!r} matches nothing. Either no layer meets it, '
      f"or no plugin knows the term '{word}:' (`surgery plugins` lists them). "
      f"For a name that has a ':' write '{word}\\:'."
    )
  return errors.SelectorError(
    f'selector {item.written!r} matches nothing among {len(universe)} '
    f'parameters.{hint(item.text, universe)}'
  )


def _no_type(
  item: Item, universe: Sequence[Path], types: Types
) -> errors.SelectorError:
  """Returns the error for a `type:` item that matches nothing."""
  layers = {p[:n] for p in universe for n in range(len(p))}
  names = {name for layer in layers for name in types(layer)}
  if not names:
    return errors.SelectorError(
      f'selector {item.written!r} matches nothing: the types of layers are '
      'not known here. Pass the graph (graph=), or save with it; for params '
      'of linen or haiku layers=surgery.layers(model, x).'
    )
  return errors.SelectorError(
    f'selector {item.written!r} matches nothing.'
    + errors.suggest(item.text[5:], names)
  )


# A number in a rule, `h/<i>`, which is no word of selectors.
_NUMBER = re.compile(r'<\w+(?:[+-]\d+)?>')


def hint(text: str, universe: Sequence[Path], *, rule: bool = False) -> str:
  """Returns a sentence that helps with what matches nothing.

  Args:
    text: a selector, or the left of a rule.
    universe: the paths that there are.
    rule: whether it is of a rule, in which `<i>` is a number.
  """
  number = _NUMBER.search(text)
  if number is not None and not rule and not text.startswith('re:'):
    plain = _NUMBER.sub('*', text)
    slashed = _slashed(plain)
    if slashed and _met(slashed, universe):
      plain = slashed
    return (
      f' {number[0]} stands for a number only in rules (OLD -> NEW); in a '
      f"selector write '*': {plain!r}."
    )
  slashed = _slashed(text)
  if slashed and _met(_NUMBER.sub('*', slashed), universe):
    return f' Names are written with slashes here: {slashed!r}.'
  return f' Nearest: {", ".join(nearest(text, universe))}.'


def _slashed(text: str) -> str | None:
  """Returns a selector with slashes for dots, if it has any."""
  if text.startswith('re:'):
    slashed = text.replace('\\.', '/')
  else:
    slashed = re.sub(r'(?<!\\)\.', '/', text)
  return slashed if slashed != text else None


def _met(text: str, universe: Sequence[Path]) -> bool:
  """Whether a selector can be read and matches something."""
  try:
    item = _item(text)
  except errors.SelectorError:
    return False
  return any(item.layer(p[:-1]) or item.param(p) for p in universe)


def nearest(text: str, universe: Sequence[Path]) -> list[str]:
  """Returns up to five paths that resemble a selector, as selectors."""
  places = dict.fromkeys(p[:n] for p in universe for n in range(len(p), 0, -1))
  # Names are compared first: a typo is usually in one segment.
  names = {place[-1] for place in places}
  words = _words(text) - names
  close = {
    name
    for word in words
    for name in difflib.get_close_matches(word, names, n=2, cutoff=0.6)
  }
  found = [p for p in places if p[-1] in close]
  if not found:
    # Comparing whole paths takes a while, so not all of a large model's.
    shown = {paths.show(p): p for p in list(places)[:5000]}
    wanted = text.removeprefix('re:')
    texts = difflib.get_close_matches(wanted, shown, n=5, cutoff=0.3)
    found = [shown[t] for t in texts] or list(places)[:5]
  return [paths.literal(p) for p in found[:5]]


def _words(text: str) -> set[str]:
  """Returns the names in a selector, without wildcards."""
  ends = r'[/{},.]'  # Other programs join names with dots.
  if text.startswith('re:'):  # Groups of an expression are no part of a name.
    text, ends = text[3:], r'[/{},|).]|\((?:\?(?::|P<\w+>))?'
  words = (word for word in re.split(ends, text) if word.strip('*'))
  return {re.sub(r'[*?\[\]\\]', '', word) for word in words}
