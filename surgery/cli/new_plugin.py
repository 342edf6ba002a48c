"""`surgery new-plugin`."""

from __future__ import annotations

import builtins
import keyword
import pathlib
import re
import shlex
import string
from collections.abc import Mapping
from typing import Any

import click

from surgery import errors, version
from surgery.cli import plugin_kinds, shared
from surgery.cli.command import Command
from surgery.contract.site import ParamSpec, Site
from surgery.host.discovery import DISTRIBUTION
from surgery.host.manager import Host, default_host

_NAME = re.compile(r'[a-z][a-z0-9]*([_-][a-z0-9]+)*')

_PYPROJECT = """\
[build-system]
requires = ["setuptools>=77.0.3"]
build-backend = "setuptools.build_meta"

[project]
name = "$distribution"
version = "0.1.0"
description = "The adapter type '$name' for surgery."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["blox-surgery>=$version", "jax>=0.10"]
# Before you publish: license = "MIT", authors = [{name = "…"}]

[project.optional-dependencies]
test = ["pytest>=8.4"]

# The entry's name is the type's name, in recipes and in the shell too.
[project.entry-points."surgery.adapters"]
$name = "$package:$class_"

[tool.setuptools]
packages = ["$package"]
"""

_MODULE = '''\
"""$class_: replace this line by what the adapter type is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import surgery

__all__ = ['$class_']


class $class_(surgery.Adapter):
  """Scales what goes into a layer and what comes out (name your source).

  `W' = diag(1 + strength·a) · W · diag(1 + strength·b)` with `a` of `in_shape`
  and `b` of `out_shape`. Both are zero at the start, so `W' = W`.
  """

  name = '$name'

  strength: float = surgery.field(
    default=1.0, gt=0, doc='How much the weights count.'
  )

  def init(self, site: surgery.Site, key: jax.Array) -> dict[str, Any]:
    """Returns `a`, zeros of `in_shape`, and `b`, zeros of `out_shape`."""
    del key  # Weights that are drawn at random come from here.
    return {'a': jnp.zeros(site.in_shape), 'b': jnp.zeros(site.out_shape)}

  def apply(
    self, site: surgery.Site, name: str, base: jax.Array, weights: Any
  ) -> jax.Array:
    """Returns what the layer gets, of the shape of `base`."""
    rows = 1 + self.strength * weights['a']
    columns = 1 + self.strength * weights['b']
    return base * rows.reshape(rows.shape + (1,) * columns.ndim) * columns
'''

_TEST = '''\
"""The laws that every adapter type obeys, and what this one computes."""

import jax.numpy as jnp
import numpy as np
import surgery
from surgery.testing import AdapterConformance

from $package import $class_


class Test$class_(AdapterConformance):
  adapter = $class_()


def test_values():
  kernel = surgery.ParamSpec('kernel', (2, 3), 'float32', 'io')
  site = surgery.Site(('net', 'layer'), (kernel,))
  weights = {'a': jnp.array([0.5, 0]), 'b': jnp.array([0, 1.0, 0])}
  adapter = $class_(strength=2.0)
  answer = adapter.apply(site, 'kernel', jnp.ones((2, 3)), weights)
  assert np.array_equal([[2, 6, 2], [1, 3, 1]], answer)
'''

_README = """\
# $distribution

The adapter type `$name` for [surgery](https://pypi.org/project/blox-surgery/).

```sh
pip install $distribution
surgery plugins show $name
surgery attach base.msgpack --adapter $name --to '**' -o adapted.msgpack
```

```python
import surgery
from $package import $class_

params = surgery.attach(params, $class_(), to='**/{query,value}')
```

What it computes, and from where: see `surgery plugins show $name`.

## Working on it

```sh
pip install --editable '.[test]'
pytest
```

`$package/__init__.py` is the type: `init` says which weights a layer gets,
`apply` what the layer is answered. `tests/` runs the laws of all types, which
takes some 15 seconds; `pytest -k 'values or linear'` is quick.

## Publishing

Raise `version` in `pyproject.toml`, then:

```sh
pip install build twine
python -m build
twine check dist/*
twine upload dist/*
```
"""

_CI = """\
name: tests
on: [push, pull_request]
jobs:
  tests:
    runs-on: ubuntu-latest
    strategy:
      matrix:
        python: ['3.11', '3.13']
    env:
      JAX_PLATFORMS: cpu
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: $${{ matrix.python }}
      - run: pip install --editable '.[test]'
      - run: pytest
  build:
    runs-on: ubuntu-latest
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: '3.11'
      - run: pip install build twine
      - run: python -m build
      - run: twine check --strict dist/*
"""

_IGNORED = """\
__pycache__/
*.egg-info/
.pytest_cache/
.venv/
build/
dist/
"""


# Names that the templates use for something else.
_TAKEN = frozenset(
  (
    *('Any', 'Callable', 'Iterator', 'Mapping', 'Sequence'),
    *('AdapterConformance', 'FormatConformance'),
    *('annotations', 'functools', 'np', 'surgery', 'surgery_passes'),
    *('surgery_methods', 'MethodConformance'),
  )
)


def _named(name: str, ending: str) -> str:
  """Returns a name, with an ending if Python or a template uses it."""
  taken = name in _TAKEN or keyword.iskeyword(name) or hasattr(builtins, name)
  return f'{name}{ending}' if taken else name


