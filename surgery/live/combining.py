"""Several models become one: params, or saved models."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from surgery import errors, expect
from surgery.aliases import Params
from surgery.editing.nonfinite import NonFinite
from surgery.host.manager import Host
from surgery.live import adoption, applying, checkpoints
from surgery.live.dispatch import told
from surgery.model.checkpoint import Checkpoint
from surgery.passes import combine as combining

Model = TypeVar('Model', bound='Params | Checkpoint')


def combine(
  models: Sequence[Model],
  *,
  method: str = 'linear',
  base: Params | Checkpoint | str | os.PathLike[str] | None = None,
  only: Literal['all', 'common'] = 'all',
  seed: int = 0,
  nonfinite: NonFinite = 'refuse',
  tokens: str | int | None = None,
  missing_rows: Literal['other', 'mean', 'zero', 'parts'] = 'other',
  tokenizers: Sequence[str | os.PathLike[str]] = (),
  vocab: Mapping[str, int] | None = None,
  check_tokenizers: bool = True,
  host: Host | None = None,
  **options: Any,
) -> Model:
  """Makes one model of several that have the same tensors: merges them.

  Floating-point tensors are combined by the method, in float64 and rounded
  once; all others have to be equal. Flags and metadata are those of the first
  model.

  Args:
    models: params or `Checkpoint`s of all models; not changed. What comes out
      is of the kind of the first; of a `Checkpoint` nothing is read until it is
      written.
    method: name of the method: linear, mean, slerp, ties, …
    base: what all models were trained from, for methods on what they differ in.
    only: `'common'` leaves out tensors that not all models have, which are an
      error otherwise.
    seed: seed of what is drawn at random, with the path of the tensor.
    nonfinite: `'allow'` combines NaN and infinity, an error otherwise.
    tokens: whose tokens the result has, where rows of embeddings and heads are
      to follow tokens: `'union'`, `'base'`, or the place of one of the models;
      `'ids'` combines rows of one number, whatever tokens they are.
    missing_rows: what a row holds that a model lacks: that of the `'other'`
      models (of the base, or the mean of those that have it), the `'mean'` of
      its rows, `'zero'`, or the mean of the rows of its `'parts'`.
    tokenizers: a `tokenizer.json` for each model, the base's at last; by
      default those beside the models' files.
    vocab: axes of tokens by selector, where names do not tell them:
      `{'**/embedding': 0, '**/head/kernel': -1}`.
    check_tokenizers: whether tokenizers have to cut text alike.
    host: whose methods there are.
    **options: options of the method; each a value, one for each model, a list
      over the depth of the model, or values by selector.

  Raises:
    ConfigError: for an unknown method or option.
    FormatError: for a tokenizer that cannot be read.
    SurgeryError: if models do not have the same tensors, naming both sides; or
      tokenizers at hand number tokens differently, and tokens is not given.
    AdapterError: if one of them has an adapter.
    CheckError: if tensors of integers differ.
    CastError: for NaN and infinity.

  Example:
    both = surgery.combine([a, b], method='slerp', t=0.3)
    one = surgery.combine(
      [a, b], base=base, method='ties', weight=[0.7, 0.3], density=0.5
    )
  """
  if isinstance(models, (Params, Checkpoint, str)) or not len(list(models)):
    raise errors.SurgeryError(
      'combine: expected a list of models, surgery.combine([a, b], …), found '
      f'{type(models).__name__}.'
    )
  first, *others = models
  with told(host, 'combine', method=method, **options) as host:
    before = _checkpoint(first, host)
    after = combining.combine(
      before,
      [_checkpoint(one, host) for one in others],
      method=method,
      base=None if base is None else _checkpoint(base, host),
      set=options,
      only=only,
      seed=seed,
      nonfinite=nonfinite,
      tokens=tokens,
      missing_rows=missing_rows,
      tokenizers=[os.fspath(one) for one in tokenizers],
      vocab=vocab,
      check_tokenizers=check_tokenizers,
      host=host,
    )
    if isinstance(first, Checkpoint):
      return after  # type: ignore[return-value]
    after.check()
    params = checkpoints.to_params(after, host, like=first)
    return applying.of_jax(params, first)  # type: ignore[no-any-return]


def _checkpoint(model: Any, host: Host) -> Checkpoint:
  if isinstance(model, Checkpoint):
    return model
  if isinstance(model, (str, os.PathLike)):
    return applying.opened('base', model, host)
  return checkpoints.to_checkpoint(
    adoption.adopted(expect.params(model, combine))
  )
