"""A recipe after it is read: inputs, steps and outputs as plain data."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from surgery import errors
from surgery.recipes import text

_SIZE = re.compile(r'(\d+(?:\.\d+)?)\s*([a-zA-Z]*)')
_UNITS = {
  '': 1,
  'B': 1,
  **{f'{c}B': 1000**n for n, c in enumerate('KMGT', 1)},
  **{f'{c}IB': 1024**n for n, c in enumerate('KMGT', 1)},
}


def nbytes(value: str | int) -> int:
  """Reads a number of bytes: `5GB`, `500MB`, `2GiB`, or a plain number.

  Raises:
    RecipeError: for anything else, and for 0.
  """
  match = _SIZE.fullmatch(str(value).strip())
  unit = match and _UNITS.get(match[2].upper())
  if not match or not unit or not (number := round(float(match[1]) * unit)):
    raise errors.RecipeError(
      f'{value!r}: expected a number of bytes such as 5GB, 500MB or 2GiB.'
    )
  return number


def is_folder(value: Any) -> bool:
  """Whether a name is that of a folder, with a slash at its end: `out/`."""
  if not isinstance(value, (str, os.PathLike)):
    return False
  name = os.fspath(value)
  return isinstance(name, str) and name.endswith(('/', os.sep))


def _escaped(value: Any) -> Any:
  """Returns a value with `$` escaped, so that it names no variables."""
  if isinstance(value, Mapping):
    return {_escaped(k): _escaped(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_escaped(one) for one in value]
  return value.replace('$', '$$') if isinstance(value, str) else value


@dataclasses.dataclass(frozen=True)
class Step:
  """One step of a recipe.

  Attributes:
    name: the pass.
    value: its options, the first of them alone, or None.
    on: alias of the checkpoint that it changes; the first input by default.
    result: alias of its result; by default the alias of what it changes.
  """

  name: str
  value: Any = None
  on: str | None = None
  result: str | None = None

  def data(self) -> Any:
    """Returns it as data, as it is written in a recipe."""
    data: dict[str, Any] = {self.name: _escaped(self.value)}
    if self.on is not None:
      data['in'] = self.on
    if self.result is not None:
      data['as'] = self.result
    return self.name if data == {self.name: None} else data


@dataclasses.dataclass(frozen=True)
class Target:
  """One output of a recipe.

  Attributes:
    path: the file; None if it is named when the recipe is run.
    of: alias of what is written; the first input's by default.
    format: name of the format; by default the suffix decides.
    shard_size: largest number of bytes of each file; None for a single file.
    strict_flax: whether it is written as flax writes it, without a manifest.
    manifest: whether flags, metadata, digests, history and so on are written.
    metadata: metadata for other programs, text by text.
    config: values for the `config.json` of a folder, by key.
    like: a model folder whose configuration, tokenizer and licences are
      copied; by default that of the input.
    folder: whether a folder is written, even if there is none yet.
  """

  path: pathlib.Path | None = None
  of: str | None = None
  format: str | None = None
  shard_size: int | None = None
  strict_flax: bool = False
  manifest: bool = True
  metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  like: pathlib.Path | None = None
  folder: bool = False

  @property
  def is_folder(self) -> bool:
    """Whether a folder is written: `out/`, or one that is there."""
    return self.folder or (self.path is not None and self.path.is_dir())

  @property
  def plain(self) -> str | None:
    """The option by which it is written without a manifest, if it is."""
    if self.strict_flax:
      return '--strict-flax'
    return None if self.manifest else '--no-manifest'

  def data(self) -> dict[str, Any]:
    """Returns it as data, without the path."""
    options = {
      'of': self.of,
      'format': self.format,
      'shard-size': self.shard_size,
      'strict-flax': True if self.strict_flax else None,
      'manifest': None if self.manifest else False,
      'metadata': dict(self.metadata) or None,
      'config': dict(self.config) or None,
    }
    return {key: one for key, one in options.items() if one is not None}


@dataclasses.dataclass(frozen=True)
class Spec:
  """A recipe as it was read; planning, running and recording take it.

  Attributes:
    inputs: files by alias; None if they are named when it is run. Steps change
      the first.
    vars: values for `${name}` in steps.
    steps: the steps, with the values of variables.
    outputs: what is written, by name.
    written: the steps as they were given, with the names of variables.
    lines: the line of each part, for messages.
    folder: files are relative to it.
  """

  inputs: Mapping[str, pathlib.Path | None]
  vars: Mapping[str, Any]
  steps: tuple[Step, ...]
  outputs: Mapping[str, Target]
  written: tuple[Any, ...] = ()
  lines: text.Lines = dataclasses.field(default_factory=text.Lines)
  folder: pathlib.Path = pathlib.Path()

  @property
  def origin(self) -> str:
    """Where it came from; empty for a verb of the shell, which has no text."""
    return self.lines.name

  @property
  def first(self) -> str:
    """Alias of the input that steps change."""
    return next(iter(self.inputs))

  def where(self, *place: str | int) -> str:
    """Returns file and line of a part, or the name of the recipe alone."""
    return self.lines.where(*place)

  def place(self, number: int) -> str:
    """Returns where a step is, for messages; for a verb, its name."""
    name = self.steps[number].name
    if not self.lines.name:
      return name
    return f'{self.lines.where("steps", number)}: step {number + 1} ({name})'

  def data(self) -> dict[str, Any]:
    """Returns it as data, with the values of variables and without files."""
    return {
      'inputs': dict.fromkeys(self.inputs),
      'steps': [one.data() for one in self.steps],
      'outputs': {k: v.data() or None for k, v in self.outputs.items()},
    }
