"""A recipe: inputs by alias, steps, outputs.

    inputs: {model: base.msgpack, tuned: null}
    vars: {weight: 0.4}
    steps:
      - drop: '**/mask'
      - add: {'tuned::**/mlp/**': '${weight}'}
      - cast: {to: bf16, keep: '**/norm'}
    outputs: {out: {path: out.msgpack, shard-size: 5GB}}

Steps change the first input, or the one that `in:` names; `as:` gives the
result another alias and leaves that input as it is. An input or output that is
null has to be named by who runs the recipe.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery import errors
from surgery.host.manager import Host, default_host
from surgery.model.checkpoint import Checkpoint
from surgery.recipes import definitions, text

if TYPE_CHECKING:
  from surgery.recipes.running import Plan

StepLike = Mapping[str, Any] | str

_TOP = ('inputs', 'vars', 'steps', 'outputs', 'about')
_TARGET = (
  'path',
  'of',
  'format',
  'shard-size',
  'strict-flax',
  'manifest',
  'metadata',
)
_NAME = re.compile(r'[A-Za-z_]\w*')
_VARIABLE = re.compile(r'\$(?:\$|\{([^{}]*)\})')
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
  """

  path: pathlib.Path | None = None
  of: str | None = None
  format: str | None = None
  shard_size: int | None = None
  strict_flax: bool = False
  manifest: bool = True
  metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

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
    return said


