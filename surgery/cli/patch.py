"""`surgery patch`."""

from __future__ import annotations

import json
import pathlib

import click

from surgery.cli import progress, shared, showing
from surgery.cli.command import Command
from surgery.host.manager import default_host
from surgery.recipes.spec import Target, is_folder


@click.command(cls=Command)
@click.argument('base', type=shared.FILE)
@click.argument('patch', type=shared.FILE)
@click.option(
  '-o',
  '--output',
  'target',
  required=True,
  help='The file to write; a new folder, if the patch is one of a folder.',
)
@click.option('--force', is_flag=True, help='Replace an existing file.')
@click.option(
  '--dry-run',
  is_flag=True,
  help='Check what needs no reading of tensors, write nothing.',
)
@shared.quiet_option
@shared.json_option
def command(
  base: pathlib.Path,
  patch: pathlib.Path,
  target: str,
  force: bool,
  dry_run: bool,
  quiet: bool,
  as_json: bool,
) -> None:
  r"""Restore the file that a patch was made from, byte by byte.

  BASE must have the same values as when `surgery diff BASE TUNED --save PATCH`
  was run; its format does not matter.

  \b
  surgery patch base.safetensors tuned.patch.safetensors -o tuned.safetensors
  """
  from surgery.files import patches
  from surgery.recipes import running

  where = pathlib.Path(target)
  running.check_target(Target(where, folder=is_folder(target)), force)
  # The tensors of the output are not known yet: progress counts the base's.
  with progress.shown(shared.opened(base).values(), quiet) as told:
    report = patches.apply_patch(
      base,
      patch,
      where,
      overwrite=force,
      dry_run=dry_run,
      progress=told,
      host=default_host(),
    )
  if as_json:
    click.echo(json.dumps({'output': target, **report}))
  elif dry_run or not quiet:
    verb = 'would write' if dry_run else 'wrote'
    size = shared.size(report['bytes'])
    said = showing.patch(report)
    click.echo(f'{verb} {target}: {said}; {size}', err=not dry_run)
