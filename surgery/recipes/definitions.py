"""What steps there are and what they take, from the signatures of passes."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from surgery import errors
from surgery.host.manager import Host
from surgery.model.checkpoint import Checkpoint

# What a pass is given by who runs it, not by a recipe.
_GIVEN = (
  'host',
  'inputs',
  'original',
  'layer_types',
  'graph',
  'pending',
)
_UNIONS = (types.UnionType, typing.Union)
_SCALARS: dict[Any, str] = {
  bool: 'true or false',
  int: 'a whole number',
  float: 'a number',
  str: 'text',
}
_LISTS = (
  list,
  tuple,
  collections.abc.Sequence,
  collections.abc.Iterable,
  collections.abc.Collection,
)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)

_NO = object()


@dataclasses.dataclass(frozen=True)
class Option:
  """Something that a step takes.

  Attributes:
    name: its name in a recipe: `check-base`, `from`.
    argument: its name in Python: `check_base`, `from_`.
    annotation: its type.
    required: whether it must be given.
    default: its value where it is not.
    doc: what it is, in a sentence or two.
  """

  name: str
  argument: str
  annotation: Any
  required: bool
  default: Any
  doc: str

  @property
  def model(self) -> bool:
    """Whether it is another checkpoint, named by its alias."""
    return Checkpoint in members(self.annotation)


@dataclasses.dataclass(frozen=True)
class Definition:
  """A step: a pass as recipes know it.

  Attributes:
    name: its name.
    function: the pass.
    options: what it takes, by name; the first can be given alone.
    summary: what it does, in a line.
    doc: the rest of what there is to say of it.
    example: how it is written.
    given: names of the arguments that whoever runs it adds.
  """

  name: str
  function: Callable[..., Any]
  options: Mapping[str, Option]
  summary: str
  doc: str
  example: str
  given: tuple[str, ...]

  @property
  def first(self) -> Option | None:
    """The option that can be given alone."""
    return next(iter(self.options.values()), None)

  def read(self, value: Any) -> dict[str, Any]:
    """Returns what a recipe says of a step, as arguments of the pass.

    Args:
      value: the options as a mapping; the first alone; or None.

    Raises:
      RecipeError: for an unknown or missing option, or a value of another type.
    """
    if isinstance(value, Mapping) and not self._is_first(value):
      named = {}
      for key, item in value.items():
        name = self._key(key)
        if name in named:
          raise errors.RecipeError(f'{name!r} is given twice.')
        named[name] = item
    elif value is None:
      named = {}
    elif self.first is None:
      raise errors.RecipeError(f'it takes no options, found {value!r}.')
    else:
      named = {self.first.name: value}
    found = {}
    for name, item in named.items():
      option = self.options[name]
      found[option.argument] = accepted(item, option.annotation, name)
    for option in self.options.values():
      if option.required and option.argument not in found:
        raise errors.RecipeError(
          f'{option.name!r} must be given: {option.doc or "it has no default"}'
        )
    return found

  def bound(
    self,
    arguments: Mapping[str, Any],
    models: Mapping[str, Checkpoint],
    original: Checkpoint | None,
  ) -> dict[str, Any]:
    """Returns arguments with models in the place of their aliases.

    Args:
      arguments: what `read` returned.
      models: other models by alias.
      original: the model before the first step.

    Raises:
      RecipeError: for an unknown alias.
    """
    given = dict(arguments)
    for option in self.options.values():
      value = given.get(option.argument)
      if option.model and isinstance(value, str):
        if value not in models:
          raise errors.RecipeError(
            f'{option.name}: no model is called {value!r}.'
            f'{errors.suggest(value, models)}'
          )
        given[option.argument] = models[value]
    if 'inputs' in self.given:
      given['inputs'] = models
    if 'original' in self.given:
      given['original'] = original
    return given

  def _key(self, key: str) -> str:
    name = key.replace('_', '-')
    if name not in self.options:
      hint = errors.suggest(name, self.options)
      raise errors.RecipeError(
        f'it has no option {key!r}.{hint or " It takes none."}'
      )
    return name

  def _is_first(self, value: Mapping[str, Any]) -> bool:
    """Whether a mapping is the first option's value, not names of options."""
    if self.first is None or any(
      key.replace('_', '-') in self.options for key in value
    ):
      return False
    return any(
      typing.get_origin(a) in _MAPPINGS or a in _MAPPINGS
      for a in members(self.first.annotation)
    )


