"""What a recipe is once it is read: inputs, steps and outputs as plain data."""

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
    RecipeError: if it is none, or 0.
  """
  match = _SIZE.fullmatch(str(value).strip())
  unit = match and _UNITS.get(match[2].upper())
  if not match or not unit or not (number := round(float(match[1]) * unit)):
    raise errors.RecipeError(
      f'{value!r}: expected a number of bytes such as 5GB, 500MB or 2GiB.'
    )
  return number


def is_folder(value: Any) -> bool:
  """Whether a name is written as that of a folder: `out/`."""
  if not isinstance(value, (str, os.PathLike)):
    return False
  name = os.fspath(value)
  return isinstance(name, str) and name.endswith(('/', os.sep))


def _escaped(value: Any) -> Any:
  """Returns a value that is the same again when variables are put in."""
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
    value: what it is given: options, the first of them alone, or None.
    on: alias of the checkpoint that it changes; the first input by default.
    result: alias of what comes out; that of what it changes by default.
  """

  name: str
  value: Any = None
  on: str | None = None
  result: str | None = None

  def data(self) -> Any:
    """Returns it as data, as a recipe says it."""
    said: dict[str, Any] = {self.name: _escaped(self.value)}
    if self.on is not None:
      said['in'] = self.on
    if self.result is not None:
      said['as'] = self.result
    return self.name if said == {self.name: None} else said


@dataclasses.dataclass(frozen=True)
class Target:
  """One output of a recipe.

  Attributes:
    path: the file; None if who runs the recipe names it.
    of: alias of what is written; the first input's by default.
    format: name of the format, where the suffix does not tell it.
    shard_size: most bytes a file, if it becomes several.
    strict_flax: whether it is written as flax writes it, without a manifest.
    manifest: whether flags, metadata, digests, history and so on are written.
    metadata: what the file says of itself to other programs, text by text.
    config: what the `config.json` of a folder is to state, by key.
    like: a model folder from which configuration, tokenizer and licences go
      along; by default that of the input.
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
    said: dict[str, Any] = {}
    if self.of is not None:
      said['of'] = self.of
    if self.format is not None:
      said['format'] = self.format
    if self.shard_size is not None:
      said['shard-size'] = self.shard_size
    if self.strict_flax:
      said['strict-flax'] = True
    if not self.manifest:
      said['manifest'] = False
    if self.metadata:
      said['metadata'] = dict(self.metadata)
    if self.config:
      said['config'] = dict(self.config)
    return said


@dataclasses.dataclass(frozen=True)
class Spec:
  """A recipe as it was read; what plans, runs and records it takes this.

  Attributes:
    inputs: files by alias; None where who runs it names them. The first is what
      steps change.
    vars: values for `${name}` in steps.
    steps: the steps, with the values of variables.
    outputs: what is written, by name.
    written: the steps as they were given, with the names of variables.
    lines: where each part stands, for messages.
    folder: to which files are relative.
  """

  inputs: Mapping[str, pathlib.Path | None]
  vars: Mapping[str, Any]
  steps: tuple[Step, ...]
  outputs: Mapping[str, Target]
  written: tuple[Any, ...]
  lines: text.Lines
  folder: pathlib.Path

  @property
  def origin(self) -> str:
    """Where it came from; empty for a verb of the shell."""
    return self.lines.name

  @property
  def first(self) -> str:
    """Alias of the input that steps change."""
    return next(iter(self.inputs))

  def where(self, *place: str | int) -> str:
    """Returns where a part stands: file and line, or the recipe alone."""
    return self.lines.where(*place)

  def data(self) -> dict[str, Any]:
    """Returns it as data, with the values of variables and without files."""
    return {
      'inputs': dict.fromkeys(self.inputs),
      'steps': [one.data() for one in self.steps],
      'outputs': {k: v.data() or None for k, v in self.outputs.items()},
    }
