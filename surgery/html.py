"""What notebooks show of objects: tables and text as HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def table(
  caption: str, names: Sequence[str], rows: Iterable[Sequence[object]]
) -> str:
  """Returns a table as HTML; texts are escaped.

  Args:
    caption: what stands above it.
    names: names of its columns.
    rows: its rows.
  """
  head = ''.join(f'<th>{html.escape(name)}</th>' for name in names)
  body = ''.join(
    '<tr>'
    + ''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)
    + '</tr>'
    for row in rows
  )
  return (
    f'<table><caption>{html.escape(caption)}</caption>'
    f'<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
  )


def text(value: object) -> str:
  """Returns text as HTML, line by line."""
  return f'<pre>{html.escape(str(value))}</pre>'
