"""`surgery extract`."""

from __future__ import annotations

import pathlib

import click

from surgery.cli import history, shared, writing
from surgery.core import errors
from surgery.core.checkpoint import Checkpoint
from surgery.core.host import default_host


def chosen(before: Checkpoint, names: tuple[str, ...]) -> str:
  """Returns the name of the one adapter that is meant.

  Raises:
    AdapterError: if none is attached, or several are and none was named.
    UsageError: if several were named.
  """
  if len(names) > 1:
    raise click.UsageError(
      f'a file holds one adapter, found {len(names)}. Name one with --adapter.'
    )
  known = before.records(default_host()).names
  if names or len(known) == 1:
    return before.records(default_host()).get((names or known)[0]).name
  if not known:
    raise errors.AdapterError('no adapter is attached.')
  raise errors.AdapterError(
    f'{len(known)} adapters are attached, and a file holds one. Name it with '
    f'--adapter: {", ".join(known)}.'
  )


def alone(before: Checkpoint, name: str) -> tuple[Checkpoint, Checkpoint]:
  """Returns what is read for an adapter's file, and what is written."""
  from surgery.passes import extract

  after = extract.extract(before, name, host=default_host())
  weights = {path: before[path] for path in after}
  return before.replace(leaves=weights), after


@click.command()
@shared.file
@shared.adapters('The adapter; the only one by default.')
@writing.writes
def command(
  file: pathlib.Path, names: tuple[str, ...], output: writing.Output
) -> None:
  r"""Write an adapter to a file of its own, bound to its base by digests.

  \b
  surgery extract adapted.msgpack --adapter default -o a.msgpack
  """
  before = shared.model(file)
  name = chosen(before, names)
  weights, after = alone(before, name)
  said = history.entry('extract', {'adapter': [name]}, [before])
  after = history.recorded(after, said)
  writing.run([writing.Step(weights, after, output)])
