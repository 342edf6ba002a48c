"""`surgery combine`."""

from __future__ import annotations

import pathlib
from typing import Any

import click

from surgery.cli import completion, shared, writing
from surgery.cli.command import Command


def _numbers(weights: tuple[str, ...]) -> dict[str, float]:
  """Returns what each adapter counts.

  Raises:
    UsageError: for what is no number.
  """
  numbers: dict[str, float] = {}
  for name, value in shared.pairs(weights, '--weight'):
    try:
      numbers[name] = float(value)
    except ValueError:
      raise click.UsageError(
        f'--weight {name}={value}: expected a number, found {value!r}.'
      ) from None
  return numbers


@click.command(cls=Command)
@shared.file
@click.option(
  '--weight',
  'weights',
  multiple=True,
  required=True,
  metavar='NAME=NUMBER',
  shell_complete=completion.adapters,
  help='What the update of an adapter counts; once for each.',
)
@click.option(
  '--with',
  'sources',
  multiple=True,
  metavar='NAME=FILE',
  help='Attach the adapter in FILE as NAME first; may be repeated.',
)
@click.option(
  '--method',
  type=click.Choice(
    [
      *('linear', 'cat', 'svd', 'magnitude_prune'),
      *('ties', 'dare_linear', 'dare_ties'),
    ]
  ),
  default='linear',
  show_default=True,
  help='How updates become one.',
)
@click.option('--rank', type=click.IntRange(1), help='Rank of what comes out.')
@click.option(
  '--density', type=float, help='Share of an update that is kept, e.g. 0.5.'
)
@click.option('--seed', type=int, help='Of what is dropped at random.')
@click.option(
  '--name', default='combined', show_default=True, help="The adapter's name."
)
@click.option('--keep', is_flag=True, help='Let the others stay, disabled.')
@writing.writes
def command(
  file: pathlib.Path,
  weights: tuple[str, ...],
  sources: tuple[str, ...],
  method: str,
  rank: int | None,
  density: float | None,
  seed: int | None,
  name: str,
  keep: bool,
  output: writing.Output,
) -> None:
  r"""Make one adapter, a LoRA, of several that add something to their base.

  \b
  surgery combine adapted.msgpack --weight a=0.7 --weight b=0.3 -o one.msgpack
  surgery combine base.msgpack --with a=a.msgpack --with b=b.msgpack \
    --weight a=1 --weight b=1 --method ties --density 0.5 -o one.msgpack
  """
  steps: list[dict[str, Any]] = []
  others = {}
  for number, (attached, path) in enumerate(shared.pairs(sources, '--with')):
    alias = f'adapter{number}'
    others[alias] = shared.opened(pathlib.Path(path))
    # How much each of them counts is said here, that of a twin too.
    step = {'from': alias, 'name': attached, 'check-same': False}
    steps.append({'attach': step})
  value: dict[str, Any] = {
    'weights': _numbers(weights),
    'method': method,
    'name': name,
  }
  options = {'rank': rank, 'density': density, 'seed': seed}
  value.update({k: v for k, v in options.items() if v is not None})
  if keep:
    value['keep'] = True
  steps.append({'combine-adapters': value})
  writing.carry_out(output, steps, shared.model(file), others)
