"""`surgery merge`."""

from __future__ import annotations

import pathlib

import click

from surgery.cli import shared, writing
from surgery.core.host import default_host


@click.command()
@shared.file
@shared.adapters('The adapter to merge; all by default. May be repeated.')
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
@writing.writes
def command(
  file: pathlib.Path,
  names: tuple[str, ...],
  source: pathlib.Path | None,
  no_check_base: bool,
  output: writing.Output,
) -> None:
  r"""Fold adapters into the base; what layers got is what is stored.

  \b
  surgery merge adapted.msgpack -o merged.msgpack
  surgery merge base.msgpack --with a.msgpack -o merged.msgpack
  """
  from surgery.passes import extract

  if no_check_base and source is None:
    raise click.UsageError('--no-check-base goes with --with.')
  if source is not None and names:
    raise click.UsageError(
      '--adapter does not go with --with: the file holds one adapter.'
    )
  host = default_host()
  before = adapted = shared.model(file)
  wanted, others = list(names) or None, []
  if source is not None:
    others = [shared.opened(source)]
    adapted = extract.insert(
      before, others[0], check_base=not no_check_base, host=host
    )
    wanted = [adapted.records(host).names[-1]]
  after = shared.passed('merge')(adapted, wanted, host=host)
  arguments = {
    'adapter': list(names),
    'with': source.name if source else None,
    'no_check_base': no_check_base,
  }
  writing.finish(before, after, output, 'merge', arguments, others)
