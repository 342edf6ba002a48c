"""Parsing: from text or data to a `Spec`, checked part by part."""

from __future__ import annotations

import collections
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
# Options of an output, and the types of those that are checked here.
_TARGET: Mapping[str, type | None] = {
  'path': None,
  'of': str,
  'format': str,
  'shard-size': None,
  'strict-flax': bool,
  'manifest': bool,
  'metadata': None,
  'config': None,
  'like': None,
}
_NAME = re.compile(r'[A-Za-z_]\w*')
_VARIABLE = re.compile(r'\$(?:\$|\{([^{}]*)\})')


def read(written: str, name: str, folder: str | os.PathLike[str] = '.') -> Spec:
  """Reads a recipe from text.

  Args:
    written: YAML or JSON.
    name: where it came from, for messages.
    folder: files are relative to it.

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
  """Parses data.

  Args:
    data: `steps`, and optionally `inputs`, `vars` and `outputs`.
    lines: the line of each part, for messages.
    folder: files are relative to it.

  Raises:
    RecipeError: for anything that is no recipe, with the line.
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
  """Returns a recipe with files and variables filled in.

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
  # Files that are named when it is run are relative to the current folder.
  files = {
    k: pathlib.Path(values[k])
    for k in (*spec.inputs, *spec.outputs)
    if values.get(k) is not None
  }
  variables = {k: values.get(k, v) for k, v in spec.vars.items()}
  steps = spec.steps
  # Steps have the values of variables, so they are parsed again for new ones.
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
  """Parses the parts of a recipe.

  Args:
    lines: the line of each part, for messages.
    folder: files are relative to it.
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
    """Returns the whole recipe."""
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
    # `surgery run recipe.yaml NAME=VALUE` does not say which of them is meant.
    counts = collections.Counter((*targets, *variables, *files))
    name, count = max(counts.items(), key=lambda one: one[1])
    if count > 1:
      raise errors.RecipeError(
        f'{self._where("outputs", name)}: {name!r} is used twice. Inputs, vars '
        'and outputs must have different names.'
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
    """Returns an output: a file alone, or a mapping of options."""
    where = self._where('outputs', name)
    if isinstance(value, Target):
      return value
    if not isinstance(value, Mapping):
      file = self._file(value, 'outputs', name)
      return Target(file, folder=is_folder(value))
    options = self._target_options(value, name)
    shard_size = _shard_size(options.get('shard-size'), where)
    strict = bool(options.get('strict-flax', False))
    if strict and shard_size is not None:
      raise errors.RecipeError(
        f'{where}: strict-flax does not go with shard-size: flax writes one '
        'file.'
      )
    manifest = options.get('manifest')
    return Target(
      self._file(options.get('path'), 'outputs', name),
      options.get('of'),
      options.get('format'),
      shard_size,
      strict,
      manifest is None or manifest,
      _metadata(options.get('metadata') or {}, where),
      _config(options.get('config') or {}, where),
      self._file(options.get('like'), 'outputs', name, 'like'),
      is_folder(options.get('path')),
    )

  def _target_options(
    self, written: Mapping[str, Any], name: str
  ) -> dict[str, Any]:
    """Returns the options of an output, whose names and types are checked."""
    where = self._where('outputs', name)
    options: dict[str, Any] = {}
    for key, item in written.items():
      self._once(key.replace('_', '-'), item, options, where)
    for key, item in options.items():
      if key not in _TARGET:
        raise errors.RecipeError(
          f'{self._where("outputs", name, key)}: an output has no {key!r}.'
          f'{errors.suggest(key, _TARGET)}'
        )
      kind = _TARGET[key]
      if item is not None and kind and not isinstance(item, kind):
        raise errors.RecipeError(
          f'{where}: {key}: expected {definitions.described(kind)}, found '
          f'{item!r}.'
        )
    return options

  def _step(self, raw: Any, number: int) -> Step:
    """Returns a step: its name alone, or a mapping with `in` and `as`."""
    where = self._where('steps', number)
    raw = self._substituted(raw, where)
    if isinstance(raw, str):
      return Step(raw)
    if not isinstance(raw, Mapping):
      raise errors.RecipeError(
        f"{where}: step {number + 1}: expected e.g. 'drop: SELECTOR', found "
        f'{raw!r}.'
      )
    # A step is one key beside `in` and `as`. More are options that were not
    # indented, which would otherwise be ignored.
    names = [key for key in raw if key not in ('in', 'as')]
    if len(names) != 1:
      shown = ', '.join(map(str, names)) or 'none'
      raise errors.RecipeError(
        f'{where}: step {number + 1}: expected one step, found {shown}. Each '
        'step is an item of the list; indent its options further, or put them '
        "in '{…}'."
      )
    on, result = (
      _alias(raw.get(key), f'{where}: step {number + 1}: {key}')
      for key in ('in', 'as')
    )
    return Step(names[0], raw[names[0]], on, result)

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
    # A variable alone keeps its type: '${weight}' is a number.
    whole = _VARIABLE.fullmatch(value)
    if whole and whole[1] is not None:
      return self._evaluated(whole[1], where)

    def one(match: re.Match[str]) -> str:
      return '$' if match[1] is None else str(self._evaluated(match[1], where))

    return _VARIABLE.sub(one, value)

  def _once(
    self, key: Any, value: Any, into: dict[Any, Any], where: str
  ) -> None:
    """Sets a key that is not there yet.

    Raises:
      RecipeError: if it is.
    """
    if key in into:
      raise errors.RecipeError(f'{where}: {key!r} is given twice.')
    into[key] = value

  def _evaluated(self, written: str, where: str) -> Any:
    """Returns the value of a variable, or of an expression."""
    # A name alone may have any value; in an expression it has to be a number.
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


def _alias(value: Any, what: str) -> str | None:
  """Returns the alias of a model, if one is given."""
  if value is None or (isinstance(value, str) and _NAME.fullmatch(value)):
    return value
  raise errors.RecipeError(
    f'{what}: expected the name of a model, found {value!r}.'
  )


def _shard_size(value: Any, where: str) -> int | None:
  try:
    return None if value is None else nbytes(value)
  except errors.RecipeError as error:
    raise errors.RecipeError(f'{where}: shard-size: {error}') from None


def _metadata(value: Any, where: str) -> dict[str, str]:
  if not isinstance(value, Mapping) or not all(
    isinstance(one, str) for pair in value.items() for one in pair
  ):
    raise errors.RecipeError(
      f'{where}: metadata: expected text by text, as {{format: pt}}, found '
      f'{value!r}. Put numbers in quotes.'
    )
  return dict(value)


def _config(value: Any, where: str) -> dict[str, Any]:
  if not isinstance(value, Mapping):
    raise errors.RecipeError(
      f'{where}: config: expected keys and values, as '
      f'{{num_hidden_layers: 10}}, found {value!r}.'
    )
  return dict(value)
