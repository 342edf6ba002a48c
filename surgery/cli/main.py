"""The entry point: a table of verbs, and what errors become."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import click

from surgery import errors
from surgery.cli import completion, platform, process, wording
from surgery.cli.codes import BUG, FAILED, INTERRUPTED, PLUGIN
from surgery.cli.command import Group
from surgery.host import foreign

# Name → summary. Static, so that `--help` imports nothing: Click asks for each
# command to print the list.
VERBS: dict[str, str] = {
  'attach': 'Attach an adapter to a saved model.',
  'cast': 'Cast floating tensors to another dtype.',
  'combine': 'Make one model of several, or one adapter.',
  'convert': 'Write a file in another format, or in several files.',
  'demo': 'Adapt a model to new digits, start to end.',
  'detach': 'Take adapters off; the base is as it was.',
  'diff': 'Compare two files; exit with 1 if they differ.',
  'disable': 'Switch adapters off.',
  'drop': 'Leave out tensors.',
  'enable': 'Switch adapters on.',
  'explain': 'Say which parameters of a model stay factored.',
  'extract': 'Write an adapter to a file of its own.',
  'extract-lora': 'Make a LoRA of the difference of two models.',
  'freeze': 'Freeze parameters.',
  'inspect': 'Show what a file holds.',
  'keep': 'Leave out all other tensors.',
  'maps': 'List maps of names between frameworks, or show one.',
  'merge': 'Fold adapters into the base.',
  'new-plugin': 'Write a plugin to begin with.',
  'patch': 'Put a model together from its base and a patch.',
  'plugins': 'List plugins, or show one.',
  'recipe-schema': 'Print the JSON schema of recipes.',
  'rename': 'Rename tensors and layers.',
  'run': 'Do the steps of a recipe.',
  'select': 'Print the tensors that selectors mean.',
  'stats': 'Show norms, moments, zeros, NaN and infinity.',
  'unfreeze': 'Let parameters train again.',
  'verify': 'Check tensors against their digests.',
}


# Those that are steps of recipes and no more.
STEPS = frozenset(
  ('cast', 'disable', 'drop', 'enable', 'freeze', 'keep', 'rename', 'unfreeze')
)


# What Click hands on where the process is the command's own.
_OWN = object()


class _Verbs(Group):
  """A group that imports a verb only when it is called."""

  def list_commands(self, ctx: click.Context) -> list[str]:
    del ctx
    return sorted(VERBS)

  def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
    del ctx
    if name not in VERBS or name in STEPS:
      from surgery.cli import steps

      if name not in VERBS and not steps.offered(name):
        return None
      command = steps.command(name)
    else:
      module = f'surgery.cli.{name.replace("-", "_")}'
      command = importlib.import_module(module).command
    if command.help is not None:
      # In a raw docstring the mark before lines that stay apart is two letters.
      command.help = command.help.replace('\\b\n', '\b\n')
    return command

  def resolve_command(
    self, ctx: click.Context, args: list[str]
  ) -> tuple[str | None, click.Command | None, list[str]]:
    known = not args or args[0] in VERBS or args[0].startswith('-')
    if not known and not ctx.resilient_parsing:
      # Plugins are asked only now, since asking imports them.
      from surgery.cli import steps

      if not steps.offered(args[0]):
        hint = errors.suggest(args[0], (*VERBS, *steps.names(tuple(VERBS))))
        raise click.UsageError(f'no verb {args[0]!r}.{hint}', ctx)
    return super().resolve_command(ctx, args)

  def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
    # That of a group would import every verb for its help.
    verbs = completion.items(VERBS, incomplete)
    for item in verbs:
      item.help = VERBS[item.value]
    return [*verbs, *click.Command.shell_complete(self, ctx, incomplete)]

  def format_commands(
    self, ctx: click.Context, formatter: click.HelpFormatter
  ) -> None:
    del ctx
    with formatter.section('Verbs'):
      formatter.write_dl([(n, VERBS[n]) for n in sorted(VERBS)])
    formatter.write_paragraph()
    formatter.write_text(
      'Every other step of recipes is a verb, too, those of plugins included: '
      'surgery STEP --help. `surgery plugins --steps` lists them.'
    )


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
  del param
  if value:
    import surgery

    click.echo(f'surgery {surgery.__version__}')
    ctx.exit()


@click.group(
  cls=_Verbs, context_settings={'help_option_names': ['-h', '--help']}
)
@click.option(
  '--version',
  is_flag=True,
  expose_value=False,
  is_eager=True,
  callback=_version,
  help='Print the version.',
)
@click.option(
  '--no-plugin',
  'blocked',
  multiple=True,
  metavar='NAME',
  help='Go on without a plugin or adapter type; it is not imported.',
)
@click.option(
  '--platform',
  'wanted',
  metavar='NAME',
  help='Compute there instead of on the CPU: cuda, tpu, … or default for '
  "JAX's own choice.",
)
@click.pass_context
def cli(
  ctx: click.Context, blocked: tuple[str, ...], wanted: str | None
) -> None:
  """Change saved models: attach adapters, merge, rename, cast, look inside.

  What is asked for goes to stdout, all else to stderr. Completion of verbs and
  of names inside of files: eval "$(_SURGERY_COMPLETE=bash_source surgery)".
  """
  from surgery.host import environment, manager

  if wanted is not None or ctx.obj is _OWN:
    platform.claim(wanted)
  if blocked or any(
    variable in os.environ for variable in environment.VARIABLES
  ):
    # A host of this command's own, so that nothing is global.
    ctx.with_resource(manager.used(manager.from_environment(block=blocked)))


def _code(error: BaseException) -> int:
  """Returns the exit code that an error becomes."""
  if isinstance(error, errors.PluginError) and not isinstance(
    error, errors.UnknownAdapterType
  ):
    return PLUGIN
  return FAILED


def run(arguments: Sequence[str] | None = None, *, own: bool = False) -> int:
  """Runs the command and returns its exit code.

  Args:
    arguments: what follows the command's name; those of the process by
      default.
    own: whether the process is the command's own, so that JAX may be told to
      do with the CPU alone.

  Returns:
    0 fine, 1 differs, 2 usage, 3 an error, 4 a plugin's failure, 70 a bug of
    this library, 130 interrupted.

  Raises:
    Ended: if a signal ended it, to the process that hears signals so.
  """
  if instruction := os.environ.get(completion.VARIABLE):
    return completion.answer(cli, instruction)
  try:
    obj = _OWN if own else None
    # What plugins print is no result.
    with foreign.product():
      result = cli.main(arguments, 'surgery', standalone_mode=False, obj=obj)
    sys.stdout.flush()
    return result if isinstance(result, int) else 0
  except click.ClickException as error:
    error.show()
    return error.exit_code
  except (click.Abort, KeyboardInterrupt):
    return INTERRUPTED
  except (BrokenPipeError, SystemExit):
    # Whoever read our output has seen enough (Click answers that by exiting
    # with 1, which means something else here). Say nothing at exit either.
    _silence()
    return 0
  except (errors.SurgeryError, OSError) as error:
    _trace()
    click.echo(f'error: {wording.line(error)}', err=True)
    _flush()
    return _code(error)
  except Exception as error:
    _trace()
    click.echo(
      f'bug: {type(error).__name__}: {error}\nThis is a mistake in surgery. '
      'Please report it with the command, and what it prints with '
      'SURGERY_DEBUG=1.',
      err=True,
    )
    return BUG


def _flush() -> None:
  """Hands out what was printed; if that cannot be, it is not tried again."""
  try:
    sys.stdout.flush()
  except OSError:
    _silence()


def _silence() -> None:
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _trace() -> None:
  if os.environ.get('SURGERY_DEBUG'):
    import traceback

    traceback.print_exc()


def _warn(message: Warning | str, *about: Any) -> None:
  """Prints a warning for people, who do not care for lines of our files."""
  click.echo(f'warning: {wording.as_options(str(message))}', err=True)


def main() -> None:
  """Runs the command and exits."""
  process.prepare()
  warnings.showwarning = _warn  # type: ignore[assignment]
  with process.ended_by_signals():
    code = run(own=True)
  sys.exit(code)
