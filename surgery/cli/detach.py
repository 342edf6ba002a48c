"""`surgery detach`."""

from __future__ import annotations

import dataclasses
import pathlib

import click

from surgery.cli import extract, history, shared, writing
from surgery.core.host import default_host


@click.command()
@shared.file
@shared.adapters('The adapter to take off; all by default. May be repeated.')
@click.option(
  '--save-adapter',
  'saved',
  type=shared.FILE,
  help='Write the adapter to this file, too. It is written first.',
)
@writing.writes
def command(
  file: pathlib.Path,
  names: tuple[str, ...],
  saved: pathlib.Path | None,
  output: writing.Output,
) -> None:
  r"""Take adapters off; the base is as it was.

  \b
  surgery detach adapted.msgpack -o base.msgpack
  surgery detach adapted.msgpack --save-adapter a.msgpack -o base.msgpack
  """
  before = shared.model(file)
  after = shared.passed('detach')(
    before, list(names) or None, host=default_host()
  )
  arguments = {
    'adapter': list(names),
    'save_adapter': saved.name if saved else None,
  }
  said = history.entry('detach', arguments, [before])
  steps = [writing.Step(before, history.recorded(after, said), output)]
  if saved is not None:
    where = dataclasses.replace(
      output, path=saved, shard_size=None, strict_flax=False
    )
    where.check()
    if saved.resolve() == output.path.resolve():
      raise click.UsageError('--save-adapter and -o name the same file.')
    weights, adapter = extract.alone(before, extract.chosen(before, names))
    adapter = history.recorded(adapter, said)
    steps.insert(0, writing.Step(weights, adapter, where))
  writing.run(steps)
