r"""What tensors are called in a safetensors file: paths joined by dots.

A `.` or a `\` inside of a name is escaped by a `\`. Since other programs split
at every dot, the manifest says which path is meant where that is not the same.
"""

from __future__ import annotations

from collections.abc import Iterable

from surgery import errors
from surgery.naming import paths
from surgery.naming.paths import Path

METADATA = '__metadata__'


def name_of(path: Path) -> str:
  """Returns the name of a tensor.

  Raises:
    FormatError: if a file cannot have it.
  """
  if not path or not all(isinstance(key, str) for key in path):
    raise errors.FormatError(
      f'expected a path of one or more strings, found {path!r}.'
    )
  name = '.'.join(k.replace('\\', '\\\\').replace('.', '\\.') for k in path)
  if name == METADATA:
    raise errors.FormatError(
      f'{name}: the name is reserved in a file. Rename the parameter.'
    )
  try:
    name.encode()
  except UnicodeEncodeError as error:
    raise errors.FormatError(
      f'{paths.show(path)!a}: a name cannot be written as UTF-8: '
      f'{error.reason}. Rename the parameter.'
    ) from None
  return name


def path_of(name: str) -> Path:
  """Returns the path that a name stands for, if no manifest says otherwise."""
  return tuple(name.split('.'))


def odd(found: Iterable[tuple[str, Path]]) -> dict[str, str]:
  """Returns paths, written down, that names do not tell, by name."""
  return {
    name: paths.show(path) for name, path in found if path_of(name) != path
  }
