"""The entry point: a table of verbs, and the exit codes of errors."""

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
  'combine': 'Combine several models into one, or adapters.',
  'convert': 'Write a file in another format, or in several files.',
  'demo': 'Adapt a model to new digits, start to end.',
  'detach': 'Remove adapters; the base is as it was.',
  'diff': 'Compare two files; exit with 1 if they differ.',
  'disable': 'Disable adapters.',
  'drop': 'Leave out tensors.',
  'enable': 'Enable adapters.',
  'explain': 'Show which parameters of a model stay factored.',
  'extract': 'Write an adapter to a file of its own.',
  'extract-lora': 'Make a LoRA of the difference between two models.',
  'freeze': 'Freeze parameters.',
  'inspect': 'Show what a file holds.',
  'keep': 'Leave out all other tensors.',
  'maps': 'List maps of names between frameworks, or show one.',
  'merge': 'Fold adapters into the base.',
  'new-plugin': 'Write the template of a plugin.',
  'patch': 'Restore a model from its base and a patch.',
  'plugins': 'List plugins, or show one.',
  'recipe-schema': 'Print the JSON schema of recipes.',
  'rename': 'Rename tensors and layers.',
  'run': 'Do the steps of a recipe.',
  'select': 'Print the tensors that selectors mean.',
  'stats': 'Show norms, moments, zeros, NaN and infinity.',
  'unfreeze': 'Make parameters trainable again.',
  'verify': 'Check tensors against their digests.',
}


# Verbs that are steps of recipes without more: `cli/steps.py` makes them.
STEPS = frozenset(
  ('cast', 'disable', 'drop', 'enable', 'freeze', 'keep', 'rename', 'unfreeze')
)


# Click's `obj` if the process is the command's own.
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
      # Click's mark for lines that are not joined is a backspace character,
      # which a raw docstring has as two characters.
      command.help = command.help.replace('\\b\n', '\b\n')
    return command

  def resolve_command(
    self, ctx: click.Context, args: list[str]
  ) -> tuple[str | None, click.Command | None, list[str]]:
    known = not args or args[0] in VERBS or args[0].startswith('-')
    if not known and not ctx.resilient_parsing:
      # Only an unknown verb can be a plugin's; to know imports plugins.
      from surgery.cli import steps

      if not steps.offered(args[0]):
        hint = errors.suggest(args[0], (*VERBS, *steps.names(tuple(VERBS))))
        raise click.UsageError(f'no verb {args[0]!r}.{hint}', ctx)
    return super().resolve_command(ctx, args)

  def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
    # Click's own imports every verb for its help text.
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
      'Every other step of recipes, also of plugins, is a verb as well: '
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
  help='Ignore a plugin or adapter type; it is not imported.',
)
@click.option(
  '--platform',
  'wanted',
  metavar='NAME',
  help='The platform to compute on instead of the CPU: cuda, tpu, … or '
  "default for JAX's own choice.",
)
@click.pass_context
def cli(
  ctx: click.Context, blocked: tuple[str, ...], wanted: str | None
) -> None:
  """Change saved models: attach adapters, merge, rename, cast, look inside.

  Results go to stdout, messages to stderr. Completion of verbs and of names
  inside of files: eval "$(_SURGERY_COMPLETE=bash_source surgery)".
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
  """Returns the exit code of an error.

  A type that is not installed is the user's mistake, not a plugin's.
  """
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
    own: whether the process is the command's own, so that JAX may be
      restricted to the CPU.

  Returns:
    0 success, 1 differs, 2 usage, 3 an error, 4 a plugin's failure, 70 a bug of
    this library, 130 interrupted.

  Raises:
    Ended: if a signal arrived, inside of `process.ended_by_signals`.
  """
  if instruction := os.environ.get(completion.VARIABLE):
    return completion.answer(cli, instruction)
  try:
    obj = _OWN if own else None
    # Output of plugins is no result, so it goes to stderr.
    with foreign.product():
      result = cli.main(arguments, 'surgery', standalone_mode=False, obj=obj)
    # A full disk or a closed pipe shows here, while it can be an exit code.
    sys.stdout.flush()
    # `--help` and `--version` return None.
    return result if isinstance(result, int) else 0
  except click.ClickException as error:
    error.show()
    return error.exit_code
  except (click.Abort, KeyboardInterrupt):
    return INTERRUPTED
  except (BrokenPipeError, SystemExit):
    # The reader of stdout closed it, as `head` does. That is no error; Click
    # would exit with 1, which means `differs` here. Python flushes stdout once
    # more at its end, which must not fail either.
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
  """Flushes stdout; if that fails, drops the rest of it."""
  try:
    sys.stdout.flush()
  except OSError:
    _silence()


def _silence() -> None:
  """Sends stdout to nowhere from now on."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _trace() -> None:
  """Prints the traceback of an error, if SURGERY_DEBUG is set."""
  if os.environ.get('SURGERY_DEBUG'):
    import traceback

    traceback.print_exc()


def _warn(message: Warning | str, *about: Any) -> None:
  """Prints a warning without the file and the line that raised it."""
  click.echo(f'warning: {wording.as_options(str(message))}', err=True)


def main() -> None:
  """Runs the command and exits."""
  process.prepare()
  warnings.showwarning = _warn  # type: ignore[assignment]
  with process.ended_by_signals():
    code = run(own=True)
  sys.exit(code)
