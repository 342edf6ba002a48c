"""What the conformance suites of hook plugins share.

A suite is a class of tests that an author inherits, as fsspec and zarr have
them. Each law is a method `test_…` whose docstring says it, so pytest needs
nothing else, and a subclass may override one that it has a reason to.
"""

from __future__ import annotations

import functools
import pathlib
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np

from surgery import errors
from surgery.builtin.lora import LoRA
from surgery.contract.site import ParamSpec, Site
from surgery.editing import choosing
from surgery.host.manager import Host
from surgery.live import checkpoints, verbs
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.naming import paths
from surgery.naming.paths import Path
from surgery.once import once
from surgery.testing import models
from surgery.testing.cases import (
  Broken,
)

S = TypeVar('S', bound='Suite')


class Fault(Exception):  # noqa: N818 - `Broken` is what is reported.
  """In what a law is broken; `law` says which one and by whom."""


def law(method: Callable[[S], None]) -> Callable[[S], None]:
  """Makes a method a law: its errors name the law that is broken."""

  @functools.wraps(method)
  def look(self: S) -> None:
    try:
      method(self)
    except Broken:
      raise
    except Exception as error:
      kind = '' if isinstance(error, Fault) else f'{type(error).__name__}: '
      name = method.__name__.removeprefix('test_')
      said = ' '.join((method.__doc__ or '').split('\n\n')[0].split())
      raise Broken(
        f"law '{name}' is broken by {self.shown()}: {kind}{error}\n"
        f'The law: {said}\nReproduce: {type(self).__name__}().'
        f'{method.__name__}()',
        name,
      ) from error

  look.is_law = True  # type: ignore[attr-defined]
  return look


class Suite:
  """A test class for pytest; derive from those of a kind of plugin.

  Attributes:
    plugin: the plugin: a module, a class or an object, as an entry point of
      `surgery.plugins` names it.
    name: what it offers by that name.
  """

  plugin: ClassVar[Any]
  name: ClassVar[str]

  @classmethod
  def laws(cls) -> dict[str, Callable[[Any], None]]:
    """Returns the laws by name."""
    found = {}
    for name in dir(cls):
      if getattr(getattr(cls, name), 'is_law', False):
        found[name.removeprefix('test_')] = getattr(cls, name)
    return found

  @classmethod
  def broken(cls, laws: Iterable[str] | None = None) -> dict[str, Broken]:
    """Returns the laws that are broken, each with its failure.

    Args:
      laws: names of the laws to look at; all by default.
    """
    found, known = {}, cls.laws()
    for name in known if laws is None else laws:
      try:
        known[name](cls())
      except Broken as error:
        found[name] = error
    return found

  @classmethod
  def shown(cls) -> str:
    """Returns the name of what is checked, for messages."""
    return f'{cls.__name__} ({getattr(cls, "name", "without a name")!r})'

  def host(self) -> Host:
    """Returns a new host that knows this plugin and no other.

    Raises:
      ConfigError: if the suite does not say which plugin it is about.
    """
    for wanted in ('plugin', 'name'):
      if not hasattr(self, wanted):
        raise errors.ConfigError(
          f'{type(self).__name__}: set `{wanted}`; the plugin is a module, a '
          'class or an object, the name is the one that it offers.'
        )
    return Host(plugins=[self.plugin], only=())

  def model(self) -> bx.Params:
    """Returns the params that laws are checked with; may be overridden.

    `net/{first,second}` have a kernel and a bias, `net/large` a kernel of more
    than one block, `net/norm` a scale, `net/steps` is an integer. The second
    layer is bfloat16, its bias is frozen and has metadata.
    """
    return _model()


def with_keys(params: bx.Params) -> bx.Params:
  """Returns params with a generator's key and counter, and some more keys.

  What hooks are shown of a key has to be the same in a file, which holds its
  numbers.
  """
  found = bx.Params()
  for path, param in params.items():
    found[path] = param
  key = jax.random.key(0)
  found['rng', 'key'] = bx.Param(key, trainable=False)
  found['rng', 'counter'] = bx.Param(jnp.uint32(0), trainable=False)
  found['rng', 'many', 'keys'] = bx.Param(jax.random.split(key, 3), False)
  return found.locked()


