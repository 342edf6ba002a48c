"""`surgery stats`."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import codes, completion, progress, shared
from surgery.cli.command import Command

if TYPE_CHECKING:
  from surgery.looking.stats import TensorStats
  from surgery.model.checkpoint import Leaf
  from surgery.naming.paths import Path

# What a table has, and what it can be ordered by.
_FIGURES = ('norm', 'mean', 'std', 'min', 'max', 'zeros', 'nan', 'inf')
_RANKS = ('effective-rank', 'stable-rank', 'sigma')
_SINGULAR = 5


@click.command(cls=Command)
@click.argument(
  'files', nargs=-1, required=True, metavar='FILE…', type=shared.FILE
)
@click.option(
  '--select',
  multiple=True,
  metavar='SELECTOR',
  shell_complete=completion.selectors,
  help='Only these tensors. May be repeated.',
)
@click.option(
  '--top',
  type=click.IntRange(1),
  metavar='N',
  help='Show only the N tensors with the largest values.',
)
@click.option(
  '--by',
  type=click.Choice((*_FIGURES, *_RANKS, 'size')),
  metavar='COLUMN',
  help='Sort by this column of the table, or by size, the largest first. With '
  '--top it is norm by default.',
)
@click.option(
  '--rank',
  is_flag=True,
  help='Also compute singular values, stable and effective rank of matrices; '
  'takes long.',
)
@click.option(
  '--finite',
  is_flag=True,
  help='Print only the first NaN or infinity of each file, and exit with 1 if '
  'there is one.',
)
@shared.quiet_option
@shared.json_option
def command(
  files: tuple[pathlib.Path, ...],
  select: tuple[str, ...],
  top: int | None,
  by: str | None,
  rank: bool,
  finite: bool,
  quiet: bool,
  as_json: bool,
) -> int:
  r"""Show norm, mean, deviation, extremes, zeros, NaN and infinity of tensors.

  Tensors are read block by block, and described as they are stored. With
  --finite the exit code is the result: 1 for NaN or infinity.

  \b
  surgery stats tuned.safetensors --top 5 --by std
  surgery stats tuned.safetensors --select '**/kernel' --rank
  surgery stats ckpt-*.safetensors --finite -q
  """
  if finite and (top or by or rank):
    raise click.UsageError('--finite does not go with --top, --by and --rank.')
  if by in _RANKS and not rank:
    raise click.UsageError(f'--by {by} needs --rank.')
  reports: list[dict[str, object]] = []

  def one(file: pathlib.Path) -> int:
    found = _found(_leaves(file, select), rank, finite, quiet)
    wrong = next((t for t in found if not t.finite), None)
    if finite:
      reports.append(_verdict(file, len(found), wrong))
      prefix = f'{file}: ' if len(files) > 1 else ''
      if not as_json and not quiet:
        _say(file, prefix, len(found), wrong)
      return codes.DIFFERS if wrong is not None else 0
    shown = _ordered(found, by or ('norm' if top else None))[:top]
    reports.append(_report(file, shown, wrong is None))
    if not as_json:
      heading = [f'{file}:'] if len(files) > 1 else []
      for line in (*heading, *_lines(shown, rank)):
        click.echo(line)
    return 0

  return shared.reported(files, one, reports if as_json else None)


def _leaves(file: pathlib.Path, select: tuple[str, ...]) -> dict[Path, Leaf]:
  from surgery.looking import stats

  return stats.selected(shared.opened(file), list(select) or None)


def _found(
  leaves: dict[Path, Leaf], rank: bool, finite: bool, quiet: bool
) -> list[TensorStats]:
  """Returns figures of tensors; with `finite`, up to one that is not finite."""
  from surgery.looking import stats

  found: list[TensorStats] = []
  with progress.shown(leaves.values(), quiet) as told:
    for path, leaf in leaves.items():
      one = stats.of_leaf(path, leaf, _SINGULAR if rank else 0)
      if told is not None:
        told(1, leaf.nbytes)
      if one is not None:
        found.append(one)
        if finite and not one.finite:
          break
  return found


def _place(one: TensorStats) -> str:
  """Returns where the first NaN or infinity is, as Python writes it."""
  index = ', '.join(map(str, one.first or ()))
  return f'{one.path}[{index}]' if one.first else one.path


def _what(one: TensorStats) -> str:
  parts = [
    f'{count} {name}'
    for count, name in ((one.nan, 'NaN'), (one.inf, 'infinite'))
    if count
  ]
  return f'{" and ".join(parts)} of {one.size}'


def _say(
  file: pathlib.Path, prefix: str, count: int, wrong: TensorStats | None
) -> None:
  if wrong is None:
    tensors = f'{count} tensor{"s"[: count != 1]}'
    click.echo(f'{file}: no NaN or infinity in {tensors}', err=True)
  else:
    click.echo(f'{prefix}{_place(wrong)} is not finite ({_what(wrong)})')


def _verdict(
  file: pathlib.Path, count: int, wrong: TensorStats | None
) -> dict[str, object]:
  return {
    'file': str(file),
    'finite': wrong is None,
    'tensors': count,
    'first': None if wrong is None else _data(wrong),
  }


def _report(
  file: pathlib.Path, shown: list[TensorStats], finite: bool
) -> dict[str, object]:
  return {
    'file': str(file),
    'finite': finite,
    'tensors': [_data(one) for one in shown],
  }


def _value(one: TensorStats, column: str) -> float | None:
  if column in _RANKS:
    if one.spectrum is None:
      return None
    if column == 'sigma':
      return one.spectrum.values[0]
    if column == 'stable-rank':
      return one.spectrum.stable_rank
    return one.spectrum.effective_rank
  value: float | None = getattr(one, column)
  return value


def _ordered(found: list[TensorStats], by: str | None) -> list[TensorStats]:
  """Returns tensors by decreasing value; those without a value come last."""
  if by is None:
    return found

  def key(one: TensorStats) -> tuple[bool, float]:
    value = _value(one, by)
    return value is None, 0.0 if value is None else -value

  return sorted(found, key=key)


def _finite(number: float | None) -> float | None:
  """Returns a number for JSON, which has no infinity: None instead."""
  return None if number is None or not math.isfinite(number) else number


def _data(one: TensorStats) -> dict[str, Any]:
  figures = {
    name: _finite(getattr(one, name))
    for name in ('norm', 'mean', 'std', 'min', 'max')
  }
  data: dict[str, Any] = {
    'path': one.path,
    'shape': list(one.shape),
    'dtype': one.dtype,
    'size': one.size,
    **figures,
    'zeros': one.zeros,
    'zero_share': one.zero_share,
    'nan': one.nan,
    'inf': one.inf,
    'first': None if one.first is None else list(one.first),
  }
  if one.spectrum is not None:
    data['singular_values'] = list(one.spectrum.values)
    data['stable_rank'] = one.spectrum.stable_rank
    data['effective_rank'] = one.spectrum.effective_rank
    data['exact'] = one.spectrum.exact
  if one.note:
    data['note'] = one.note
  return data


def _lines(found: list[TensorStats], rank: bool) -> Iterator[str]:
  """Yields a table, numbers to the right."""
  head = ['tensor', '', *_FIGURES[:6], 'not finite']
  ranks = ['effective rank', 'stable rank', 'singular values']
  table = [head + ranks * rank]
  table += [_row(one) + _spectrum(one) * rank for one in found]
  widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
  for row in table:
    cells = [
      f'{cell:<{width}}' if k < 2 or k >= 8 else f'{cell:>{width}}'
      for k, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    yield '  '.join(cells).rstrip()


def _row(one: TensorStats) -> list[str]:
  shape = ','.join(map(str, one.shape))
  tensor = 'value' if one.dtype is None else f'{one.dtype}[{shape}]'
  figures = [
    _short(value) for value in (one.norm, one.mean, one.std, one.min, one.max)
  ]
  zeros = '-' if one.norm is None else f'{100 * one.zero_share:.3g}%'
  wrong = f'{_what(one)}, first {_place(one)}' if not one.finite else ''
  notes = ', '.join(filter(None, (one.note, wrong)))
  return [one.path, tensor, *figures, zeros, notes]


def _short(value: float | None) -> str:
  return '-' if value is None else f'{value:.4g}'


def _spectrum(one: TensorStats) -> list[str]:
  found = one.spectrum
  if found is None:
    return ['', '', '']
  values = ' '.join(f'{v:.4g}' for v in found.values)
  about = '' if found.exact else 'about '
  return [
    _short(found.effective_rank),
    _short(found.stable_rank),
    f'{about}{values}',
  ]