def members(annotation: Any) -> tuple[Any, ...]:
  """Returns the types that an annotation allows."""
  if typing.get_origin(annotation) in _UNIONS:
    return tuple(m for a in typing.get_args(annotation) for m in members(a))
  return (annotation,)


def accepted(value: Any, annotation: Any, where: str) -> Any:
  """Returns a value of a recipe as a type wants it.

  Raises:
    RecipeError: if it is of another type.
  """
  found = _accept(value, annotation)
  if found is _NO:
    _check_entries(value, annotation, where)
    kind = type(value).__name__
    hint = ''
    if isinstance(value, str) and {int, float} & {*members(annotation)}:
      hint = (
        ' Text is no number: write it without quotes, and a variable alone, '
        "'${name}', since what stands around it makes it text. It can be "
        "computed with inside of the braces: '${-name}', '${1 - name}'."
      )
    elif str in members(annotation) and not isinstance(value, (list, dict)):
      hint = ' If it is text, put it in quotes.'
    raise errors.RecipeError(
      f'{where!r}: expected {described(annotation)}, found {value!r} '
      f'({kind}).{hint}'
    )
  return found


def _check_entries(value: Any, annotation: Any, where: str) -> None:
  """Raises for the first entry of a mapping that is of another type.

  Raises:
    RecipeError: naming the entry.
  """
  if not isinstance(value, Mapping):
    return
  for one in members(annotation):
    args = typing.get_args(one)
    if typing.get_origin(one) in _MAPPINGS and len(args) == 2:
      for key, item in value.items():
        accepted(item, args[1], f'{where}: {key}')


def _accept(value: Any, annotation: Any) -> Any:
  kinds = members(annotation)
  if len(kinds) > 1:
    # What a value is exactly goes before what it can be taken for.
    for one in sorted(kinds, key=lambda a: a is not type(value)):
      found = _accept(value, one)
      if found is not _NO:
        return found
    return _NO
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if annotation is Any:
    return value
  if annotation in (None, type(None)):
    return None if value is None else _NO
  if annotation is bool:
    return value if isinstance(value, bool) else _NO
  if annotation is int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole else _NO
  if annotation is float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if number else _NO
  if annotation is str or (annotation is Checkpoint and isinstance(value, str)):
    return value if isinstance(value, str) else _NO
  if origin is typing.Literal:
    return next((a for a in args if type(a) is type(value) and a == value), _NO)
  if origin in _LISTS or annotation in _LISTS:
    return _accept_list(value, args)
  if origin in _MAPPINGS or annotation in _MAPPINGS:
    return _accept_mapping(value, args)
  # From Python an option may be what no text can say, e.g. a selection.
  if isinstance(annotation, type) and isinstance(value, annotation):
    return value
  return _NO


def _accept_list(value: Any, args: tuple[Any, ...]) -> Any:
  if not isinstance(value, (list, tuple)):
    return _NO
  inner = args[0] if args else Any
  found = [_accept(one, inner) for one in value]
  return _NO if any(one is _NO for one in found) else found


def _accept_mapping(value: Any, args: tuple[Any, ...]) -> Any:
  if not isinstance(value, Mapping):
    return _NO
  inner = args[1] if len(args) == 2 else Any
  found = {key: _accept(one, inner) for key, one in value.items()}
  return _NO if any(one is _NO for one in found.values()) else found


def described(annotation: Any) -> str:
  """Returns what an option takes, as people say it."""
  words: list[str] = []
  for one in members(annotation):
    origin, args = typing.get_origin(one), typing.get_args(one)
    if one is Any:
      return 'anything'
    if one is Checkpoint:
      words.append('the name of an input')
    elif one in _SCALARS:
      words.append(_SCALARS[one])
    elif origin is typing.Literal:
      words.append(' or '.join(repr(a) for a in args))
    elif origin in _LISTS:
      words.append(f'a list of ({described(args[0])})')
    elif origin in _MAPPINGS or one in _MAPPINGS:
      words.append('a mapping')
    elif one in (None, type(None)):
      words.append('null')
  return ', or '.join(dict.fromkeys(words)) or 'something else'


