"""`surgery extract`."""

from __future__ import annotations

import dataclasses
import pathlib

import click

from surgery.cli import shared, writing
from surgery.cli.command import Command


def step(names: tuple[str, ...]) -> dict[str, object]:
  """Returns the step that makes an adapter of its own, as `adapter`.

  Raises:
    UsageError: if several adapters were named.
  """
  if len(names) > 1:
    raise click.UsageError(
      f'a file holds one adapter, found {len(names)}. Name one with --adapter.'
    )
  return {'extract': names[0] if names else None, 'as': 'adapter'}


@click.command(cls=Command)
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
  output = dataclasses.replace(output, of='adapter')
  writing.carry_out(output, [step(names)], before)
