"""Configuration: dataclass fields with types and ranges that are checked.

An adapter's options are data. They are checked when an adapter is made in
Python, read from a file, and parsed from `--set rank=8`, by the one code here.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import json
import math
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from surgery import errors
from surgery.contract import origin

_RANGE = ('gt', 'ge', 'lt', 'le')
_SIGNS = {'gt': '>', 'ge': '>=', 'lt': '<', 'le': '<='}
_SCALARS = (bool, int, float, str)


def field(
  *,
  default: Any = dataclasses.MISSING,
  gt: float | None = None,
  ge: float | None = None,
  lt: float | None = None,
  le: float | None = None,
  doc: str = '',
) -> Any:
  """Declares an option of an adapter type, with its range and documentation.

  All arguments are keywords, because type checkers look for `default=`.

  Args:
    default: value where none is given; without it the option is required.
    gt: the value must be greater.
    ge: the value must be greater or equal.
    lt: the value must be less.
    le: the value must be less or equal.
    doc: one sentence for `surgery plugins`.

  Returns:
    A dataclass field.

  Example:
    class Mine(surgery.Adapter):
      name = 'mine'
      rank: int = surgery.field(default=8, ge=1, doc='Rank of the update.')
  """
  bounds = {'gt': gt, 'ge': ge, 'lt': lt, 'le': le}
  metadata: dict[str, Any] = {k: v for k, v in bounds.items() if v is not None}
  metadata['doc'] = doc
  return dataclasses.field(default=default, metadata=metadata)


@functools.lru_cache(maxsize=512)
def _hints(cls: type) -> dict[str, Any]:
  return typing.get_type_hints(cls)


def options(cls: type) -> dict[str, dataclasses.Field[Any]]:
  """Returns the options of an adapter type, by name."""
  fields = dataclasses.fields(cls)
  return {f.name: f for f in fields if f.name != 'patterns'}


def type_name(annotation: Any) -> str:
  """Returns an annotation as a person would write it."""
  if annotation is type(None):
    return 'None'
  if isinstance(annotation, type) and not typing.get_args(annotation):
    return annotation.__name__
  if typing.get_origin(annotation) in (types.UnionType, typing.Union):
    return ' | '.join(type_name(a) for a in typing.get_args(annotation))
  return str(annotation).replace('typing.', '')


def _where(cls: type, key: str) -> str:
  return f"{called(cls)}, option '{key}'"


def called(cls: type) -> str:
  """Returns a class with options, for messages.

  `adapter type 'lora'`; of another distribution's, `adapter type 'ia3' of
  surgery-ia3 1.0`.
  """
  kind = getattr(cls, '_called', 'adapter type')
  where = origin.origin(cls)
  name = cls.name  # type: ignore[attr-defined]
  return f"{kind} '{name}'{f' of {where}' if where else ''}"


# An integer is a value for a float, as elsewhere in Python; a bool, which is an
# integer to Python, is one for neither.
_NUMBERS: dict[Any, tuple[type, ...]] = {float: (int, float), int: (int,)}
_UNIONS = (types.UnionType, typing.Union)


def _conforms(value: Any, annotation: Any) -> bool:
  """Whether a value has the type of an annotation, tuples item by item."""
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if annotation is None or annotation is type(None):
    return value is None
  if origin in _UNIONS:
    return any(_conforms(value, a) for a in args)
  if origin is typing.Literal:
    # With the types, since `True == 1`.
    return (type(value), value) in [(type(a), a) for a in args]
  if annotation in _NUMBERS:
    numbers = _NUMBERS[annotation]
    return isinstance(value, numbers) and not isinstance(value, bool)
  if origin is tuple:
    return isinstance(value, tuple) and _conforms_each(value, args)
  if isinstance(annotation, type):
    return isinstance(value, annotation)
  return annotation is Any


def _conforms_each(values: tuple[Any, ...], args: tuple[Any, ...]) -> bool:
  """Whether the items of a tuple are those of a tuple's annotation."""
  if len(args) == 2 and args[1] is Ellipsis:
    return all(_conforms(v, args[0]) for v in values)
  return len(values) == len(args) and all(map(_conforms, values, args))


# How values that are words are written.
_WORDS: dict[Any, dict[str, bool | None]] = {
  type(None): {'none': None, 'null': None},
  bool: {'true': True, 'false': False},
}


def _parse(text: str, annotation: Any) -> Any:
  """Reads `text` as `annotation`; returns the text itself where it cannot."""
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if origin in _UNIONS:
    # Any text is text, so that is tried last: `8` is a number for `int | str`.
    ordered = sorted(args, key=lambda a: a is str)
    read = [(_parse(text, option), option) for option in ordered]
    return next((v for v, option in read if _conforms(v, option)), text)
  if annotation in _WORDS:
    return _WORDS[annotation].get(text.lower(), text)
  if origin is typing.Literal:
    return next((a for a in args if str(a) == text), text)
  if annotation is str:
    return text
  try:
    if annotation in (int, float):
      return annotation(text)
    return _from_json(json.loads(text), annotation)
  except ValueError:
    return text


def _from_json(value: Any, annotation: Any) -> Any:
  """Turns JSON's lists into tuples where the annotation asks for them."""
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if origin in _UNIONS and isinstance(value, list):
    return next(
      (_from_json(value, a) for a in args if typing.get_origin(a) is tuple),
      value,
    )
  if origin is tuple and isinstance(value, list):
    return tuple(map(_from_json, value, _items(args, len(value))))
  return value


def _items(args: tuple[Any, ...], count: int) -> tuple[Any, ...]:
  """Returns the annotation of each item of a tuple, given the tuple's own."""
  if len(args) == 2 and args[1] is Ellipsis:
    return args[:1] * count
  # A wrong number of items is an error that `check` raises; here nothing is
  # lost.
  return args if len(args) == count else (Any,) * count


def _widened(value: Any, annotation: Any) -> Any:
  """Turns an integer into a float where the annotation allows no integer."""
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if origin is tuple and isinstance(value, tuple):
    return tuple(map(_widened, value, _items(args, len(value))))
  if origin in (types.UnionType, typing.Union):
    # `int | float` keeps an integer as it is; `float | None` makes it a float.
    fitting = [a for a in args if _conforms(value, a)]
    return value if int in fitting else _widened(value, fitting[0])
  return float(value) if annotation is float else value


def _plain(value: Any) -> Any:
  """Returns a scalar of numpy as the number, or text, of Python that it is.

  Exactly that one: `np.float32(0.1)` is 0.10000000149011612.
  """
  if isinstance(value, tuple):
    return tuple(map(_plain, value))
  numpy = sys.modules.get('numpy')  # Not imported: then it is no scalar of it.
  if numpy is not None and isinstance(value, numpy.generic):
    return value.item()
  return value


def _finite(value: Any) -> bool:
  if isinstance(value, tuple):
    return all(map(_finite, value))
  return not isinstance(value, float) or math.isfinite(value)


def check(cls: type, key: str, value: Any) -> Any:
  """Returns an option's value if it has its type and lies in its range.

  An integer becomes a float where the option is one, so that `alpha=8` and
  `alpha=8.0` are one configuration; a scalar of numpy becomes Python's.

  Raises:
    ConfigError: naming the adapter type, the option, what was expected and
      what was found.
  """
  annotation = _hints(cls)[key]
  plain = _plain(value)
  if not _conforms(plain, annotation):
    raise errors.ConfigError(
      f'{_where(cls, key)}: expected {type_name(annotation)}, found '
      f'{value!r} ({type(value).__name__}).'
    )
  value = _widened(plain, annotation)
  if not _finite(value):
    raise errors.ConfigError(
      f'{_where(cls, key)}: expected a finite number, found {value!r}.'
    )
  bounds = options(cls)[key].metadata
  for number in _numbers(value):
    _check_range(cls, key, number, bounds)
  return value


def _numbers(value: Any) -> Iterator[int | float]:
  """Yields a number, or those in a tuple."""
  if isinstance(value, tuple):
    for one in value:
      yield from _numbers(one)
  elif isinstance(value, (int, float)) and not isinstance(value, bool):
    yield value


def _check_range(
  cls: type, key: str, value: float, bounds: Mapping[str, Any]
) -> None:
  for name in _RANGE:
    bound = bounds.get(name)
    if bound is None:
      continue
    holds = {
      'gt': value > bound,
      'ge': value >= bound,
      'lt': value < bound,
      'le': value <= bound,
    }[name]
    if not holds:
      raise errors.ConfigError(
        f'{_where(cls, key)}: expected a value {_SIGNS[name]} {bound}, found '
        f'{value!r}.'
      )


def check_keys(cls: type, given: Mapping[str, Any]) -> None:
  """Raises unless every key of `given` is an option of the adapter type.

  Raises:
    ConfigError: naming the key, with suggestions.
  """
  known = options(cls)
  for key in given:
    if key not in known:
      hint = errors.suggest(key, known) or ' It has no options.'
      raise errors.ConfigError(f"{called(cls)} has no option '{key}'.{hint}")


def is_required(option: dataclasses.Field[Any]) -> bool:
  """Whether an option has no default."""
  return option.default is dataclasses.MISSING


def is_tuple(cls: type, key: str) -> bool:
  """Whether an option is a tuple of any length, of one kind of values."""
  return typing.get_origin(_hints(cls)[key]) is tuple


def takes_floats(cls: type, key: str) -> bool:
  """Whether an option is a number with a fraction, or several."""
  annotation = _hints(cls)[key]
  if is_tuple(cls, key):
    annotation = typing.get_args(annotation)[0]
  return _conforms(0.5, annotation)


def check_required(cls: type, given: Mapping[str, Any]) -> None:
  """Raises unless every option without a default is given.

  Raises:
    ConfigError: naming the option.
  """
  for key, option in options(cls).items():
    if option.default is dataclasses.MISSING and key not in given:
      raise errors.ConfigError(f'{_where(cls, key)}: a value is required.')


def parse(cls: type, given: Mapping[str, str]) -> dict[str, Any]:
  """Reads options as they are typed in a shell, by their declared types.

  Args:
    cls: the adapter type.
    given: text by option, e.g. `{'rank': '8'}`.

  Returns:
    Values by option; those that cannot be read stay text, for `check` to
    refuse.

  Raises:
    ConfigError: for an unknown option.
  """
  check_keys(cls, given)
  hints = _hints(cls)
  return {k: _parse(v, hints[k]) for k, v in given.items()}


def from_json(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
  """Reads options from parsed JSON.

  Raises:
    ConfigError: for an unknown option.
  """
  check_keys(cls, given)
  hints = _hints(cls)
  return {k: _from_json(v, hints[k]) for k, v in given.items()}


def declared(cls: type) -> list[dict[str, Any]]:
  """Returns what there is to know of each option: type, range, default, doc."""
  hints, result = _hints(cls), []
  for name, option in options(cls).items():
    required = option.default is dataclasses.MISSING
    bounds = [
      f'{_SIGNS[k]} {option.metadata[k]}'
      for k in _RANGE
      if k in option.metadata
    ]
    result.append(
      {
        'name': name,
        'type': type_name(hints[name]),
        'required': required,
        'default': None if required else option.default,
        'range': ', '.join(bounds),
        'doc': option.metadata.get('doc', ''),
      }
    )
  return result


def supported(annotation: Any) -> bool:
  """Whether values of the annotation survive JSON, and so a saved file."""
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if annotation in _SCALARS or annotation in (None, type(None)):
    return True
  if origin in (types.UnionType, typing.Union):
    return all(supported(a) for a in args)
  if origin is typing.Literal:
    return all(isinstance(a, _SCALARS) for a in args)
  if origin is tuple:
    return all(a is Ellipsis or supported(a) for a in args)
  return False


def check_declaration(cls: type) -> None:
  """Raises unless every option has a type that survives a saved file.

  Raises:
    PluginError: naming the adapter type and the option.
  """
  for name in options(cls):
    annotation = _hints(cls)[name]
    if not supported(annotation):
      raise errors.PluginError(
        f'{_where(cls, name)}: {type_name(annotation)} cannot be saved with '
        'the weights. Options are bool, int, float, str, Literal, tuples of '
        'these, or None.'
      )
    bounds = [
      b for b in _RANGE if options(cls)[name].metadata.get(b) is not None
    ]
    if bounds and not _has_numbers(annotation):
      raise errors.PluginError(
        f'{_where(cls, name)}: {bounds[0]}= needs a number, found the type '
        f'{type_name(annotation)}.'
      )


def make_dataclass(cls: type, **how: Any) -> None:
  """Makes a frozen dataclass of a class whose annotated attributes are options.

  Args:
    cls: the class; changed.
    **how: further arguments of `dataclasses.dataclass`.

  Raises:
    PluginError: if a default can be changed, as a dictionary can.
  """
  try:
    dataclasses.dataclass(frozen=True, kw_only=True, **how)(cls)
  except ValueError as error:
    # What Python advises, a factory, is no value that a file could hold.
    what = str(error).partition(':')[0]
    raise errors.PluginError(
      f'{cls.__module__}.{cls.__qualname__}: {what}. Options are bool, int, '
      'float, str, Literal, tuples of these, or None: write a tuple, or an '
      'option for each value.'
    ) from error


def _has_numbers(annotation: Any) -> bool:
  if annotation in (int, float):
    return True
  return any(map(_has_numbers, typing.get_args(annotation)))


def freeze(
  patterns: Any,
) -> tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]:
  """Returns `patterns` as nested tuples, which are hashable.

  Raises:
    ConfigError: if it is not a mapping from selector to options.
  """
  if isinstance(patterns, tuple):
    patterns = {k: dict(v) for k, v in patterns}
  if not isinstance(patterns, collections.abc.Mapping):
    raise errors.ConfigError(
      'patterns: expected {selector: {option: value}}, found '
      f'{patterns!r} ({type(patterns).__name__}).'
    )
  frozen = []
  for selector, values in patterns.items():
    if not isinstance(selector, str) or not isinstance(
      values, collections.abc.Mapping
    ):
      raise errors.ConfigError(
        'patterns: expected {selector: {option: value}}, found the entry '
        f'{selector!r}: {values!r}.'
      )
    frozen.append((selector, tuple(values.items())))
  return tuple(frozen)
