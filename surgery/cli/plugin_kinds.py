"""What `surgery new-plugin` writes for hook plugins, kind by kind."""

from __future__ import annotations

import dataclasses

PYPROJECT = """\
[build-system]
requires = ["setuptools>=77.0.3"]
build-backend = "setuptools.build_meta"

[project]
name = "$distribution"
version = "0.1.0"
description = "The $what '$name' for surgery."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["blox-surgery>=$version", "numpy"]
# Before you publish: license = "MIT", authors = [{name = "…"}]

[project.optional-dependencies]
test = ["pytest>=8.4"]

# A module, an object or a class; `surgery --no-plugin $name` leaves it out.
[project.entry-points."surgery.plugins"]
$name = "$package"

[tool.setuptools]
packages = ["$package"]
"""

README = """\
# $distribution

The $what `$name` for [surgery](https://pypi.org/project/blox-surgery/).

```sh
pip install $distribution
$shell
```

```python
import surgery

$python
```

## Working on it

```sh
pip install --editable '.[test]'
pytest
```

`$package/__init__.py` is the $what. `tests/` runs the laws of its kind
(`surgery.testing.$suite`), which takes some seconds.

## Publishing

Raise `version` in `pyproject.toml`, then:

```sh
pip install build twine
python -m build
twine check dist/*
twine upload dist/*
```
"""

TEST = '''\
"""The laws that every $what obeys, and what this one does."""

$imports

import $package


class Test$class_($suite):
  plugin = $package
$said


$values
'''


@dataclasses.dataclass(frozen=True)
class Kind:
  """What is written for a kind of plugin.

  Attributes:
    what: the kind in words.
    hook: the hook that it implements.
    suite: the class of `surgery.testing` with its laws.
    module: text of its module.
    imports: what its test imports.
    said: what its test says to the suite.
    values: tests of what it computes.
    shell: how it is used in the shell.
    python: the same in Python.
  """

  what: str
  hook: str
  suite: str
  module: str
  imports: str
  said: str
  values: str
  shell: str
  python: str


_PASS = Kind(
  what='pass',
  hook='surgery_passes',
  suite='PassConformance',
  module='''\
"""A pass: replace this line by what it does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import surgery

__all__ = ['$function']


def $function(
  checkpoint: surgery.Checkpoint,
  select: str | Sequence[str],
  at: float,
  *,
  host: surgery.Host,
) -> surgery.Checkpoint:
  """Brings values beyond a bound to it.

  Nothing is read here: a tensor is computed when it is asked for, in blocks if
  what it is made of comes in blocks.

  Args:
    checkpoint: the model.
    select: the tensors.
    at: the bound, for both signs.
    host: whose hooks are asked.

  Raises:
    SurgeryError: for a bound that is not positive, or a tensor that has no
      floating-point numbers.

  Example:
    $name: {select: '**/kernel', at: 0.5}
  """
  if not at > 0:
    raise surgery.SurgeryError(f'$name: expected at > 0, found {at}.')
  leaves = dict(checkpoint)
  for path in surgery.select(checkpoint, select, host=host):
    leaf = leaves[path]
    if leaf.dtype is None or 'float' not in leaf.dtype:
      raise surgery.SurgeryError(
        f'$name: {"/".join(path)}: expected a floating-point tensor, found '
        f'{leaf}. Select others.'
      )
    part = None
    if leaf.part is not None:
      part = functools.partial(_clipped, leaf.part, at)
    load = functools.partial(_clipped, leaf.load, at)
    leaves[path] = leaf.replace(load=load, part=part)
  return checkpoint.replace(leaves=leaves)


def _clipped(load: Callable[..., Any], at: float, *index: Any) -> np.ndarray:
  """Returns a tensor, or a block of it, in its own dtype."""
  array = np.asarray(load(*index))
  return np.clip(array, -at, at).astype(array.dtype)


@surgery.hookimpl
def surgery_passes() -> Mapping[str, Callable[..., Any]]:
  """Offers the pass by its name."""
  return {'$name': $function}
''',
  imports="""\
import blox as bx
import jax.numpy as jnp
import numpy as np
import surgery
from surgery.testing import PassConformance""",
  said="""\
  name = '$name'
  options = {'select': '**/kernel', 'at': 0.5}
  refused = [({'select': '**/kernel', 'at': 0.0}, 'expected at > 0')]""",
  values="""\
def test_values():
  params = bx.Params()
  params['net', 'kernel'] = bx.Param(jnp.array([-2.0, 0.25, 3.0]))
  host = surgery.Host(plugins=[$package], only=())
  step = {'$name': {'select': '**', 'at': 0.5}}
  found = surgery.apply(params.locked(), step, host=host)
  assert np.array_equal([-0.5, 0.25, 0.5], found['net', 'kernel'].value)""",
  shell="""\
surgery $name base.msgpack '**/kernel' --at 0.5 -o clipped.msgpack
echo "- $name: {select: '**/kernel', at: 0.5}" > recipe.yaml
surgery run recipe.yaml model=base.msgpack out=changed.msgpack""",
  python="""\
step = {'$name': {'select': '**/kernel', 'at': 0.5}}
params = surgery.apply(params, step)""",
)

