"""Commands that refuse a repeated option, unless it takes several values."""

from __future__ import annotations

import collections

import click


class _Once(click.Command):
  """Refuses a second value of an option that takes one.

  Click would keep the last value silently. Options of several values are
  declared with `multiple=True`.
  """

  def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
    if not ctx.resilient_parsing:  # Not while a shell completes a line.
      self._check_once(ctx, list(args))
    return super().parse_args(ctx, args)

  def _check_once(self, ctx: click.Context, args: list[str]) -> None:
    """Raises for an option that is given twice.

    Raises:
      UsageError: naming it.
    """
    _, _, given = self.make_parser(ctx).parse_args(args)
    for param, count in collections.Counter(given).items():
      # Eager options, as `--help`, print something and end the command.
      if (
        count > 1
        and isinstance(param, click.Option)
        and not (param.multiple or param.count or param.is_eager)
      ):
        name = max(param.opts, key=len)
        what = '' if param.is_flag else ' It takes one value.'
        raise click.UsageError(f'{name} is given twice.{what}', ctx)


class Command(_Once):
  """A verb."""


class Group(_Once, click.Group):
  """A verb with verbs of its own."""

  command_class = Command
