"""`surgery diff`."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import codes, completion, progress, shared, showing
from surgery.cli.command import Command
from surgery.host.manager import default_host
from surgery.naming import paths

if TYPE_CHECKING:
  from surgery.looking.diff import Difference, TensorDiff
  from surgery.model.checkpoint import Checkpoint


@click.command(cls=Command)
@click.argument('a', metavar='A', type=shared.FILE)
@click.argument('b', metavar='B', type=shared.FILE)
@click.argument(
  'selectors',
  nargs=-1,
  metavar='[SELECTOR]…',
  shell_complete=completion.selectors,
)
@click.option(
  '--top',
  type=click.IntRange(1),
  metavar='N',
  help='Show only the N tensors that differ most.',
)
@click.option(
  '--tolerance',
  type=click.FloatRange(0),
  metavar='T',
  help='Largest relative error ‖a-b‖/‖a‖ of a tensor that is let pass; its '
  'dtype may differ then. 0 asks for equal values. By default every bit and '
  'the dtype count.',
)
@click.option(
  '--save',
  type=shared.FILE,
  metavar='PATCH',
  help='Write a patch: what B has and A has not. `surgery patch` makes B of '
  'A and it. Exit with 0.',
)
@click.option(
  '--no-compress',
  is_flag=True,
  help='With --save: compress nothing. By default zstd is used where it makes '
  'the patch smaller and the package zstandard is installed.',
)
@click.option(
  '--force', is_flag=True, help='With --save: replace an existing file.'
)
@shared.quiet_option
@shared.json_option
def command(
  a: pathlib.Path,
  b: pathlib.Path,
  selectors: tuple[str, ...],
  top: int | None,
  tolerance: float | None,
  save: pathlib.Path | None,
  no_compress: bool,
  force: bool,
  quiet: bool,
  as_json: bool,
) -> int:
  r"""Compare two files, tensor by tensor; exit with 1 if they differ.

  With selectors, only those tensors are compared. Histories are not. With
  --quiet nothing is printed; the exit code tells.

  \b
  surgery diff base.msgpack merged.msgpack --top 5
  surgery diff base.msgpack half.msgpack '**/kernel' --tolerance 1e-2
  surgery diff base.msgpack tuned.msgpack --save patch.safetensors
  """
  if save is not None:
    if selectors or top is not None or tolerance is not None:
      raise click.UsageError(
        '--save does not go with selectors, --top and --tolerance: a patch '
        'holds all that differs.'
      )
    _save(a, b, save, force, not no_compress, quiet, as_json)
    return 0
  if force or no_compress:
    raise click.UsageError('--force and --no-compress need --save.')
  if tolerance is not None and math.isnan(tolerance):
    raise click.UsageError('--tolerance: expected a number, found nan.')
  first, second = shared.opened(a), shared.opened(b)
  said = [] if selectors else _manifests(first, second)
  count, different = 0, []
  for one in _compared(first, second, selectors, quiet):
    count += 1
    if one.differs(tolerance):
      different.append(one)
  equal = not said and not different
  shown = _top(different, top)
  if as_json:
    data = {
      'a': str(a),
      'b': str(b),
      'equal': equal,
      'compared': count,
      'differing': len(different),
      'manifest': [vars(d) for d in said],
      'tensors': [_data(one) for one in shown],
    }
    click.echo(json.dumps(data, default=str))
  elif not quiet:
    for line in (*map(str, said), *_lines(shown)):
      click.echo(line)
    click.echo(_summary(count, different, len(said), tolerance))
  return 0 if equal else codes.DIFFERS


def _save(
  a: pathlib.Path,
  b: pathlib.Path,
  save: pathlib.Path,
  force: bool,
  compress: bool,
  quiet: bool,
  as_json: bool,
) -> None:
  """Writes a patch."""
  from surgery.files import patches
  from surgery.files.patches import coding
  from surgery.recipes import running
  from surgery.recipes.spec import Target

  running.check_target(Target(save), force)
  if compress and not quiet and coding.zstd() is None:
    click.echo(
      'zstandard is not installed, so nothing is compressed: pip install '
      "'blox-surgery[zstd]'.",
      err=True,
    )
  with progress.shown(shared.opened(b).values(), quiet) as told:
    report = patches.make_patch(
      a,
      b,
      save,
      overwrite=force,
      compress=compress,
      progress=told,
      host=default_host(),
    )
  if as_json:
    click.echo(json.dumps({'output': str(save), **report}))
  elif not quiet:
    said, sizes = showing.patch(report), (report['patch'], report['bytes'])
    small, large = map(shared.size, sizes)
    click.echo(f'wrote {save}: {said}; {small} for {large}', err=True)


def _manifests(a: Checkpoint, b: Checkpoint) -> list[Difference]:
  from surgery.looking import diff

  return diff.manifests(a.manifest, b.manifest)


def _compared(
  a: Checkpoint, b: Checkpoint, selectors: tuple[str, ...], quiet: bool
) -> Iterator[TensorDiff]:
  """Yields the results, telling how far it has come."""
  from surgery.looking import diff

  chosen = list(selectors) or None
  with progress.shown(({**b, **a}).values(), quiet) as told:
    for one in diff.diff(a, b, chosen, host=default_host()):
      yield one
      if told is not None:
        leaf = one.a or one.b
        told(1, leaf.nbytes if leaf else 0)


def _weight(one: TensorDiff) -> float:
  """Returns how much a tensor differs; most, where that is no number."""
  return one.figures.relative if one.figures else math.inf


def _top(different: list[TensorDiff], top: int | None) -> list[TensorDiff]:
  if top is None:
    return different
  return sorted(different, key=_weight, reverse=True)[:top]


def _finite(number: float | None) -> float | None:
  """Returns a number that JSON has; null for infinity."""
  return None if number is None or not math.isfinite(number) else number


def _data(one: TensorDiff) -> dict[str, Any]:
  sides = {
    side: None
    if leaf is None
    else {
      'shape': None if leaf.shape is None else list(leaf.shape),
      'dtype': leaf.dtype,
    }
    for side, leaf in (('a', one.a), ('b', one.b))
  }
  figures = None
  if one.figures is not None:
    figures = {
      'max_abs': _finite(one.figures.max_abs),
      'relative': _finite(one.figures.relative),
      'cosine': _finite(one.figures.cosine),
      'changed': one.figures.share,
      'nonfinite': one.figures.nonfinite,
    }
  return {
    'path': paths.show(one.path),
    'only_in': 'b' if one.a is None else 'a' if one.b is None else None,
    **sides,
    'notes': [vars(note) for note in one.notes],
    'figures': figures,
  }


def _lines(different: list[TensorDiff]) -> Iterator[str]:
  """Yields a table of tensors that differ."""
  rows = [(paths.show(d.path), _tensor(d), _figures(d)) for d in different]
  widths = [max((len(r[i]) for r in rows), default=0) for i in range(2)]
  for path, tensor, figures in rows:
    yield f'{path:<{widths[0]}}  {tensor:<{widths[1]}}  {figures}'.rstrip()


def _tensor(one: TensorDiff) -> str:
  texts = dict.fromkeys(str(x) for x in (one.a, one.b) if x is not None)
  return ' → '.join(texts)


def _figures(one: TensorDiff) -> str:
  if one.a is None:
    return 'only in b'
  if one.b is None:
    return 'only in a'
  parts = [str(note) for note in one.notes]
  figures = one.figures
  if one.a.shape != one.b.shape:
    parts.insert(0, 'shapes differ')
  elif figures is None and not one.equal and one.a.shape is not None:
    parts.insert(0, 'codes of a quantised weight differ')
  elif figures is None and not one.equal:
    parts.insert(0, f'{one.a.load()!r} → {one.b.load()!r}')
  elif figures is not None and one.a.dtype != one.b.dtype and one.equal:
    parts.insert(0, 'equal values')
  elif figures is not None and figures.changed:
    cosine = '-' if figures.cosine is None else f'{figures.cosine:.6f}'
    parts.insert(
      0,
      f'max {figures.max_abs:.3g}, relative {figures.relative:.3g}, '
      f'cosine {cosine}, changed {_percent(figures.share)}',
    )
    if figures.nonfinite:
      parts.insert(1, f'{figures.nonfinite} not finite in one')
  return '; '.join(parts)


def _percent(share: float) -> str:
  return f'{share:.3g}' if share < 0.0001 else f'{100 * share:.3g}%'


def _summary(
  count: int, different: list[TensorDiff], said: int, tolerance: float | None
) -> str:
  parts = []
  if different:
    parts.append(f'{len(different)} of {count} tensors differ')
  for side, gone in (('a', 'b'), ('b', 'a')):
    if only := sum(getattr(d, gone) is None for d in different):
      parts.append(f'{only} of them only in {side}')
  if said:
    parts.append(f'{said} difference{"s"[: said > 1]} beside tensors')
  within = '' if tolerance is None else f' within {tolerance:g}'
  return ', '.join(parts) or f'equal{within}: {count} tensors'
