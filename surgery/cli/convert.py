"""`surgery convert`."""

from __future__ import annotations

import pathlib
from typing import Any

import click

from surgery.cli import completion, shared, writing
from surgery.cli.command import Command
from surgery.recipes.spec import Step


@click.command(cls=Command)
@click.argument('file', metavar='IN', type=shared.FILE)
@click.option(
  '--to',
  'form',
  metavar='FORMAT',
  shell_complete=completion.formats,
  help='msgpack, safetensors, …; by default the suffix of OUT decides.',
)
@click.option(
  '--map',
  'name',
  metavar='NAME|FILE',
  shell_complete=completion.maps,
  help='Give tensors the names and axes of another framework, e.g. '
  'llama-flax, or by a map of your own, my.yaml. `surgery maps` lists them.',
)
@click.option(
  '--direction',
  'way',
  type=click.Choice(['jax', 'torch']),
  help='With --map: the side to convert to; by default the one for which all '
  'tensors match.',
)
@click.option(
  '--root',
  metavar='PATH',
  help="With --map: the prefix of all paths in the tree, e.g. 'params' of "
  "flax, or the name of blox's graph.",
)
@writing.converts
def command(
  file: pathlib.Path,
  form: str | None,
  name: str | None,
  way: str | None,
  root: str | None,
  output: writing.Output,
) -> None:
  r"""Write IN in another format, or in files of another size, bit for bit.

  \b
  surgery convert base.msgpack base.safetensors
  surgery convert base.msgpack parts.msgpack --shard-size 5GB
  surgery convert hf-folder/ out.msgpack --map llama-flax
  surgery convert out.msgpack again/ --map llama-flax --like hf-folder/
  """
  output = output.to(format=form)
  if name is None:
    shared.need('--map', direction=way, root=root)
    writing.carry_out(output, [], shared.opened(file))
    return
  writing.carry_out(output, [_step(name, way, root)], shared.model(file))


def _step(name: str, way: str | None, root: str | None) -> Step:
  """Returns the step; a map in a file becomes part of it."""
  from surgery.interop import maps

  chosen: Any = maps.load(pathlib.Path(name)) if maps.is_file(name) else name
  options = {'to': way, 'root': root}
  options = {key: value for key, value in options.items() if value is not None}
  if not options and isinstance(chosen, str):
    return Step('map', chosen)
  return Step('map', {'name': chosen, **options})
