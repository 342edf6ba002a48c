"""`surgery extract-lora`."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import click

from surgery.cli import completion, shared, writing
from surgery.cli.command import Command
from surgery.recipes.spec import Step


@click.command(cls=Command)
@click.argument('base', type=shared.FILE)
@click.argument('tuned', type=shared.FILE)
@click.option(
  '--rank',
  'ranks',
  multiple=True,
  metavar='[SELECTOR=]N',
  help='Rank of the update; 16 by default. May be repeated: the first selector '
  'that matches decides, and N alone is for all others.',
)
@click.option(
  '--energy',
  'energies',
  multiple=True,
  metavar='[SELECTOR=]SHARE',
  help='Instead of --rank: the share of the squared norm that the factors '
  'keep, e.g. 0.95. May be repeated.',
)
@click.option(
  '--max-rank',
  type=click.IntRange(1),
  help='The largest rank that --energy leads to; 64 by default.',
)
@click.option(
  '--to',
  multiple=True,
  metavar='SELECTOR',
  shell_complete=completion.selectors,
  help='Layers or parameters to factorise; by default all matrices that '
  'differ. May be repeated.',
)
@click.option(
  '--keep-whole',
  multiple=True,
  metavar='SELECTOR',
  shell_complete=completion.selectors,
  help='Parameters that are kept whole, with their values in TUNED, e.g. norms '
  'and heads; `all` for all that differ and have no factors. May be repeated.',
)
@click.option(
  '--exact', is_flag=True, help='Decompose matrices in full; takes long.'
)
@click.option(
  '--seed', type=int, help='Random seed of the decompositions; 0 by default.'
)
@click.option(
  '--stacked',
  type=click.IntRange(0),
  help='Number of axes stacked in front of parameters.',
)
@click.option(
  '--layout',
  multiple=True,
  metavar='[SELECTOR=]LETTERS',
  help='A letter for each axis: s stacked, i input, o output.',
)
@click.option('--name', help="The adapter's name; `default` by default.")
@writing.writes
def command(
  base: pathlib.Path,
  tuned: pathlib.Path,
  ranks: tuple[str, ...],
  energies: tuple[str, ...],
  max_rank: int | None,
  to: tuple[str, ...],
  keep_whole: tuple[str, ...],
  exact: bool,
  seed: int | None,
  stacked: int | None,
  layout: tuple[str, ...],
  name: str | None,
  output: writing.Output,
) -> None:
  r"""Make a LoRA adapter of the difference between TUNED and BASE.

  Its error for each matrix, ‖Δ - A·B‖ / ‖Δ‖, is shown and recorded in its file.

  \b
  surgery extract-lora base.safetensors tuned.safetensors --rank 16 -o a.msgpack
  surgery extract-lora base.msgpack tuned.msgpack --energy 0.95 --max-rank 64 \
    --keep-whole '**/{norm,bias}' -o a.msgpack
  """
  if ranks and energies:
    raise click.UsageError('give --rank or --energy, not both.')
  if max_rank is not None and not energies:
    raise click.UsageError('--max-rank needs --energy.')
  value: dict[str, Any] = {
    'tuned': 'tuned',
    'rank': _by_selector(ranks, int, '--rank'),
    'energy': _by_selector(energies, float, '--energy'),
    'max-rank': max_rank,
    'to': shared.short(to),
    'keep-whole': shared.short(keep_whole),
    'exact': exact or None,
    'seed': seed,
    'stacked': stacked,
    'layout': _by_selector(layout, str, '--layout'),
    'name': name,
  }
  # Defaults are the step's own, and are not recorded in the history.
  given = {key: one for key, one in value.items() if one is not None}
  writing.carry_out(
    output.to(of='adapter'),
    [Step('extract-lora', given, result='adapter')],
    shared.model(base),
    {'tuned': shared.model(tuned)},
  )


def _by_selector(
  items: tuple[str, ...], kind: Callable[[str], Any], option: str
) -> Any:
  """Returns a value for all, or values by selector; None if none is given.

  Raises:
    UsageError: for a value of another type, or one that is given twice.
  """
  found: dict[str, Any] = {}
  for item in items:
    selector, sign, text = item.rpartition('=')
    key = selector if sign else 'all'
    if key in found:
      raise click.UsageError(f'{option} for {key!r} is given twice.')
    try:
      found[key] = kind(text)
    except ValueError:
      what = 'a whole number' if kind is int else 'a number'
      raise click.UsageError(
        f'{option} {item!r}: expected {what}, found {text!r}.'
      ) from None
  if 'all' in found:
    # The first selector that matches decides, so this one has to come last.
    found['all'] = found.pop('all')
  return found['all'] if [*found] == ['all'] else found or None