_FORMAT = Kind(
  what='file format',
  hook='surgery_formats',
  suite='FormatConformance',
  module='''\
"""A file format: replace this line by what it is.

It keeps arrays and no more, as numpy's `.npz`: what else a model has a format
either writes down, or refuses to lose.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import secrets
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

import surgery

__all__ = ['$class_']

# Of other dtypes, as bfloat16, numpy's files keep the bytes and not the name.
DTYPES = frozenset(
  (
    'bool',
    *(f'{kind}int{bits}' for kind in ('', 'u') for bits in (8, 16, 32, 64)),
    *(f'float{bits}' for bits in (16, 32, 64)),
    *(f'complex{bits}' for bits in (64, 128)),
  )
)


class $class_:
  """Reads and writes `.$name`."""

  suffixes = ('.$name',)

  def open(self, path: Any) -> surgery.Checkpoint:
    """Returns the arrays of a file; they are read when they are asked for."""
    leaves = {}
    with _reading(path) as file:
      for name in file.files:
        array = file[name]  # For its shape; numpy offers no other way.
        load = functools.partial(_read, path, name)
        leaf = surgery.Leaf(load, array.shape, array.dtype.name)
        leaves[tuple(name.split('/'))] = leaf
    return surgery.Checkpoint(leaves, origin=str(path))

  def write(
    self, checkpoint: surgery.Checkpoint, path: Any, *, overwrite: bool = False
  ) -> None:
    """Writes a checkpoint, whole or not at all."""
    path = pathlib.Path(path)
    if path.exists() and not overwrite:
      raise FileExistsError(17, 'the file exists', str(path))
    _check(checkpoint, path)
    # Another file takes the place of the old one once it is whole.
    other = path.with_name(f'.{path.name}.{secrets.token_hex(4)}')
    try:
      with zipfile.ZipFile(other, 'w') as file:
        for name, leaf in checkpoint.items():
          array = np.asanyarray(leaf.load())
          with file.open(f'{"/".join(name)}.npy', 'w', force_zip64=True) as one:
            np.lib.format.write_array(one, array, allow_pickle=False)
      os.replace(other, path)
    finally:
      other.unlink(missing_ok=True)


def _check(checkpoint: surgery.Checkpoint, path: pathlib.Path) -> None:
  """Raises if a checkpoint has something that would be lost."""
  if checkpoint.manifest.adapters:
    raise surgery.FormatError(
      f'{path}: .$name has no place for adapters. Merge or detach first.'
    )
  if checkpoint.manifest.metadata:
    raise surgery.FormatError(f'{path}: .$name has no place for its texts.')
  for name, leaf in checkpoint.items():
    what = None
    if leaf.shape is None or leaf.dtype is None:
      what = 'values that are no arrays'
    elif leaf.key is not None:
      what = 'keys of random numbers'
    elif not leaf.trainable or leaf.metadata:
      what = 'flags and metadata'
    elif leaf.dtype not in DTYPES:
      what = leaf.dtype
    elif any('/' in part or '\\\\' in part for part in name):
      what = 'names with slashes'
    if what is not None:
      raise surgery.FormatError(
        f'{path}: {"/".join(name)}: .$name has no place for {what}.'
      )


@contextlib.contextmanager
def _reading(path: Any) -> Iterator[Any]:
  """Opens a file; whatever it raises because of its bytes is a FormatError."""
  # Outside of `try`: what the system says of a file it says best.
  with pathlib.Path(path).open('rb') as stream:
    try:
      with np.load(stream, allow_pickle=False) as file:
        yield file
    except Exception as error:
      raise surgery.FormatError(
        f'{path}: it is no .$name, or damaged: {type(error).__name__}: '
        f'{error}. Fetch it again.'
      ) from error


def _read(path: Any, name: str) -> np.ndarray:
  with _reading(path) as file:
    array: np.ndarray = file[name]
    return array


@surgery.hookimpl
def surgery_formats() -> Mapping[str, Any]:
  """Offers the format by its name."""
  return {'$name': $class_()}
''',
  imports="""\
import numpy as np
import surgery
from surgery.testing import FormatConformance""",
  said="""\
  name = '$name'
  # What it has no place for, and refuses.
  refused = (
    'bfloat16', 'float8_e3m4', 'float8_e4m3', 'float8_e4m3b11fnuz',
    'float8_e4m3fn', 'float8_e4m3fnuz', 'float8_e5m2', 'float8_e5m2fnuz',
    'float8_e8m0fnu', 'float6_e2m3fn', 'float6_e3m2fn', 'float4_e2m1fn',
    'int2', 'int4', 'uint2', 'uint4',
    'names', 'frozen', 'metadata', 'key', 'value', 'texts', 'adapter',
  )  # fmt: skip""",
  values="""\
def test_values(tmp_path):
  host = surgery.Host(plugins=[$package], only=())
  array = np.arange(6, dtype=np.float32).reshape(2, 3)
  leaf = surgery.Leaf(lambda: array, array.shape, 'float32')
  model = surgery.Checkpoint({('net', 'kernel'): leaf})
  model.write(tmp_path / 'm.$name', host=host)
  with np.load(tmp_path / 'm.$name') as file:
    assert np.array_equal(array, file['net/kernel'])""",
  shell="""\
surgery convert base.msgpack base.$name""",
  python="""\
model = surgery.open('base.$name')""",
)

