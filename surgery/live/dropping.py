"""Says so where a model is called in a way in which dropout does nothing.

Dropout of an adapter is done to what goes into its factors, which
`surgery.factored` alone sees. A model that is called by itself gets a parameter
without dropout, and cannot say so.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from surgery import errors, jaxcompat
from surgery.model.records import AdapterRecord, Records, SiteRecord
from surgery.naming.paths import Path

# Whether whoever calls a model has seen to dropout.
_seen_to = contextvars.ContextVar('seen_to', default=False)


@contextlib.contextmanager
def seen_to() -> Iterator[None]:
  """The scope of calls of which dropout is no matter, or is done elsewhere."""
  token = _seen_to.set(True)
  try:
    yield
  finally:
    _seen_to.reset(token)


def dropless(
  chain: Iterable[tuple[AdapterRecord, SiteRecord]],
) -> list[tuple[AdapterRecord, SiteRecord]]:
  """Returns those of some adapters that are to drop something and do not."""
  if _seen_to.get():
    return []
  return [link for link in chain if drops(*link)]


def drops(adapter: AdapterRecord, record: SiteRecord) -> bool:
  """Whether an adapter drops elements at a site in training."""
  return any(name in record.weights for name in adapter.adapter.counters)


def counters(records: Records) -> list[Path]:
  """Returns the weights that count calls in training."""
  return [
    record.weights[name].path
    for adapter in records.adapters
    if adapter.enabled
    for record in adapter.sites.values()
    for name in adapter.adapter.counters
    if name in record.weights
  ]


def warn_of_training(
  links: Iterable[tuple[AdapterRecord, SiteRecord]],
  values: Mapping[Path, Any],
) -> None:
  """Warns if adapters train without the dropout that they have.

  That is so where their weights are differentiated. It is not to be seen if
  the model is behind a transformation of its own (`jax.grad` of `jax.jit`, a
  scan, `jax.checkpoint`), which traces it before anything is differentiated.

  Args:
    links: the adapters and their sites, as `dropless` gives them.
    values: parameters by path.
  """
  for adapter, record in links:
    for spec in record.weights.values():
      if spec.path in values and jaxcompat.is_differentiated(
        values[spec.path].value
      ):
        warn(adapter.name, 'while its weights are differentiated')
        break


def warn(name: str, how: str) -> None:
  """Warns that the dropout of an adapter does nothing.

  Args:
    name: the adapter.
    how: what is done with the model.
  """
  warnings.warn(
    f'adapter {name!r} has dropout, which does nothing in this call: the model '
    f'is called by itself {how}. Call surgery.factored(model), which is the '
    'one to drop elements, or attach with dropout=0. Where this is no training '
    'ignore it, by warnings.filterwarnings.',
    errors.DropoutWarning,
    stacklevel=2,
  )


def in_training(
  model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
  """Whether a call is in training, as far as its `is_training` says so.

  Args:
    model: what is called.
    args: its arguments.
    kwargs: the same.
  """
  try:
    bound = inspect.signature(model).bind(*args, **kwargs)
  except (TypeError, ValueError):
    return True
  bound.apply_defaults()
  return bound.arguments.get('is_training', True) is not False
