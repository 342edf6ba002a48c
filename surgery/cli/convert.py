"""`surgery convert`."""

from __future__ import annotations

import pathlib
from typing import Any

import click

from surgery.cli import completion, shared, writing
from surgery.cli.command import Command


@click.command(cls=Command)
@click.argument('file', metavar='IN', type=shared.FILE)
@click.option(
  '--to',
  'form',
  metavar='FORMAT',
  shell_complete=completion.formats,
  help='msgpack, safetensors, …; what the suffix of OUT says by default.',
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
  help='With --map: to which side; by default the one where all tensors find a '
  'place.',
)
@click.option(
  '--root',
  metavar='PATH',
  help="With --map: where all lies in the tree, e.g. 'params' of flax, or the "
  "name of blox's graph.",
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
  r"""Write IN in another format, or in files of another size; same bits.

  \b
  surgery convert base.msgpack base.safetensors
  surgery convert base.msgpack parts.msgpack --shard-size 5GB
  surgery convert hf-folder/ out.msgpack --map llama-flax
  surgery convert out.msgpack again/ --map llama-flax --like hf-folder/
  """
  output = output.to(format=form)
  if name is None:
    for option, value in (('--direction', way), ('--root', root)):
      if value is not None:
        raise click.UsageError(f'{option} goes with --map.')
    writing.carry_out(output, [], shared.opened(file))
    return
  writing.carry_out(output, [_step(name, way, root)], shared.model(file))


def _step(name: str, way: str | None, root: str | None) -> dict[str, Any]:
  """Returns the step; of a map of the user's own, with all that it says."""
  from surgery.interop import maps

  said: Any = maps.load(pathlib.Path(name)) if maps.is_file(name) else name
  options = {'to': way, 'root': root}
  options = {key: value for key, value in options.items() if value is not None}
  if not options and isinstance(said, str):
    return {'map': said}
  return {'map': {'name': said, **options}}