_POLICY = Kind(
  what='freeze policy',
  hook='surgery_freeze_param',
  suite='PolicyConformance',
  module='''\
"""A freeze policy: replace this line by what trains under it, and why."""

from __future__ import annotations

import surgery


@surgery.hookimpl
def surgery_freeze_param(site: surgery.Site, policy: str) -> bool | None:
  """Answers `$name`: biases train. Other policies are somebody else's."""
  if policy != '$name':
    return None
  return site.name == 'bias'
''',
  imports="""\
import blox as bx
import jax.numpy as jnp
import surgery
from surgery.testing import PolicyConformance""",
  said="""\
  name = '$name'
  trains = '**/bias'""",
  values="""\
def test_values():
  params = bx.Params()
  for name in ('kernel', 'bias'):
    params['net', name] = bx.Param(jnp.ones(2))
  host = surgery.Host(plugins=[$package], only=())
  found = surgery.freeze(params.locked(), policy='$name', host=host)
  assert not found['net', 'kernel'].trainable
  assert found['net', 'bias'].trainable""",
  shell="""\
surgery freeze base.msgpack --policy $name -o frozen.msgpack""",
  python="""\
params = surgery.freeze(params, policy='$name')""",
)

_TERM = Kind(
  what='term of selectors',
  hook='surgery_match_layer',
  suite='TermConformance',
  module='''\
"""A term of selectors: `$name:1000` means layers with more elements."""

from __future__ import annotations

import math

import surgery


@surgery.hookimpl
def surgery_match_layer(site: surgery.Site, term: str) -> bool | None:
  """Answers `$name:N`; every other term is somebody else's."""
  name, _, number = term.partition(':')
  if name != '$name':
    return None
  if not (number.isascii() and number.isdigit()):
    raise surgery.SelectorError(
      f'{term!r}: expected a number of elements, as in $name:1000.'
    )
  return sum(math.prod(param.shape) for param in site.params) > int(number)
''',
  imports="""\
import blox as bx
import jax.numpy as jnp
import surgery
from surgery.testing import TermConformance""",
  said="""\
  name = '$name:1000'
  matches = 'net/large/**'
  refused = [('$name:x', 'expected a number of elements')]""",
  values="""\
def test_values():
  params = bx.Params()
  for name, size in (('small', 2), ('large', 40)):
    params['net', name, 'kernel'] = bx.Param(jnp.ones((size, size)))
  host = surgery.Host(plugins=[$package], only=())
  found = surgery.select(params.locked(), '$name:1000', host=host)
  assert [('net', 'large', 'kernel')] == list(found)""",
  shell="""\
surgery select base.msgpack '$name:1000'""",
  python="""\
chosen = surgery.select(params, '$name:1000')""",
)

