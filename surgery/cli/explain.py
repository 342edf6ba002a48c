"""`surgery explain`."""

from __future__ import annotations

import contextlib
import importlib
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import click

from surgery import errors
from surgery.cli import shared
from surgery.cli.command import Command


@click.command(cls=Command)
@shared.file
@click.argument('code', metavar='MODULE:FUNCTION')
@shared.json_option
def command(file: pathlib.Path, code: str, as_json: bool) -> None:
  r"""Show which parameters stay factored in a call of a model.

  FUNCTION is your own: it returns the model, and the arguments of a call after
  params, e.g. `return model, x`. Nothing is computed.

  \b
  surgery explain adapted.msgpack my_model:example
  """
  import surgery

  model, *arguments = _called(code)
  params = surgery.load(file)
  with _user_code(f'{code}: the model'):
    found = surgery.explain(model, params, *arguments)
  click.echo(json.dumps(found.to_json()) if as_json else str(found))


@contextlib.contextmanager
def _user_code(what: str) -> Iterator[None]:
  """Turns errors of the user's code into errors that name it.

  Raises:
    SurgeryError: for any other error.
  """
  try:
    yield
  except errors.SurgeryError:
    raise
  except Exception as error:
    raise errors.SurgeryError(
      f'{what} raises {type(error).__name__}: {error}'
    ) from error


def _called(code: str) -> tuple[Any, ...]:
  """Returns what the user's function returns.

  Raises:
    UsageError: if there is no such function.
    SurgeryError: if it returns something else.
  """
  name, colon, function = code.partition(':')
  if not (name and colon and function):
    raise click.UsageError(
      f'expected MODULE:FUNCTION, e.g. my_model:example, found {code!r}.'
    )
  # An installed command has no current folder on its path.
  if '' not in sys.path:
    sys.path.insert(0, '')  # A module beside the file, as for python -m.
  try:
    call = getattr(importlib.import_module(name), function)
  except (ModuleNotFoundError, AttributeError) as error:
    raise click.UsageError(f'{code}: {error}.') from error
  with _user_code(f'{code}()'):
    made = call()
  if not isinstance(made, tuple) or not made or not callable(made[0]):
    raise errors.SurgeryError(
      f'{code}() returned {type(made).__name__}, expected a tuple of the model '
      'and the arguments of a call after params, e.g. (model, x).'
    )
  return made
