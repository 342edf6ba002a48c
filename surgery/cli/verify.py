"""`surgery verify`."""

from __future__ import annotations

import collections
import pathlib
from typing import TYPE_CHECKING

import click

from surgery import errors
from surgery.cli import codes, progress, shared
from surgery.cli.command import Command
from surgery.host import location
from surgery.host.manager import default_host
from surgery.naming import paths

if TYPE_CHECKING:
  from surgery.looking.verify import Verified
  from surgery.model.checkpoint import Checkpoint
  from surgery.naming.paths import Path


@click.command(cls=Command)
@click.argument(
  'files', nargs=-1, required=True, metavar='FILE…', type=shared.FILE
)
@click.option(
  '--write',
  is_flag=True,
  help='Add the digests that are missing, replacing FILE.',
)
@click.option(
  '--allow-missing',
  is_flag=True,
  help='Pass over tensors without a digest, if others have one.',
)
@shared.quiet_option
@shared.json_option
def command(
  files: tuple[pathlib.Path, ...],
  write: bool,
  allow_missing: bool,
  quiet: bool,
  as_json: bool,
) -> int:
  r"""Recompute the digests of tensors; exit with 1 if one differs.

  A tensor without a digest cannot be checked: exits with 3. Of several files
  all are looked at. With --quiet the exit code tells.

  \b
  surgery verify base.msgpack
  surgery verify *.safetensors
  surgery verify from_flax.msgpack --write
  """
  reports: list[dict[str, object]] = []

  def one(file: pathlib.Path) -> int:
    # The tensors of several files are told apart by the names of the files.
    prefix = f'{file}: ' if len(files) > 1 else ''
    code, report = _verify(file, prefix, write, allow_missing, quiet, as_json)
    reports.append(report)
    return code

  return shared.reported(files, one, reports if as_json else None)


def _verify(
  file: pathlib.Path,
  prefix: str,
  write: bool,
  allow_missing: bool,
  quiet: bool,
  as_json: bool,
) -> tuple[int, dict[str, object]]:
  """Verifies one file; returns its exit code, and what is found as JSON."""
  opened = shared.opened(file)
  if not write and all(leaf.digest is None for leaf in opened.values()):
    raise errors.SurgeryError(
      f'{file}: no tensor has a digest, so there is nothing to compare with. '
      'Give --write to add the digests of what is there now.'
    )
  found = _verified(opened, quiet)
  states = collections.Counter(one.state for one in found)
  wrong = [one for one in found if one.state == 'differs']
  added = states['missing'] if write and not wrong else 0
  if added:
    _complete(file, opened, found, quiet)
  if not quiet:
    for tensor in wrong:
      click.echo(
        f'{prefix}{paths.show(tensor.path)}: {_reason(tensor)}', err=as_json
      )
    click.echo(_summary(file, states, added), err=True)
    if wrong and write:
      click.echo(
        f'{file}: no digest was added: first see to what differs.', err=True
      )
  code = codes.DIFFERS if wrong else 0
  unchecked = [one.path for one in found if one.state == 'missing']
  if unchecked and not added and not allow_missing:
    # A difference that was found weighs more than what was not looked at.
    code = code or codes.FAILED
    click.echo(f'error: {file}: {_unchecked(unchecked, len(found))}', err=True)
  return code, _data(file, found, states, added)


def _unchecked(unchecked: list[Path], count: int) -> str:
  """Says of which tensors nothing is known."""
  one = len(unchecked) == 1
  return (
    f'{len(unchecked)} of {count} tensors {"has" if one else "have"} no digest '
    f'and {"was" if one else "were"} not checked: '
    f'{errors.listed(map(paths.show, unchecked))}. Give --write to add the '
    f'{"digest" if one else "digests"} of what is there now, or '
    f'--allow-missing to pass {"it" if one else "them"} over.'
  )


def _verified(opened: Checkpoint, quiet: bool) -> list[Verified]:
  from surgery.looking import verify

  found = []
  tensors = [leaf for leaf in opened.values() if leaf.shape is not None]
  with progress.shown(tensors, quiet) as told:
    for one in verify.verify(opened):
      found.append(one)
      if told is not None:
        told(1, opened[one.path].nbytes)
  return found


def _complete(
  file: pathlib.Path,
  opened: Checkpoint,
  found: list[Verified],
  quiet: bool,
) -> None:
  """Writes the file anew, with all digests."""
  from surgery.looking import verify
  from surgery.recipes import running
  from surgery.recipes.recipe import Recipe

  digests = {one.path: one.found for one in found if one.found is not None}
  after = verify.complete(opened, digests)
  where = pathlib.Path(opened.origin)
  recipe = Recipe(
    [], inputs={'model': where}, outputs={'out': where}, origin=''
  )
  plan = running.plan(recipe.spec, default_host(), {'model': after})
  if location.is_index(where):
    from surgery.files import sharding

    # Only the index changes; its files need not be written again.
    sharding.annotate(where, plan.outputs[0].after)
    return
  plan.write(
    overwrite=True, watched=lambda one: progress.shown(one.values(), quiet)
  )


def _reason(one: Verified) -> str:
  if one.reason:
    return one.reason
  return f'expected {one.expected}, found {one.found}.'


def _summary(
  file: pathlib.Path, states: collections.Counter[str], added: int
) -> str:
  parts = [f'{states["ok"]} ok']
  if states['differs']:
    parts.append(f'{states["differs"]} differ')
  if states['missing']:
    what = 'added' if added else 'without a digest'
    parts.append(f'{states["missing"]} {what}')
  return f'{file}: {", ".join(parts)}'


def _data(
  file: pathlib.Path,
  found: list[Verified],
  states: collections.Counter[str],
  added: int,
) -> dict[str, object]:
  return {
    'file': str(file),
    'ok': states['ok'],
    'differs': states['differs'],
    'missing': states['missing'] - added,
    'added': added,
    'tensors': [
      {
        'path': paths.show(one.path),
        'state': one.state,
        'expected': one.expected,
        'found': one.found,
      }
      for one in found
    ],
  }