def schema(annotation: Any) -> dict[str, Any]:
  """Returns the JSON schema of what an option takes."""
  found = [s for s in map(_schema_of, members(annotation)) if s is not None]
  if not found or {} in found:
    return {}
  return found[0] if len(found) == 1 else {'anyOf': found}


def _schema_of(annotation: Any) -> dict[str, Any] | None:
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if annotation is Any:
    return {}
  simple = {
    bool: 'boolean',
    int: 'integer',
    float: 'number',
    str: 'string',
    Checkpoint: 'string',
    type(None): 'null',
    None: 'null',
  }
  if annotation in simple:
    return {'type': simple[annotation]}
  if origin is typing.Literal:
    return {'enum': list(args)}
  if origin in _LISTS:
    return {'type': 'array', 'items': schema(args[0])}
  if origin in _MAPPINGS or annotation in _MAPPINGS:
    inner = schema(args[1]) if len(args) == 2 else {}
    return {'type': 'object', 'additionalProperties': inner or True}
  return None


# Signatures and docstrings.


def option_name(argument: str) -> str:
  """Returns the name in a recipe of an argument in Python."""
  return argument.rstrip('_').replace('_', '-')


def of(name: str, function: Callable[..., Any]) -> Definition:
  """Returns the definition of a step.

  Args:
    name: its name.
    function: the pass.
  """
  whole = inspect.unwrap(function)
  try:
    hints = typing.get_type_hints(whole)
  except Exception:
    # A plugin may import types for a type checker only: anything goes then.
    hints = {}
  parameters = list(inspect.signature(whole).parameters.values())
  text = inspect.getdoc(whole) or ''
  summary, body, docs, example = _read_doc(text)
  options = {}
  for one in parameters[1:]:
    if one.name in _GIVEN or one.kind in (one.VAR_KEYWORD, one.VAR_POSITIONAL):
      continue
    key = option_name(one.name)
    required = one.default is one.empty
    options[key] = Option(
      key,
      one.name,
      hints.get(one.name, Any),
      required,
      None if required else one.default,
      docs.get(one.name, ''),
    )
  given = tuple(p.name for p in parameters if p.name in _GIVEN)
  return Definition(name, function, options, summary, body, example, given)


_SECTION = re.compile(r'^(Args|Returns|Raises|Example|Yields):\s*$', re.M)
_ARGUMENT = re.compile(r'^  (\w+): (.*(?:\n    .*)*)', re.M)


def _read_doc(text: str) -> tuple[str, str, dict[str, str], str]:
  """Splits a docstring into summary, body, arguments and example."""
  pieces = _SECTION.split(text)
  summary, _, body = pieces[0].partition('\n')
  sections = dict(zip(pieces[1::2], pieces[2::2], strict=True))
  arguments = {
    match[1]: ' '.join(match[2].split())
    for match in _ARGUMENT.finditer(sections.get('Args', ''))
  }
  example = inspect.cleandoc(sections.get('Example', ''))
  return summary.strip(), body.strip(), arguments, example


def find(name: str, host: Host) -> Definition:
  """Returns the definition of a step.

  Raises:
    RecipeError: if no plugin offers it, with suggestions.
  """
  known = host.passes
  if name not in known:
    raise errors.RecipeError(
      f'no step is called {name!r}.{errors.suggest(name, known)}'
    )
  try:
    return _cached(name, known[name])
  except (TypeError, ValueError) as error:
    owner = host.offered_by('surgery_passes', name)
    raise errors.PluginError(
      f'pass {name!r} of {owner or "the library"} cannot be a step: its '
      f'signature cannot be read ({error}). It is a function from a Checkpoint '
      'and named arguments to a Checkpoint.'
    ) from error


@functools.lru_cache(maxsize=256)
def _cached(name: str, function: Callable[..., Any]) -> Definition:
  return of(name, function)


def every(host: Host) -> dict[str, Definition]:
  """Returns all steps by name."""
  return {name: find(name, host) for name in sorted(host.passes)}
