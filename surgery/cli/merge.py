"""`surgery merge`."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import shared, writing
from surgery.cli.command import Command
from surgery.recipes.spec import Step

if TYPE_CHECKING:
  from surgery.model.checkpoint import Checkpoint


@click.command(cls=Command)
@shared.file
@shared.adapters('The adapter to merge; all by default. May be repeated.')
@click.option(
  '--with',
  'sources',
  type=shared.FILE,
  multiple=True,
  help='Merge the adapter in this file into the base in FILE. May be repeated; '
  'the first is innermost.',
)
@click.option(
  '--names',
  'rules',
  multiple=True,
  metavar="'OLD -> NEW'|MAP",
  help='With --with, for an adapter of another program: the names of its '
  'modules in FILE, by rules or by a map of `surgery maps`. May be repeated.',
)
@click.option(
  '--no-check-base',
  is_flag=True,
  help='With --with: accept a base with other values.',
)
@click.option(
  '--no-check-same',
  is_flag=True,
  help='With --with: accept the same adapter twice.',
)
@click.option(
  '--no-check-finite',
  is_flag=True,
  help='Write a result with NaN or infinity.',
)
@writing.writes
def command(
  file: pathlib.Path,
  names: tuple[str, ...],
  sources: tuple[pathlib.Path, ...],
  rules: tuple[str, ...],
  no_check_base: bool,
  no_check_same: bool,
  no_check_finite: bool,
  output: writing.Output,
) -> None:
  r"""Fold adapters into the base: their updates become part of the tensors.

  \b
  surgery merge adapted.msgpack -o merged.msgpack
  surgery merge base.msgpack --with a.msgpack -o merged.msgpack
  surgery merge model.safetensors --with peft-folder/ -o merged.safetensors
  surgery merge base.msgpack --with a.msgpack --with b.msgpack -o ab.msgpack
  """
  if sources:
    _check_sources(sources, names)
  else:
    shared.need(
      '--with',
      no_check_base=no_check_base,
      no_check_same=no_check_same,
      names=rules,
    )
  before = shared.model(file)
  merging = {'check-finite': False} if no_check_finite else {}
  if not sources:
    step = Step('merge', _names(list(names), merging))
    writing.carry_out(output, [step], before)
    return
  attaching = shared.unchecked(no_check_base, no_check_same)
  if len(sources) == 1:
    others = {'adapter': shared.opened(sources[0])}
    renamed = {'with-names': list(rules)} if rules else {}
    options = {'with': 'adapter', **attaching, **renamed, **merging}
    steps = [Step('merge', options)]
  else:
    # All are compared with the base before one of them changes it.
    if rules:
      attaching['names'] = list(rules)
    steps, others = _together(before, sources, attaching, merging)
  writing.carry_out(output, steps, before, others)


def _check_sources(
  sources: Sequence[pathlib.Path], names: Sequence[str]
) -> None:
  """Raises for `--with` beside `--adapter`, or with a file given twice."""
  if names:
    raise click.UsageError(
      '--adapter does not go with --with: a file holds one adapter.'
    )
  for number, source in enumerate(sources):
    if source.resolve() in [one.resolve() for one in sources[:number]]:
      raise click.UsageError(f'--with {source}: given twice.')


def _names(names: list[str], options: Mapping[str, Any]) -> Any:
  """Returns a step's value: the names alone if there are no options."""
  short = shared.short(names)
  return {'names': short, **options} if options else short


def _together(
  before: Checkpoint,
  sources: Sequence[pathlib.Path],
  options: Mapping[str, Any],
  merging: Mapping[str, Any],
) -> tuple[list[Step], dict[str, Checkpoint]]:
  """Returns steps that attach several adapters and merge them, and their files.

  Args:
    before: the model.
    sources: the adapters, the innermost first.
    options: further options of attaching.
    merging: further options of merging.
  """
  steps: list[Step] = []
  # They need names of their own as long as they are attached.
  taken = [one['name'] for one in before.manifest.adapters]
  free = (n for n in map('with{}'.format, itertools.count()) if n not in taken)
  names = list(itertools.islice(free, len(sources)))
  others = {}
  for number, (name, source) in enumerate(zip(names, sources, strict=True)):
    alias = f'adapter{number}'
    others[alias] = shared.opened(source)
    steps.append(Step('attach', {'from': alias, 'name': name, **options}))
  return [*steps, Step('merge', _names(names, merging))], others
