"""Steps of recipes as verbs of the shell, those of plugins too.

The options of a step are read from the signature of its pass, as in recipes.
The help texts of the library's own verbs are here; those of others are the
docstrings of their passes.
"""

from __future__ import annotations

import dataclasses
import pathlib
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import click

from surgery import errors
from surgery.cli import completion, shared, writing
from surgery.cli.command import Command
from surgery.host.manager import default_host
from surgery.recipes.spec import Step

if TYPE_CHECKING:
  from surgery.recipes.definitions import Definition, Option


@dataclasses.dataclass(frozen=True)
class Words:
  """The help text of an option, and its names in the shell.

  Attributes:
    help: the help text.
    metavar: the placeholder of its value.
    complete: completes its value.
    names: its names, if they differ from the name of the step's option.
  """

  help: str
  metavar: str | None = None
  complete: completion.Complete | None = None
  names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Verb:
  """The help text of a verb, and what its signature does not tell.

  Attributes:
    help: the help text, with examples.
    options: those of its options, by their names in recipes.
    alone: whether it also accepts an adapter without its base.
    either: options that exclude each other.
  """

  help: str
  options: Mapping[str, Words] = dataclasses.field(default_factory=dict)
  alone: bool = False
  either: tuple[str, ...] = ()


def _adapter(does: str) -> Words:
  return Words(f'The adapter to {does}; all by default. May be repeated.')


VERBS = {
  'cast': Verb(
    r"""Cast floating tensors to another dtype, rounding once.

    \b
    surgery cast base.msgpack --to bf16 --keep '**/norm*' -o half.msgpack
    """,
    {
      'to': Words(
        'bf16, f16, f32, … or a full name.', 'DTYPE', completion.dtypes
      ),
      'keep': Words(
        'Leave these as they are, or cast them to another dtype: '
        "'**/norm=f32'. May be repeated.",
        'SELECTOR[=DTYPE]',
        completion.kept,
      ),
      'overflow': Words(
        'Let finite values become infinite or NaN.',
        names=('--allow-overflow', '--overflow'),
      ),
      'underflow': Words(
        "Let most of a tensor's numbers become zero.",
        names=('--allow-underflow', '--underflow'),
      ),
    },
    alone=True,
  ),
  'disable': Verb(
    r"""Disable adapters: layers use the base as it is stored.

    \b
    surgery disable adapted.msgpack --adapter default -o out.msgpack
    """,
    {'names': _adapter('disable')},
  ),
  'drop': Verb(
    r"""Leave out tensors; a layer means everything beneath it.

    \b
    surgery drop base.msgpack '**/head' -o out.msgpack
    """
  ),
  'enable': Verb(
    r"""Enable adapters: layers use the adapted parameters.

    \b
    surgery enable adapted.msgpack --adapter default -o out.msgpack
    """,
    {'names': _adapter('enable')},
  ),
  'freeze': Verb(
    r"""Freeze parameters: the selected ones, or all but adapters' weights.

    \b
    surgery freeze adapted.msgpack -o frozen.msgpack
    surgery freeze base.msgpack '**/embed' -o frozen.msgpack
    """,
    {
      'policy': Words(
        'The policy of a plugin or adapter type that decides what is frozen, '
        'e.g. bitfit; by default `adapters`, which freezes all but adapters.',
        'NAME',
      )
    },
    either=('select', 'policy'),
  ),
  'keep': Verb(
    r"""Leave out all other tensors; a layer means everything beneath it.

    \b
    surgery keep base.msgpack '**/encoder' -o out.msgpack
    """
  ),
  'rename': Verb(
    r"""Rename tensors and layers, with their adapters.

    All rules are applied at once, so two names may be swapped; the first that
    matches a path decides. Wildcards on the right stand for what `*`, `**` and
    `{a,b}` matched on the left.

    \b
    surgery rename base.msgpack 'net/head -> net/output' -o out.msgpack
    surgery rename base.msgpack '**/h<i>/** -> **/block<i+1>/**' -o out.msgpack
    """
  ),
  'unfreeze': Verb(
    r"""Make parameters trainable again that `freeze` froze, and no others.

    \b
    surgery unfreeze frozen.msgpack '**/output' -o out.msgpack
    """
  ),
}

# Prefix of a step's options in Python, where `file` and `force` are taken.
_OF = 'of_'
# Options of steps that are arguments of verbs, or may be repeated.
_SELECT, _RULES, _NAMES = 'select', 'rules', 'names'
# Options of all verbs that write.
_TAKEN = (
  *('file', 'output', 'force', 'dry-run', 'json', 'quiet', 'shard-size'),
  *('strict-flax', 'no-manifest', 'metadata', 'help'),
)


def offered(name: str) -> bool:
  """Whether a plugin, or the library, offers a step of that name."""
  return name in default_host().passes


def command(name: str) -> click.Command:
  """Returns a step as a verb.

  Args:
    name: the step.

  Raises:
    PluginError: if its signature cannot be read.
  """
  from surgery.recipes import definitions

  definition = definitions.find(name, default_host())
  verb = VERBS.get(name) or Verb(_help(definition))

  @writing.writes
  def perform(file: pathlib.Path, output: writing.Output, **given: Any) -> None:
    arguments, others = _read(definition, given)
    _check_either(verb, arguments)
    before = shared.opened(file) if verb.alone else shared.model(file)
    step = Step(name, _short(definition, arguments))
    writing.carry_out(output, [step], before, others)

  # Click collects options from the innermost decorator outwards.
  decorated: Any = perform
  for option in reversed([*definition.options.values()]):
    words = verb.options.get(option.name)
    decorated = _declared(option, name, words)(decorated)
  return click.command(name, cls=Command, help=verb.help)(
    shared.file(decorated)
  )


