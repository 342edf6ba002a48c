"""`surgery merge`."""

from __future__ import annotations

import pathlib

import click

from surgery.cli import shared
from surgery.core.host import default_host


@click.command()
@click.argument('file', type=shared.FILE)
@click.option(
  '--adapter',
  'names',
  multiple=True,
  metavar='NAME',
  help='The adapter to merge; all by default. May be repeated.',
)
@click.option(
  '--with',
  'source',
  type=shared.FILE,
  help='Merge the adapter in this file into the base in FILE.',
)
@click.option(
  '--no-check-base',
  is_flag=True,
  help='With --with: take a base with other values.',
)
@shared.writes
def command(
  file: pathlib.Path,
  names: tuple[str, ...],
  source: pathlib.Path | None,
  no_check_base: bool,
  output: shared.Output,
) -> None:
  r"""Fold adapters into the base; what layers got is what is stored.

  \b
  surgery merge adapted.msgpack -o merged.msgpack
  surgery merge base.msgpack --with a.msgpack -o merged.msgpack
  """
  from surgery.core.checkpoint import open_checkpoint
  from surgery.passes import extract, merge

  if no_check_base and source is None:
    raise click.UsageError('--no-check-base goes with --with.')
  if source is not None and names:
    raise click.UsageError(
      '--adapter does not go with --with: the file holds one adapter.'
    )
  host = default_host()
  before = adapted = shared.model(file)
  wanted = list(names) or None
  if source is not None:
    adapted = extract.insert(
      before, open_checkpoint(source), check_base=not no_check_base, host=host
    )
    wanted = [adapted.records(host).names[-1]]
  after = merge.merge(adapted, wanted, host=host)
  shared.finish(
    before,
    after,
    output,
    'merge',
    {
      'adapters': wanted,
      'with': source.name if source else None,
    },
  )
