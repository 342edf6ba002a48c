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
  from surgery.model.checkpoint import Checkpoint, Leaf


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
  help='Largest relative error ‖a-b‖/‖a‖ of a tensor that is accepted, in any '
  'dtype. 0 means equal values. By default bits and dtypes have to be equal.',
)
@click.option(
  '--save',
  type=shared.FILE,
  metavar='PATCH',
  help='Write the differences as a patch, from which `surgery patch` makes B '
  'of A. Exit with 0.',
)
@click.option(
  '--no-compress',
  is_flag=True,
  help='With --save: compress nothing. By default zstd is used if it makes the '
  'patch smaller and the package zstandard is installed.',
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

  With selectors, only those tensors are compared. Histories are never compared.
  With --quiet nothing is printed; the exit code is the result.

  \b
  surgery diff base.msgpack merged.msgpack --top 5
  surgery diff base.msgpack half.msgpack '**/kernel' --tolerance 1e-2
  surgery diff base.msgpack tuned.msgpack --save patch.safetensors
  """
  if save is not None:
    if selectors or top is not None or tolerance is not None:
      raise click.UsageError(
        '--save does not go with selectors, --top and --tolerance: a patch '
        'holds all differences.'
      )
    _save(a, b, save, force, not no_compress, quiet, as_json)
    return 0
  if force or no_compress:
    raise click.UsageError('--force and --no-compress need --save.')
  if tolerance is not None and math.isnan(tolerance):
    raise click.UsageError('--tolerance: expected a number, found nan.')
  first, second = shared.opened(a), shared.opened(b)
  notes = [] if selectors else _manifests(first, second)
  found = list(_compared(first, second, selectors, quiet))
  different = [one for one in found if one.differs(tolerance)]
  equal = not notes and not different
  shown = _top(different, top)
  if as_json:
    data = {
      'a': str(a),
      'b': str(b),
      'equal': equal,
      'compared': len(found),
      'differing': len(different),
      'manifest': [vars(d) for d in notes],
      'tensors': [_data(one) for one in shown],
    }
    click.echo(json.dumps(data, default=str))
  elif not quiet:
    for line in (*map(str, notes), *_lines(shown)):
      click.echo(line)
    click.echo(_summary(len(found), different, len(notes), tolerance))
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
  """Yields the results, and shows progress."""
  from surgery.looking import diff

  chosen = list(selectors) or None
  with progress.shown(({**b, **a}).values(), quiet) as told:
    for one in diff.diff(a, b, chosen, host=default_host()):
      yield one
      if told is not None:
        leaf = one.a or one.b
        told(1, leaf.nbytes if leaf else 0)


def _weight(one: TensorDiff) -> float:
  """Returns how much a tensor differs; infinity if that is no number."""
  return one.figures.relative if one.figures else math.inf


def _top(different: list[TensorDiff], top: int | None) -> list[TensorDiff]:
  if top is None:
    return different
  return sorted(different, key=_weight, reverse=True)[:top]


def _finite(number: float | None) -> float | None:
  """Returns a number for JSON, which has no infinity: None instead."""
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
  values = _values(one, one.a, one.b)
  return '; '.join([*values, *map(str, one.notes)])


def _values(one: TensorDiff, a: Leaf, b: Leaf) -> Iterator[str]:
  """Yields how the values of a tensor differ."""
  figures = one.figures
  if a.shape != b.shape:
    yield 'shapes differ'
  elif figures is None:
    # Values that are no arrays, or codes, whose values are not computed.
    if not one.equal and a.shape is None:
      yield f'{a.load()!r} → {b.load()!r}'
    elif not one.equal:
      yield 'codes of a quantised weight differ'
  elif a.dtype != b.dtype and one.equal:
    yield 'equal values'
  elif figures.changed:
    cosine = '-' if figures.cosine is None else f'{figures.cosine:.6f}'
    yield (
      f'max {figures.max_abs:.3g}, relative {figures.relative:.3g}, '
      f'cosine {cosine}, changed {_percent(figures.share)}'
    )
    if figures.nonfinite:
      yield f'{figures.nonfinite} not finite in one'


def _percent(share: float) -> str:
  return f'{share:.3g}' if share < 0.0001 else f'{100 * share:.3g}%'


def _summary(
  count: int, different: list[TensorDiff], notes: int, tolerance: float | None
) -> str:
  parts = []
  if different:
    parts.append(f'{len(different)} of {count} tensors differ')
  for side, gone in (('a', 'b'), ('b', 'a')):
    if only := sum(getattr(d, gone) is None for d in different):
      parts.append(f'{only} of them only in {side}')
  if notes:
    parts.append(f'{notes} difference{"s"[: notes > 1]} beside tensors')
  within = '' if tolerance is None else f' within {tolerance:g}'
  return ', '.join(parts) or f'equal{within}: {count} tensors'