@once
def _model() -> bx.Params:
  numbers = np.random.default_rng(0)

  def drawn(*shape: int) -> Any:
    return numbers.normal(size=shape).astype(np.float32)

  params = bx.Params()
  params['net', 'first', 'kernel'] = bx.Param(jnp.asarray(drawn(6, 5)))
  params['net', 'first', 'bias'] = bx.Param(jnp.asarray(drawn(5)))
  half = jnp.bfloat16
  params['net', 'second', 'kernel'] = bx.Param(jnp.asarray(drawn(5, 4), half))
  params['net', 'second', 'bias'] = bx.Param(
    jnp.asarray(drawn(4), half), False, {'note': ('a', 1)}
  )
  # Two blocks, a full one and a smaller one.
  params['net', 'large', 'kernel'] = bx.Param(jnp.asarray(drawn(1050, 1000)))
  params['net', 'norm', 'scale'] = bx.Param(jnp.asarray(drawn(5)))
  params['net', 'steps'] = bx.Param(jnp.asarray(3, jnp.int32))
  return params.locked()


def adapted(params: bx.Params, host: Host) -> bx.Params:
  """Returns params with LoRA wherever it can be, which does something."""
  with warnings.catch_warnings():
    # Layers that LoRA does not serve are left out, and that is fine.
    warnings.simplefilter('ignore', errors.SiteWarning)
    return models.stirred(
      verbs.attach(params, LoRA(rank=1), to='**', host=host)
    )


@contextmanager
def folder() -> Iterator[pathlib.Path]:
  """Gives an empty folder that is removed afterwards."""
  with tempfile.TemporaryDirectory() as name:
    yield pathlib.Path(name)


def checkpoint(params: bx.Params) -> Checkpoint:
  """Returns params as passes get them."""
  return checkpoints.to_checkpoint(params)


def chosen(
  model: Checkpoint, select: str | Iterable[str], host: Host
) -> set[Path]:
  """Returns what a selector matches, which may be nothing."""
  text = select if isinstance(select, str) else list(select)
  try:
    return set(choosing.chosen(model, text, model.manifest.layer_types, host))
  except errors.SelectorError:
    return set()


def array(leaf: Leaf) -> np.ndarray | None:
  """Returns the value of a leaf as an array; None for other values."""
  return None if leaf.shape is None else np.asarray(leaf.load())


def differs(expected: Leaf, found: Leaf) -> str | None:
  """Returns in what a leaf is another one, down to the bit; None if it is not.

  The digest, and how it is computed, are no part of what it is.
  """
  for what in ('shape', 'dtype', 'trainable', 'key'):
    a, b = getattr(expected, what), getattr(found, what)
    if a != b:
      return f'{what} is {b}, expected {a}'
  if dict(expected.metadata) != dict(found.metadata):
    return (
      f'metadata is {dict(found.metadata)}, expected {dict(expected.metadata)}'
    )
  wrong = found.mismatch(found.load())
  if wrong is not None:
    return wrong
  one, two = array(expected), array(found)
  if one is None or two is None:
    same = type(expected.load()) is type(found.load())
    if not same or expected.load() != found.load():
      return f'the value is {found.load()!r}, expected {expected.load()!r}'
    return None
  if one.tobytes() != two.tobytes():
    count = int(np.sum(one != two))
    return f'{count or "some"} of {one.size} values differ'
  return None


def same_leaves(
  expected: Mapping[Path, Leaf], found: Mapping[Path, Leaf], what: str
) -> None:
  """Raises a fault unless two models have the same leaves."""
  for path in sorted(expected.keys() ^ found.keys()):
    where = 'is missing' if path in expected else 'should not be there'
    raise Fault(f'{what}: {paths.show(path)} {where}.')
  for path, leaf in expected.items():
    wrong = differs(leaf, found[path])
    if wrong is not None:
      raise Fault(f'{what}: {paths.show(path)}: {wrong}.')


def refusal(call: Callable[[], Any]) -> errors.SurgeryError | None:
  """Returns the error by which a call is refused; None if it is not.

  A `PluginError` is a failure that nobody foresaw, and is raised.
  """
  try:
    call()
  except errors.PluginError:
    raise
  except errors.SurgeryError as error:
    return error
  return None


def sites(params: bx.Params, *, each: bool) -> list[Site]:
  """Returns what hooks are shown of a model.

  Args:
    params: the model.
    each: whether each parameter has a site, as policies get them, and not each
      layer, as terms do.
  """
  groups: dict[Any, list[ParamSpec]] = {}
  for path, leaf in checkpoint(params).items():
    spec = choosing.shown(path[-1], leaf)
    groups.setdefault(path if each else path[:-1], []).append(spec)
  return [
    Site(path[:-1] if each else path, tuple(specs))
    for path, specs in groups.items()
  ]
