"""What an output records of how it was made, and how people read that."""

from __future__ import annotations

import json
import pathlib
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from surgery.core import paths
from surgery.core.checkpoint import Checkpoint

# Arguments that stand on a command line without the name of an option.
_POSITIONAL = ('selectors', 'rules')


def fingerprint(checkpoint: Checkpoint) -> str:
  """Returns a digest of names, dtypes, shapes and known digests of tensors.

  No tensor is read for it.
  """
  from surgery.files.digest import Digester

  rows = [
    [
      paths.show(path),
      leaf.dtype,
      None if leaf.shape is None else list(leaf.shape),
      leaf.digest,
    ]
    for path, leaf in checkpoint.items()
  ]
  text = json.dumps(rows, ensure_ascii=False, separators=(',', ':'))
  digester = Digester()
  digester.update(text.encode())
  return digester.digest()


def entry(
  verb: str, arguments: Mapping[str, Any], inputs: Iterable[Checkpoint]
) -> dict[str, Any]:
  """Returns what is recorded of a verb.

  Args:
    verb: its name.
    arguments: its options by their names: no paths but names of files, no
      times, so that the same command gives the same bytes.
    inputs: what it read.
  """
  import surgery

  return {
    'version': surgery.__version__,
    'pass': verb,
    'arguments': dict(arguments),
    'inputs': [
      {'file': pathlib.Path(one.origin).name, 'digest': fingerprint(one)}
      for one in inputs
    ],
  }


def recorded(checkpoint: Checkpoint, said: Mapping[str, Any]) -> Checkpoint:
  """Returns a checkpoint whose history ends with an entry."""
  manifest = checkpoint.manifest
  return checkpoint.replace(
    manifest=manifest.replace(history=(*manifest.history, said))
  )


def lines(history: Iterable[Mapping[str, Any]]) -> Iterator[str]:
  """Yields a history as people read it, oldest first."""
  for one in history:
    inputs = [i for i in one.get('inputs') or () if isinstance(i, Mapping)]
    yield command_line(one)
    said = [f'surgery {one["version"]}'] if one.get('version') else []
    said += [f'{i.get("file")} {i.get("digest")}' for i in inputs]
    yield f'  # {", ".join(said)}'.rstrip(' #')


def command_line(said: Mapping[str, Any]) -> str:
  """Returns an entry as the command that it records, but for its output."""
  arguments = said.get('arguments')
  arguments = arguments if isinstance(arguments, Mapping) else {}
  words = ['surgery', str(said.get('pass'))]
  inputs = said.get('inputs') or ()
  words += [str(i.get('file')) for i in inputs[:1] if isinstance(i, Mapping)]
  for name in _POSITIONAL:
    words += map(str, arguments.get(name) or ())
  for name, value in arguments.items():
    if name not in _POSITIONAL:
      words += _option(name, value)
  return ' '.join(shlex.quote(word) for word in words)


def _option(name: str, value: Any) -> Iterator[str]:
  option = '--' + name.replace('_', '-')
  if value is True:
    yield option
  elif isinstance(value, Mapping):
    for key, text in _settings(value):
      yield from ('--set' if name == 'config' else option, f'{key}={text}')
  elif isinstance(value, (list, tuple)):
    for one in value:
      yield from (option, str(one))
  elif value is not None and value is not False:
    yield from (option, str(value))


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  for key, value in config.items():
    if key == 'patterns' and isinstance(value, Mapping):
      for selector, some in value.items():
        for name, text in _settings(some if isinstance(some, Mapping) else {}):
          yield f'{selector}:{name}', text
    elif isinstance(value, str):
      yield key, value
    elif value is not None:
      yield key, json.dumps(value)