class Recipe:
  """Changes to saved models or params, said as data.

  Args:
    steps: the steps, as in a recipe's file: `{'drop': '**/mask'}`, `'merge'`.
    inputs: files by alias; None where who runs it names them. Steps change the
      first.
    outputs: files, or options, by name.
    vars: values for `${name}` in steps.
    origin: where it came from, for messages.
    folder: to which files are relative.

  Raises:
    RecipeError: for what cannot be a recipe.

  Example:
    recipe = surgery.Recipe([{'drop': '**/mask'}, {'cast': 'bf16'}])
    recipe.run(model='base.msgpack', out='out.msgpack')
    params = surgery.apply(params, recipe)
  """

  def __init__(
    self,
    steps: Iterable[StepLike],
    *,
    inputs: Mapping[str, str | os.PathLike[str] | None] | None = None,
    outputs: Mapping[str, Any] | None = None,
    vars: Mapping[str, Any] | None = None,
    origin: str = 'recipe',
    folder: str | os.PathLike[str] = '.',
  ) -> None:
    self.origin = origin
    self._lines: text.Lines | None = None
    self._folder = pathlib.Path(folder)
    given = {'model': None} if inputs is None else dict(inputs)
    targets = {'out': None} if outputs is None else dict(outputs)
    self._read(given, vars or {}, list(steps), targets)

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> Recipe:
    """Reads a recipe from a file of YAML or JSON.

    Files that it names are relative to its folder.

    Raises:
      RecipeError: if it cannot be read, with the line.
      OSError: if the file cannot be.
    """
    where = pathlib.Path(path)
    try:
      written = where.read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
      raise errors.RecipeError(f'{where}: not UTF-8 text: {error}.') from None
    return cls.loads(written, str(where), where.parent)

  @classmethod
  def loads(
    cls,
    written: str,
    name: str = 'recipe',
    folder: str | os.PathLike[str] = '.',
  ) -> Recipe:
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
    recipe = cls.__new__(cls)
    recipe.origin = name
    recipe._lines = lines
    recipe._folder = pathlib.Path(folder)
    recipe._read(
      _mapping(data.get('inputs', {'model': None}), 'inputs', lines),
      _mapping(data.get('vars') or {}, 'vars', lines),
      data.get('steps'),
      _mapping(data.get('outputs', {'out': None}), 'outputs', lines),
    )
    return recipe

  def where(self, *place: str | int) -> str:
    """Returns where a part of it stands: file and line, or step."""
    if self._lines is not None:
      return self._lines.where(*place)
    return self.origin

  def _read(
    self,
    inputs: Mapping[str, Any],
    variables: Mapping[str, Any],
    steps: Any,
    outputs: Mapping[str, Any],
  ) -> None:
    self.inputs = {
      self._named(k, 'inputs'): self._file(v, 'inputs', k)
      for k, v in inputs.items()
    }
    if not self.inputs:
      raise errors.RecipeError(f'{self.where("inputs")}: expected an input.')
    for name in variables:
      self._named(name, 'vars')
    self.vars = dict(variables)
    self.outputs = {
      self._named(k, 'outputs'): self._target(v, k) for k, v in outputs.items()
    }
    both = [k for k in self.outputs if k in self.inputs or k in self.vars]
    both += [k for k in self.vars if k in self.inputs]
    if both:
      raise errors.RecipeError(
        f'{self.where("outputs", both[0])}: {both[0]!r} is the name of two '
        'things; inputs, vars and outputs share their names.'
      )
    if not isinstance(steps, list):
      raise errors.RecipeError(
        f'{self.where("steps")}: steps: expected a list, found {steps!r}.'
      )
    self._raw_steps = steps
    self.steps = tuple(self._step(one, k) for k, one in enumerate(steps))

  def _named(self, name: str, part: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
      raise errors.RecipeError(
        f'{self.where(part, name)}: {part}: a name has letters, digits and '
        f'underscores, found {name!r}.'
      )
    return name

  def _file(self, value: Any, *place: str) -> pathlib.Path | None:
    if value is None:
      return None
    if not isinstance(value, (str, os.PathLike)) or not str(value):
      raise errors.RecipeError(
        f'{self.where(*place)}: {place[-1]}: expected a file, found {value!r}.'
      )
    return self._folder / value

  def _target(self, value: Any, name: str) -> Target:
    where = self.where('outputs', name)
    if not isinstance(value, Mapping):
      return Target(self._file(value, 'outputs', name))
    said: dict[str, Any] = {}
    for key, item in value.items():
      self._once(key.replace('_', '-'), item, said, where)
    for key in said:
      if key not in _TARGET:
        raise errors.RecipeError(
          f'{self.where("outputs", name, key)}: an output has no {key!r}.'
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
    return Target(
      self._file(said.get('path'), 'outputs', name),
      said.get('of'),
      said.get('format'),
      shard_size,
      strict,
      manifest is None or manifest,
      dict(metadata),
    )

  def _step(self, raw: Any, number: int) -> Step:
    where = self.where('steps', number)
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
      return self._variable(whole[1], where)

    def one(match: re.Match[str]) -> str:
      return '$' if match[1] is None else str(self._variable(match[1], where))

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

  def _variable(self, name: str, where: str) -> Any:
    if name not in self.vars:
      raise errors.RecipeError(
        f'{where}: no variable is called {name!r}.'
        f"{errors.suggest(name, self.vars)} Write '$$' for a plain '$'."
      )
    if self.vars[name] is None:
      raise errors.RecipeError(
        f'{where}: the variable {name!r} has no value. Give {name}=VALUE.'
      )
    return self.vars[name]

  # What becomes of it.

  def bound(self, **values: Any) -> Recipe:
    """Returns the recipe with files and variables that were missing.

    Args:
      **values: files by the names of inputs and outputs, and values by those of
        variables.

    Raises:
      RecipeError: for a name that the recipe does not have.
    """
    known = (*self.inputs, *self.outputs, *self.vars)
    for name in values:
      if name not in known:
        raise errors.RecipeError(
          f'{self.origin}: it has no input, output or variable {name!r}.'
          f'{errors.suggest(name, known)}'
        )
    new: Recipe = object.__new__(type(self))
    new.origin, new._lines, new._folder = self.origin, self._lines, self._folder
    files = {
      k: pathlib.Path(values[k])
      for k in (*self.inputs, *self.outputs)
      if values.get(k) is not None
    }
    new.inputs = {k: files.get(k, v) for k, v in self.inputs.items()}
    new.outputs = {
      k: dataclasses.replace(v, path=files.get(k, v.path))
      for k, v in self.outputs.items()
    }
    new.vars = {k: values.get(k, v) for k, v in self.vars.items()}
    new._raw_steps = self._raw_steps
    new.steps = self.steps
    if new.vars != self.vars:
      new.steps = tuple(
        new._step(one, k) for k, one in enumerate(self._raw_steps)
      )
    return new

  def data(self) -> dict[str, Any]:
    """Returns it as data, with the values of variables and without files."""
    said: dict[str, Any] = {
      'inputs': dict.fromkeys(self.inputs),
      'steps': [one.data() for one in self.steps],
      'outputs': {k: v.data() or None for k, v in self.outputs.items()},
    }
    return said

  def plan(self, *, host: Host | None = None, **values: Any) -> Plan:
    """Plans it: opens what it reads, and does all but read tensors.

    Args:
      host: whose passes and formats there are.
      **values: files and variables, as `bound` takes them.

    Raises:
      RecipeError: for a mistake, with line and step.
    """
    from surgery.recipes import running

    return running.plan(self.bound(**values), host or default_host())

  def run(
    self, *, overwrite: bool = False, host: Host | None = None, **values: Any
  ) -> Plan:
    """Plans it and writes its outputs, all or none.

    Args:
      overwrite: whether outputs may exist.
      host: whose passes and formats there are.
      **values: files and variables, as `bound` takes them.

    Returns:
      The plan that was carried out.

    Raises:
      RecipeError: for a mistake, with line and step.
      CheckError: if something does not hold that the recipe asserts.
    """
    plan = self.plan(host=host, **values)
    plan.write(overwrite=overwrite)
    return plan

  def apply(
    self,
    checkpoint: Checkpoint,
    *,
    host: Host | None = None,
    **others: Checkpoint,
  ) -> Checkpoint:
    """Does the steps on a checkpoint; nothing is read or written yet.

    Args:
      checkpoint: the first input.
      host: whose passes there are.
      **others: the other inputs, by alias.

    Returns:
      What the first output is made of.

    Raises:
      RecipeError: for a mistake, with line and step.
    """
    from surgery.recipes import running

    first = next(iter(self.inputs))
    models = {first: checkpoint, **others}
    return running.applied(self, models, host or default_host())

  def __repr__(self) -> str:
    return f'<Recipe {self.origin}: {len(self.steps)} steps>'


def _mapping(value: Any, name: str, lines: text.Lines) -> Mapping[str, Any]:
  if not isinstance(value, Mapping):
    raise errors.RecipeError(
      f'{lines.where(name)}: {name}: expected names and values, found '
      f'{value!r}.'
    )
  return value


def of(value: Recipe | Sequence[StepLike] | StepLike) -> Recipe:
  """Returns a recipe, or one of some steps."""
  if isinstance(value, Recipe):
    return value
  if isinstance(value, (str, Mapping)):
    return Recipe([value])
  return Recipe(value)