def _class(name: str, kind: str) -> str:
  """Returns the name of a class."""
  words = ''.join(word.capitalize() for word in re.split('[_-]', name))
  return _named(words, kind.capitalize())


def _origin(name: str, kind: str) -> str | None:
  """Returns who has a name already; None if it is free."""
  host = default_host()
  if kind == 'adapter':
    found = name in host.adapter_names()
    return host.distribution(name) if found else None
  for info in host.plugins():
    if info.kind == 'plugin' and info.name == name:
      return info.origin
  if kind in _RESERVED:
    return _answerer(host, name, kind)
  offered: Mapping[str, Any] = {
    'pass': host.passes,
    'format': host.formats,
    'method': host.methods,
  }[kind]
  for other, one in offered.items():
    if other == name or f'.{name}' in getattr(one, 'suffixes', ()):
      hook = plugin_kinds.KINDS[kind].hook
      return host.offered_by(hook, other) or DISTRIBUTION
  return None


# Names of policies and terms that the library itself has.
_RESERVED = {'policy': ('adapters',), 'term': ('re', 'type', 'serves')}


def _answerer(host: Host, name: str, kind: str) -> str | None:
  """Returns who answers to the name of a policy or a term, if anybody does.

  These are not listed anywhere, so the hook is called.
  """
  if name in _RESERVED[kind]:
    return DISTRIBUTION
  site = Site(('net', 'layer'), (ParamSpec('kernel', (1, 1), 'float32', 'io'),))
  asked = {'policy': name} if kind == 'policy' else {'term': f'{name}:1'}
  try:
    answer = host.ask(plugin_kinds.KINDS[kind].hook, site=site, **asked)
  except errors.SurgeryError:
    answer = True  # A plugin has the name, and wants other arguments.
  return None if answer is None else 'a plugin that is installed'


def _texts(kind: str, said: dict[str, str]) -> dict[str, str]:
  """Returns the texts of a distribution by file."""
  if kind == 'adapter':
    project, module, test, readme = _PYPROJECT, _MODULE, _TEST, _README
  else:
    one = plugin_kinds.KINDS[kind]
    filled = {
      name: string.Template(getattr(one, name)).substitute(said)
      for name in ('imports', 'said', 'values', 'shell', 'python')
    }
    said = {**said, **filled, 'what': one.what, 'suite': one.suite}
    project, module = plugin_kinds.PYPROJECT, one.module
    test, readme = plugin_kinds.TEST, plugin_kinds.README
  return {
    path: string.Template(text).substitute(said)
    for path, text in {
      'pyproject.toml': project,
      f'{said["package"]}/__init__.py': module,
      f'tests/test_{said["module"]}.py': test,
      'README.md': readme,
      '.github/workflows/tests.yml': _CI,
      '.gitignore': _IGNORED,
    }.items()
  }


def _check_name(name: str) -> None:
  """Raises unless a name can be that of a distribution and of a module."""
  good = lambda one: _NAME.fullmatch(one) and not keyword.iskeyword(one)
  if not good(name):
    better = re.sub(r'[^a-z0-9-]+', '_', name.lower())
    better = re.sub(r'[_-]*-[_-]*', '-', better).strip('_-')
    raise click.UsageError(
      f'{name!r}: expected lower-case letters and digits, with single hyphens '
      'or underscores between them.'
      f'{f" Write {better}." if good(better) else ""}'
    )


@click.command(cls=Command)
@click.argument('name')
@click.option(
  '--kind',
  type=click.Choice(['adapter', *plugin_kinds.KINDS]),
  default='adapter',
  show_default=True,
  help='What it offers.',
)
@click.option(
  '-o',
  '--output',
  'folder',
  type=shared.FILE,
  help='The folder to make; surgery-NAME by default.',
)
def command(name: str, kind: str, folder: pathlib.Path | None) -> None:
  r"""Write a distribution with a plugin that works at once.

  An adapter type, a pass, a file format, a merge method, a freeze policy or a
  term of selectors, with tests by all laws of its kind.

  \b
  surgery new-plugin mine
  surgery new-plugin dora-lite
  surgery new-plugin clip --kind pass
  pip install --editable './surgery-mine[test]'
  pytest surgery-mine
  """
  # In Python the words of a name are joined by underscores.
  module = name.replace('-', '_')
  _check_name(name)
  origin = _origin(name, kind)
  if origin is not None:
    what = 'adapter type'
    if kind != 'adapter':
      what = plugin_kinds.KINDS[kind].what
    raise errors.SurgeryError(
      f"{what} '{name}' exists already, of {origin}. Give another name."
    )
  distribution = f'surgery-{name.replace("_", "-")}'
  folder = folder or pathlib.Path(distribution)
  if folder.exists():
    raise errors.SurgeryError(f'{folder}: exists already. Give another folder.')
  if not folder.parent.is_dir():
    raise errors.SurgeryError(f'{folder.parent}: there is no such folder.')
  said = {
    'name': name,
    'module': module,
    'package': f'surgery_{module}',
    'distribution': distribution,
    'class_': _class(name, kind),
    'function': _named(module, '_pass'),
    'version': version.VERSION,
  }
  for path, text in _texts(kind, said).items():
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding='utf-8')
    click.echo(str(file))
  there = folder if folder.is_absolute() else f'./{folder}'
  what, tests = shlex.quote(f'{there}[test]'), shlex.quote(str(folder))
  click.echo(f'next: pip install --editable {what} && pytest {tests}', err=True)
