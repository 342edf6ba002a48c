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
      RecipeError: if it cannot be read, with the line.
      OSError: if the file cannot be.
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
      folder: to which files are relative.

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
    """What was read."""
    return self._spec

  @property
  def origin(self) -> str:
    """Where it came from, for messages."""
    return self._spec.origin

  @property
  def inputs(self) -> Mapping[str, pathlib.Path | None]:
    """Files by alias; None where who runs it names them."""
    return self._spec.inputs

  @property
  def outputs(self) -> Mapping[str, Target]:
    """What is written, by name."""
    return self._spec.outputs

  @property
  def vars(self) -> Mapping[str, Any]:
    """Values of variables; None where who runs it gives them."""
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
    """Plans it: opens what it reads, and does all but read tensors.

    Args:
      host: whose passes and formats there are.
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
    models = {self._spec.first: checkpoint, **others}
    return running.applied(self._spec, models, host or default_host())

  def __repr__(self) -> str:
    return f'<Recipe {self.origin}: {len(self.steps)} steps>'


def of(value: Recipe | Sequence[StepLike] | StepLike) -> Recipe:
  """Returns a recipe, or one of some steps."""
  if isinstance(value, Recipe):
    return value
  if isinstance(value, (str, Mapping)):
    return Recipe([value])
  return Recipe(value)


# What recipes are called, whatever a plugin reads of that name.
_OURS = ('.yaml', '.yml', '.json')


def _check_no_model(path: pathlib.Path) -> None:
  """Raises if a file is a saved model and no recipe, as its name says.

  Raises:
    RecipeError: saying how it is given to a recipe.
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
