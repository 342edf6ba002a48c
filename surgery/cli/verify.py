"""`surgery verify`."""

from __future__ import annotations

import dataclasses
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
  help='Add missing digests, replacing FILE.',
)
@click.option(
  '--allow-missing',
  is_flag=True,
  help='Skip tensors without a digest, if others have one.',
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

  A tensor without a digest cannot be checked: exits with 3. All files are
  checked, whatever is found. With --quiet only the exit code is given.

  \b
  surgery verify base.msgpack
  surgery verify *.safetensors
  surgery verify from_flax.msgpack --write
  """
  reports: list[dict[str, object]] = []

  def one(file: pathlib.Path) -> int:
    found = _verify(file, write, quiet)
    if not quiet:
      # With several files, each tensor needs the name of its file.
      prefix = f'{file}: ' if len(files) > 1 else ''
      found.show(prefix, as_json)
      if found.wrong and write:
        click.echo(
          f'{file}: no digest was added, since tensors differ. Resolve that '
          'first.',
          err=True,
        )
    reports.append(found.data())
    return found.code(allow_missing)

  return shared.reported(files, one, reports if as_json else None)


@dataclasses.dataclass(frozen=True)
class _Result:
  """The result of verifying a file.

  Attributes:
    file: the file.
    tensors: the result for each tensor.
    added: how many digests were added.
  """

  file: pathlib.Path
  tensors: list[Verified]
  added: int

  def of(self, state: str) -> list[Verified]:
    """Returns the tensors in a state: `ok`, `differs` or `missing`."""
    return [one for one in self.tensors if one.state == state]

  @property
  def wrong(self) -> list[Verified]:
    """The tensors whose digest differs."""
    return self.of('differs')

  def show(self, prefix: str, as_json: bool) -> None:
    """Prints the tensors that differ, and a summary."""
    for one in self.wrong:
      text = f'{prefix}{paths.show(one.path)}: {_reason(one)}'
      click.echo(text, err=as_json)
    parts = [f'{len(self.of("ok"))} ok']
    if self.wrong:
      parts.append(f'{len(self.wrong)} differ')
    if missing := len(self.of('missing')):
      parts.append(f'{missing} {"added" if self.added else "without a digest"}')
    click.echo(f'{self.file}: {", ".join(parts)}', err=True)

  def code(self, allow_missing: bool) -> int:
    """Returns the exit code; prints an error for tensors without a digest."""
    code = codes.DIFFERS if self.wrong else 0
    unchecked = [one.path for one in self.of('missing')]
    if not unchecked or self.added or allow_missing:
      return code
    text = _unchecked(unchecked, len(self.tensors))
    click.echo(f'error: {self.file}: {text}', err=True)
    # A difference is more than a tensor that could not be checked.
    return code or codes.FAILED

  def data(self) -> dict[str, object]:
    """Returns it as JSON data."""
    return {
      'file': str(self.file),
      'ok': len(self.of('ok')),
      'differs': len(self.wrong),
      'missing': len(self.of('missing')) - self.added,
      'added': self.added,
      'tensors': [
        {
          'path': paths.show(one.path),
          'state': one.state,
          'expected': one.expected,
          'found': one.found,
        }
        for one in self.tensors
      ],
    }


def _verify(file: pathlib.Path, write: bool, quiet: bool) -> _Result:
  """Verifies a file, and adds digests if none differs and `write` is true.

  Raises:
    SurgeryError: if no tensor has a digest.
  """
  opened = shared.opened(file)
  if not write and all(leaf.digest is None for leaf in opened.values()):
    raise errors.SurgeryError(
      f'{file}: no tensor has a digest, so there is nothing to compare with. '
      'Give --write to add digests of the present values.'
    )
  result = _Result(file, _verified(opened, quiet), 0)
  missing = result.of('missing')
  if not write or result.wrong or not missing:
    return result
  _complete(opened, result.tensors, quiet)
  return dataclasses.replace(result, added=len(missing))


def _unchecked(unchecked: list[Path], count: int) -> str:
  """Returns the message about tensors without a digest."""
  one = len(unchecked) == 1
  return (
    f'{len(unchecked)} of {count} tensors {"has" if one else "have"} no digest '
    f'and {"was" if one else "were"} not checked: '
    f'{errors.listed(map(paths.show, unchecked))}. Give --write to add '
    f'{"a digest" if one else "digests"} of the present values, or '
    f'--allow-missing to skip {"it" if one else "them"}.'
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


def _complete(opened: Checkpoint, found: list[Verified], quiet: bool) -> None:
  """Writes a file again, with all digests."""
  from surgery.looking import verify
  from surgery.recipes import running
  from surgery.recipes.spec import Spec, Target

  # The new file has the same values, so digests that were just computed hold.
  digests = {one.path: one.found for one in found if one.found is not None}
  after = verify.complete(opened, digests)
  where = pathlib.Path(opened.origin)
  recipe = Spec({'model': where}, {}, (), {'out': Target(where)})
  plan = running.plan(recipe, default_host(), {'model': after})
  if location.is_index(where):
    from surgery.files import sharding

    # Only the index changes; its files need not be written again.
    sharding.annotate(where, plan.outputs[0].after)
    return
  plan.write(
    overwrite=True, watched=lambda one: progress.shown(one.values(), quiet)
  )


def _reason(one: Verified) -> str:
  return one.reason or f'expected {one.expected}, found {one.found}.'
