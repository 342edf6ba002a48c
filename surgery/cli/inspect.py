"""`surgery inspect`."""

from __future__ import annotations

import errno
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import shared
from surgery.cli.command import Command
from surgery.host import location
from surgery.host.manager import default_host
from surgery.interop.peft import config as peft
from surgery.model import record_json
from surgery.model.layers import LayerTypes
from surgery.naming import paths
from surgery.naming.paths import Path

if TYPE_CHECKING:
  from surgery.model.checkpoint import Checkpoint, Leaf


def _flags(leaf: Leaf) -> list[str]:
  flags = [] if leaf.trainable else ['frozen']
  if leaf.key:
    flags.append(f'key {leaf.key}')
  if leaf.metadata.get('adapter'):
    flags.append(f'adapter {leaf.metadata["adapter"]}')
  return flags


@click.command(cls=Command)
@shared.file
@shared.selectors(required=False)
@click.option(
  '--history', is_flag=True, help='Show a recipe that makes it again.'
)
@shared.json_option
def command(
  file: pathlib.Path, selectors: tuple[str, ...], history: bool, as_json: bool
) -> int:
  r"""Show the tensors, flags and adapters of FILE, without reading tensors.

  Selectors that name existing files are further files.

  \b
  surgery inspect adapted.msgpack
  surgery inspect adapted.msgpack '**/lora_*' --json
  surgery inspect base.msgpack adapted.msgpack '**/query'
  """
  further = [pathlib.Path(text) for text in selectors]
  further = [path for path in further if path.exists()]
  chosen = [text for text in selectors if not pathlib.Path(text).exists()]
  # A misspelt file would otherwise be a selector that matches nothing.
  for text in chosen:
    if _is_file_name(text):
      raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), text)
  files = [file, *further]
  several: list[Any] = []

  def one(file: pathlib.Path) -> int:
    shown = _shown(file, chosen, history, as_json)
    if as_json:
      several.append({'file': str(file), **shown} if not history else shown)
    elif len(files) == 1:
      if shown:
        click.echo(shown)
    else:
      between = '' if file == files[0] else '\n'
      click.echo(f'{between}{file}:\n{shown}')
    return 0

  code = shared.each(files, one)
  if as_json:
    click.echo(json.dumps(several if further else several[0]))
  return code


def _is_file_name(text: str) -> bool:
  """Whether a selector has the suffix of a saved model, as no tensor has."""
  forms = default_host().formats.values()
  suffixes = {suffix for form in forms for suffix in form.suffixes}
  return location.suffix(pathlib.Path(text)) in suffixes


def _shown(
  file: pathlib.Path, selectors: list[str], history: bool, as_json: bool
) -> Any:
  """Returns what is shown of a file, as text or as JSON data."""
  from surgery.editing import choosing

  opened = shared.opened(file)
  chosen: Iterable[Path] = opened
  if selectors:
    chosen = choosing.select(opened, *selectors)
  chosen = list(chosen)
  if history:
    return _history(file, opened, as_json)
  return _data(opened, chosen) if as_json else '\n'.join(_lines(opened, chosen))


def _history(file: pathlib.Path, opened: Checkpoint, as_json: bool) -> Any:
  from surgery.recipes import history as histories

  entries = opened.manifest.history
  if as_json:
    return list(entries)
  if not entries:
    click.echo(f'{file}: no history is recorded.', err=True)
  name = f'{file.name}/' if file.is_dir() else file.name
  return '\n'.join(histories.lines(entries, name, default_host()))


def _data(opened: Checkpoint, chosen: list[Path]) -> dict[str, Any]:
  manifest = opened.manifest
  return {
    'kind': manifest.kind,
    'locked': manifest.locked,
    'tensors': [
      {
        'path': paths.show(path),
        'shape': None if leaf.shape is None else list(leaf.shape),
        'dtype': leaf.dtype,
        'bytes': leaf.nbytes,
        'trainable': leaf.trainable,
        'adapter': leaf.metadata.get('adapter'),
        'key': leaf.key,
        'digest': leaf.digest,
      }
      for path, leaf in ((p, opened[p]) for p in chosen)
    ],
    'layers': {
      paths.show(p): list(t.names) for p, t in manifest.layer_types.items()
    },
    'adapters': list(manifest.adapters),
    **(
      {'peft': manifest.extra[peft.KEY]} if peft.KEY in manifest.extra else {}
    ),
    'history': list(manifest.history),
  }


def _headings(
  layer: Path, shown: Path, types: LayerTypes
) -> Iterator[tuple[str, str, str, str]]:
  """Yields rows of the layers that lie between `layer` and those shown."""
  # Layers that the last tensor is in as well have their lines already.
  common = 0
  while common < min(len(layer), len(shown)) and layer[common] == shown[common]:
    common += 1
  for depth in range(common, len(layer)):
    known = types.get(layer[: depth + 1])
    kind = f'({known.names[0]})' if known and known.names else ''
    name = paths.show((layer[depth],))
    yield f'{"  " * depth}{name}/', kind, '', ''


def _lines(opened: Checkpoint, chosen: list[Path]) -> list[str]:
  """Returns the tree, the adapters and the totals."""
  manifest = opened.manifest
  lines = _tree(opened, chosen)
  if manifest.adapters:
    lines.append('')
  for index, adapter in enumerate(manifest.adapters):
    note = ' (innermost)' if index == 0 and len(manifest.adapters) > 1 else ''
    lines.append(f'adapter {record_json.describe(adapter)}{note}')
  if peft.KEY in manifest.extra:
    lines += ['', f'PEFT {peft.describe(manifest.extra[peft.KEY])}']
  return [*lines, '', _totals(opened, chosen)]


def _tree(opened: Checkpoint, chosen: list[Path]) -> list[str]:
  """Returns a line for each layer and tensor, with columns."""
  rows: list[tuple[str, str, str, str]] = []
  shown: Path = ()
  for path in chosen:
    layer, leaf = path[:-1], opened[path]
    if layer != shown:
      rows += _headings(layer, shown, opened.manifest.layer_types)
      shown = layer
    name = f'{"  " * len(layer)}{paths.show(path[-1:])}'
    nbytes = shared.size(leaf.nbytes)
    rows.append((name, str(leaf), nbytes, ', '.join(_flags(leaf))))
  widths = [max((len(r[i]) for r in rows), default=0) for i in range(3)]
  return [
    f'{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d}'.rstrip()
    for a, b, c, d in rows
  ]


def _totals(opened: Checkpoint, chosen: list[Path]) -> str:
  """Returns the numbers of tensors, elements and bytes."""
  leaves = [opened[p] for p in chosen]
  # An adapter that is disabled does not train; its flags stay.
  adapters = opened.manifest.adapters
  off = {one['name'] for one in adapters if not one.get('enabled', True)}
  trains = sum(
    leaf.size
    for leaf in leaves
    if leaf.trainable
    and not leaf.key
    and leaf.metadata.get('adapter') not in off
  )
  return (
    f'{opened.manifest.kind}: {len(leaves)} tensors, '
    f'{sum(x.size for x in leaves):,} elements ({trains:,} trainable), '
    f'{shared.size(sum(x.nbytes for x in leaves))}'
  )
