"""Definitions of steps, read from the signatures and docstrings of passes."""

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

# Arguments of passes that the caller supplies, and no recipe can give.
_GIVEN = (
  'host',
  'inputs',
  'original',
  'layer_types',
  'graph',
  'pending',
)
_UNIONS = (types.UnionType, typing.Union)


@dataclasses.dataclass(frozen=True)
class _Kind:
  """A type that an option may have.

  Attributes:
    words: what it is called in messages.
    schema: its name in JSON schemas.
    has: whether a value of a recipe is one.
  """

  words: str
  schema: str
  has: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


_NULL = _Kind('null', 'null', lambda value: value is None)
_KINDS: dict[Any, _Kind] = {
  bool: _Kind('true or false', 'boolean', lambda v: isinstance(v, bool)),
  int: _Kind(
    'a whole number', 'integer', lambda v: _is_number(v) and isinstance(v, int)
  ),
  float: _Kind('a number', 'number', _is_number),
  str: _Kind('text', 'string', lambda v: isinstance(v, str)),
  # A recipe names it by its alias; from Python it is given itself.
  Checkpoint: _Kind(
    'the name of an input',
    'string',
    lambda v: isinstance(v, (str, Checkpoint)),
  ),
  type(None): _NULL,
  None: _NULL,
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
  """An option of a step.

  Attributes:
    name: its name in a recipe: `check-base`, `from`.
    argument: its name in Python: `check_base`, `from_`.
    annotation: its type.
    required: whether it must be given.
    default: its value otherwise.
    doc: its description, a sentence or two.
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
    options: its options by name; the first can be given alone.
    summary: what it does, in a line.
    doc: the rest of its description.
    example: how it is written.
    given: names of the arguments that the caller supplies.
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
    """Returns the options of a step in a recipe, as arguments of the pass.

    Args:
      value: the options as a mapping; the first alone; or None.

    Raises:
      RecipeError: for an unknown or missing option, or a value of another type.
    """
    found = {}
    # Types are checked here, so that a pass gets what its signature declares.
    for name, item in self._named(value).items():
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
    # From Python an option may be a checkpoint already.
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

  def _named(self, value: Any) -> dict[str, Any]:
    """Returns values by the names of their options."""
    if value is None:
      return {}
    if not isinstance(value, Mapping) or self._is_first(value):
      if self.first is None:
        raise errors.RecipeError(f'it takes no options, found {value!r}.')
      return {self.first.name: value}
    named: dict[str, Any] = {}
    for key, item in value.items():
      name = self._key(key)
      if name in named:
        raise errors.RecipeError(f'{name!r} is given twice.')
      named[name] = item
    return named

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
    return any(map(_is_mapping, members(self.first.annotation)))


def members(annotation: Any) -> tuple[Any, ...]:
  """Returns the types that an annotation allows."""
  if typing.get_origin(annotation) in _UNIONS:
    return tuple(m for a in typing.get_args(annotation) for m in members(a))
  return (annotation,)


def accepted(value: Any, annotation: Any, where: str) -> Any:
  """Returns a value of a recipe, converted to a type.

  Raises:
    RecipeError: if it is of another type.
  """
  found = _accept(value, annotation)
  if found is _NO:
    _check_entries(value, annotation, where)
    raise errors.RecipeError(
      f'{where!r}: expected {described(annotation)}, found {value!r} '
      f'({type(value).__name__}).{_hint(value, annotation)}'
    )
  return found


def _hint(value: Any, annotation: Any) -> str:
  """Returns how a value may have to be quoted, if that could be the mistake."""
  kinds = members(annotation)
  if isinstance(value, str) and {int, float} & {*kinds}:
    return (
      ' Text is no number: write it without quotes. A variable has to stand '
      "alone, '${name}': with other characters around it the value is text. "
      "Compute inside of the braces: '${-name}', '${1 - name}'."
    )
  if str in kinds and not isinstance(value, (list, dict)):
    return ' If it is text, put it in quotes.'
  return ''


def _check_entries(value: Any, annotation: Any, where: str) -> None:
  """Raises for the first entry of a mapping that is of another type.

  Raises:
    RecipeError: naming the entry.
  """
  if not isinstance(value, Mapping):
    return
  for one in members(annotation):
    args = typing.get_args(one)
    if _is_mapping(one) and len(args) == 2:
      for key, item in value.items():
        accepted(item, args[1], f'{where}: {key}')


def _is_mapping(annotation: Any) -> bool:
  return typing.get_origin(annotation) in _MAPPINGS or annotation in _MAPPINGS


def _is_list(annotation: Any) -> bool:
  return typing.get_origin(annotation) in _LISTS or annotation in _LISTS


def _accept(value: Any, annotation: Any) -> Any:
  """Returns a value, converted to a type; `_NO` if it has another one."""
  kinds = members(annotation)
  if len(kinds) > 1:
    # The exact type goes before one that the value can be converted to: 1 is
    # an int, and could be a float.
    kinds = tuple(sorted(kinds, key=lambda a: a is not type(value)))
    found = (_accept(value, one) for one in kinds)
    return next((one for one in found if one is not _NO), _NO)
  if annotation is Any:
    return value
  if annotation in _KINDS:
    return value if _KINDS[annotation].has(value) else _NO
  args = typing.get_args(annotation)
  if typing.get_origin(annotation) is typing.Literal:
    return next((a for a in args if type(a) is type(value) and a == value), _NO)
  if _is_list(annotation):
    return _accept_list(value, args)
  if _is_mapping(annotation):
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
  """Returns the name of an option's type, for messages and documentation."""
  kinds = members(annotation)
  if Any in kinds:
    return 'anything'
  words = dict.fromkeys(filter(None, map(_words, kinds)))
  return ', or '.join(words) or 'something else'


def _words(annotation: Any) -> str:
  """Returns the name of a single type; empty for one that no text can give."""
  args = typing.get_args(annotation)
  if annotation in _KINDS:
    return _KINDS[annotation].words
  if typing.get_origin(annotation) is typing.Literal:
    return ' or '.join(repr(a) for a in args)
  if typing.get_origin(annotation) in _LISTS:
    return f'a list of ({described(args[0])})'
  return 'a mapping' if _is_mapping(annotation) else ''


def schema(annotation: Any) -> dict[str, Any]:
  """Returns the JSON schema of an option's type."""
  found = [s for s in map(_schema_of, members(annotation)) if s is not None]
  if not found or {} in found:
    return {}
  return found[0] if len(found) == 1 else {'anyOf': found}


def _schema_of(annotation: Any) -> dict[str, Any] | None:
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if annotation is Any:
    return {}
  if annotation in _KINDS:
    return {'type': _KINDS[annotation].schema}
  if origin is typing.Literal:
    return {'enum': list(args)}
  if origin in _LISTS:
    return {'type': 'array', 'items': schema(args[0])}
  if _is_mapping(annotation):
    inner = schema(args[1]) if len(args) == 2 else {}
    return {'type': 'object', 'additionalProperties': inner or True}
  return None


# Signatures and docstrings.


def option_name(argument: str) -> str:
  """Returns the name in a recipe of an argument in Python."""
  return argument.rstrip('_').replace('_', '-')


@functools.lru_cache(maxsize=256)
def define(name: str, function: Callable[..., Any]) -> Definition:
  """Returns the definition of a step, read from its pass.

  Args:
    name: its name.
    function: the pass.
  """
  # A decorated pass keeps the signature of the function inside.
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
  # The first argument is the checkpoint.
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
  # Splitting at headings gives text, heading, text, heading, text, …
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
    return define(name, known[name])
  except (TypeError, ValueError) as error:
    owner = host.offered_by('surgery_passes', name)
    raise errors.PluginError(
      f'pass {name!r} of {owner or "the library"} cannot be a step: its '
      f'signature cannot be read ({error}). It is a function from a Checkpoint '
      'and named arguments to a Checkpoint.'
    ) from error


def every(host: Host) -> dict[str, Definition]:
  """Returns all steps by name."""
  return {name: find(name, host) for name in sorted(host.passes)}
