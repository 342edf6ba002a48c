"""Recipes on params."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import blox as bx
import jax
import numpy as np

from surgery import errors, expect
from surgery.editing import devices
from surgery.host.manager import Host, default_host
from surgery.live import adoption, checkpoints, lineage, placing
from surgery.live import params as live
from surgery.live.dispatch import types_of
from surgery.model.checkpoint import Checkpoint, open_checkpoint
from surgery.recipes import recipe as recipes
from surgery.recipes.recipe import Recipe

Model = TypeVar('Model', bx.Params, Checkpoint)


@devices.transfers()
def apply(
  model: Model,
  recipe: Recipe | Sequence[Mapping[str, Any] | str] | Mapping[str, Any] | str,
  *,
  graph: bx.Graph | None = None,
  host: Host | None = None,
  **inputs: bx.Params | Checkpoint | str | os.PathLike[str],
) -> Model:
  """Does the steps of a recipe on params, or on a saved model.

  On params they are done at once; a `Checkpoint` stays lazy, and nothing is
  read before it is written.

  Args:
    model: the model's params, or a `Checkpoint`; not changed.
    recipe: a recipe, its steps, or one step: `{'drop': '**/mask'}`.
    graph: the model's graph, for `type:` selectors.
    host: offers the passes.
    **inputs: other inputs of the recipe by alias: params, checkpoints or files.

  Returns:
    What the recipe's first output would have: params or a `Checkpoint`, as
    `model` is.

  Raises:
    RecipeError: for a mistake, with the step.
    CheckError: if an assertion of the recipe fails; for a `Checkpoint` when it
      is written.

  Example:
    params = surgery.apply(params, {'stack': 'h/<i>/** -> h/**'})
    both = surgery.apply(params, {'add': 'tuned::**/mlp/**'}, tuned='t.msgpack')
  """
  host = host or default_host()
  if not isinstance(model, Checkpoint):
    expect.params(model, apply)
  steps = recipes.as_recipe(recipe)
  missing = [alias for alias in inputs if alias not in steps.inputs]
  if missing and not isinstance(recipe, Recipe):
    given = {**steps.inputs, **dict.fromkeys(missing)}
    steps = Recipe([one.data() for one in steps.steps], inputs=given)
  others = {alias: opened(alias, one, host) for alias, one in inputs.items()}
  if isinstance(model, Checkpoint):
    before = model
  else:
    before = checkpoints.to_checkpoint(adoption.adopted(model))
  if graph is not None:
    said = before.manifest.replace(layer_types=types_of(graph))
    before = before.replace(manifest=said)
  after = steps.apply(before, host=host, **others)
  if isinstance(model, Checkpoint):
    return after
  after.check()
  params = of_jax(checkpoints.to_params(after, host, like=model), model)
  return lineage.remembered(
    params, model, before, 'apply', steps, (), others, host
  )


def opened(alias: str, value: Any, host: Host) -> Checkpoint:
  """Returns an input as a checkpoint: params, a file, or one already.

  Raises:
    SurgeryError: if it is something else.
  """
  if isinstance(value, Checkpoint):
    return value
  if isinstance(value, bx.Params):
    return checkpoints.to_checkpoint(adoption.adopted(value))
  if isinstance(value, (str, os.PathLike)):
    return checkpoints.from_tensors(open_checkpoint(value, host=host))
  raise errors.SurgeryError(
    f'apply: {alias}: expected params, a Checkpoint or a file, found '
    f'{type(value).__name__}.'
  )


def of_jax(params: bx.Params, before: bx.Params) -> bx.Params:
  """Returns params in which new arrays of numpy are arrays of JAX.

  64-bit arrays stay numpy's if JAX would narrow them, as do unchanged ones.
  """
  data = {}
  for path, param in params.items():
    old = before[path].value if path in before else None
    value = param.value
    if (
      isinstance(value, (np.ndarray, np.generic))
      and value is not old
      and jax.dtypes.canonicalize_dtype(value.dtype) == value.dtype
    ):
      param = param.replace(value=placing.kept(value, old))
    data[path] = param
  records, notes = live.records_of(params), live.notes_of(params)
  return live.make(data, params.is_locked, records, notes)
