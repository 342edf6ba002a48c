"""Plans and reports as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click

from surgery.cli import wording
from surgery.cli.shared import size

_KINDS = ('copied', 'renamed', 'computed', 'new', 'gone')


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
  """Yields a line for each tensor that a plan changes."""
  for row in rows:
    plain = not {'trainable', 'from'} & row.keys()
    if row['what'] == 'copied' and plain:
      continue
    shape = '' if row['shape'] is None else str(tuple(row['shape']))
    tensor = f'{row["dtype"] or "value"}{shape}'
    yield '  '.join([f'{row["what"]:<8}', row['path'], tensor, *_notes(row)])


def _notes(row: Mapping[str, Any]) -> Iterator[str]:
  """Yields what is special about a tensor of a plan."""
  if 'from' in row:
    yield f'from {row["from"]}'
  if 'blocks' in row:
    yield 'in blocks' if row['blocks'] else 'whole'
  if row.get('time') == 'heavy':
    yield 'takes long'
  if 'trainable' in row:
    yield 'trains' if row['trainable'] else 'frozen'


def summary(report: dict[str, Any]) -> str:
  """Returns a plan in a line."""
  rows = report['tensors']
  parts = []
  for what in _KINDS:
    sizes = [row['bytes'] for row in rows if row['what'] == what]
    if sizes:
      parts.append(f'{len(sizes)} {what} ({size(sum(sizes))})')
  for flag, word in ((False, 'frozen'), (True, 'to train')):
    if count := sum(r.get('trainable') is flag for r in rows):
      parts.append(f'{count} {word}')
  if report['memory']:
    parts.append(f'about {size(report["memory"])} of memory')
  # An adapter without weights has a file without tensors.
  return ', '.join(parts) or 'no tensors'


def warnings(report: Mapping[str, Any]) -> Iterator[str]:
  """Yields the warnings about a folder, and the findings of writing."""
  for line in report.get('folder', {}).get('warnings', ()):
    yield f'warning: {line}'
  yield from found(report.get('found', []))


def found(rows: list[dict[str, Any]]) -> Iterator[str]:
  """Yields a line for each kind of finding of writing."""
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
  """Prints the assertions of a recipe without outputs."""
  if dry_run:
    for text in texts:
      click.echo(f'check     {text}')
  what = 'would check' if dry_run else 'checked'
  click.echo(
    f'{what} {len(texts)} assertion{"s"[: len(texts) != 1]} on values; names, '
    'shapes and dtypes hold.',
    err=not dry_run,
  )


def folder(report: Mapping[str, Any]) -> Iterator[str]:
  """Yields a line for each change of a configuration, and each copied file."""
  from surgery.interop import configs

  for one in report.get('config', ()):
    old, new = (configs.shown(one[key]) for key in ('old', 'new'))
    yield f'config    {one["key"]}: {old} -> {new}  ({one["why"]})'
  for name in report.get('along', ()):
    yield f'along     {name}'


def patch(report: Mapping[str, Any]) -> str:
  """Returns the numbers of tensors of a patch, in a line."""
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
  """Prints a plan: in full if it is not carried out, else its summary."""
  for line in _details(report) if dry_run else ():
    click.echo(line)
  text = summary(report)
  if extracted := report.get('extracted'):
    text = f'{text}, error {extracted["error"]:.3%}'
  verb = 'would write' if dry_run else 'wrote'
  # A plan is the result of a dry run; otherwise the file is the result.
  click.echo(f'{verb} {where}: {text}', err=not dry_run)


def _details(report: Mapping[str, Any]) -> Iterator[str]:
  """Yields the lines of a plan."""
  for check in report['checks']:
    yield f'check     {check}'
  yield from lines(report['tensors'])
  for one in report.get('left_out', ()):
    yield f'left out  {one["path"]}  {one["why"]}'
  for one in report.get('remarks', ()):
    yield f'note      {wording.as_options(one)}.'
  yield from folder(report.get('folder', {}))
  for path, one in report.get('extracted', {}).get('sites', {}).items():
    yield f'factors   {path}  rank {one["rank"]}  error {one["error"]:.3%}'
