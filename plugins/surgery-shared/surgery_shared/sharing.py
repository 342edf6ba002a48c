"""What types have in common whose sites share weights."""

from __future__ import annotations

import surgery


def refuse_patterns(adapter: surgery.Adapter, *options: str) -> None:
  """Raises if options that decide the shared weights are given by selector.

  Args:
    adapter: the adapter.
    options: names of these options.

  Raises:
    ConfigError: naming the selector and the option.
  """
  for selector, values in adapter.patterns:
    for option, _ in values:
      if option in options:
        raise surgery.ConfigError(
          f'adapter type {adapter.name!r}, patterns: {selector!r} sets '
          f'{option!r}, which decides weights that all sites share. Give one '
          f'{option} for all, or attach a second adapter under another name=.'
        )
