"""Histories: the recipes that made an output, recorded in it."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from surgery import errors, version
from surgery.host.manager import Host
from surgery.model.checkpoint import Checkpoint
from surgery.naming import paths
from surgery.recipes import definitions, text
from surgery.recipes.spec import Spec

# Marks a digest without values: models of the same structure share it.
_STRUCTURE = 'structure-'


def fingerprint(checkpoint: Checkpoint) -> str:
  """Returns a digest that identifies a model, without reading tensors.

  It is a digest of names, dtypes, shapes, plain values, and the recorded
  digests of tensors.

  Returns:
    `xxh3:…`; or `structure-xxh3:…` if a tensor has no digest, so that a model
    with other values may have the same.
  """
  from surgery.files.digest import Digester

  rows = [
    [
      paths.show(path),
      leaf.dtype,
      repr(leaf.load()) if leaf.shape is None else list(leaf.shape),
      leaf.digest,
    ]
    for path, leaf in checkpoint.items()
  ]
  text = json.dumps(rows, ensure_ascii=False, separators=(',', ':'))
  digester = Digester()
  digester.update(text.encode(errors='surrogatepass'))
  tensors = [one for one in checkpoint.values() if one.shape is not None]
  known = all(one.digest is not None for one in tensors)
  return f'{"" if known else _STRUCTURE}{digester.digest()}'


def entry(
  recipe: Spec, output: str, main: str, inputs: Mapping[str, Checkpoint]
) -> dict[str, Any]:
  """Returns the entry that is recorded for a recipe.

  Args:
    recipe: the recipe.
    output: name of the output in which it is recorded.
    main: alias of the input whose history the output continues.
    inputs: the inputs, by alias. Of files only names are recorded, and no
      times, so that the same recipe gives the same bytes.
  """
  data = recipe.data()
  # Names of other outputs are left out, so that this one does not depend on
  # them.
  outputs = {output: data['outputs'][output]}
  return {
    'version': version.VERSION,
    'recipe': {'steps': _jsonable(data['steps']), 'outputs': outputs},
    'main': main,
    'inputs': [
      {
        'name': alias,
        'file': pathlib.Path(one.origin).name,
        'digest': fingerprint(one),
      }
      for alias, one in inputs.items()
    ],
  }


def _jsonable(value: Any) -> Any:
  """Returns a value of a recipe as JSON data."""
  if isinstance(value, Mapping):
    return {str(k): _jsonable(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_jsonable(one) for one in value]
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  return str(value)


def recorded(checkpoint: Checkpoint, last: Mapping[str, Any]) -> Checkpoint:
  """Returns a checkpoint whose history ends with an entry."""
  manifest = checkpoint.manifest
  return checkpoint.replace(
    manifest=manifest.replace(history=(*manifest.history, last))
  )


def lines(
  history: Iterable[Mapping[str, Any]], name: str, host: Host
) -> Iterator[str]:
  """Yields the lines of a recipe that makes a file again, with comments.

  Args:
    history: the entries, oldest first.
    name: the file that it made.
    host: offers the passes.
  """
  history = list(history)
  entries = [one for one in history if _is_entry(one)]
  yield from _comments(entries)
  others = len(history) - len(entries)
  if others:
    yield f'# entries that are no recipes of surgery: {others}'
  if entries:
    yield from text.write(as_recipe(entries, name, host)).splitlines()


def _comments(entries: Iterable[Mapping[str, Any]]) -> Iterator[str]:
  """Yields a comment for each entry: the version and the inputs."""
  no_values = False
  for one in entries:
    parts = [f'surgery {one["version"]}'] if one.get('version') else []
    parts += [f'{i["file"]} {i["digest"]}' for i in _inputs(one)]
    yield f'# {", ".join(parts)}'
    digests = (str(i['digest']) for i in _inputs(one))
    no_values |= any(digest.startswith(_STRUCTURE) for digest in digests)
  if no_values:
    yield (
      f'# {_STRUCTURE}…: tensors had no digest, so it is that of names, dtypes '
      'and shapes; see surgery verify --write'
    )


def _is_entry(one: Any) -> bool:
  """Whether an entry of a history was recorded by `entry`."""
  recipe = one.get('recipe') if isinstance(one, Mapping) else None
  return (
    isinstance(recipe, Mapping)
    and isinstance(recipe.get('steps'), list)
    and isinstance(recipe.get('outputs'), Mapping)
    and bool(recipe['outputs'])
    and bool(_inputs(one))
  )


def _inputs(one: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """Returns the inputs of an entry; of a malformed one those that are whole."""
  found = one.get('inputs')
  if not isinstance(found, list):
    return []
  return [
    i
    for i in found
    if isinstance(i, Mapping) and {'name', 'file', 'digest'} <= i.keys()
  ]


def as_recipe(
  entries: Iterable[Mapping[str, Any]], name: str, host: Host
) -> dict[str, Any]:
  """Joins entries, each of which continued the one before, to one recipe.

  Args:
    entries: the entries, oldest first.
    name: the file that is made.
    host: offers the passes.
  """
  inputs: dict[str, str] = {}
  steps: list[Any] = []
  used: set[str] = set()
  now, target = '', {}
  for one in entries:
    # `now` is empty for the first entry, which continues none.
    names = _new_aliases(one, now, inputs, used)
    own = str(_inputs(one)[0]['name'])
    first = next(iter(inputs))
    for step in one['recipe']['steps']:
      steps.append(_renamed(step, names, own, first, host))
    target = dict(next(iter(one['recipe']['outputs'].values())) or {})
    now = names.get(target.pop('of', None) or own, own)
  output: Any = {'path': name, **target}
  if now != next(iter(inputs)):
    output['of'] = now
  outputs = {'out': name if output == {'path': name} else output}
  return {'inputs': inputs, 'steps': steps, 'outputs': outputs}


def _new_aliases(
  entry: Mapping[str, Any], now: str, inputs: dict[str, str], used: set[str]
) -> dict[str, str]:
  """Returns the aliases that an entry's models have in the joined recipe.

  Args:
    entry: the entry.
    now: the alias of the model that it continues.
    inputs: files by alias; its further inputs are added.
    used: all aliases; new ones are added.
  """
  names: dict[str, str] = {}
  for one in _inputs(entry):
    if now and one['name'] == entry.get('main'):
      names[one['name']] = now
      continue
    names[one['name']] = alias = _free(str(one['name']), used)
    used.add(alias)
    inputs[alias] = str(one['file'])
  for step in entry['recipe']['steps']:
    result = step.get('as') if isinstance(step, Mapping) else None
    if isinstance(result, str) and result not in names:
      names[result] = _free(result, used)
      used.add(names[result])
  return names


def _free(name: str, used: set[str]) -> str:
  """Returns a name that is not used yet."""
  free, number = name, 2
  while free in used:
    free, number = f'{name}{number}', number + 1
  return free


def _renamed(
  step: Any, names: Mapping[str, str], own: str, first: str, host: Host
) -> Any:
  """Returns a step with other aliases.

  Args:
    step: the step.
    names: the new alias of each.
    own: alias of the first input of its recipe.
    first: alias of the first input of the joined recipe.
    host: offers the passes.
  """
  # The first input of an entry has the alias of what it continues, which may
  # be another than the first of the joined recipe.
  step = {step: None} if isinstance(step, str) else dict(step)
  on = names.get(step.pop('in', None) or own, own)
  result = step.pop('as', None)
  ((verb, value),) = list(step.items())[:1]
  if any(old != new for old, new in names.items()):
    value = _with_aliases(value, names, _model_keys(verb, host))
  made: dict[str, Any] = {verb: value}
  if on != first:
    made['in'] = on
  if result is not None:
    made['as'] = names.get(result, result)
  return verb if made == {verb: None} else made


def _model_keys(verb: str, host: Host) -> set[str]:
  """Returns the options of a step whose value is an alias."""
  try:
    options = definitions.find(verb, host).options.values()
  except errors.RecipeError:
    return set()
  # In `assert` it is `to`, beneath `equal`.
  return {o.name for o in options if o.model} | (
    {'to'} if verb == 'assert' else set()
  )


def _with_aliases(
  value: Any, names: Mapping[str, str], keys: set[str], key: str = ''
) -> Any:
  """Returns a step's value with other aliases, alone or before a `::`."""
  if isinstance(value, Mapping):
    return {
      _with_aliases(k, names, keys): _with_aliases(v, names, keys, str(k))
      for k, v in value.items()
    }
  if isinstance(value, list):
    return [_with_aliases(one, names, keys, key) for one in value]
  if not isinstance(value, str):
    return value
  # Selectors of other models are written `ALIAS::PATTERN`.
  head, sign, rest = value.partition('::')
  if sign and head.strip() in names:
    return f'{names[head.strip()]}::{rest}'
  return names.get(value, value) if key in keys else value
