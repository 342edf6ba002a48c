"""Rows that follow tokens: models of different vocabularies become alike.

Row 5 of an embedding is the token that a tokenizer numbers 5. Where tokenizers
differ, models can be combined only after the rows of each have the order of one
vocabulary; then everything else is done as if they had always had it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from surgery import errors
from surgery.editing import regions, rounding, tensors
from surgery.editing.regions import Reader, Region
from surgery.files import tokenizers
from surgery.files.tokenizers import Tokenizer
from surgery.host.manager import Host
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.vocabulary import Vocabulary
from surgery.naming import paths
from surgery.naming.paths import Path
from surgery.passes import arithmetic, rows

Missing = Literal['other', 'mean', 'zero', 'parts']
Tokenizers = Sequence[str | os.PathLike[str]] | Mapping[str, str]

_UNION, _BASE, _IDS = 'union', 'base', 'ids'
# Names of tensors that have a row for each token; of those that only look so.
_EMBEDS = re.compile(r'embed|wte|tok|shared')
_HEADS = re.compile(r'head|output|decoder|logits|predictions|unembed')
_OTHER = re.compile(r'pos|wpe|type|rotary|patch|vision|image|audio')


@dataclasses.dataclass(frozen=True)
class Wish:
  """What a user says of tokens.

  Attributes:
    tokens: whose tokens the result has; None to see to it that rows of one
      number are of one token, as far as tokenizers are at hand.
    missing: what a row holds that a model lacks.
    tokenizers: files of the models, in their order or by alias.
    vocab: axes of tokens by selector.
    check: whether tokenizers have to cut text alike.
  """

  tokens: str | int | None = None
  missing: Missing = 'other'
  tokenizers: Tokenizers = ()
  vocab: Mapping[str, int] | None = None
  check: bool = True


@dataclasses.dataclass(frozen=True)
class Model:
  """A model that is combined.

  Attributes:
    name: what messages call it.
    leaves: the model.
    aliases: names by which a recipe knows it.
  """

  name: str
  leaves: Checkpoint
  aliases: tuple[str, ...] = ()


def matched(
  models: Sequence[Model], based: bool, wish: Wish, host: Host
) -> tuple[list[Checkpoint], Vocabulary | None, list[str]]:
  """Returns models whose rows stand for the same tokens.

  Args:
    models: the models; the base at last, if there is one.
    based: whether there is one.
    wish: what the user says.
    host: knows selectors.

  Returns:
    The models; the vocabulary, if rows moved; and sentences for the plan.

  Raises:
    ConfigError: for options that do not fit.
    FormatError: for a tokenizer that cannot be read.
    SurgeryError: if tokenizers do not go together, or it is not known which
      tensors have a row for each token.
  """
  every = [one.leaves for one in models]
  if wish.tokens is None:
    _check_unused(wish)
    _check_numbers(models)
    return every, None, []
  if wish.tokens == _IDS:
    return every, None, []
  if wish.missing not in ('other', 'mean', 'zero', 'parts'):
    raise errors.ConfigError(
      'missing-rows: expected other, mean, zero or parts, found '
      f'{wish.missing!r}.'
    )
  known = _read(models, wish.tokenizers)
  target = _target(models, based, wish.tokens)
  if wish.check:
    _check_alike(known)
  joined = tokenizers.union(known) if target is None else known[target]
  axes = _axes(models, known, wish.vocab, host)
  sizes = [_size(one, axes) for one in models]
  count = joined.size if target is None else sizes[target]
  if count > sum(sizes) + len(joined.ids):
    # A damaged number would ask for more rows than there is memory.
    far = max(known, key=lambda one: one.size)
    raise errors.SurgeryError(
      f'{far.path}: the token {far.tokens[far.size - 1]!r} has the number '
      f'{far.size - 1}, and the models have {sum(sizes)} rows together. Give '
      'it a smaller number.'
    )
  plans = _plans(models, known, joined, sizes, count, target, based, wish)
  after = []
  for number, one in enumerate(models):
    changed = {
      path: _Rows(path, axis, models, number, plans).leaf()
      for path, axis in axes.items()
      if not plans[number].unchanged
    }
    after.append(
      tensors.edited(one.leaves, 'combine', changed=changed, host=host)
      if changed
      else one.leaves
    )
  remarks = [text for plan in plans for text in plan.remarks()]
  return after, _vocabulary(known, joined, target), remarks


def _check_unused(wish: Wish) -> None:
  """Raises for options that mean nothing without `tokens`.

  Raises:
    ConfigError: naming one.
  """
  given = {
    'missing-rows': wish.missing != 'other',
    'tokenizers': bool(wish.tokenizers),
    'vocab': wish.vocab is not None,
  }
  for name in (name for name, said in given.items() if said):
    raise errors.ConfigError(
      f'{name}: it is for rows that follow tokens. Say whose tokens the result '
      'has: tokens: union, base, or one of the models.'
    )


def _check_numbers(models: Sequence[Model]) -> None:
  """Raises if tokenizers are at hand that number tokens differently.

  Raises:
    SurgeryError: naming both, and a number.
  """
  files = [tokenizers.found(one.leaves.origin) for one in models]
  first = files[0]
  if first is None:
    return
  ours = first.read_bytes()
  a: Tokenizer | None = None
  for file, model in zip(files[1:], models[1:], strict=True):
    if file is None or file == first or file.read_bytes() == ours:
      continue
    try:
      a = a or tokenizers.read(first)
      b = tokenizers.read(file)
    except errors.FormatError:
      continue  # Nobody asked for it; it may be another program's.
    clash = tokenizers.conflict(a, b)
    if clash is not None:
      number, one, other = clash
      raise errors.SurgeryError(
        f'token {number} is {one!r} in {first} and {other!r} in {file}, so row '
        f'{number} of {models[0].name} and of {model.name} are of different '
        'tokens. Give tokens: union, base or one of the models, for rows that '
        'follow tokens; or tokens: ids to combine rows of one number.'
      )


def _read(models: Sequence[Model], given: Tokenizers) -> list[Tokenizer]:
  """Returns the tokenizer of each model.

  Raises:
    ConfigError: if there are too many, or for an unknown model.
    SurgeryError: if a model has none.
  """
  files: list[Any] = [None] * len(models)
  if isinstance(given, Mapping):
    for alias, file in given.items():
      files[_index(models, alias, 'tokenizers')] = file
  elif isinstance(given, (str, os.PathLike)) or len(given) > len(models):
    raise errors.ConfigError(
      f'tokenizers: expected a list of {len(models)} files, one for each model '
      f'and the base at last, found {given!r}.'
    )
  else:
    files[: len(given)] = given
  found: list[Tokenizer] = []
  for one, file in zip(models, files, strict=True):
    path = file if file is not None else tokenizers.found(one.leaves.origin)
    if path is None:
      raise errors.SurgeryError(
        f'{one.name}: its tokenizer is not known. {_lacking(one.leaves.origin)}'
      )
    same = next((t for t in found if t.path == pathlib.Path(path)), None)
    found.append(same or tokenizers.read(path))
  return found


def _lacking(origin: str) -> str:
  """Returns what there is beside a model instead of a tokenizer.json."""
  cure = (
    'Give tokenizers (--tokenizer): a tokenizer.json for each model, in their '
    'order, the base at last.'
  )
  try:
    tokenizers.read(pathlib.Path(origin or '.').parent)
  except errors.FormatError as error:
    return f'{error} Or g{cure[1:]}' if origin else cure
  return cure


def _target(
  models: Sequence[Model], based: bool, tokens: str | int
) -> int | None:
  """Returns which model's tokens the result has; None for those of all.

  Raises:
    ConfigError: for an unknown model.
  """
  if tokens == _UNION:
    return None
  if tokens == _BASE:
    if not based:
      raise errors.ConfigError(
        'tokens: base: there is no base. Give union, or one of the models.'
      )
    return len(models) - 1
  return _index(models, tokens, 'tokens')


def _index(models: Sequence[Model], name: Any, option: str) -> int:
  """Returns the place of a model.

  Raises:
    ConfigError: if there is none.
  """
  if type(name) is int and 0 <= name < len(models):
    return name
  for number, one in enumerate(models):
    if name in one.aliases:
      return number
  known = [alias for one in models for alias in one.aliases]
  said = ', '.join((*(['union', 'base', 'ids'] if option == 'tokens' else []),
                    *known))  # fmt: skip
  raise errors.ConfigError(
    f'{option}: expected {said or "a model"}{", or" if said else ""} the place '
    f'of a model, from 0 to {len(models) - 1}; found {name!r}.'
  )


def _check_alike(known: Sequence[Tokenizer]) -> None:
  """Raises if what a token is in one tokenizer is not what it is in another.

  Raises:
    SurgeryError: saying in what they differ.
  """
  first = known[0]
  for other in known[1:]:
    if differ := tokenizers.differing(first, other):
      raise errors.SurgeryError(
        f'{first.path} and {other.path} differ in {", ".join(differ)}, so that '
        'the same text may be written as different tokens, and different text '
        'as the same. Give check-tokenizers: false to match tokens by what is '
        'written all the same.'
      )


# Which tensors have a row for each token.


def _axes(
  models: Sequence[Model],
  known: Sequence[Tokenizer],
  given: Mapping[str, int] | None,
  host: Host,
) -> dict[Path, int]:
  """Returns the axis of tokens of each tensor that has one.

  Raises:
    SurgeryError: if it is not known.
  """
  first = models[0].leaves
  both = {
    path: [one.leaves[path] for one in models]
    for path in first
    if all(path in one.leaves for one in models)
  }
  if given is not None:
    return _given_axes(first, both, given, host)
  lengths = _lengths(both, known)
  found: dict[Path, int] = {}
  for path, leaves in both.items():
    shapes = [leaf.shape or () for leaf in leaves]
    axes = [
      axis
      for axis in range(min(map(len, shapes)))
      if tuple(shape[axis] for shape in shapes) == lengths
    ]
    if not axes or not rounding.is_float(leaves[0].dtype or ''):
      continue
    named = bool(_looks(_HEADS, path) or _looks(_EMBEDS, path))
    if len(axes) > 1 or not (named or len(set(lengths)) > 1):
      raise errors.SurgeryError(
        f'{paths.show(path)} is {leaves[0]}, and it is not certain whether one '
        f'of its axes has a place for each of {lengths[0]} tokens. Say which '
        "tensors have: vocab: {'**/embedding': 0, '**/head/kernel': -1}."
      )
    found[path] = axes[0]
  return found


def _given_axes(
  first: Checkpoint,
  both: Mapping[Path, Sequence[Leaf]],
  given: Mapping[str, int],
  host: Host,
) -> dict[Path, int]:
  found: dict[Path, int] = {}
  for selector, axis in given.items():
    for path in tensors.chosen(first, selector, 'vocab', host):
      if path not in both or path in found:
        continue
      for leaf in both[path]:
        arithmetic.check_number(leaf, path, 'vocab')
      found[path] = regions.axis_of(axis, both[path][0].shape or (), path)
  if not found:
    raise errors.SurgeryError(
      'vocab: no tensor that all models have is selected.'
    )
  return found


def _looks(words: re.Pattern[str], path: Path) -> bool:
  name = paths.show(path).lower()
  return bool(words.search(name)) and not _OTHER.search(name)


def _lengths(
  both: Mapping[Path, Sequence[Leaf]], known: Sequence[Tokenizer]
) -> tuple[int, ...]:
  """Returns how many rows the embedding of each model has.

  Raises:
    SurgeryError: if it is not known which it is.
  """
  found: dict[tuple[int, ...], Path] = {}
  # Tokens that were added may lack their rows.
  needed = [one.size - len(one.added) for one in known]
  for path, leaves in both.items():
    if not _looks(_EMBEDS, path) or 'head' in paths.show(path).lower():
      continue
    if any(len(leaf.shape or ()) != 2 for leaf in leaves):
      continue
    lengths = tuple((leaf.shape or (0,))[0] for leaf in leaves)
    if all(n >= least for n, least in zip(lengths, needed, strict=True)):
      found.setdefault(lengths, path)
  if len(found) == 1:
    return next(iter(found))
  said = (
    f'{" and ".join(map(paths.show, found.values()))} may both be'
    if found
    else 'no tensor looks like'
  )
  raise errors.SurgeryError(
    f'{said} the embedding of tokens. Say which tensors have a place for each '
    "token, and on which axis: vocab: {'**/embedding': 0, "
    "'**/head/kernel': -1}."
  )


def _size(model: Model, axes: Mapping[Path, int]) -> int:
  """Returns how many rows a model has.

  Raises:
    SurgeryError: if its tensors have different numbers of them.
  """
  sizes = {
    path: (model.leaves[path].shape or ())[axis] for path, axis in axes.items()
  }
  if len(set(sizes.values())) > 1:
    shown = ', '.join(f'{paths.show(p)} {n}' for p, n in sizes.items())
    raise errors.SurgeryError(
      f'{model.name}: its tensors have rows for different numbers of tokens: '
      f'{shown}. Give them the same with resize-vocab first.'
    )
  return next(iter(sizes.values()))


# Which row is which.


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Where the rows of a model come from.

  Attributes:
    model: what messages call it.
    tokens: token of each new row, '' where it is none's.
    donor: the model of which a new row is a copy, -1 where it is none.
    row: which row of that.
    mixed: which rows are the mean of those of several models.
    parts: rows of its own tokens of which a new row is the mean.
    means: which rows hold the mean of all of its own.
    zeros: which rows are zero.
    own: rows of its own tokens.
    where: for each model the row of each new row's token, -1 without.
    dropped: how many of its tokens are left out.
    unchanged: whether all rows stay where they are.
    missing: how many rows are filled.
    how: what they are filled with.
  """

  model: str
  tokens: Sequence[str]
  donor: np.ndarray
  row: np.ndarray
  mixed: np.ndarray
  parts: Mapping[int, Sequence[int]]
  means: np.ndarray
  zeros: np.ndarray
  own: np.ndarray
  where: Sequence[np.ndarray]
  sharing: Sequence[int]
  dropped: int
  unchanged: bool
  missing: int
  how: str

  def remarks(self) -> Iterator[str]:
    """Yields what a plan says of it."""
    if self.missing:
      yield (
        f'{self.model} has no row for {self.missing} of {len(self.donor)} '
        f'tokens; they are filled with {self.how}'
      )
    if self.dropped:
      yield f'{self.dropped} tokens of {self.model} are left out'


