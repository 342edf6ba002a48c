"""The manifest: what a saved model says beside its tensors, as JSON.

It holds what arrays cannot: flags, metadata, PRNG implementations, lock state,
types of layers, adapters with their configuration, digests, and the history of
passes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from surgery import errors
from surgery.model.layers import LayerType
from surgery.model.quantised import Codes
from surgery.naming import paths
from surgery.naming.paths import Path

VERSION = 1
KEY = '__surgery__'
MODEL, ADAPTER, PATCH = 'model', 'adapter', 'patch'
# What an adapter's file says of how near it is to what it was extracted from.
EXTRACTED = 'extracted'
# What only the file's own format understands; not part of a `Manifest`.
FILE = 'file'


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What is known of a checkpoint beside its leaves.

  Attributes:
    kind: `model`, `adapter` for an adapter without its base, or `patch` for
      the difference between two models.
    locked: whether params that are loaded from it are locked.
    layer_types: types of layers, where they are known.
    trees: structure of parameters whose value is a pytree, by path; see
      `surgery.live.checkpoints`.
    adapters: adapters as JSON data, innermost first.
    history: passes that made it, oldest first, as JSON data.
    metadata: metadata that other programs wrote into a file, text by text.
    extra: unknown entries, which are kept.
  """

  kind: str = MODEL
  locked: bool = True
  layer_types: Mapping[Path, LayerType] = dataclasses.field(
    default_factory=dict
  )
  trees: Mapping[Path, Any] = dataclasses.field(default_factory=dict)
  adapters: tuple[Mapping[str, Any], ...] = ()
  history: tuple[Mapping[str, Any], ...] = ()
  metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def replace(self, **changes: Any) -> Manifest:
    """Returns a manifest with some attributes changed."""
    return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class LeafNote:
  """What the manifest says of one tensor.

  Attributes:
    trainable: whether the parameter trains.
    metadata: the parameter's metadata.
    key: PRNG implementation, if the tensor holds the data of a key.
    digest: digest of the tensor's bytes, e.g. `xxh3:…`.
    codes: the quantised weight that it is a part of, unless its name says so.
    base: whether it has not changed since an adapter was attached.
  """

  trainable: bool = True
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  key: str | None = None
  digest: str | None = None
  codes: Codes | None = None
  base: bool = False


def check_no_patch(manifest: Manifest, where: str) -> None:
  """Raises for a patch where a model or an adapter is expected.

  Raises:
    FormatError: saying what to do with it.
  """
  if manifest.kind == PATCH:
    raise errors.FormatError(
      f'{where or "this"}: a patch, not a model: it holds the difference '
      'between a model and its base. Apply it first: surgery patch BASE PATCH '
      '-o OUT.'
    )


def _encode(value: Any, where: str) -> Any:
  """Returns metadata as JSON data in which tuples stay tuples."""
  if value is None or isinstance(value, (bool, int, str)):
    return value
  if isinstance(value, float):
    # JSON has no NaN and no infinity.
    return value if math.isfinite(value) else {'__float__': repr(value)}
  if isinstance(value, (list, tuple)):
    items = [_encode(v, where) for v in value]
    return {'__tuple__': items} if isinstance(value, tuple) else items
  if isinstance(value, Mapping):
    return _encode_mapping(value, where)
  raise errors.FormatError(
    f'{where}: metadata of type {type(value).__name__} ({value!r}) cannot be '
    'saved. Use None, bool, int, float, str, and lists, tuples and dicts of '
    'these.'
  )


def _encode_mapping(value: Mapping[Any, Any], where: str) -> dict[str, Any]:
  for key in value:
    # JSON would make text of a number, and `1` and `'1'` one key.
    if not isinstance(key, str):
      raise errors.FormatError(
        f'{where}: metadata keys must be strings to be saved, found {key!r}.'
      )
  pairs = {k: _encode(v, where) for k, v in value.items()}
  # A dict that looks like one of our marks is marked itself.
  if len(pairs) == 1 and next(iter(pairs)).startswith('__'):
    return {'__dict__': pairs}
  return pairs


def _decode(value: Any) -> Any:
  """Returns what `_encode` was given."""
  if isinstance(value, list):
    return [_decode(v) for v in value]
  if not isinstance(value, dict):
    return value
  if len(value) == 1:
    [(mark, inner)] = value.items()
    if mark == '__float__':
      return float(inner)
    if mark == '__tuple__':
      return tuple(map(_decode, inner))
    if mark == '__dict__':
      value = inner
  return {k: _decode(v) for k, v in value.items()}


def to_json(
  manifest: Manifest, notes: Mapping[Path, LeafNote]
) -> dict[str, Any]:
  """Returns the manifest as JSON data.

  Args:
    manifest: the manifest.
    notes: what there is to say of each tensor.

  Raises:
    FormatError: for metadata that JSON cannot hold.
  """
  shown = {path: paths.show(path) for path in notes}
  entries = {shown[p]: _entry(note, shown[p]) for p, note in notes.items()}
  sections = {
    'trees': {paths.show(p): t for p, t in manifest.trees.items()},
    'layers': {
      paths.show(p): {'types': list(t.names), 'layouts': dict(t.layouts)}
      for p, t in manifest.layer_types.items()
    },
    'adapters': list(manifest.adapters),
    'history': list(manifest.history),
    'metadata': dict(manifest.metadata),
  }
  return {
    **manifest.extra,
    'version': VERSION,
    'kind': manifest.kind,
    'locked': manifest.locked,
    # Of 50,000 tensors most have nothing but defaults: they are left out.
    'tensors': {path: entry for path, entry in entries.items() if entry},
    **{name: section for name, section in sections.items() if section},
  }


