"""`surgery merge`."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import shared, writing
from surgery.cli.command import Command

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
  'the first lies innermost.',
)
@click.option(
  '--names',
  'rules',
  multiple=True,
  metavar="'OLD -> NEW'|MAP",
  help='With --with, for an adapter of another program: what its modules are '
  'called in FILE, by rules or by a map of `surgery maps`. May be repeated.',
)
@click.option(
  '--no-check-base',
  is_flag=True,
  help='With --with: take a base with other values.',
)
@click.option(
  '--no-check-same',
  is_flag=True,
  help='With --with: take the same adapter twice.',
)
@click.option(
  '--no-check-finite',
  is_flag=True,
  help='Write a result that has NaN or infinity.',
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
  r"""Fold adapters into the base; what layers got is what is stored.

  \b
  surgery merge adapted.msgpack -o merged.msgpack
  surgery merge base.msgpack --with a.msgpack -o merged.msgpack
  surgery merge model.safetensors --with peft-folder/ -o merged.safetensors
  surgery merge base.msgpack --with a.msgpack --with b.msgpack -o ab.msgpack
  """
  for given, option in ((no_check_base, 'base'), (no_check_same, 'same')):
    if given and not sources:
      raise click.UsageError(f'--no-check-{option} goes with --with.')
  if rules and not sources:
    raise click.UsageError('--names goes with --with.')
  if sources and names:
    raise click.UsageError(
      '--adapter does not go with --with: a file holds one adapter.'
    )
  for number, source in enumerate(sources):
    if source.resolve() in [one.resolve() for one in sources[:number]]:
      raise click.UsageError(f'--with {source}: given twice.')
  before = shared.model(file)
  anyway = {'check-finite': False} if no_check_finite else {}
  if not sources:
    step = {'merge': _meant(list(names), anyway)}
    writing.carry_out(output, [step], before)
    return
  unchecked: dict[str, Any] = {
    **({'check-base': False} if no_check_base else {}),
    **({'check-same': False} if no_check_same else {}),
  }
  if len(sources) == 1:
    others = {'adapter': shared.opened(sources[0])}
    called = {'with-names': list(rules)} if rules else {}
    step = {'merge': {'with': 'adapter', **unchecked, **called, **anyway}}
    steps: list[dict[str, Any]] = [step]
  else:
    # All are held against the base before one of them changes it.
    if rules:
      unchecked['names'] = list(rules)
    steps, others = _together(before, sources, unchecked, anyway)
  writing.carry_out(output, steps, before, others)


def _meant(names: list[str], options: Mapping[str, Any]) -> Any:
  """Returns a step's value: the names alone, where there are no options."""
  short = shared.short(names)
  return {'names': short, **options} if options else short


def _together(
  before: Checkpoint,
  sources: Sequence[pathlib.Path],
  options: Mapping[str, Any],
  merging: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], dict[str, Checkpoint]]:
  """Returns steps that attach several adapters and merge them, and their files.

  Args:
    before: the model.
    sources: the adapters, the innermost first.
    options: further options of attaching.
    merging: further options of merging.
  """
  steps: list[dict[str, Any]] = []
  taken = [one['name'] for one in before.manifest.adapters]
  free = (n for n in map('with{}'.format, itertools.count()) if n not in taken)
  names = list(itertools.islice(free, len(sources)))
  others = {}
  for number, (name, source) in enumerate(zip(names, sources, strict=True)):
    alias = f'adapter{number}'
    others[alias] = shared.opened(source)
    steps.append({'attach': {'from': alias, 'name': name, **options}})
  return [*steps, {'merge': _meant(names, merging)}], others