_METHOD = Kind(
  what='merge method',
  hook='surgery_methods',
  suite='MethodConformance',
  module='''\
"""A merge method: replace this line by how several tensors become one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

import surgery

__all__ = ['$class_']


class $class_(surgery.Method):
  """The mean of what lies between the extremes at each place.

  It needs one block at a time. What a method needs of the whole of a tensor
  (a norm, a threshold) it finds in `prepare`, by `whole.total` and
  `whole.largest`; random numbers come from `block.uniform`.
  """

  name = '$name'
  # Say base = 'required' for methods on `block.deltas`.
  least = 2

  scale: float = surgery.field(default=1.0, gt=0, doc='A factor.')

  def combine(self, block: Any, prepared: Any) -> Any:
    """Returns a block of the result."""
    tensors = np.sort(np.stack(block.tensors), axis=0)
    if len(tensors) > 2:
      tensors = tensors[1:-1]
    return tensors.mean(axis=0) * self.scale


@surgery.hookimpl
def surgery_methods() -> Mapping[str, type[surgery.Method]]:
  """Offers the method by its name."""
  return {'$name': $class_}
''',
  imports="""\
import blox as bx
import jax.numpy as jnp
import numpy as np
import surgery
from surgery.testing import MethodConformance""",
  said="""\
  name = '$name'
  symmetric = True
  refused = [({'scale': 0.0}, 'expected a value > 0')]""",
  values="""\
def test_values():
  host = surgery.Host(plugins=[$package], only=())
  models = []
  for number in (1.0, 2.0, 9.0):
    params = bx.Params()
    params['net', 'kernel'] = bx.Param(jnp.full(3, number))
    models.append(params.locked())
  found = surgery.combine(models, method='$name', host=host)
  assert np.array_equal([2, 2, 2], found['net', 'kernel'].value)""",
  shell="""\
surgery combine a.msgpack b.msgpack --method $name -o out.msgpack""",
  python="""\
params = surgery.combine([a, b, c], method='$name')""",
)

KINDS = {
  'pass': _PASS,
  'format': _FORMAT,
  'method': _METHOD,
  'policy': _POLICY,
  'term': _TERM,
}
