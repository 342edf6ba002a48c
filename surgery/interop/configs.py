"""Edits to what a `config.json` states of a model's tensors.

Of architectures that are known each statement has a formula
(`surgery.interop.architectures`). The formulae are evaluated on the tensors
that were read and on those that are written. Only what differs between the two
is changed in the configuration, and only where the configuration agreed with
the tensors before. So a statement that no step touched stays as it was,
whatever it means.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery import errors
from surgery.interop import architectures, labels
from surgery.interop.architectures import Architecture, Count, Measure, Part

if TYPE_CHECKING:
  from surgery.model.checkpoint import Leaf
  from surgery.naming.paths import Path

  Tensors = Mapping[Path, Leaf]
  # Returns for a function that gives a tensor's layer the old number of each
  # new layer, or None where that is not known.
  Sources = Callable[[Callable[[Path], int | None]], Sequence[int] | None]

# The dtypes in which transformers loads a model by name.
_DTYPES = ('float64', 'float32', 'float16', 'bfloat16')
_DTYPE_KEYS = ('dtype', 'torch_dtype')
_TOKEN = re.compile(r'_token_(id|index)$')
_TIE = 'tie_word_embeddings'
# Lists of these names have an item for each layer, if they are as long.
_OF_EACH_LAYER = re.compile(
  r'layer|block|atten|attn|window|heads|ffn|intermediate'
)


@dataclasses.dataclass(frozen=True)
class Change:
  """A statement of a configuration that is changed.

  Attributes:
    key: its key, with dots between levels.
    old: what it was; None where it was not stated.
    new: what it is.
    why: the tensors that decide it, or the option.
  """

  key: str
  old: Any
  new: Any
  why: str

  def to_json(self) -> dict[str, Any]:
    """Returns it as a plan shows it."""
    return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Edited:
  """A configuration for what is written.

  Attributes:
    config: the configuration.
    changes: what was changed.
    warnings: statements that look stale, a sentence each.
  """

  config: Mapping[str, Any]
  changes: tuple[Change, ...] = ()
  warnings: tuple[str, ...] = ()


def edited(
  config: Mapping[str, Any],
  before: Tensors | None,
  after: Tensors,
  *,
  given: Mapping[str, Any] | None = None,
  tied: bool = False,
  sources: Sources = lambda number: None,
  numbers: Mapping[int, int] | None = None,
) -> Edited:
  """Returns the configuration of what is written.

  Args:
    config: the configuration of what was read.
    before: the tensors that it described; None where they are not known.
    after: the tensors that are written.
    given: what the user states, by key with dots; it decides.
    tied: whether a step left out the head because the embedding stands for it.
    sources: returns for a function that gives a tensor's layer the old number
      of each new layer, or None where that is not known.
    numbers: new numbers of tokens by old ones; None where all stay.

  Raises:
    SurgeryError: for a key of `given` beneath something that is no object.
  """
  whole = _Whole(config, given or {}, tied, sources)
  parts = architectures.parts(config)
  for part in parts if numbers is not None else ():
    whole.tokens(numbers or {}, part.above)
  for part in parts:
    if not part.above:
      whole.repeat(parts)
    one = _Editing(whole, part, before, after)
    if part.architecture is not None:
      one.known(part.architecture)
    elif before is not None:
      one.unknown([p.above for p in parts if p.above])
    one.dtype()
  if before is not None:
    named = labels.followed(config, before, after)
    for key, value in named.stated.items():
      whole.set(key, value, named.why)
    # Who states the names has seen to it.
    if labels.NAMES not in whole.given:
      whole.said.extend(named.warnings)
  whole.give()
  return Edited(
    whole.config, tuple(whole.changes), tuple(dict.fromkeys(whole.said))
  )


class _Whole:
  """A configuration while it is edited.

  Args:
    config: as it was read; not changed.
    given: what the user states, by key with dots.
    tied: whether a step left out a head that is tied.
    sources: see `edited`.

  Attributes:
    config: as it is.
    changes: what was changed.
    said: warnings.
  """

  def __init__(
    self,
    config: Mapping[str, Any],
    given: Mapping[str, Any],
    tied: bool,
    sources: Sources,
  ) -> None:
    self.config = copy.deepcopy(dict(config))
    self.given = given
    self.tied = tied
    self.sources = sources
    self.changes: list[Change] = []
    self.said: list[str] = []

  def inside(self, above: str) -> dict[str, Any]:
    """Returns a configuration inside of it, or itself."""
    found: dict[str, Any] = self.config[above] if above else self.config
    return found

  def set(self, name: str, new: Any, why: str, above: str = '') -> None:
    """States something, unless the user does."""
    inside = self.inside(above)
    key = f'{above}.{name}' if above else name
    old = inside.get(name)
    if key in self.given or old == new:
      return
    inside[name] = new
    self.changes.append(Change(key, old, new, why))

  def tokens(self, numbers: Mapping[int, int], above: str) -> None:
    """Gives tokens that are named the numbers that they have now."""
    said = dict(self.inside(above))
    new, lost = renumbered(said, numbers)
    for key, value in new.items():
      if value != said[key]:
        self.set(key, value, 'the number of the same token', above)
    self.said.extend(f'{text} in config.json' for text in lost)

  def repeat(self, parts: Sequence[Part]) -> None:
    """States for the whole what it repeats of its language model."""
    described = any(not p.above and p.architecture for p in parts)
    texts = {p.above for p in parts if p.above and p.role == 'text'}
    for change in [] if described else list(self.changes):
      above, _, name = change.key.partition('.')
      if above not in texts or not name or name in _DTYPE_KEYS:
        continue
      if change.old is not None and self.config.get(name) == change.old:
        self.set(name, change.new, f'as in {above}')

  def give(self) -> None:
    """States what the user does.

    Raises:
      SurgeryError: for a key beneath something that is no object.
    """
    for key, value in self.given.items():
      *above, last = key.split('.')
      inside: Any = self.config
      for name in above:
        inner = inside.setdefault(name, {})
        if not isinstance(inner, dict):
          raise errors.SurgeryError(
            f'--config {key}: {name!r} is {inner!r:.80} in config.json, and '
            'nothing lies beneath it.'
          )
        inside = inner
      old = inside.get(last)
      if last not in inside or old != value or type(old) is not type(value):
        inside[last] = value
        self.changes.append(Change(key, old, value, 'given'))


class _Editing:
  """A part of a configuration while it is edited.

  Args:
    whole: the whole.
    part: the part.
    before: all tensors that were read; None where they are not known.
    after: all tensors that are written.
  """

  def __init__(
    self, whole: _Whole, part: Part, before: Tensors | None, after: Tensors
  ) -> None:
    self._whole = whole
    self._part = part
    self._old = copy.deepcopy(whole.inside(part.above))
    self._before = None if before is None else part.of(before)
    self._after = part.of(after)

  @property
  def config(self) -> dict[str, Any]:
    """The part as it is now."""
    return self._whole.inside(self._part.above)

  def _set(self, key: str, new: Any, why: str) -> None:
    self._whole.set(key, new, why, self._part.above)

  def _warn(self, text: str) -> None:
    self._whole.said.append(text)

  def _key(self, name: str) -> str:
    return self._part.key(name)

  # What is known.

  def known(self, one: Architecture) -> None:
    """Edits the configuration of an architecture that is known."""
    measures: dict[str, Measure] = {**one.layers, **one.sizes}
    found = [m(self._after) for m in (*measures.values(), *one.heads.values())]
    if not any(found):
      if not self._part.above:
        self._warn(
          f'config.json describes {self._part.kind!r}, and no tensor that is '
          'written has a name of that architecture, so it is copied as it is.'
        )
      return
    size = self._head_size(one)
    for key, measure in measures.items():
      self._measured(key, measure, 1, one)
    for key, measure in one.heads.items():
      if size is not None:
        self._measured(key, measure, size, one)
    self._state_implied(one, {**measures, **one.heads}, size or 1)
    self._state_head_size(one, size)
    for key, count in one.layers.items():
      self._per_layer(key, count, one, first=key == next(iter(one.layers)))
    self._check_experts(one)
    self._tie(one)
    self._check_tokens()

  def _measured(
    self, key: str, measure: Measure, by: int, one: Architecture
  ) -> None:
    """States what a formula gives, if it gives something else than before."""
    key = one.name(key, self.config)
    after = measure(self._after)
    before = None if self._before is None else measure(self._before)
    if after == before:
      return
    stated = self._stated(key, one)
    shown = self._key(key)
    if not after:
      if before and key in self.config:
        self._warn(
          f'{shown} is {self.config[key]} in config.json, and no tensor tells '
          f'it any more ({measure}).'
        )
      return
    if len(after) > 1:
      self._warn(
        f'{shown}: config.json has one number, and the tensors have '
        f'{_listed(after)} ({measure}).'
      )
      return
    [size] = after
    if size % by:
      self._warn(
        f'{shown}: {size} places cannot be heads of {by} each ({measure}).'
      )
      return
    if before is not None and stated is not None and before != {stated * by}:
      self._warn(
        f'{shown} is {stated} in config.json and {_listed(before)} in the '
        f'tensors that were read ({measure}), so it is left as it is.'
      )
      return
    wanted = size // by
    said = self.config.get(key)
    follows = said is None and key in one.implied
    if said != wanted and not (follows and self._implies(key, one, wanted)):
      self._set(key, wanted, str(measure))

  def _stated(self, key: str, one: Architecture) -> int | None:
    """Returns what the configuration stated, or stated by leaving it out."""
    value = self._old.get(key)
    if value is None and key in one.implied:
      other, factor = one.implied[key]
      base = self._old.get(other)
      return base * factor if isinstance(base, int) else None
    return value if type(value) is int else None

  def _implies(self, key: str, one: Architecture, value: int) -> bool:
    """Whether what is not stated follows from what is stated now."""
    if self.config.get(key) is not None or key not in one.implied:
      return True
    other, factor = one.implied[key]
    base = self.config.get(other)
    return not isinstance(base, int) or base * factor == value

  def _state_implied(
    self, one: Architecture, measures: Mapping[str, Measure], by: int
  ) -> None:
    """States what stayed, where the key that it followed from has changed."""
    for key in one.implied:
      stated = self._stated(key, one)
      measure = measures.get(key)
      if stated is None or measure is None or self.config.get(key) is not None:
        continue
      each = by if key in one.heads else 1
      now = measure(self._after)
      if now == {stated * each} and not self._implies(key, one, stated):
        self._set(key, stated, str(measure))

  def _head_size(self, one: Architecture) -> int | None:
    """Returns the size of a head, which no step changes."""
    stated = self._old.get(one.head_size) if one.head_size else None
    if type(stated) is int and stated > 0:
      return stated
    if one.default_head_size is not None:
      return one.default_head_size
    hidden = self._old.get(one.hidden)
    heads = self._old.get(next(iter(one.heads), ''))
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
      return hidden // heads
    return None

  def _state_head_size(self, one: Architecture, size: int | None) -> None:
    """Sees to it that the size of a head is what it was."""
    if size is None or self.config == self._old:
      return
    if one.head_size and self.config.get(one.head_size) is not None:
      return
    if one.default_head_size is not None:
      return
    first = next(iter(one.heads))
    hidden, heads = self.config.get(one.hidden), self.config.get(first)
    if not isinstance(hidden, int) or not isinstance(heads, int) or not heads:
      return
    if hidden == heads * size:
      return
    if one.head_size:
      self._set(one.head_size, size, f'{one.hidden} is not {first} times it')
    else:
      self._warn(
        f'{self._key(first)}: {heads} heads of {size} are not {one.hidden} = '
        f'{hidden}, which transformers expects of {self._part.kind!r}: it '
        'cannot load this model.'
      )

  # What is stated of each layer.

  def _per_layer(
    self, key: str, count: Count, one: Architecture, first: bool
  ) -> None:
    """Edits what is stated of each layer.

    Args:
      key: the key of the number of layers.
      count: the layers.
      one: the architecture.
      first: whether it is of these layers that the architecture states more.
    """
    old = self._old.get(key)
    if type(old) is not int and self._before is not None:
      old = next(iter(count(self._before)), None)
    now = count(self._after)
    if type(old) is not int or len(now) != 1:
      return
    [new] = now
    sources = self._whole.sources(lambda path: self._number(count, path))
    if sources is not None and (
      len(sources) != new or any(k >= old for k in sources)
    ):
      sources = None
    if old == new and (sources is None or list(sources) == list(range(old))):
      return
    layers = _Layers(self._key(key), old, new, sources)
    for stated in one.per_layer if first else ():
      self._state_layers(stated, layers)
    self._listed_layers(layers, {p.key for p in one.per_layer})

  def _number(self, count: Count, path: Path) -> int | None:
    """Returns the number of the layer that a tensor of this part is in."""
    if not self._part.has(path):
      return None
    return architectures.number(count.pattern, path)

  def _state_layers(
    self, stated: architectures.PerLayer, layers: _Layers
  ) -> None:
    """Edits one statement of each layer, stated in full or by other keys."""
    items = stated.items(self._old, layers.old)
    moved = layers.moved(items) if len(items) == layers.old else None
    if moved is None:
      self._warn_of_layers(stated.key, layers)
      return
    if stated.items(self.config, layers.new) != moved:
      for key, value in stated.stating(self.config, moved).items():
        self._set(key, value, f'{stated.why} of {layers.key}')

  def _listed_layers(self, layers: _Layers, known: Iterable[str]) -> None:
    """Edits lists that have an item for each layer, by whatever name."""
    for name, value in list(self.config.items()):
      if not isinstance(value, list) or len(value) != layers.old:
        continue
      if layers.old < 2 or name in known or _TOKEN.search(name):
        continue
      if not _OF_EACH_LAYER.search(name):
        continue
      moved = layers.moved(value)
      if moved is None:
        self._warn_of_layers(name, layers)
      else:
        self._set(name, moved, f'an item for each layer of {layers.key}')

  def _warn_of_layers(self, name: str, layers: _Layers) -> None:
    key = self._key(name)
    if key in self._whole.given:
      return
    self._warn(
      f'{key} tells the layers of {layers.key} apart in config.json, and it is '
      f'not known which of the {layers.old} each of the {layers.new} is that '
      f'there are now. State it with --config {key}=….'
    )

  # Checks.

  def _check_experts(self, one: Architecture) -> None:
    """Sees to it that routers and tokens have as many experts as there are."""
    if one.router is None or one.experts is None:
      return
    measure = one.sizes[one.experts]
    now, known = measure(self._after), one.router(self._after)
    before = self._before
    if now != known and (
      before is None or measure(before) == one.router(before)
    ):
      self._warn(
        f'{self._key(one.name(one.experts, self.config))}: there are '
        f'{_listed(now)} experts, and routers for {_listed(known)} '
        f'({one.router}): transformers cannot load this model. Cut the rows of '
        'the routers, too.'
      )
    chosen = self.config.get(one.chosen)
    if len(now) == 1 and type(chosen) is int and chosen > (most := max(now)):
      self._set(one.chosen, most, f'there are {most} experts')

  def _tie(self, one: Architecture) -> None:
    """States whether the head is the embedding."""
    if self._before is None or one.head is None:
      return
    was, now = (
      any(True for _ in architectures.matched(one.head, t))
      for t in (self._before, self._after)
    )
    # Of a language model inside of another the whole decides, and both say it.
    places = [self._part.above]
    if self._part.above and _TIE in self._whole.config:
      places = ['', *(p for p in places if _TIE in self.config)]
    stated = self._whole.inside(places[0]).get(_TIE, one.tied)
    shown = self._key(_TIE) if places[0] else _TIE
    if now and not was and stated:
      for above in places:
        self._whole.set(_TIE, False, f'{one.head} is there', above)
    elif was and not now and not stated:
      if self._whole.tied:
        for above in places:
          self._whole.set(_TIE, True, f'{one.head} was tied', above)
      elif shown not in self._whole.given:
        self._warn(
          f'{one.head} is gone, and {shown} is false in config.json: '
          'transformers would draw a new head. If the embedding stands for it, '
          f'state --config {shown}=true.'
        )

  def _check_tokens(self) -> None:
    """Warns of tokens that the vocabulary has not any more."""
    size = self.config.get('vocab_size')
    if not isinstance(size, int) or size == self._old.get('vocab_size'):
      return
    for above in dict.fromkeys(('', self._part.above)):
      for name, value in tokens(self._whole.inside(above), size):
        key = f'{above}.{name}' if above else name
        self._warn(
          f'{key} is {value} in config.json, and the vocabulary has {size} '
          'tokens.'
        )

  def dtype(self) -> None:
    """States the dtype of most numbers."""
    now = _common_dtype(self._after)
    was = None if self._before is None else _common_dtype(self._before)
    keys = [k for k in _DTYPE_KEYS if isinstance(self.config.get(k), str)]
    if now is None or now == was:
      return
    for key in keys:
      stated = self.config[key].removeprefix('torch.')
      if was is not None and stated != was:
        self._warn(
          f'{self._key(key)} is {stated} in config.json, and most numbers that '
          f'were read are {was}, so it is left as it is.'
        )
      elif now in _DTYPES:
        self._set(key, now, 'the dtype of most numbers')
      else:
        self._warn(
          f'{self._key(key)} is {stated} in config.json, and most numbers are '
          f'{now}, which transformers does not load by its name.'
        )

  def unknown(self, parts: Sequence[str]) -> None:
    """Warns of what looks stale where the architecture is not known.

    Args:
      parts: keys of configurations inside, which are looked at by themselves.
    """
    assert self._before is not None
    was, now = _facts(self._before), _facts(self._after)
    own = {
      key: value
      for key, value in self.config.items()
      if self._part.above or key not in parts
    }
    stale = [
      f'{self._key(key)} = {value}'
      for key, value in _numbers(own)
      if self._key(key) not in self._whole.given
      and _looks_stale(key, value, was, now)
    ]
    if stale:
      kind = self._part.kind
      what = repr(kind) if kind else 'of no model_type'
      self._warn(
        f'the architecture {what} is not known, so '
        f'{self._part.above or "config.json"} is copied; these look stale: '
        f'{", ".join(stale)}. State them with --config KEY=VALUE.'
      )


@dataclasses.dataclass(frozen=True)
class _Layers:
  """Which layers there were, and are.

  Attributes:
    key: the key of their number.
    old: how many there were.
    new: how many there are.
    sources: the old number of each; None if that is not known.
  """

  key: str
  old: int
  new: int
  sources: Sequence[int] | None

  def moved(self, items: Sequence[Any]) -> list[Any] | None:
    """Returns the items of the layers that there are; None if not known."""
    if self.sources is not None:
      return [items[k] for k in self.sources]
    if items and all(item == items[0] for item in items):
      return [items[0]] * self.new
    return None


def _listed(sizes: Iterable[int]) -> str:
  return ' and '.join(map(str, sorted(sizes))) or 'none'


def _common_dtype(tensors: Tensors) -> str | None:
  """Returns the floating dtype that most numbers have."""
  counts: collections.Counter[str] = collections.Counter()
  for leaf in tensors.values():
    if leaf.dtype is not None and 'float' in leaf.dtype and leaf.codes is None:
      counts[leaf.dtype] += leaf.size
  return max(counts, key=lambda name: counts[name], default=None)


# What looks stale where nothing is known.

_OF_LAYERS = re.compile(r'layer|depth|block')
_OF_AXES = re.compile(r'vocab|hidden|embd|embed|dim|d_model|d_ff|inner|size')


@dataclasses.dataclass(frozen=True)
class _Facts:
  """Numbers that tensors have.

  Attributes:
    layers: how many layers are numbered beneath some place.
    axes: lengths of axes.
  """

  layers: frozenset[int]
  axes: frozenset[int]


def _facts(tensors: Tensors) -> _Facts:
  numbered: dict[Path, set[str]] = {}
  axes: set[int] = set()
  for path, leaf in tensors.items():
    axes.update(leaf.shape or ())
    for at, name in enumerate(path):
      if name.isdigit():
        numbered.setdefault(path[:at], set()).add(name)
  return _Facts(frozenset(map(len, numbered.values())), frozenset(axes))


def _numbers(config: Mapping[str, Any], above: str = '') -> Iterator[Any]:
  """Yields whole numbers of a configuration, with their keys."""
  for key, value in config.items():
    if isinstance(value, dict):
      yield from _numbers(value, f'{above}{key}.')
    elif type(value) is int and value > 1:
      yield f'{above}{key}', value


def _looks_stale(key: str, value: int, was: _Facts, now: _Facts) -> bool:
  """Whether a number was one of the tensors', and is none any more."""
  if _OF_LAYERS.search(key):
    return value in was.layers and value not in now.layers
  if _OF_AXES.search(key):
    return value in was.axes and value not in now.axes
  return False


