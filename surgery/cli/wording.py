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
# An argument without its value, `name=`, is not the beginning of one with it.
_ANY = re.compile('|'.join(f"{re.escape(k)}(?![\\w'])" for k in OPTIONS))
# Where a message has both, `(keep='a', --keep 'a')`.
_BOTH = (
  re.compile(r'\(\w+=[^,()]*, (--[^()]*)\)'),
  re.compile(r'\((--[^,()]*), \w+=[^()]*\)'),
)


# Examples, of which the parts are the reader's own.
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
  """Returns a message with options in the place of arguments of Python."""
  for example, option in _EXAMPLES:
    text = example.sub(option, text)
  for both in _BOTH:
    text = both.sub(r'(\1)', text)
  return _ANY.sub(lambda match: OPTIONS[match[0]], text)


def line(error: BaseException) -> str:
  """Returns what an error says, for people at a shell."""
  if isinstance(error, OSError) and error.strerror:
    where = f'{error.filename}: ' if error.filename else ''
    return as_options(f'{where}{error.strerror}.')
  return as_options(str(error))
