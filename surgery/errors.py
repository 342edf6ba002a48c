"""Every error that the library raises on purpose.

An error says where (a path), what was expected, what was found and what to
do. All derive from `SurgeryError`, so that one `except` catches them.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from typing import Any


class SurgeryError(Exception):
  """Something that was asked for cannot be done; nothing was changed.

  Attributes:
    context: where it was found, outermost first: a file, a verb, a path; see
      `within`.
  """

  context: tuple[str, ...] = ()

  def __str__(self) -> str:
    # What is wrong is the first argument, as in other exceptions of Python.
    return ': '.join((*self.context, *map(str, self.args[:1])))

  def __reduce__(self) -> Any:
    # Python's own calls the class with `args`, and so fails for a class, a
    # plugin's maybe, that takes more arguments than its message.
    return _restored, (type(self), self.args, self.__dict__)


def _restored(
  cls: type[SurgeryError], args: tuple[Any, ...], state: dict[str, Any]
) -> SurgeryError:
  """Returns an error as it was, without calling its class."""
  error = cls.__new__(cls, *args)
  error.args = args
  error.__dict__.update(state)
  return error


@contextlib.contextmanager
def within(where: str) -> Iterator[None]:
  """Adds where it was to an error on its way up.

  The error keeps its class, its attributes and its traceback. One that is not
  this library's gets a note (PEP 678).

  Args:
    where: a file, a step, a verb, an adapter or a path.
  """
  try:
    yield
  except SurgeryError as error:
    # Whoever raised it may have said so already.
    if not str(error).startswith(f'{where}: '):
      error.context = (where, *error.context)
    raise
  except Exception as error:
    error.add_note(f'This was in {where}.')
    raise


class ConfigError(SurgeryError, ValueError):
  """A configuration has an unknown key, or a value of wrong type or range."""


class SelectorError(SurgeryError, ValueError):
  """A selector cannot be read, or matches nothing."""


class SiteError(SurgeryError, ValueError):
  """An adapter cannot serve a parameter: wrong dtype, rank or shape."""


class SiteWarning(UserWarning):
  """A layer that a selector names is left out: a type cannot serve it."""


class ShardWarning(UserWarning):
  """A file that is opened alone is one of several that make a model."""


class CastError(SurgeryError, ValueError):
  """A dtype cannot hold a value that is to be cast to it."""


class QuantisedError(SurgeryError, ValueError):
  """Numbers are needed where a file holds codes of a quantised weight."""


class RenameError(SurgeryError, ValueError):
  """A rule cannot be read, matches nothing, or makes two paths one."""


class CheckError(SurgeryError):
  """An assertion of a recipe or a pass failed; nothing was written."""


class RecipeError(SurgeryError, ValueError):
  """A recipe cannot be read, or a step of it cannot be done."""


class AdapterError(SurgeryError):
  """An adapter name is unknown or taken, or its records are missing."""


class OrderError(SurgeryError):
  """Adapters do not commute, so the one asked for cannot be merged alone."""


class UnreachedError(SurgeryError):
  """A traced call never asked for parameters that an adapter rewrites.

  Attributes:
    paths: the parameters that were never asked for, as tuples of strings.
  """

  def __init__(self, message: str, paths: Iterable[tuple[str, ...]]) -> None:
    super().__init__(message)
    self.paths = tuple(paths)


class DenseFallbackWarning(UserWarning):
  """A parameter whose adapter gave a low-rank value was computed dense.

  Results are right, and cost as much as without `surgery.factored`. Each
  parameter and reason is named once by a factored model.
  """


class DropoutWarning(UserWarning):
  """An adapter has dropout, and a call in training drops nothing.

  Only `surgery.factored(model)` drops elements; the model by itself does not.
  """


class PluginError(SurgeryError):
  """A plugin is broken, unknown or breaks the contract."""


class UnknownAdapterType(PluginError, KeyError):  # noqa: N818
  """No installed distribution offers an adapter type of that name."""


class FormatError(SurgeryError, ValueError):
  """A file is not what it should be.

  Attributes:
    offset: byte offset at which reading stopped, where it is known.
  """

  def __init__(self, message: str, offset: int | None = None) -> None:
    super().__init__(message)
    self.offset = offset


class BaseMismatchError(SurgeryError, ValueError):
  """An adapter was made for a base with other values."""


class DependencyError(SurgeryError, ImportError):
  """An installed library lacks what this one needs of it."""


def suggest(word: str, known: Iterable[str]) -> str:
  """Returns ` Did you mean 'x'?`, or what is known, or nothing.

  Args:
    word: what was written.
    known: what could have been written.
  """
  known = sorted(set(known))
  close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
  if close:
    return f' Did you mean {" or ".join(repr(c) for c in close)}?'
  if known:
    shown = ', '.join(known[:12]) + (', …' if len(known) > 12 else '')
    return f' Known: {shown}.'
  return ''


def listed(items: Iterable[str], most: int = 5, separator: str = ', ') -> str:
  """Returns `a, b and 7 more`: so many of a list as a line can hold.

  Args:
    items: texts.
    most: how many of them are shown.
    separator: what stands between them; `; ` where they are sentences.
  """
  items = list(items)
  more = len(items) - most
  shown = separator.join(items[:most])
  comma = '' if separator == ', ' else separator.rstrip()
  return f'{shown}{comma} and {more} more' if more > 0 else shown
