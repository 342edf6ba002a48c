r"""Selectors: saying which parameters of a model are meant.

| written | means |
| --- | --- |
| `net/mlp/hidden0` | that path; a layer stands for all beneath it |
| `**/attention/{query,value}` | glob by segment: `*`, `?`, `[ab]`, `{a,b}`, and
  `**` for any number of segments |
| `re:.*/h\d+/kernel` | regular expression that matches the whole path |
| `type:Linear` | layers of a class of that name or derived from one |
| `word:rest` | a term that a plugin answers (`surgery_match_layer`) |
| `!…` | all that … matches is taken out |
| a list | any of its items, less what its `!` items match |
| `all` | everything |

A `\` takes a character's meaning away: `a\/b` is one segment.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from surgery.core import errors, paths
from surgery.core.paths import Path

Text = str | Sequence[str]
Types = Callable[[Path], tuple[str, ...]]
Term = Callable[[str, Path], bool]

ALL = 'all'
_TERM = re.compile(r'([a-zA-Z_][\w-]*):(?!\\)')
_MOST_ALTERNATIVES = 1000


def _no_types(layer: Path) -> tuple[str, ...]:
  del layer
  return ()


def _braces(text: str, whole: str) -> list[str]:
  """Expands `a{b,c}d` into `abd` and `acd`, nested and repeated."""
  depth, start, cuts, i = 0, -1, [], 0
  while i < len(text):
    char = text[i]
    if char == '\\':
      i += 2
      continue
    if char == '{':
      if depth == 0:
        start, cuts = i, [i]
      depth += 1
    elif char == ',' and depth == 1:
      cuts.append(i)
    elif char == '}':
      if depth == 0:
        raise errors.SelectorError(
          f"selector {whole!r}: a '}}' without its '{{'. Write '\\}}' for the "
          'character itself.'
        )
      depth -= 1
      if depth == 0:
        cuts.append(i)
        parts = [text[a + 1 : b] for a, b in itertools.pairwise(cuts)]
        tails = _braces(text[i + 1 :], whole)
        result = [
          text[:start] + p + tail
          for part in parts
          for p in _braces(part, whole)
          for tail in tails
        ]
        if len(result) > _MOST_ALTERNATIVES:
          raise errors.SelectorError(
            f'selector {whole!r}: its braces stand for more than '
            f'{_MOST_ALTERNATIVES} patterns. Use a regular expression (re:…).'
          )
        return result
    i += 1
  if depth:
    raise errors.SelectorError(
      f"selector {whole!r}: a '{{' without its '}}'. Write '\\{{' for the "
      'character itself.'
    )
  return [text]


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
  """Returns a regex for a segment, and whether it has a wildcard."""
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
      end = segment.find(']', i + 2)
      if end < 0:
        raise errors.SelectorError(
          f"selector {whole!r}: a '[' without its ']'. Write '\\[' for the "
          'character itself.'
        )
      body = segment[i + 1 : end]
      negated = body.startswith(('!', '^'))
      body = body[1:] if negated else body
      body = body.replace('\\', '\\\\').replace('[', '\\[').replace('^', '\\^')
      out.append(f'[^\0{body}]' if negated else f'[{body}]')
      wild = True
      i = end
    else:
      out.append(re.escape(char))
    i += 1
  return ''.join(out), wild


def _glob(text: str) -> tuple[re.Pattern[str], bool]:
  r"""Returns a regex over `a\0b\0`, and whether its last part is literal."""
  alternatives, literal = [], True
  for one in _braces(text, text):
    regex = []
    for segment in _segments(one):
      if segment == '**':
        regex.append('(?:[^\0]*\0)*')
        wild = True
      else:
        part, wild = segment_regex(segment, text)
        regex.append(part + '\0')
    literal = literal and not wild
    alternatives.append(''.join(regex))
  try:
    return re.compile('|'.join(f'(?:{a})' for a in alternatives)), literal
  except re.error as error:
    raise errors.SelectorError(
      f'selector {text!r}: cannot be read as a glob ({error}).'
    ) from None


def _joined(path: Path) -> str:
  return ''.join(segment + '\0' for segment in path)


@dataclasses.dataclass(frozen=True)
class Item:
  """One item of a selector.

  Attributes:
    text: as it was written, without a leading `!`.
    kind: `glob`, `re`, `type`, `term` or `all`.
    negate: whether what it matches is taken out.
    literal: whether it names parameters or layers one by one.
  """

  text: str
  kind: str
  negate: bool
  literal: bool = dataclasses.field(compare=False)
  regex: re.Pattern[str] | None = dataclasses.field(compare=False, repr=False)
  beneath: re.Pattern[str] | None = dataclasses.field(compare=False, repr=False)

  @property
  def written(self) -> str:
    """The item as it was written."""
    return ('!' if self.negate else '') + self.text

  def layer(
    self, layer: Path, types: Types = _no_types, term: Term | None = None
  ) -> bool:
    """Whether the item matches a layer or one that it lies in."""
    if self.kind == ALL:
      return True
    if self.kind == 'glob':
      assert self.beneath is not None
      return self.beneath.fullmatch(_joined(layer)) is not None
    above = (layer[:n] for n in range(len(layer), 0, -1))
    if self.kind == 're':
      assert self.regex is not None
      return any(self.regex.fullmatch(paths.show(a)) for a in above)
    if self.kind == 'type':
      return any(self.text[5:] in types(a) for a in above)
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


def _item(text: str) -> Item:
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
  if body == ALL:
    return Item(body, ALL, negate, False, None, None)
  term = _TERM.match(body)
  if term and term[1] == 're':
    try:
      return Item(body, 're', negate, False, re.compile(body[3:]), None)
    except re.error as error:
      raise errors.SelectorError(
        f'selector {text!r}: not a regular expression: {error}.'
      ) from None
  if term and term[1] == 'type':
    return Item(body, 'type', negate, False, None, None)
  if term:
    return Item(body, 'term', negate, False, None, None)
  regex, literal = _glob(body)
  beneath = re.compile(f'(?:{regex.pattern})(?:[^\0]*\0)*')
  return Item(body, 'glob', negate, literal, regex, beneath)


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
  missing: str = 'error',
) -> Match:
  """Finds what a selector means.

  Args:
    selector: the selector.
    universe: the paths to choose from.
    types: names of a layer's class and bases.
    term: answers terms of plugins for a layer.
    missing: `'error'` raises for an item that matches nothing, `'pass'` not.

  Returns:
    The paths that are meant, in the order of `universe`.

  Raises:
    SelectorError: for an item that matches nothing, with the nearest paths.
  """
  universe = list(universe)
  taken: dict[Item, dict[Path, bool]] = {}
  for item in (*selector.positive, *selector.negative):
    layers: dict[Path, bool] = {}
    met: dict[Path, bool] = {}
    for path in universe:
      layer = path[:-1]
      if layer not in layers:
        layers[layer] = item.layer(layer, types, term)
      if layers[layer]:
        met[path] = True
      elif item.param(path):
        met[path] = False
    if not met and missing == 'error' and (item.kind != ALL or not universe):
      raise nothing(item, universe, types)
    taken[item] = met
  levels: dict[Path, tuple[Item, bool]] = {}
  by_item: dict[Item, list[Path]] = {i: [] for i in selector.positive}
  for path in universe:
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


def nothing(
  item: Item, universe: Sequence[Path], types: Types = _no_types
) -> errors.SelectorError:
  """Returns the error for an item that matches nothing, with near misses."""
  if not universe:
    return errors.SelectorError(
      f'selector {item.written!r} matches nothing: there are no parameters.'
    )
  if item.kind == 'type':
    layers = {p[:n] for p in universe for n in range(1, len(p))}
    names = {name for layer in layers for name in types(layer)}
    if not names:
      return errors.SelectorError(
        f'selector {item.written!r} matches nothing: the types of layers are '
        'not known here. Give the graph (graph=), or save with it.'
      )
    return errors.SelectorError(
      f'selector {item.written!r} matches nothing.'
      + errors.suggest(item.text[5:], names)
    )
  if item.kind == 'term':
    word = item.text.partition(':')[0]
    return errors.SelectorError(
      f'selector {item.written!r} matches nothing. Either no layer meets it, '
      f"or no plugin knows the term '{word}:' (`surgery plugins` lists them). "
      f"For a name that has a ':' write '{word}\\:'."
    )
  near = nearest(item.text, universe)
  return errors.SelectorError(
    f'selector {item.written!r} matches nothing among {len(universe)} '
    f'parameters. Nearest: {", ".join(near)}.'
  )


def nearest(text: str, universe: Sequence[Path]) -> list[str]:
  """Returns up to five paths that resemble a selector, as selectors."""
  wanted = text.removeprefix('re:')
  places = dict.fromkeys(p[:n] for p in universe for n in range(len(p), 0, -1))
  # Names are compared first: a typo is usually in one segment.
  names = {place[-1] for place in places}
  words = [
    re.sub(r'[*?\[\]\\]', '', word)
    for word in re.split(r'[/{},]', wanted)
    if word.strip('*')
  ]
  close = [
    name
    for word in words
    for name in difflib.get_close_matches(word, names, n=2, cutoff=0.6)
    if word not in names
  ]
  found = [p for p in places if p[-1] in close]
  if not found:
    shown = {paths.show(p): p for p in list(places)[:5000]}
    texts = difflib.get_close_matches(wanted, shown, n=5, cutoff=0.3)
    found = [shown[t] for t in texts] or list(places)[:5]
  return [paths.literal(p) for p in found[:5]]
