"""`surgery cast`."""

from __future__ import annotations

import pathlib

import click

from surgery.cli import completion, shared, writing
from surgery.cli.command import Command


@click.command(cls=Command)
@shared.file
@click.option(
  '--to',
  required=True,
  metavar='DTYPE',
  shell_complete=completion.dtypes,
  help='bf16, f16, f32, … or a full name.',
)
@click.option(
  '--keep',
  multiple=True,
  metavar='SELECTOR[=DTYPE]',
  shell_complete=completion.kept,
  help="Leave these as they are, or cast them to that: '**/norm=f32'. May be "
  'repeated.',
)
@click.option(
  '--allow-overflow',
  is_flag=True,
  help='Let finite values become infinite or NaN.',
)
@click.option(
  '--allow-underflow',
  is_flag=True,
  help="Let most of a tensor's numbers become zero.",
)
@writing.writes
def command(
  file: pathlib.Path,
  to: str,
  keep: tuple[str, ...],
  allow_overflow: bool,
  allow_underflow: bool,
  output: writing.Output,
) -> None:
  r"""Cast floating tensors to another dtype, rounding once.

  \b
  surgery cast base.msgpack --to bf16 --keep '**/norm*' -o half.msgpack
  """
  value: dict[str, object] = {'to': to}
  if keep:
    value['keep'] = shared.short(keep)
  if allow_overflow:
    value['overflow'] = True
  if allow_underflow:
    value['underflow'] = True
  writing.carry_out(output, [{'cast': value}], shared.opened(file))