_HOW = {
  'other': 'the rows of models that have them',
  'mean': 'the mean of its rows',
  'zero': 'zeros',
  'parts': 'the mean of the rows of their parts',
}


def _plans(
  models: Sequence[Model],
  known: Sequence[Tokenizer],
  joined: Tokenizer,
  sizes: Sequence[int],
  count: int,
  target: int | None,
  based: bool,
  wish: Wish,
) -> list[_Plan]:
  """Returns for each model where its rows come from.

  Raises:
    SurgeryError: if a model has no token of the vocabulary.
  """
  tokens = [joined.tokens.get(k, '') for k in range(count)]
  where = [
    _where(tokens, one, size) for one, size in zip(known, sizes, strict=True)
  ]
  # Rows without a token are those of the model whose vocabulary it is.
  keeper = target or 0
  empty = np.array([k not in joined.tokens for k in range(count)], bool)
  places = np.arange(count)
  for found in where:
    found[empty] = -1
  where[keeper][empty & (places < sizes[keeper])] = places[
    empty & (places < sizes[keeper])
  ]
  return [
    _plan(k, models, known, tokens, sizes, where, empty, based, wish)
    for k in range(len(models))
  ]


def _where(
  tokens: Sequence[str], tokenizer: Tokenizer, size: int
) -> np.ndarray:
  """Returns the row of each token in a model, -1 where it has none."""
  get = tokenizer.ids.get
  found = np.fromiter((get(t, -1) for t in tokens), np.int64, len(tokens))
  found[found >= size] = -1
  return found