def _help(definition: Definition) -> str:
  """Returns a pass's docstring as a help text of Click."""
  name = definition.name
  example = f'surgery {name} model.msgpack … -o out.msgpack'
  parts = [definition.summary or f'Do the step {name}.', definition.doc]
  if definition.example:
    lines = definition.example.splitlines()
    parts.append('\n'.join(('\b', 'As a step of a recipe:', *lines)))
  return '\n\n'.join((*filter(None, parts), f'\b\n{example}'))


def _kinds(annotation: Any) -> tuple[Any, ...]:
  from surgery.recipes import definitions

  kinds = definitions.members(annotation)
  return tuple(k for k in kinds if k not in (None, type(None)))


def _declared(
  option: Option, step: str, words: Words | None
) -> Callable[[Any], Any]:
  """Returns the decorator that adds an option of a step to a command."""
  if option.name == _SELECT:
    return _argument(option, 'SELECTOR', completion.selectors)
  if option.name == _RULES and str in _kinds(option.annotation):
    return _argument(option, "'OLD -> NEW'", None)
  if option.name == _NAMES:
    text = words.help if words else _sentence(option.doc)
    return shared.adapters(text, _OF + option.argument)
  # An option of a step may have the name of one of all verbs, as `--force`.
  clash = option.name in _TAKEN
  plain = f'--{step}-{option.name}' if clash else f'--{option.name}'
  words = words or Words(_sentence(option.doc))
  names = words.names or (plain,)
  kind, many = _type(option)
  more: dict[str, Any] = {}
  # What is on by default needs a way to switch it off.
  if kind is bool and option.default is True:
    names = (f'{plain}/--no-{plain.removeprefix("--")}',)
    more['default'] = None
  elif kind is bool:
    more['is_flag'] = True
  else:
    more.update(type=kind, multiple=many)
  return click.option(
    *names,
    _OF + option.argument,
    required=option.required,
    metavar=words.metavar,
    shell_complete=words.complete,
    help=words.help,
    **more,
  )


def _argument(
  option: Option, shown: str, complete: completion.Complete | None
) -> Callable[[Any], Any]:
  return click.argument(
    _OF + option.argument,
    nargs=-1,
    required=option.required,
    metavar=f'{shown}…' if option.required else f'[{shown}]…',
    shell_complete=complete,
  )


def _sentence(text: str) -> str:
  return text[:1].upper() + text[1:]


def _type(option: Option) -> tuple[Any, bool]:
  """Returns Click's type for an option, and whether it may be repeated."""
  kinds = _kinds(option.annotation)
  if option.model:
    return shared.FILE, False
  if len(kinds) == 1 and typing.get_origin(kinds[0]) is Literal:
    return click.Choice([str(a) for a in typing.get_args(kinds[0])]), False
  if len(kinds) == 1 and kinds[0] in (bool, int, float, str):
    return kinds[0], False
  # Text; an option of several texts may be repeated.
  texts = str in kinds and any(k not in (str, Any) for k in kinds)
  return str, texts and not {int, float, bool} & set(kinds)


def _read(
  definition: Definition, given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the options of a step, and the models among them by alias."""
  found: dict[str, Any] = {}
  others = {}
  for option in definition.options.values():
    value = given[_OF + option.argument]
    # Options that were not given stay out of the history.
    if value is None or value == () or (value is False and not option.default):
      continue
    if option.model:
      # No alias of a verb ends in an underscore, so it is new.
      others[alias := f'{option.argument.rstrip("_")}_'] = shared.opened(value)
      value = alias
    elif isinstance(value, tuple):
      value = shared.short(value)
    elif _type(option)[0] is str:
      value = _value(option, value)
    found[option.name] = value
  return found, others


def _value(option: Option, written: str) -> Any:
  """Returns an option's value: text, or data in YAML if it takes no text.

  Raises:
    UsageError: if it cannot be read.
  """
  from surgery.recipes import text

  kinds = _kinds(option.annotation)
  if set(kinds) <= {str} or Any in kinds:
    return written if str in kinds or Any not in kinds else text.scalar(written)
  try:
    return text.read(written, f'--{option.name}')[0]
  except errors.RecipeError as error:
    raise click.UsageError(str(error)) from None


def _check_either(verb: Verb, arguments: Mapping[str, Any]) -> None:
  """Raises if options are given that exclude each other."""
  both = [n for n in verb.either if n in arguments]
  if len(both) > 1:
    shown = ['SELECTOR' if n == _SELECT else f'--{n}' for n in verb.either]
    raise click.UsageError(f'give {" or ".join(shown)}, not both.')


def _short(definition: Definition, arguments: Mapping[str, Any]) -> Any:
  """Returns the value of a step in its shortest form, for the history."""
  if not arguments:
    return None
  first = definition.first
  if first is not None and [*arguments] == [first.name]:
    value = arguments[first.name]
    # A mapping alone could be read as options.
    return dict(arguments) if isinstance(value, Mapping) else value
  return dict(arguments)


def names(known: Sequence[str]) -> list[str]:
  """Returns the steps that are no verbs in a list."""
  return sorted(set(default_host().passes) - set(known))
