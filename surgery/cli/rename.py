"""`surgery rename`."""

from __future__ import annotations

import pathlib

import click

from surgery.cli import shared, writing
from surgery.cli.command import Command


@click.command(cls=Command)
@shared.file
@click.argument('rules', nargs=-1, required=True, metavar="'OLD -> NEW'…")
@writing.writes
def command(
  file: pathlib.Path, rules: tuple[str, ...], output: writing.Output
) -> None:
  r"""Rename tensors and layers; adapters go along.

  All rules hold at once, so two names may be swapped; the first that matches a
  path decides. What `*`, `**` and `{a,b}` match on the left stands on the
  right.

  \b
  surgery rename base.msgpack 'net/head -> net/output' -o out.msgpack
  surgery rename base.msgpack '**/h<i>/** -> **/block<i+1>/**' -o out.msgpack
  """
  steps = [{'rename': shared.short(rules)}]
  writing.carry_out(output, steps, shared.model(file))