def _plan(
  number: int,
  models: Sequence[Model],
  known: Sequence[Tokenizer],
  tokens: Sequence[str],
  sizes: Sequence[int],
  where: Sequence[np.ndarray],
  empty: np.ndarray,
  based: bool,
  wish: Wish,
) -> _Plan:
  name, own = models[number].name, known[number]
  count = len(tokens)
  row = where[number].copy()
  donor = np.where(row >= 0, number, -1)
  if not (row[~empty] >= 0).any():
    raise errors.SurgeryError(
      f'{name} has none of the tokens of the result, so nothing of its rows '
      'would be left. Is it the right tokenizer?'
    )
  lacking = row < 0
  missing = int(np.count_nonzero(lacking & ~empty))
  sharing = [k for k in range(len(models)) if k != number]
  base = len(models) - 1
  if based and number != base:
    # What all were trained from says best what a token is to them.
    sharing = [base, *(k for k in sharing if k != base)]
  mixed = np.zeros(count, bool)
  # Rows that are no token's are always copies.
  copied = lacking if wish.missing == 'other' else lacking & empty
  _give(copied, donor, row, mixed, where, sharing, based and number != base)
  left = (donor < 0) & ~mixed
  parts: dict[int, list[int]] = {}
  if wish.missing == 'parts':
    for k in np.flatnonzero(left).tolist():
      plain = any(tokens[k] in one.added for one in known)
      cut = [n for n in own.parts(tokens[k], plain) if n < sizes[number]]
      if cut:
        parts[k] = cut
  means = left.copy()
  means[list(parts)] = False
  zeros = np.zeros(count, bool)
  if wish.missing == 'zero':
    means, zeros = zeros, means
  new = set(tokens)
  dropped = sum(t not in new and n < sizes[number] for t, n in own.ids.items())
  rows_ = sorted(n for n in own.ids.values() if n < sizes[number])
  stays = np.array_equal(row, np.arange(count)) and bool(
    (donor == number).all()
  )
  how = _HOW[wish.missing]
  if wish.missing == 'parts' and (whole := int(np.count_nonzero(means))):
    how += f' ({whole} have none here, and are filled with the mean of all)'
  return _Plan(
    name, tokens, donor, row, mixed, parts, means, zeros,
    np.array(rows_, np.int64), where, sharing, dropped,
    stays and count == sizes[number], missing, how,
  )  # fmt: skip


