"""Messages of the library, whose arguments are options here."""

from __future__ import annotations

import re

# How the shell writes what the library's messages call an argument.
OPTIONS = {
  'overwrite=True (--force)': '--force',
  '--force (overwrite=True)': '--force',
  'Give the graph (graph=), or save with it': (
    'Save the model with its graph (surgery.save(…, graph=graph))'
  ),
  'check-finite: false (check_finite=False)': (
    '--no-check-finite (in a recipe check-finite: false)'
  ),
  'check-same: false (check_same=False)': (
    '--no-check-same (in a recipe check-same: false)'
  ),
  '(manifest=True)': '',
  'check_base=False': '--no-check-base',
  'overwrite=True': '--force',
  'another name=': 'another --name',
  'name=': '--name',
  'stacked=': '--stacked',
  'layout=': '--layout',
  'without a shard_size': 'without --shard-size',
  'keep= of cast': '--keep of cast',
}
# An argument without its value, `name=`, is not the beginning of one with it.
_ANY = re.compile('|'.join(f"{re.escape(k)}(?![\\w'])" for k in OPTIONS))
# Where a message has both, `(keep='a', --keep 'a')`.
_BOTH = (
  re.compile(r'\(\w+=[^,()]*, (--[^()]*)\)'),
  re.compile(r'\((--[^,()]*), \w+=[^()]*\)'),
)


def as_options(text: str) -> str:
  """Returns a message with options in the place of arguments of Python."""
  for both in _BOTH:
    text = both.sub(r'(\1)', text)
  return _ANY.sub(lambda match: OPTIONS[match[0]], text)


def line(error: BaseException) -> str:
  """Returns what an error says, for people at a shell."""
  if isinstance(error, OSError) and error.strerror:
    where = f'{error.filename}: ' if error.filename else ''
    return as_options(f'{where}{error.strerror}.')
  return as_options(str(error))
