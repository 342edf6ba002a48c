"""Plans as people read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click

from surgery.cli import wording
from surgery.cli.shared import size

_KINDS = ('copied', 'renamed', 'computed', 'new', 'gone')


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
  """Yields what a plan changes, a tensor a line."""
  for row in rows:
    plain = not {'trainable', 'from'} & row.keys()
    if row['what'] == 'copied' and plain:
      continue
    shape = '' if row['shape'] is None else str(tuple(row['shape']))
    notes = []
    if 'from' in row:
      notes.append(f'from {row["from"]}')
    if 'blocks' in row:
      notes.append('in blocks' if row['blocks'] else 'whole')
    if row.get('time') == 'heavy':
      notes.append('takes long')
    if 'trainable' in row:
      notes.append('trains' if row['trainable'] else 'frozen')
    tensor = f'{row["dtype"] or "value"}{shape}'
    yield '  '.join([f'{row["what"]:<8}', row['path'], tensor, *notes])


def summary(report: dict[str, Any]) -> str:
  """Returns a plan in a line."""
  rows = report['tensors']
  some = {what: [r for r in rows if r['what'] == what] for what in _KINDS}
  parts = [
    f'{len(one)} {what} ({size(sum(r["bytes"] for r in one))})'
    for what, one in some.items()
    if one
  ]
  for flag, word in ((False, 'frozen'), (True, 'to train')):
    if count := sum(r.get('trainable') is flag for r in rows):
      parts.append(f'{count} {word}')
  if report['memory']:
    parts.append(f'about {size(report["memory"])} of memory')
  # An adapter without weights has a file without tensors.
  return ', '.join(parts) or 'no tensors'


def found(rows: list[dict[str, Any]]) -> Iterator[str]:
  """Yields what was found out while tensors were written, a line a kind."""
  for text in dict.fromkeys(row['text'] for row in rows):
    own = [row for row in rows if row['text'] == text]
    share = sum(r['count'] for r in own) / sum(r['of'] for r in own)
    most = ', '.join(f'{r["path"]} {r["share"]:.2%}' for r in own[:3])
    more = f' and {len(own) - 3} more' if len(own) > 3 else ''
    yield (
      f'{share:.2%} of the numbers that were not zero {text}, in {len(own)} '
      f'tensor{"s"[: len(own) > 1]}: {most}{more}.'
    )


def checks(texts: list[str], dry_run: bool) -> None:
  """Prints what a recipe asserts that writes nothing."""
  if dry_run:
    for text in texts:
      click.echo(f'check     {text}')
  what = 'would check' if dry_run else 'checked'
  click.echo(
    f'{what} {len(texts)} assertion{"s"[: len(texts) != 1]} on values; names, '
    'shapes and dtypes hold.',
    err=not dry_run,
  )


def folder(said: Mapping[str, Any]) -> Iterator[str]:
  """Yields what is written to a folder beside the tensors, a line each."""
  from surgery.interop import configs

  for one in said.get('config', ()):
    old, new = (configs.shown(one[key]) for key in ('old', 'new'))
    yield f'config    {one["key"]}: {old} -> {new}  ({one["why"]})'
  for name in said.get('along', ()):
    yield f'along     {name}'


def patch(report: Mapping[str, Any]) -> str:
  """Returns in a line what a patch does to tensors."""
  words = {
    'same': 'as in the base',
    'blocks': 'changed in blocks',
    'whole': 'changed as a whole',
    'new': 'new',
    'removed': 'removed',
  }
  parts = [f'{report[k]} {w}' for k, w in words.items() if report[k]]
  return ', '.join(parts) or 'no tensors'


def show(report: dict[str, Any], where: str, dry_run: bool) -> None:
  """Prints a plan: what is to be done, or what was done."""
  if dry_run:
    for check in report['checks']:
      click.echo(f'check     {check}')
    for line in lines(report['tensors']):
      click.echo(line)
    for one in report.get('left_out', ()):
      click.echo(f'left out  {one["path"]}  {one["why"]}')
    for one in report.get('remarks', ()):
      click.echo(f'note      {wording.as_options(one)}.')
    for line in folder(report.get('folder', {})):
      click.echo(line)
  said = summary(report)
  if extracted := report.get('extracted'):
    said = f'{said}, error {extracted["error"]:.3%}'
    if dry_run:
      for path, one in extracted['sites'].items():
        error = f'rank {one["rank"]}  error {one["error"]:.3%}'
        click.echo(f'factors   {path}  {error}')
  verb = 'would write' if dry_run else 'wrote'
  click.echo(f'{verb} {where}: {said}', err=not dry_run)
