"""Warnings of calls of a model in which an adapter's dropout has no effect.

Dropout of an adapter is applied to the input of its factors, which only
`surgery.factored` sees. A model that is called directly gets a parameter
without dropout.
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

# Whether the caller of the model takes care of dropout.
_seen_to = contextvars.ContextVar('seen_to', default=False)


@contextlib.contextmanager
def seen_to() -> Iterator[None]:
  """The scope of calls that need no dropout, or apply it themselves."""
  token = _seen_to.set(True)
  try:
    yield
  finally:
    _seen_to.reset(token)


def dropless(
  chain: Iterable[tuple[AdapterRecord, SiteRecord]],
) -> list[tuple[AdapterRecord, SiteRecord]]:
  """Returns the adapters that have dropout, if this call does not apply it."""
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
  """Warns if adapters train without their dropout.

  They do if their weights are differentiated. This cannot be detected if the
  model is inside of a transformation of its own (`jax.grad` of `jax.jit`, a
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
    f'adapter {name!r} has dropout, which has no effect in this call: the '
    f'model is called by itself {how}. Call surgery.factored(model), which '
    'applies it, or attach with dropout=0. If this is no training, ignore the '
    'warning with warnings.filterwarnings.',
    errors.DropoutWarning,
    stacklevel=2,
  )


def in_training(
  model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
  """Whether a call is in training, by its argument `is_training`.

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
