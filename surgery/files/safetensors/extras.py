"""What a safetensors file cannot say of leaves, for our manifest to say.

It is an object under `file`: `paths` by name where the name does not tell,
`dtypes` by name of what is stored as bytes, `scalars` (names of numpy scalars),
`values`: position, path and value of leaves that are no arrays, and `format`,
the file's `format` if no other program wrote it.
"""

from __future__ import annotations

import base64
import dataclasses
import math
from typing import Any, NamedTuple

from surgery import errors
from surgery.files import arrays
from surgery.model import manifest
from surgery.naming import paths
from surgery.naming.paths import Path

_PLAIN = (bool, int, float, str, type(None))


class Value(NamedTuple):
  """A leaf that is no array.

  Attributes:
    at: its position among all leaves.
    path: its path.
    value: a number, text, None, or an empty dict.
  """

  at: int
  path: Path
  value: Any


@dataclasses.dataclass(frozen=True)
class Extras:
  """What our manifest says of the file beside what all formats say.

  Attributes:
    paths: paths, written down, by name.
    dtypes: names of dtypes by name.
    scalars: names of numpy scalars.
    values: leaves that are no arrays.
  """

  paths: dict[str, str] = dataclasses.field(default_factory=dict)
  dtypes: dict[str, str] = dataclasses.field(default_factory=dict)
  scalars: list[str] = dataclasses.field(default_factory=list)
  values: list[Value] = dataclasses.field(default_factory=list)

  def to_json(self) -> dict[str, Any]:
    """Returns the extras as JSON data, without what is empty.

    Raises:
      FormatError: for a value that a file cannot hold.
    """
    values = [[at, paths.show(p), _encode(v, p)] for at, p, v in self.values]
    data = {
      'paths': self.paths,
      'dtypes': self.dtypes,
      'scalars': self.scalars,
      'values': values,
    }
    return {key: value for key, value in data.items() if value}


def from_json(data: Any, where: str, offset: int) -> Extras:
  """Reads what `to_json` returned.

  Raises:
    FormatError: if it is something else.
  """
  try:
    return _read(data)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise errors.FormatError(
      f'{where}: {manifest.KEY}, {manifest.FILE}: malformed entry: '
      f'{type(error).__name__}: {error}. The file is damaged; save or fetch it '
      'again.',
      offset,
    ) from None


def _read(data: Any) -> Extras:
  if not isinstance(data, dict):
    raise TypeError(f'expected an object, found {data!r:.80}')
  names: dict[str, str] = dict(data.get('paths', {}))
  types: dict[str, str] = dict(data.get('dtypes', {}))
  scalars = list(data.get('scalars', []))
  texts = [*names, *names.values(), *types, *scalars]
  if not all(isinstance(text, str) for text in texts):
    raise TypeError('expected text')
  for name in types.values():
    if name not in arrays.DTYPES:
      raise ValueError(f'unknown dtype {name!r:.80}')
  values = []
  for at, path, value in data.get('values', []):
    if type(at) is not int or at < 0:
      raise ValueError(f'expected a position, found {at!r:.80}')
    values.append(Value(at, paths.parse(path), _decode(value)))
  return Extras(names, types, scalars, values)


def _encode(value: Any, path: Path) -> Any:
  if type(value) is complex:
    return {'complex': [_encode(value.real, path), _encode(value.imag, path)]}
  if type(value) is bytes:
    return {'bytes': base64.b64encode(value).decode()}
  if type(value) is float and not math.isfinite(value):
    return {'float': repr(value)}
  if type(value) in _PLAIN or (type(value) is dict and not value):
    return value
  raise errors.FormatError(
    f'{paths.show(path)}: a value of type {type(value).__name__} cannot be '
    'saved. Use arrays, numbers, text, None, or an empty dict.'
  )


def _decode(value: Any) -> Any:
  if not isinstance(value, dict):
    if type(value) not in _PLAIN:
      raise TypeError(f'expected a number, text or null, found {value!r:.80}')
    return value
  if not value:
    return {}
  [(kind, inner)] = value.items()
  if kind == 'complex':
    real, imag = map(_decode, inner)
    return complex(float(real), float(imag))
  if kind == 'float':
    return float(inner)
  if kind == 'bytes':
    return base64.b64decode(inner, validate=True)
  raise ValueError(f'unknown kind of value {kind!r:.80}')
