"""Tests of other frameworks need them: `pip install --group dev`."""

import importlib.util

_NEEDED = ('equinox', 'haiku', 'optax', 'orbax')
if any(importlib.util.find_spec(name) is None for name in _NEEDED):
  collect_ignore_glob = ['test_*.py']