def _give(
  wanted: np.ndarray,
  donor: np.ndarray,
  row: np.ndarray,
  mixed: np.ndarray,
  where: Sequence[np.ndarray],
  sharing: Sequence[int],
  first_decides: bool,
) -> None:
  """Fills rows from models that have them: one's, or the mean of several."""
  having = [wanted & (where[k] >= 0) for k in sharing]
  counts = np.sum(having, axis=0) if having else np.zeros(len(donor), int)
  for place, (k, has) in enumerate(zip(sharing, having, strict=True)):
    alone = has & (counts == 1)
    if first_decides and place == 0:
      alone = has
    alone &= donor < 0
    donor[alone] = k
    row[alone] = where[k][alone]
  mixed[:] = wanted & (donor < 0) & (counts > 1)


# The tensors.


@dataclasses.dataclass(frozen=True)
class _Rows:
  """A tensor of a model whose rows are brought into another order.

  Attributes:
    path: its path.
    axis: the axis of tokens.
    models: all models.
    number: which of them it is of.
    plans: where rows come from, for each model.
  """

  path: Path
  axis: int
  models: Sequence[Model]
  number: int
  plans: Sequence[_Plan]

  @property
  def _plan(self) -> _Plan:
    return self.plans[self.number]

  @functools.cached_property
  def _readers(self) -> list[Reader]:
    return [Reader(one.leaves[self.path]) for one in self.models]

  def leaf(self) -> Leaf:
    """Returns the tensor.

    Raises:
      SurgeryError: if the models' rows are of different shapes or dtypes.
    """
    leaves = [one.leaves[self.path] for one in self.models]
    first = leaves[self.number]
    assert first.shape is not None
    for model, other in zip(self.models, leaves, strict=True):
      if _row(other, self.axis) != _row(first, self.axis):
        raise errors.SurgeryError(
          f'{paths.show(self.path)} is {first} in {self._plan.model} and '
          f'{other} in {model.name}; their rows have to be alike. Change one '
          'of them first.'
        )
    shape = list(first.shape)
    shape[self.axis] = len(self._plan.donor)
    plan = self._plan
    mixed = bool(np.any(np.diff(plan.row) < 0) or np.any(plan.donor < 0))
    return regions.computed(
      first, tuple(shape), self._block, leaves, scattered=mixed
    )

  def _block(self, region: Region) -> Any:
    plan, axis = self._plan, self.axis
    cut = region[axis]
    first = self.models[self.number].leaves[self.path]
    assert first.dtype is not None
    rest = (*region[:axis], *region[axis + 1 :])
    result = np.empty(
      (cut.stop - cut.start, *regions.sizes(rest)),
      regions.dtype_of(first.dtype),
    )
    donor = plan.donor[cut]
    for k in np.unique(donor[donor >= 0]).tolist():
      mask = donor == k
      found = self._take(k, region, plan.row[cut][mask])
      if k != self.number:
        self._check(found, k, plan.row[cut][mask])
      result[mask] = found
    for mask, make in (
      (plan.mixed[cut], self._mixed),
      (plan.means[cut], self._mean),
      (plan.zeros[cut], lambda region, new: 0.0),
    ):
      if mask.any():
        new = np.flatnonzero(mask) + cut.start
        result[mask] = self._narrowed(make(region, new), first.dtype)
    for k in range(cut.start, cut.stop) if plan.parts else ():
      if k in plan.parts:
        places = np.array(plan.parts[k], np.int64)
        value = self._wide(self.number, region, places).mean(axis=0)
        result[k - cut.start] = self._narrowed(value, first.dtype)
    return np.moveaxis(result, 0, axis)

  def _take(self, model: int, region: Region, places: np.ndarray) -> np.ndarray:
    """Returns rows of a model, on the first axis."""
    return rows.taken(
      self._readers[model], self.path, region, self.axis, places
    )

  def _wide(self, model: int, region: Region, places: np.ndarray) -> np.ndarray:
    """Returns rows as float64, in which there is no NaN."""
    found = self._take(model, region, places)
    self._check(found, model, places)
    return found.astype(np.float64)

  def _check(self, found: np.ndarray, model: int, places: np.ndarray) -> None:
    rows.check_finite(found, self.path, places, self.models[model].name)

  def _mixed(self, region: Region, new: np.ndarray) -> np.ndarray:
    """Returns means of the rows that several other models have."""
    plan = self._plan
    total: Any = 0.0
    count = np.zeros(len(new))
    for k in plan.sharing:
      places = plan.where[k][new]
      has = places >= 0
      if not has.any():
        continue
      value = self._wide(k, region, places[has])
      if isinstance(total, float):
        total = np.zeros((len(new), *value.shape[1:]))
      total[has] += value
      count[has] += 1
    result: np.ndarray = total / count.reshape(-1, *[1] * (total.ndim - 1))
    return result

  def _mean(self, region: Region, new: np.ndarray) -> np.ndarray:
    """Returns the mean of the rows of all of the model's own tokens."""
    del new
    rest = (*region[: self.axis], *region[self.axis + 1 :])
    return self._whole_mean[rest]

  @functools.cached_property
  def _whole_mean(self) -> np.ndarray:
    return rows.mean(
      self._readers[self.number],
      self.path,
      self.axis,
      self._plan.own,
      self._plan.model,
    )

  def _narrowed(self, value: Any, dtype: str) -> Any:
    block = np.asarray(value, np.float64)
    return arithmetic.narrowed(block, dtype, self.path, 'combine')


def _row(leaf: Leaf, axis: int) -> tuple[Any, ...]:
  shape = leaf.shape or ()
  return (*shape[:axis], -1, *shape[axis + 1 :]), leaf.dtype, leaf.key


# What goes along.


def _vocabulary(
  known: Sequence[Tokenizer], joined: Tokenizer, target: int | None
) -> Vocabulary:
  """Returns the vocabulary of the result, as files."""
  first = known[0]
  changed = target is None and joined.ids != first.ids
  files: dict[str, Any] = dict(tokenizers.along(known[target or 0], changed))
  if changed:
    files[tokenizers.NAME] = tokenizers.dumped(joined)
  if not target:
    return Vocabulary(files)
  return Vocabulary(
    files,
    {
      number: joined.ids[token]
      for token, number in first.ids.items()
      if token in joined.ids
    },
  )
