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
null is named when the recipe is run.
"""

from __future__ import annotations

import copy
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from surgery import errors
from surgery.host import location
from surgery.host.manager import Host, default_host
from surgery.model.checkpoint import Checkpoint
from surgery.recipes import parsing, running, text
from surgery.recipes.running import Plan
from surgery.recipes.spec import Spec, Step, Target

StepLike = Mapping[str, Any] | str


class Recipe:
  """Changes to saved models or params, as data.

  Args:
    steps: the steps, as in a recipe's file: `{'drop': '**/mask'}`, `'merge'`.
    inputs: files by alias; None if they are named when it is run. Steps change
      the first.
    outputs: files, or options, by name.
    vars: values for `${name}` in steps.
    origin: where it came from, for messages.
    folder: files are relative to it.

  Raises:
    RecipeError: for anything that is no recipe.

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
    data = {
      'inputs': {'model': None} if inputs is None else dict(inputs),
      'vars': vars or {},
      'steps': steps if isinstance(steps, (str, Mapping)) else list(steps),
      'outputs': {'out': None} if outputs is None else dict(outputs),
    }
    self._spec = parsing.parse(data, text.Lines(origin), pathlib.Path(folder))

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> Recipe:
    """Reads a recipe from a file of YAML or JSON.

    Files that it names are relative to its folder.

    Raises:
      RecipeError: for anything that is no recipe, with the line.
      OSError: if the file cannot be read.
    """
    where = pathlib.Path(path)
    _check_no_model(where)
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
      folder: files are relative to it.

    Raises:
      RecipeError: if it cannot be read, with the line.
    """
    return cls([])._with(parsing.read(written, name, folder))

  def _with(self, spec: Spec) -> Recipe:
    new = copy.copy(self)
    new._spec = spec
    return new

  @property
  def spec(self) -> Spec:
    """The recipe as plain data."""
    return self._spec

  @property
  def origin(self) -> str:
    """Where it came from, for messages."""
    return self._spec.origin

  @property
  def inputs(self) -> Mapping[str, pathlib.Path | None]:
    """Files by alias; None if they are named when it is run."""
    return self._spec.inputs

  @property
  def outputs(self) -> Mapping[str, Target]:
    """What is written, by name."""
    return self._spec.outputs

  @property
  def vars(self) -> Mapping[str, Any]:
    """Values of variables; None if they are given when it is run."""
    return self._spec.vars

  @property
  def steps(self) -> tuple[Step, ...]:
    """The steps, with the values of variables."""
    return self._spec.steps

  def bound(self, **values: Any) -> Recipe:
    """Returns the recipe with files and variables that were missing.

    Args:
      **values: files by the names of inputs and outputs, and values by those of
        variables.

    Raises:
      RecipeError: for a name that the recipe does not have.
    """
    return self._with(parsing.bound(self._spec, values))

  def data(self) -> dict[str, Any]:
    """Returns it as data, with the values of variables and without files."""
    return self._spec.data()

  def plan(self, *, host: Host | None = None, **values: Any) -> Plan:
    """Plans it: opens its inputs and does its steps, without reading tensors.

    Args:
      host: offers the passes and formats.
      **values: files and variables, as `bound` takes them.

    Raises:
      RecipeError: for a mistake, with line and step.
    """
    spec = parsing.bound(self._spec, values)
    return running.plan(spec, host or default_host())

  def run(
    self, *, overwrite: bool = False, host: Host | None = None, **values: Any
  ) -> Plan:
    """Plans it and writes its outputs, all or none.

    Args:
      overwrite: whether existing outputs are replaced.
      host: offers the passes and formats.
      **values: files and variables, as `bound` takes them.

    Returns:
      The plan that was carried out.

    Raises:
      RecipeError: for a mistake, with line and step.
      CheckError: if an assertion of the recipe fails.
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
    """Does the steps on a checkpoint, without reading or writing tensors.

    Args:
      checkpoint: the first input.
      host: offers the passes.
      **others: the other inputs, by alias.

    Returns:
      The checkpoint that the first output would have.

    Raises:
      RecipeError: for a mistake, with line and step.
    """
    models = {self._spec.first: checkpoint, **others}
    return running.applied(self._spec, models, host or default_host())

  def __repr__(self) -> str:
    return f'<Recipe {self.origin}: {len(self.steps)} steps>'


def as_recipe(value: Recipe | Sequence[StepLike] | StepLike) -> Recipe:
  """Returns a recipe as it is, and steps as a recipe."""
  if isinstance(value, Recipe):
    return value
  if isinstance(value, (str, Mapping)):
    return Recipe([value])
  return Recipe(value)


# Suffixes of recipes, even if a plugin has a format with one of them.
_OURS = ('.yaml', '.yml', '.json')


def _check_no_model(path: pathlib.Path) -> None:
  """Raises if a file has the suffix of a saved model.

  Raises:
    RecipeError: with how a model is given to a recipe.
  """
  suffix = location.suffix(path)
  if suffix in _OURS or not path.is_file():
    return
  forms = default_host().formats.values()
  if any(suffix in form.suffixes for form in forms):
    raise errors.RecipeError(
      f'{path}: expected a recipe, which is a file of YAML, found a saved '
      f'model. A recipe gets it as an input: surgery run RECIPE model={path} '
      'out=FILE.'
    )
