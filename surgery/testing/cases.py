"""What laws are given: a type, a layer of some kind, and what is expected."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import blox as bx
import jax
import numpy as np

from surgery import errors
from surgery.contract.adapter import Adapter
from surgery.host.manager import Host
from surgery.live import described, dropping
from surgery.naming import paths
from surgery.testing import models


class Broken(AssertionError):  # noqa: N818 - it is what pytest reports.
  """A law that an adapter type breaks.

  Attributes:
    law: its name.
  """

  def __init__(self, message: str, law: str = '') -> None:
    super().__init__(message)
    self.law = law


@dataclasses.dataclass(frozen=True)
class Declared:
  """What a type says that it does not do.

  Attributes:
    identity: whether a new adapter changes nothing.
    mergeable: whether it can be merged.
    trains: whether it has weights that train.
    factored: whether its low-rank values stay factored.
    unsupported: kinds of layers that it does not serve.
    too_large: options with values that no layer can have; None for a rank of
      10,000 where the type has that option, empty if nothing bounds it.
    seeded: whether what looks drawn differs from seed to seed.
    multiple_of: what divides the numbers of inputs and outputs of layers.
  """

  identity: bool = True
  mergeable: bool = True
  trains: bool = True
  factored: bool = True
  unsupported: tuple[str, ...] = ()
  too_large: Mapping[str, Any] | None = None
  seeded: bool = True
  multiple_of: int = 1


@dataclasses.dataclass(frozen=True)
class Case:
  """An adapter on a model.

  Attributes:
    adapter: the adapter.
    kind: the kind of layers.
    dtype: dtype of the base.
    declared: the declarations of the type.
    law: name of the law.
  """

  adapter: Adapter
  kind: str
  dtype: str
  declared: Declared
  law: str = ''

  @functools.cached_property
  def host(self) -> Host:
    """A host that knows this type and no other."""
    return Host(plugins=[type(self.adapter)], only=())

  def twin(self) -> Case:
    """Returns the same case of a type that is the same, and new.

    `init` and `apply` are compiled once for an adapter and layers that look
    alike; for a twin they are run again.
    """
    cls = type(self.adapter)
    twin: Any = type(cls.__name__, (cls,), {'__module__': cls.__module__})
    options = {
      field.name: getattr(self.adapter, field.name)
      for field in dataclasses.fields(self.adapter)  # type: ignore[arg-type]
      if field.init
    }
    return dataclasses.replace(self, adapter=twin(**options))

  def model(self) -> models.Model:
    """Returns the model."""
    return models.model(
      self.kind, self.dtype, multiple_of=self.declared.multiple_of
    )

  def attached(self, of: models.Model, **options: Any) -> bx.Params:
    """Returns the model's params with the adapter, as it begins."""
    adapter = options.pop('adapter', self.adapter)
    return models.attached(of, adapter, self.host, **options)

  def trained(self, of: models.Model, **options: Any) -> bx.Params:
    """Returns the same with weights that do something."""
    return models.stirred(self.attached(of, **options))

  # What laws say.

  def broken(self, what: str, site: str = '') -> Broken:
    """Returns the error for this law."""
    at = f', at {site}' if site else ''
    return Broken(
      f"law '{self.law}' is broken by {self.adapter!r} on {self.kind} layers "
      f'of {self.dtype}{at}: {what}{self._inherited()}\nThe law: '
      f'{summary(self.law)}\nReproduce: surgery.testing.check('
      f'{self.adapter!r}, {self._options()})',
      self.law,
    )

  def _inherited(self) -> str:
    """Returns whose word it is that the law holds, if it was inherited."""
    name, cls = ABOUT.get(self.law, ''), type(self.adapter)
    if not getattr(cls, name, None) or name in vars(cls):
      return ''
    base = next(base for base in cls.__mro__ if name in vars(base))
    value = getattr(cls, name)
    return (
      f'\n`{name} = {value!r}` is inherited from {base.__name__}. If it is not '
      f"true of '{cls.name}', set {name} = {type(value)()!r} in the class."
    )

  def _options(self) -> str:
    """Returns the arguments of `check` that look at this case."""
    said: dict[str, Any] = {
      'laws': [self.law],
      'kinds': [self.kind],
      'dtypes': [self.dtype],
    }
    for field in dataclasses.fields(self.declared):
      value = getattr(self.declared, field.name)
      usual = field.default
      if field.name == 'mergeable':
        usual = type(self.adapter).mergeable
      if value != usual:
        said[field.name] = list(value) if isinstance(value, tuple) else value
    return ', '.join(f'{name}={value!r}' for name, value in said.items())

  def look(self) -> None:
    """Looks at the law.

    Raises:
      Broken: if the adapter breaks it, or raises what it should not.
    """
    try:
      # Accelerators round products to fewer bits unless they are told not to,
      # and laws compare with what a dtype holds. Those that differentiate a
      # model by itself mean it without dropout.
      with jax.default_matmul_precision('highest'), dropping.seen_to():
        LAWS[self.law](self)
    except Broken:
      raise
    except errors.SurgeryError as error:
      hint = ''
      if isinstance(error, errors.SiteError):
        hint = (
          ' If the type is not meant for such layers, say so: unsupported = '
          f'({self.kind!r},). If it is meant for other sizes, say which: '
          'multiple_of = 4 makes all numbers of inputs and outputs multiples.'
        )
      raise self.broken(f'{type(error).__name__}: {error}{hint}') from error

  def close(self, expected: Any, actual: Any, what: str) -> None:
    """Raises unless two outputs are equal but for rounding."""
    self._compare(expected, actual, what, TOLERANCES[self.dtype])

  def same(self, expected: Any, actual: Any, what: str) -> None:
    """Raises unless two outputs are equal to the bit."""
    self._compare(expected, actual, what, 0.0)

  def _compare(
    self, expected: Any, actual: Any, what: str, most: float
  ) -> None:
    a, b = np.asarray(expected), np.asarray(actual)
    if a.shape != b.shape or a.dtype != b.dtype:
      raise self.broken(
        f'{what}: expected {a.dtype}{a.shape}, found {b.dtype}{b.shape}.'
      )
    if not most and a.tobytes() == b.tobytes():
      return
    x, y = a.astype(np.float64), b.astype(np.float64)
    apart = np.abs(x - y).max(initial=0)
    size = max(np.abs(x).max(initial=0), 1.0)
    if not apart <= most * size or not most:
      allowed = f'at most {most * size:.2g}' if most else 'the same bits'
      raise self.broken(
        f'{what}: expected {allowed} between them, they differ by up to '
        f'{apart:.3g}.'
      )

  def same_params(
    self, expected: bx.Params, actual: bx.Params, what: str
  ) -> None:
    """Raises unless params are equal: paths, flags and bits."""
    if sorted(expected.keys()) != sorted(actual.keys()):
      odd = set(expected.keys()) ^ set(actual.keys())
      raise self.broken(f'{what}: one has {paths.show(min(odd))}.')
    for path, param in expected.items():
      other = actual[path]
      if param.trainable != other.trainable:
        raise self.broken(f'{what}: the flag differs.', paths.show(path))
      a, b = plain(param.value), plain(other.value)
      if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
        raise self.broken(f'{what}: values differ.', paths.show(path))

  def raises(self, function: Callable[[], Any], what: str) -> None:
    """Raises unless a call is refused."""
    try:
      function()
    except errors.SurgeryError:
      return
    raise self.broken(f'{what}: expected an error, and there was none.')


def plain(value: Any) -> np.ndarray:
  """Returns an array of numbers, also of keys."""
  if described.is_key(value):
    value = jax.random.key_data(value)
  return np.asarray(value)


def snapshot(params: bx.Params) -> dict[Any, bytes]:
  """Returns the bytes of all that params hold, by path."""
  return {path: plain(p.value).tobytes() for path, p in params.items()}


# How far outputs may differ where programs are compiled otherwise.
TOLERANCES = {'float32': 2e-5, 'bfloat16': 5e-2, 'float16': 1e-2}


Law = Callable[[Case], None]


LAWS: dict[str, Law] = {}


# The attribute by which a type says that a law holds for it.
ABOUT: dict[str, str] = {}


def summary(law: str) -> str:
  """Returns a law in a sentence."""
  return ' '.join((LAWS[law].__doc__ or '').split('\n\n')[0].split())