def _entry(note: LeafNote, shown: str) -> dict[str, Any]:
  """Returns a tensor's note as JSON data, without what is the default.

  Args:
    note: the note.
    shown: the tensor's path, for messages.
  """
  entry: dict[str, Any] = {}
  if not note.trainable:
    entry['trainable'] = False
  if note.metadata:
    entry['metadata'] = _encode(dict(note.metadata), shown)
  if note.key is not None:
    entry['key'] = note.key
  if note.digest is not None:
    entry['digest'] = note.digest
  if note.codes is not None:
    entry['codes'] = [note.codes.kind, paths.show(note.codes.of)]
  if note.base:
    entry['base'] = True
  return entry


def dumps(manifest: Manifest, notes: Mapping[Path, LeafNote]) -> bytes:
  """Returns the manifest as UTF-8 JSON.

  Args:
    manifest: the manifest.
    notes: what there is to say of each tensor.

  Raises:
    FormatError: for metadata that JSON cannot hold.
  """
  return encoded(to_json(manifest, notes))


def encoded(data: Mapping[str, Any]) -> bytes:
  """Returns a manifest's JSON data as UTF-8.

  Raises:
    FormatError: for what JSON cannot hold.
  """
  try:
    text = json.dumps(data, ensure_ascii=False, separators=(',', ':'))
    return text.encode()
  except (TypeError, ValueError, RecursionError) as error:
    raise errors.FormatError(
      f'manifest ({KEY}): cannot be written as JSON: {error}.'
    ) from None


def _expect(condition: bool, what: str) -> None:
  if not condition:
    raise errors.FormatError(f'manifest ({KEY}): {what}.')


_SECTIONS: dict[str, type] = {
  'tensors': dict,
  'trees': dict,
  'layers': dict,
  'adapters': list,
  'history': list,
  'metadata': dict,
}
_KNOWN = {'version', 'kind', 'locked', *_SECTIONS, FILE}


def _codes(entry: Any) -> Codes | None:
  if entry is None:
    return None
  kind, of = map(str, entry)
  return Codes(kind, paths.parse(of))


def loads(text: bytes) -> tuple[Manifest, dict[Path, LeafNote]]:
  """Reads what `dumps` wrote.

  Raises:
    FormatError: if it is not a manifest, or one of a newer version.
  """
  return from_json(decoded(text))


def decoded(text: bytes | str) -> Any:
  """Reads what `encoded` wrote.

  Raises:
    FormatError: if it is not JSON.
  """
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise errors.FormatError(f'manifest ({KEY}): not JSON: {error}.') from None


def from_json(data: Any) -> tuple[Manifest, dict[Path, LeafNote]]:
  """Reads what `to_json` returned.

  Raises:
    FormatError: if it is not a manifest, or one of a newer version.
  """
  _check_sections(data)
  try:
    notes = {
      paths.parse(p): LeafNote(
        bool(n.get('trainable', True)),
        _decode(n.get('metadata', {})),
        n.get('key'),
        n.get('digest'),
        _codes(n.get('codes')),
        bool(n.get('base', False)),
      )
      for p, n in data.get('tensors', {}).items()
    }
    layer_types = {
      paths.parse(p): LayerType(tuple(t['types']), dict(t['layouts']))
      for p, t in data.get('layers', {}).items()
    }
  except RecursionError:
    raise errors.FormatError(f'manifest ({KEY}): nested too deep.') from None
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise errors.FormatError(
      f'manifest ({KEY}): malformed entry: {type(error).__name__}: {error}.'
    ) from None
  manifest = Manifest(
    kind=data['kind'],
    locked=bool(data.get('locked', True)),
    layer_types=layer_types,
    trees={paths.parse(p): t for p, t in data.get('trees', {}).items()},
    adapters=tuple(data.get('adapters', ())),
    history=tuple(data.get('history', ())),
    metadata=data.get('metadata', {}),
    # A later release may write more of the same version; it is not lost.
    extra={k: v for k, v in data.items() if k not in _KNOWN},
  )
  return manifest, notes


def _check_sections(data: Any) -> None:
  """Raises unless JSON data has the sections of a manifest that can be read.

  Raises:
    FormatError: naming the section.
  """
  _expect(isinstance(data, dict), 'expected an object')
  version = data.get('version')
  _expect(isinstance(version, int), f'expected a version, found {version!r}')
  if version > VERSION:
    raise errors.FormatError(
      f'manifest ({KEY}): version {version} is newer than this release reads '
      f'({VERSION}). Update blox-surgery.'
    )
  kinds = (MODEL, ADAPTER, PATCH)
  _expect(data.get('kind') in kinds, f'kind {data.get("kind")!r}')
  for key, kind in _SECTIONS.items():
    _expect(
      isinstance(data.get(key, kind()), kind),
      f'{key!r} should be {"an object" if kind is dict else "a list"}',
    )
  _expect(
    all(isinstance(value, str) for value in data.get('metadata', {}).values()),
    "'metadata' should hold text",
  )