def tokens(config: Mapping[str, Any], size: int) -> Iterator[tuple[str, Any]]:
  """Yields statements of tokens that a vocabulary of some size has not."""
  for name, value in config.items():
    values = value if isinstance(value, list) else [value]
    numbers = [v for v in values if type(v) is int]
    if _TOKEN.search(name) and any(v >= size for v in numbers):
      yield name, value


def renumbered(
  config: Mapping[str, Any], numbers: Mapping[int, int]
) -> tuple[dict[str, Any], list[str]]:
  """Returns a configuration that names the same tokens by new numbers.

  Args:
    config: the configuration; keys `…_token_id` name tokens.
    numbers: new numbers by old ones.

  Returns:
    The configuration, and for each token that there is not any more the
    beginning of a sentence about it.
  """
  found, lost = dict(config), []
  for name, value in config.items():
    if not name.endswith('_token_id'):
      continue
    many = isinstance(value, list)
    old = [n for n in (value if many else [value]) if type(n) is int]
    for number in old:
      if number not in numbers:
        lost.append(
          f'the token {number} of {name} is not in the new vocabulary; state '
          f'another one for {name}'
        )
    if many:
      found[name] = [numbers.get(n, n) for n in value]
    elif old:
      found[name] = numbers.get(value, value)
  return found, lost


def value_of(text: str) -> Any:
  """Returns what `KEY=VALUE` states: JSON, or text where it is none."""
  try:
    return json.loads(text)
  except ValueError:
    return text


def shown(value: Any) -> str:
  """Returns a value as a plan shows it."""
  text = json.dumps(value, ensure_ascii=False, default=str)
  return text if len(text) <= 60 else f'{text[:59]}…'
