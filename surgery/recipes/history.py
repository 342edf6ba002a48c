"""What an output records of how it was made: a recipe that makes it again."""

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

# Before a digest that does not tell models apart whose tensors look alike.
_STRUCTURE = 'structure-'


def fingerprint(checkpoint: Checkpoint) -> str:
  """Returns a digest that identifies a model as far as that is known.

  No tensor is read for it: it is a digest of names, dtypes, shapes, plain
  values, and the digests of tensors that are on record.

  Returns:
    `xxh3:…`, or `structure-xxh3:…` where a tensor has no digest, so that
    another model with other values may have the same.
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
  said = json.dumps(rows, ensure_ascii=False, separators=(',', ':'))
  digester = Digester()
  digester.update(said.encode(errors='surrogatepass'))
  tensors = [one for one in checkpoint.values() if one.shape is not None]
  known = all(one.digest is not None for one in tensors)
  return f'{"" if known else _STRUCTURE}{digester.digest()}'


def entry(
  recipe: Spec, output: str, main: str, inputs: Mapping[str, Checkpoint]
) -> dict[str, Any]:
  """Returns what is recorded of a recipe.

  Args:
    recipe: the recipe.
    output: name of the output in which it is recorded.
    main: alias of the input that the output goes on from, whose history it has.
    inputs: what was read, by alias. Of files only names are recorded, and no
      times, so that the same recipe gives the same bytes.
  """
  said = recipe.data()
  # What other outputs are called is nobody's business.
  outputs = {output: said['outputs'][output]}
  return {
    'version': version.VERSION,
    'recipe': {'steps': _jsonable(said['steps']), 'outputs': outputs},
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
  """Returns what a recipe said as JSON data."""
  if isinstance(value, Mapping):
    return {str(k): _jsonable(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_jsonable(one) for one in value]
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  return str(value)


def recorded(checkpoint: Checkpoint, said: Mapping[str, Any]) -> Checkpoint:
  """Returns a checkpoint whose history ends with an entry."""
  manifest = checkpoint.manifest
  return checkpoint.replace(
    manifest=manifest.replace(history=(*manifest.history, said))
  )


def lines(
  history: Iterable[Mapping[str, Any]], name: str, host: Host
) -> Iterator[str]:
  """Yields a history as a recipe that people read and `surgery run` takes.

  Args:
    history: what is recorded, oldest first.
    name: the file that it made.
    host: knows what steps take.
  """
  history = list(history)
  entries = [one for one in history if _is_entry(one)]
  for one in entries:
    said = [f'surgery {one["version"]}'] if one.get('version') else []
    said += [f'{i["file"]} {i["digest"]}' for i in _inputs(one)]
    yield f'# {", ".join(said)}'
  read = [str(i['digest']) for one in entries for i in _inputs(one)]
  if any(one.startswith(_STRUCTURE) for one in read):
    yield (
      f'# {_STRUCTURE}…: tensors had no digest, so it is that of names, dtypes '
      'and shapes; see surgery verify --write'
    )
  others = len(history) - len(entries)
  if others:
    yield f'# {others} more that are no recipes of this program'
  if entries:
    yield from text.write(as_recipe(entries, name, host)).splitlines()


def _is_entry(one: Any) -> bool:
  recipe = one.get('recipe') if isinstance(one, Mapping) else None
  return (
    isinstance(recipe, Mapping)
    and isinstance(recipe.get('steps'), list)
    and isinstance(recipe.get('outputs'), Mapping)
    and bool(recipe['outputs'])
    and bool(_inputs(one))
  )


def _inputs(one: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  found = one.get('inputs')
  return [
    i
    for i in (found if isinstance(found, list) else [])
    if isinstance(i, Mapping) and {'name', 'file', 'digest'} <= i.keys()
  ]


def as_recipe(
  entries: Iterable[Mapping[str, Any]], name: str, host: Host
) -> dict[str, Any]:
  """Returns one recipe of several, each of which went on from the one before.

  Args:
    entries: what is recorded of each, oldest first.
    name: the file that is made.
    host: knows what steps take.
  """
  inputs: dict[str, str] = {}
  steps: list[Any] = []
  used: set[str] = set()
  now, target = '', {}
  for number, one in enumerate(entries):
    names: dict[str, str] = {}
    for said in _inputs(one):
      if number and said['name'] == one.get('main'):
        names[said['name']] = now
        continue
      names[said['name']] = alias = _free(str(said['name']), used)
      used.add(alias)
      inputs[alias] = str(said['file'])
    for step in one['recipe']['steps']:
      result = step.get('as') if isinstance(step, Mapping) else None
      if isinstance(result, str) and result not in names:
        names[result] = _free(result, used)
        used.add(names[result])
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
    first: alias of the first input of the recipe that it becomes part of.
    host: knows what steps take.
  """
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
  """Returns under which keys of a step an alias stands alone."""
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
  if isinstance(value, Mapping):
    return {
      _with_aliases(k, names, keys): _with_aliases(v, names, keys, str(k))
      for k, v in value.items()
    }
  if isinstance(value, list):
    return [_with_aliases(one, names, keys, key) for one in value]
  if not isinstance(value, str):
    return value
  head, sign, rest = value.partition('::')
  if sign and head.strip() in names:
    return f'{names[head.strip()]}::{rest}'
  return names.get(value, value) if key in keys else value
