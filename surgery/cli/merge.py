"""`surgery merge`."""

from __future__ import annotations

import pathlib

import click

from surgery.cli import shared, writing


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
  if no_check_base and source is None:
    raise click.UsageError('--no-check-base goes with --with.')
  if source is not None and names:
    raise click.UsageError(
      '--adapter does not go with --with: the file holds one adapter.'
    )
  before = shared.model(file)
  if source is None:
    writing.carry_out(output, [{'merge': shared.short(names)}], before)
    return
  value: dict[str, object] = {'with': 'adapter'}
  if no_check_base:
    value['check-base'] = False
  others = {'adapter': shared.opened(source)}
  writing.carry_out(output, [{'merge': value}], before, others)
