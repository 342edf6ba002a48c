"""Laws of adapter types on layers of other frameworks.

They are few, since a tree becomes params that the other laws look at: what is
looked at is the way there and back. `pytest -m frameworks` runs them.
"""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from surgery.contract.adapter import Adapter
from surgery.factoring.transform import factored
from surgery.host.manager import Host
from surgery.testing.cases import Broken
from surgery.trees import verbs
from surgery.trees.adapted import AdaptedTree

# What is made: a model, a function that calls it, and inputs.
_Made = tuple[Any, Callable[[Any, Any], Any], Any]


# Layers have the names that they have in the kit's other models.


def _linen(times: int) -> _Made:
  import flax.linen as nn

  class Net(nn.Module):
    @nn.compact  # type: ignore[untyped-decorator]
    def __call__(self, x: Any) -> Any:
      x = jnp.tanh(nn.Dense(5 * times, name='query')(x))
      return nn.Dense(4 * times, name='query2')(nn.LayerNorm(name='norm')(x))

  x = _inputs(times)
  params = Net().init(jax.random.key(0), x)['params']
  return params, lambda params, x: Net().apply({'params': params}, x), x


def _nnx(times: int) -> _Made:
  from flax import nnx

  class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
      self.query = nnx.Linear(6 * times, 5 * times, rngs=rngs)
      self.norm = nnx.LayerNorm(5 * times, rngs=rngs)
      self.query2 = nnx.Linear(5 * times, 4 * times, rngs=rngs)

    def __call__(self, x: Any) -> Any:
      return self.query2(self.norm(jnp.tanh(self.query(x))))

  return Net(nnx.Rngs(0)), lambda model, x: model(x), _inputs(times)


def _equinox(times: int) -> _Made:
  import equinox as eqx

  class Net(eqx.Module):
    query: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    query2: eqx.nn.Linear

    def __call__(self, x: Any) -> Any:
      return self.query2(self.norm(jnp.tanh(self.query(x))))

  first, second = jax.random.split(jax.random.key(0))
  model = Net(
    eqx.nn.Linear(6 * times, 5 * times, key=first),
    eqx.nn.LayerNorm(5 * times),
    eqx.nn.Linear(5 * times, 4 * times, key=second),
  )
  return model, lambda model, x: jax.vmap(model)(x), _inputs(times)


def _inputs(times: int) -> Any:
  drawn = np.random.default_rng(0).normal(size=(3, 6 * times))
  return jnp.asarray(drawn, 'float32')


_MAKERS: dict[str, Callable[[int], _Made]] = {
  'linen': _linen,
  'nnx': _nnx,
  'equinox': _equinox,
}
_HOMES = {'linen': 'flax', 'nnx': 'flax', 'equinox': 'equinox'}


def installed() -> list[str]:
  """Returns the frameworks that are installed."""
  return [n for n, home in _HOMES.items() if importlib.util.find_spec(home)]


def look(
  framework: str,
  adapter: Adapter,
  *,
  mergeable: bool = True,
  multiple_of: int = 1,
  host: Host | None = None,
) -> None:
  """Looks at a type on layers of a framework.

  What it changes is as `resolve` says, dense or factored; a merge has the same
  bits; a file gives the same back; detached, the model is as it was.

  Args:
    framework: `linen`, `nnx` or `equinox`.
    adapter: type and configuration.
    mergeable: whether it can be merged.
    multiple_of: what divides the numbers of inputs and outputs of layers.
    host: knows the type; one that knows no other by default.

  Raises:
    Broken: naming what does not hold.
  """
  host = host or Host(plugins=[type(adapter)], only=())
  model, call, x = _MAKERS[framework](multiple_of)
  tree = verbs.attach(model, adapter, to='all', host=host)
  fail = functools.partial(_fail, framework, adapter)
  if not isinstance(tree, AdaptedTree):
    fail('attach gave no AdaptedTree')
  draw = np.random.default_rng(1)
  move = lambda w: (
    w + jnp.asarray(0.3 * draw.normal(size=w.shape), w.dtype)
    if jnp.issubdtype(w.dtype, jnp.inexact)
    else w
  )
  frozen = type(adapter).frozen
  moved = {
    site: {n: w if n in frozen else move(w) for n, w in some.items()}
    for site, some in verbs.weights(tree).items()
  }
  tree = verbs.with_weights(tree, 'default', moved)
  dense = tree.resolve()
  expected = call(dense, x)
  fast: Any = factored(call)
  made = fast(tree, x, is_training=False) if adapter.counters else fast(tree, x)
  if not np.allclose(expected, made, rtol=1e-3, atol=1e-4):
    fail('what is factored is not what is dense')
  if mergeable and not _same(dense, verbs.merge(tree, host=host)):
    fail('a merge has other bits than what the model gets')
  if not _same(model, verbs.detach(tree, host=host)):
    fail('the base is another after detach')
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'm.msgpack'
    verbs.save(path, tree, host=host)
    if not _same(tree, verbs.load(path, like=model, host=host)):
      fail('a file gives something else back')


def _same(a: Any, b: Any) -> bool:
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(
    np.array_equal(x, y) if hasattr(x, 'dtype') else x is y for x, y in pairs
  )


def _fail(framework: str, adapter: Adapter, what: str) -> None:
  raise Broken(
    f'{adapter!r} on layers of {framework}: {what}.\nReproduce: '
    f'surgery.testing.frameworks.look({framework!r}, {adapter!r})',
    'frameworks',
  )
