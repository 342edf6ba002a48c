"""From what is written to a `Spec`: the one way in which recipes are read."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from surgery import errors
from surgery.recipes import definitions, expressions, text
from surgery.recipes.spec import Spec, Step, Target, is_folder, nbytes

_TOP = ('inputs', 'vars', 'steps', 'outputs', 'about')
_TARGET = (
  'path',
  'of',
  'format',
  'shard-size',
  'strict-flax',
  'manifest',
  'metadata',
  'config',
  'like',
)
_NAME = re.compile(r'[A-Za-z_]\w*')
_VARIABLE = re.compile(r'\$(?:\$|\{([^{}]*)\})')


def read(written: str, name: str, folder: str | os.PathLike[str] = '.') -> Spec:
  """Reads a recipe from text.

  Args:
    written: YAML or JSON.
    name: where it came from, for messages.
    folder: to which files are relative.

  Raises:
    RecipeError: if it cannot be read, with the line.
  """
  data, lines = text.read(written, name)
  if isinstance(data, list):
    data, lines = {'steps': data}, lines.under('steps')
  if not isinstance(data, Mapping):
    raise errors.RecipeError(
      f'{name}: expected a mapping with steps, found {data!r}.'
    )
  for key in data:
    if key not in _TOP:
      raise errors.RecipeError(
        f'{lines.where(key)}: a recipe has no {key!r}.'
        f'{errors.suggest(key, _TOP)}'
      )
  return parse(data, lines, pathlib.Path(folder))


def parse(
  data: Mapping[str, Any], lines: text.Lines, folder: pathlib.Path
) -> Spec:
  """Returns the recipe that data says.

  Args:
    data: `steps`, and where they are given `inputs`, `vars` and `outputs`.
    lines: where each part stands, for messages.
    folder: to which files are relative.

  Raises:
    RecipeError: for what cannot be a recipe, with the line.
  """

  def mapping(key: str, default: Any) -> Mapping[str, Any]:
    value = data.get(key, default)
    if not isinstance(value, Mapping):
      raise errors.RecipeError(
        f'{lines.where(key)}: {key}: expected names and values, found '
        f'{value!r}.'
      )
    return value

  steps = data.get('steps')
  inputs = mapping('inputs', {'model': None})
  variables = mapping('vars', {}) if data.get('vars') else {}
  outputs = mapping('outputs', {'out': None})
  return _Parsing(lines, folder).spec(inputs, variables, steps, outputs)


def bound(spec: Spec, values: Mapping[str, Any]) -> Spec:
  """Returns a recipe with files and variables that were missing.

  Args:
    spec: the recipe.
    values: files by the names of inputs and outputs, and values by those of
      variables.

  Raises:
    RecipeError: for a name that the recipe does not have.
  """
  known = (*spec.inputs, *spec.outputs, *spec.vars)
  for name in values:
    if name not in known:
      raise errors.RecipeError(
        f'{spec.origin}: it has no input, output or variable {name!r}.'
        f'{errors.suggest(name, known)}'
      )
  # Files that are given by who runs it are relative to where that is.
  files = {
    k: pathlib.Path(values[k])
    for k in (*spec.inputs, *spec.outputs)
    if values.get(k) is not None
  }
  variables = {k: values.get(k, v) for k, v in spec.vars.items()}
  steps = spec.steps
  if variables != spec.vars:
    steps = _Parsing(spec.lines, spec.folder).steps(spec.written, variables)
  return dataclasses.replace(
    spec,
    inputs={k: files.get(k, v) for k, v in spec.inputs.items()},
    outputs={
      k: dataclasses.replace(
        v,
        path=files.get(k, v.path),
        folder=is_folder(values[k]) if k in files else v.folder,
      )
      for k, v in spec.outputs.items()
    },
    vars=variables,
    steps=steps,
  )


class _Parsing:
  """Reads the parts of a recipe.

  Args:
    lines: where each part stands, for messages.
    folder: to which files are relative.
  """

  def __init__(self, lines: text.Lines, folder: pathlib.Path) -> None:
    self._lines, self._where = lines, lines.where
    self._folder = folder
    self._vars: Mapping[str, Any] = {}

  def spec(
    self,
    inputs: Mapping[str, Any],
    variables: Mapping[str, Any],
    steps: Any,
    outputs: Mapping[str, Any],
  ) -> Spec:
    """Returns all of it."""
    files = {
      self._named(k, 'inputs'): self._file(v, 'inputs', k)
      for k, v in inputs.items()
    }
    if not files:
      raise errors.RecipeError(f'{self._where("inputs")}: expected an input.')
    for name in variables:
      self._named(name, 'vars')
    targets = {
      self._named(k, 'outputs'): self._target(v, k) for k, v in outputs.items()
    }
    both = [k for k in targets if k in files or k in variables]
    both += [k for k in variables if k in files]
    if both:
      raise errors.RecipeError(
        f'{self._where("outputs", both[0])}: {both[0]!r} is the name of '
        'two things; inputs, vars and outputs share their names.'
      )
    if not isinstance(steps, (list, tuple)):
      raise errors.RecipeError(
        f'{self._where("steps")}: steps: expected a list, found {steps!r}.'
      )
    return Spec(
      files,
      dict(variables),
      self.steps(steps, variables),
      targets,
      tuple(steps),
      self._lines,
      self._folder,
    )

  def steps(
    self, written: Iterable[Any], variables: Mapping[str, Any]
  ) -> tuple[Step, ...]:
    """Returns steps with the values of variables."""
    self._vars = variables
    return tuple(self._step(one, k) for k, one in enumerate(written))

  def _named(self, name: str, part: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
      raise errors.RecipeError(
        f'{self._where(part, name)}: {part}: a name has letters, digits and '
        f'underscores, found {name!r}.'
      )
    return name

  def _file(self, value: Any, *place: str) -> pathlib.Path | None:
    if value is None:
      return None
    if not isinstance(value, (str, os.PathLike)) or not str(value):
      raise errors.RecipeError(
        f'{self._where(*place)}: {place[-1]}: expected a file, found {value!r}.'
      )
    return self._folder / value

  def _target(self, value: Any, name: str) -> Target:
    where = self._where('outputs', name)
    if isinstance(value, Target):
      return value
    if not isinstance(value, Mapping):
      file = self._file(value, 'outputs', name)
      return Target(file, folder=is_folder(value))
    said: dict[str, Any] = {}
    for key, item in value.items():
      self._once(key.replace('_', '-'), item, said, where)
    for key in said:
      if key not in _TARGET:
        raise errors.RecipeError(
          f'{self._where("outputs", name, key)}: an output has no {key!r}.'
          f'{errors.suggest(key, _TARGET)}'
        )
    size = said.get('shard-size')
    try:
      shard_size = None if size is None else nbytes(size)
    except errors.RecipeError as error:
      raise errors.RecipeError(f'{where}: shard-size: {error}') from None
    for key, kind in (
      ('of', str),
      ('format', str),
      ('strict-flax', bool),
      ('manifest', bool),
    ):
      if said.get(key) is not None and not isinstance(said[key], kind):
        raise errors.RecipeError(
          f'{where}: {key}: expected {definitions.described(kind)}, found '
          f'{said[key]!r}.'
        )
    strict = bool(said.get('strict-flax', False))
    if strict and shard_size is not None:
      raise errors.RecipeError(
        f'{where}: strict-flax does not go with shard-size: flax writes one '
        'file.'
      )
    metadata = said.get('metadata') or {}
    if not isinstance(metadata, Mapping) or not all(
      isinstance(k, str) and isinstance(v, str) for k, v in metadata.items()
    ):
      raise errors.RecipeError(
        f'{where}: metadata: expected text by text, as {{format: pt}}, found '
        f'{metadata!r}. Put numbers in quotes.'
      )
    manifest = said.get('manifest')
    config = said.get('config') or {}
    if not isinstance(config, Mapping):
      raise errors.RecipeError(
        f'{where}: config: expected keys and values, as '
        f'{{num_hidden_layers: 10}}, found {config!r}.'
      )
    return Target(
      self._file(said.get('path'), 'outputs', name),
      said.get('of'),
      said.get('format'),
      shard_size,
      strict,
      manifest is None or manifest,
      dict(metadata),
      dict(config),
      self._file(said.get('like'), 'outputs', name, 'like'),
      is_folder(said.get('path')),
    )

  def _step(self, raw: Any, number: int) -> Step:
    where = self._where('steps', number)
    raw = self._substituted(raw, where)
    if isinstance(raw, str):
      return Step(raw)
    if not isinstance(raw, Mapping):
      raise errors.RecipeError(
        f"{where}: step {number + 1}: expected e.g. 'drop: SELECTOR', found "
        f'{raw!r}.'
      )
    names = [key for key in raw if key not in ('in', 'as')]
    if len(names) != 1:
      shown = ', '.join(map(str, names)) or 'none'
      raise errors.RecipeError(
        f'{where}: step {number + 1}: expected one step, found {shown}. Each '
        "step is an item of the list; its options stand deeper, or in '{…}'."
      )
    for key in ('in', 'as'):
      if raw.get(key) is not None and not (
        isinstance(raw[key], str) and _NAME.fullmatch(raw[key])
      ):
        raise errors.RecipeError(
          f'{where}: step {number + 1}: {key}: expected the name of a model, '
          f'found {raw[key]!r}.'
        )
    return Step(names[0], raw[names[0]], raw.get('in'), raw.get('as'))

  def _substituted(self, value: Any, where: str) -> Any:
    """Returns a part of a recipe with the values of variables."""
    if isinstance(value, Mapping):
      found: dict[Any, Any] = {}
      for k, v in value.items():
        key = self._substituted(k, where)
        self._once(key, self._substituted(v, where), found, where)
      return found
    if isinstance(value, (list, tuple)):
      return [self._substituted(one, where) for one in value]
    if not isinstance(value, str):
      return value
    whole = _VARIABLE.fullmatch(value)
    if whole and whole[1] is not None:
      return self._evaluated(whole[1], where)

    def one(match: re.Match[str]) -> str:
      return '$' if match[1] is None else str(self._evaluated(match[1], where))

    return _VARIABLE.sub(one, value)

  def _once(
    self, key: Any, value: Any, into: dict[Any, Any], where: str
  ) -> None:
    """Puts a value under a key that has none yet.

    Raises:
      RecipeError: if the key has one.
    """
    if key in into:
      raise errors.RecipeError(f'{where}: {key!r} is given twice.')
    into[key] = value

  def _evaluated(self, written: str, where: str) -> Any:
    """Returns a variable, or what an expression of some gives."""
    name = written.strip()
    if _NAME.fullmatch(name) or written in self._vars:
      return self._variable(written if written in self._vars else name, where)
    with errors.within(where):
      return expressions.evaluated(
        written, lambda one: self._variable(one, where)
      )

  def _variable(self, name: str, where: str) -> Any:
    if name not in self._vars:
      raise errors.RecipeError(
        f'{where}: no variable is called {name!r}.'
        f"{errors.suggest(name, self._vars)} Write '$$' for a plain '$'."
      )
    if self._vars[name] is None:
      raise errors.RecipeError(
        f'{where}: the variable {name!r} has no value. Give {name}=VALUE.'
      )
    return self._vars[name]
