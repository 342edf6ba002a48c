"""Combine: several models become one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from surgery import errors
from surgery.contract.method import Method, is_measured
from surgery.editing import following, regions, rounding, tensors
from surgery.editing.nonfinite import NonFinite
from surgery.editing.regions import Reader, Region
from surgery.host.manager import Host
from surgery.methods import parameters, streaming
from surgery.model import quantised
from surgery.model.checkpoint import Check, Checkpoint, Leaf
from surgery.model.vocabulary import Vocabulary
from surgery.naming import paths
from surgery.naming.paths import Path
from surgery.passes import arithmetic, described, twins
from surgery.passes import tokens as tokens_
from surgery.passes.reshape import transposed

_SHOWN = 5


def combine(
  checkpoint: Checkpoint,
  with_: str | Sequence[str] | Sequence[Checkpoint] = (),
  *,
  method: str = 'linear',
  base: Checkpoint | None = None,
  set: Mapping[str, Any] | None = None,
  only: Literal['all', 'common'] = 'all',
  seed: int = 0,
  nonfinite: NonFinite = 'refuse',
  tokens: str | int | None = None,
  missing_rows: tokens_.Missing = 'other',
  tokenizers: Sequence[str] | Mapping[str, str] = (),
  vocab: Mapping[str, int] | None = None,
  check_tokenizers: bool = True,
  inputs: tensors.Inputs | None = None,
  host: Host,
) -> Checkpoint:
  """Makes one model of several that have the same tensors: merges them.

  Floating-point tensors are combined by the method, in float64 and rounded
  once; all others have to be equal. What else the model has (flags, metadata,
  the file's own) is that of the first.

  Args:
    checkpoint: the first model.
    with_: names of the inputs that are the other models, in their order.
    method: the method: linear, mean, slerp, task_arithmetic, ties, …
    base: the input from which all models were trained, for methods on what
      they differ in.
    set: options of the method, e.g. `{weight: [0.7, 0.3], density: 0.5}`; each
      a value, one a model, a list over the depth, or values by selector.
    only: `common` leaves out tensors that not all models have, which are an
      error otherwise.
    seed: seed of what is drawn at random, with the path of the tensor.
    nonfinite: `allow` combines NaN and infinity, which are an error otherwise.
    tokens: whose tokens the result has, where rows of embeddings and heads are
      to follow tokens: `union`, `base`, or one of the models, by its alias or
      its place (from 0); `ids` combines rows of one number, whatever they are.
    missing_rows: what a row holds that a model lacks: that of the `other`
      models (of the base, or the mean of those that have it), the `mean` of its
      rows, `zero`, or the mean of the rows of its `parts`.
    tokenizers: a tokenizer.json for each model, the base's at last, or by
      alias; by default those beside the models.
    vocab: axes of tokens by selector, where names do not tell them:
      `{'**/embedding': 0, '**/head/kernel': -1}`.
    check_tokenizers: whether tokenizers have to cut text alike.
    inputs: other checkpoints by alias.
    host: whose methods there are.

  Raises:
    ConfigError: for an unknown method or option.
    FormatError: for a tokenizer that cannot be read.
    SurgeryError: if models do not have the same tensors, naming both sides; or
      tokenizers at hand number tokens differently, and tokens is not given.
    AdapterError: if one of them has an adapter.
    CheckError: when it is written, if tensors of integers differ.
    CastError: when it is written, for NaN and infinity.

  Example:
    combine: {with: [b, c], base: base, method: ties, set: {density: 0.5}}
  """
  cls, owner = found(method, host)
  models = _models(checkpoint, with_, inputs)
  bases = []
  if base is not None:
    of = _aliases(base, inputs)
    bases = [tokens_.Model(_called('the base', base), base, of)]
  check_count(cls, len(models), base is not None)
  every = [*models, *bases]
  for one in every:
    _check_model(one, host)
  wish = tokens_.Wish(tokens, missing_rows, tokenizers, vocab, check_tokenizers)
  every, vocabulary, remarks = _matched(every, bool(bases), wish, host)
  first = every[0].leaves
  common = _common(every, only)
  template = first.replace(leaves={p: first[p] for p in common})
  remarks += described.differing([(m.name, m.leaves.origin) for m in every])
  options = parameters.Parameters(cls, set or {}, len(models), template, host)
  changed, checks = {}, []
  for path in common:
    leaves = [one.leaves[path] for one in every]
    _check_alike(path, every, leaves)
    dtype = leaves[0].dtype or ''
    if rounding.is_float(dtype) and not leaves[0].size:
      continue
    if rounding.is_float(dtype):
      changed[path] = _combined(
        path, every, base is not None, options.at(path), seed, nonfinite, owner
      )
      remarks += _apart(path, template, options)
    else:
      checks += _equal(path, every, leaves)
  if not changed:
    raise errors.SurgeryError(
      'the models have no floating-point tensor in common.'
    )
  gone = [path for path in first if path not in template]
  result = tensors.edited(
    first, 'combine', changed=changed, gone=gone, host=host
  )
  return result.replace(
    checks=(*result.checks, *checks),
    remarks=(*result.remarks, *remarks),
    vocabulary=vocabulary,
  )


def _apart(
  path: Path, leaves: Checkpoint, options: parameters.Parameters
) -> list[str]:
  """Says of a head that may be a copy that it would be none any more."""
  twin, _ = twins.twin(path, leaves)
  if twin == path or options.at(path) == options.at(twin):
    return []
  return [
    f'{paths.show(path)} has other options than {paths.show(twin)}; if it is a '
    'copy of it, it will be none any more'
  ]


def _matched(
  every: Sequence[tokens_.Model], based: bool, wish: tokens_.Wish, host: Host
) -> tuple[list[tokens_.Model], Vocabulary | None, list[str]]:
  """Returns models whose rows stand for the same tokens; see `tokens`."""
  leaves, vocabulary, remarks = tokens_.matched(every, based, wish, host)
  models = [
    dataclasses.replace(one, leaves=after)
    for one, after in zip(every, leaves, strict=True)
  ]
  return models, vocabulary, remarks


def found(method: str, host: Host) -> tuple[type[Method], str]:
  """Returns a method, and whose it is, for messages.

  Raises:
    ConfigError: if nobody offers it.
  """
  known = host.methods
  if method not in known:
    raise errors.ConfigError(
      f'no method is called {method!r}.{errors.suggest(method, known)}'
    )
  owner = host.offered_by('surgery_methods', method)
  return known[method], f' of {owner}' if owner else ''


def check_count(cls: type[Method], count: int, based: bool) -> None:
  """Raises unless a method takes so many models, and a base.

  Raises:
    ConfigError: saying what it takes.
  """
  if cls.base == 'required' and not based:
    raise errors.ConfigError(
      f"method '{cls.name}' works on what models differ in from their base, "
      'and none is given. Give base (--base FILE).'
    )
  if cls.base == 'none' and based:
    raise errors.ConfigError(
      f"method '{cls.name}' takes no base. Leave it out, or give it as one of "
      'the models.'
    )
  if count < cls.least or (cls.most is not None and count > cls.most):
    beside = ' beside the base' if based else ''
    if cls.most is None:
      wanted = f'{cls.least} or more models'
    elif cls.most == cls.least:
      wanted = 'one model' if cls.most == 1 else f'{cls.most} models'
    else:
      wanted = f'{cls.least} to {cls.most} models'
    raise errors.ConfigError(
      f"method '{cls.name}': expected {wanted}{beside}, found {count}."
    )


def _called(name: str, checkpoint: Checkpoint) -> str:
  """Returns what messages call a model: its file, if it has one."""
  return checkpoint.origin or name


def _aliases(one: Checkpoint, inputs: tensors.Inputs | None) -> tuple[str, ...]:
  """Returns the names by which a recipe knows a model."""
  return tuple(a for a, other in (inputs or {}).items() if other is one)


def _models(
  checkpoint: Checkpoint,
  others: str | Sequence[str] | Sequence[Checkpoint],
  inputs: tensors.Inputs | None,
) -> list[tokens_.Model]:
  """Returns all models, the checkpoint first."""
  name, of = (
    _called('the first model', checkpoint),
    _aliases(checkpoint, inputs),
  )
  found = [tokens_.Model(name, checkpoint, of)]
  given: Sequence[str | Checkpoint]
  given = [others] if isinstance(others, str) else list(others)
  for number, one in enumerate(given):
    if isinstance(one, Checkpoint):
      found.append(tokens_.Model(_called(f'model {number + 2}', one), one))
    else:
      leaves = tensors.aliased(checkpoint, one, inputs)
      found.append(tokens_.Model(_called(repr(one), leaves), leaves, (one,)))
  return found


def _check_model(model: tokens_.Model, host: Host) -> None:
  """Raises unless it is a whole model without adapters and quantised weights.

  Raises:
    AdapterError: naming the adapters.
    QuantisedError: naming the weight.
  """
  with errors.within(model.name):
    following.check_model(model.leaves)
    adapters = [a.name for a in model.leaves.records(host).adapters]
    # A model with an adapter would be combined without it, and nothing would
    # show that.
    if adapters:
      raise errors.AdapterError(
        f'it has the adapter {adapters[0]!r}, but only models without adapters '
        'are combined. Merge it into its base first (surgery merge), or detach '
        'it.'
      )
    for leaf in model.leaves.values():
      quantised.refuse(leaf)


def _common(models: Sequence[tokens_.Model], only: str) -> list[Path]:
  """Returns the tensors that all models have, in the order of the first.

  Raises:
    SurgeryError: for one that only some have, naming both sides.
  """
  first = models[0].leaves
  union = dict.fromkeys(path for one in models for path in one.leaves)
  lacking = [
    path for path in union if not all(path in one.leaves for one in models)
  ]
  if not lacking:
    return list(first)
  # Some files leave out a head that is tied to the embedding: that is another
  # error, which says what to do.
  for path in lacking:
    _check_tied(path, models)
  if only == 'common':
    gone = set(lacking)
    return [path for path in first if path not in gone]
  lines = []
  for path in lacking[:_SHOWN]:
    has = next(one for one in models if path in one.leaves)
    lacks = next(one for one in models if path not in one.leaves)
    lines.append(
      f'{paths.show(path)}: {has.name} has it, {lacks.name} lacks it'
    )
  more = len(lacking) - _SHOWN
  shown = '; '.join(lines) + (f'; and {more} more' if more > 0 else '')
  raise errors.SurgeryError(
    f'{shown}. Rename or drop these tensors first, or give only: common to '
    'leave out what not all models have.'
  )


def _check_tied(path: Path, models: Sequence[tokens_.Model]) -> None:
  """Raises for a head that some models have and others tie to the embedding.

  Combined without it, the one would get the embedding of both as its head;
  left out, the other would lose its own.

  Raises:
    SurgeryError: naming both.
  """
  has = next(one for one in models if path in one.leaves)
  lacks = next(one for one in models if path not in one.leaves)
  shape = has.leaves[path].shape or ()
  if len(shape) != 2:
    return
  for other, leaf in lacks.leaves.items():
    embeds = other in has.leaves and twins.named(other, twins.EMBEDDING)
    if not embeds or leaf.shape not in (shape, shape[::-1]):
      continue
    turned = '' if leaf.shape == shape else ', transpose: true'
    rule = f"'{paths.show(other)} -> {paths.show(path)}'"
    raise errors.SurgeryError(
      f'{paths.show(path)}: {has.name} has it, and {lacks.name} lacks it. '
      f'{paths.show(other)} has the same shape, so the one has a head of its '
      'own and the other ties it to the embedding. Give the other one first '
      f'(untie: {{rules: {rule}{turned}}}), or rename the tensor if it is no '
      'head.'
    )


def _check_alike(
  path: Path, models: Sequence[tokens_.Model], leaves: Sequence[Leaf]
) -> None:
  """Raises unless a tensor is of one shape and dtype in all models.

  Raises:
    SurgeryError: naming both sides.
  """
  first = leaves[0]
  for model, leaf in zip(models[1:], leaves[1:], strict=True):
    if (leaf.shape, leaf.dtype, leaf.key) != (
      first.shape, first.dtype, first.key,
    ):  # fmt: skip
      same = leaf.shape == first.shape
      cure = 'Cast one of them first' if same else 'Change one of them first'
      raise errors.SurgeryError(
        f'{paths.show(path)} is {first} in {models[0].name} and {leaf} in '
        f'{model.name}; they have to be alike. {cure}.'
      )
  if str(first.dtype).startswith('complex'):
    raise errors.SurgeryError(
      f'{paths.show(path)} is {first.dtype}; methods combine models of '
      'real numbers. Drop it first, or use add and scale.'
    )


def _equal(
  path: Path, models: Sequence[tokens_.Model], leaves: Sequence[Leaf]
) -> list[Check]:
  """Returns what has to hold of a tensor that cannot be combined."""
  checks = []
  first = leaves[0]
  for model, leaf in zip(models[1:], leaves[1:], strict=True):
    if leaf.load is first.load:
      continue
    text = (
      f'{paths.show(path)} is the same in {models[0].name} and {model.name}'
    )
    checks.append(Check(text, _Same(path, models[0].name, first, model, leaf)))
  return checks


@dataclasses.dataclass(frozen=True)
class _Same:
  """Sees to it that a tensor of integers is the same in two models."""

  path: Path
  name: str
  leaf: Leaf
  model: tokens_.Model
  other: Leaf

  def __call__(self) -> None:
    if not self._is_equal():
      raise errors.CheckError(
        f'combine: {paths.show(self.path)} ({self.leaf}) differs between '
        f'{self.name} and {self.model.name}, and only floating-point tensors '
        'can be combined. Copy it from one to the others first, or drop it.'
      )

  def _is_equal(self) -> bool:
    if self.leaf.shape is not None:
      return regions.same_bytes(self.leaf, self.other)
    a, b = self.leaf.load(), self.other.load()
    return type(a) is type(b) and bool(a == b)


def _combined(
  path: Path,
  models: Sequence[tokens_.Model],
  based: bool,
  method: Method,
  seed: int,
  nonfinite: NonFinite,
  owner: str,
) -> Leaf:
  """Returns what a method makes of a tensor."""
  leaves = [one.leaves[path] for one in models]
  twin, turned = twins.twin(path, models[0].leaves)
  turned = turned and not method.pointwise
  if turned:
    leaves = [transposed(leaf, [1, 0]) for leaf in leaves]
  leaf = leaves[0]
  assert leaf.shape is not None and leaf.dtype is not None
  shape = leaf.shape
  sources = [
    streaming.Source(model.name, _flat(one, path), leaf.dtype == 'float64')
    for model, one in zip(models, leaves, strict=True)
  ]
  tensor = streaming.Tensor(
    path,
    shape,
    sources[:-1] if based else sources,
    sources[-1] if based else None,
    rows=method.rows,
    uniform=streaming.Uniform(seed, twin),
    finite=nonfinite == 'refuse',
  )
  made = streaming.Combined(method, tensor, leaf.dtype, nonfinite, owner)

  def block(region: Region) -> Any:
    start = regions.start_of(region, shape)
    count = regions.sizes(region)
    return made.span(start, start + int(np.prod(count))).reshape(count)

  # Blocks of the grid lie in C order; any other region is put together of them.
  result = regions.computed(leaf, shape, block, leaves, anywhere=False)
  result = result.with_fields(heavy=is_measured(method))
  return transposed(result, [1, 0]) if turned else result


def _flat(leaf: Leaf, path: Path) -> streaming.Flat:
  """Returns a function that reads elements of a tensor, in C order."""
  if leaf.part is not None:
    reader = Reader(leaf)
    return lambda start, stop: arithmetic.plain(
      reader.flat(start, stop), path, 'combine'
    )
  held: list[np.ndarray] = []

  def flat(start: int, stop: int) -> np.ndarray:
    if not held:
      held.append(arithmetic.plain(leaf.load(), path, 'combine').reshape(-1))
    found = held[0][start:stop]
    if stop == leaf.size:
      held.clear()
    return found

  return flat
