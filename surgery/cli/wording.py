"""Messages of the library, with options instead of Python's arguments."""

from __future__ import annotations

import re

# The shell's wording of arguments in messages of the library.
OPTIONS = {
  'overwrite=True (--force)': '--force',
  '--force (overwrite=True)': '--force',
  'Pass the graph (graph=), or save with it': (
    'Save the model with its graph (surgery.save(…, graph=graph))'
  ),
  'check-finite: false (check_finite=False)': (
    '--no-check-finite (in a recipe check-finite: false)'
  ),
  'check-same: false (check_same=False)': (
    '--no-check-same (in a recipe check-same: false)'
  ),
  'nonfinite: allow': '--nonfinite allow (in a recipe nonfinite: allow)',
  'only: common': '--only common (in a recipe only: common)',
  '(manifest=True)': '',
  'names= (--names)': '--names',
  'with graph=,': 'with its graph,',
  'surgery.save_adapter': 'surgery extract',
  'surgery.load_adapter': 'surgery attach --from',
  'by patterns.': "by --set 'SELECTOR:OPTION=VALUE'.",
  'check_base=False': '--no-check-base',
  'overwrite=True': '--force',
  'another name=': 'another --name',
  'name=': '--name',
  'stacked=': '--stacked',
  'layout=': '--layout',
  'without a shard_size': 'without --shard-size',
  'keep= of cast': '--keep of cast',
}
# `name=` alone is an argument; before a value it is part of an example.
_ANY = re.compile('|'.join(f"{re.escape(k)}(?![\\w'])" for k in OPTIONS))
# Messages that have both, `(keep='a', --keep 'a')`.
_BOTH = (
  re.compile(r'\(\w+=[^,()]*, (--[^()]*)\)'),
  re.compile(r'\((--[^,()]*), \w+=[^()]*\)'),
)


# Examples, whose parts come from the user's own arguments.
_EXAMPLES = (
  # layout={'net/w': 'oi'}
  (re.compile(r"layout=\{'((?:[^'\\]|\\.)*)': '(\w+)'\}"), r"--layout '\1=\2'"),
  # patterns={'**/query': {'rank': 4}}
  (
    re.compile(r"patterns=\{'((?:[^'\\]|\\.)*)': \{'(\w+)': ([^{}]+)\}\}"),
    r"--set '\1:\2=\3'",
  ),
)


def as_options(text: str) -> str:
  """Returns a message with options instead of arguments of Python."""
  for example, option in _EXAMPLES:
    text = example.sub(option, text)
  for both in _BOTH:
    text = both.sub(r'(\1)', text)
  return _ANY.sub(lambda match: OPTIONS[match[0]], text)


def line(error: BaseException) -> str:
  """Returns the message of an error, for the shell."""
  if isinstance(error, OSError) and error.strerror:
    where = f'{error.filename}: ' if error.filename else ''
    return as_options(f'{where}{error.strerror}.')
  return as_options(str(error))
