"""Models for the conformance kit: small, and each awkward in its way."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np

from surgery.contract.adapter import Adapter
from surgery.host.manager import Host
from surgery.live import verbs

DTYPES = ('float32', 'bfloat16', 'float16')


class _Heads(bx.Module):
  """A layer whose kernel has three axes: (inputs, heads, head)."""

  def __init__(self, graph: bx.Graph, heads: int, size: int, rng: Any) -> None:
    super().__init__(graph)
    self.sizes, self.rng = (heads, size), rng

  def __call__(self, params: bx.Params, x: Any) -> Any:
    init = jax.nn.initializers.normal(0.3)
    kernel, params = self.get_param(
      params, 'kernel', (x.shape[-1], *self.sizes), init, rng=self.rng
    )
    bias, params = self.get_param(
      params, 'bias', self.sizes, init, rng=self.rng
    )
    y = jnp.einsum('...d,dhk->...hk', x, kernel) + bias
    return y.reshape(*x.shape[:-1], -1), params


class _Stack(bx.Module):
  """Layers in one: what lies inside of scan, with axes in front."""

  def __init__(self, graph: bx.Graph, depth: int, rng: Any) -> None:
    super().__init__(graph)
    self.depth, self.rng = depth, rng

  def __call__(self, params: bx.Params, x: Any) -> Any:
    init = jax.nn.initializers.normal(0.3)
    width = x.shape[-1]
    kernel, params = self.get_param(
      params, 'kernel', (self.depth, width, width), init, rng=self.rng
    )
    bias, params = self.get_param(
      params, 'bias', (self.depth, width), init, rng=self.rng
    )
    return jax.lax.scan(_layer, x, (kernel, bias))[0], params


def _layer(h: Any, one: Any) -> Any:
  # A function of the module: a new one would be compiled at each call.
  return jnp.tanh(h @ one[0] + one[1]), None


class _Net(bx.Module):
  """Two layers of a kind, the name of one being a part of the other's."""

  def __init__(
    self,
    graph: bx.Graph,
    kind: str,
    rng: Any,
    scale: int = 1,
    times: int = 1,
  ) -> None:
    super().__init__(graph)
    self.kind = kind
    n = scale * times
    first, second = graph.child('query'), graph.child('query2')
    plain = {'use_bias': False} if kind == 'no_bias' else {}
    if kind == 'conv':
      self.query = bx.Conv(first, (3, 2), 5 * times, rng)
      self.query2 = bx.Conv(second, 3, 4 * times, rng)
    elif kind == 'embed':
      self.query = bx.Embed(first, 7 * n, 5 * n, rng)
      self.query2 = bx.Linear(second, 4 * n, rng)
    elif kind == 'einsum':
      self.query = _Heads(first, 2, 3 * n, rng)
      self.query2 = _Heads(second, 2, 2 * n, rng)
    elif kind == 'stacked':
      self.query = _Stack(first, 3, rng)
      self.query2 = _Stack(second, 2, rng)
    elif kind == 'norm':
      # Scales that differ, or the sum of squares of outputs would be constant.
      init = jax.nn.initializers.normal(1.0)
      self.query = bx.LayerNorm(first, scale_init=init, bias_init=init, rng=rng)
      self.query2 = bx.RMSNorm(second, scale_init=init, rng=rng)
    else:
      self.query = bx.Linear(first, 5 * n, rng, **plain)
      self.query2 = bx.Linear(second, 4 * n, rng, **plain)

  def __call__(self, params: bx.Params, x: Any) -> Any:
    h, params = self.query(params, x)
    return self.query2(params, jnp.tanh(h))


# Kinds of layers whose default parameter is a matrix.
MATRICES = ('linear', 'no_bias', 'conv', 'embed', 'einsum', 'stacked')
# Layers with vectors only are checked for types that request them.
KINDS = (*MATRICES, 'norm')


@dataclasses.dataclass(frozen=True)
class Model:
  """A model to adapt.

  Attributes:
    net: the model.
    params: its params, locked.
    x: some inputs.
    options: what `attach` needs to know of it.
  """

  net: Any
  params: bx.Params
  x: Any
  options: dict[str, Any]

  def __call__(self, params: bx.Params, x: Any = None) -> Any:
    """Returns the outputs."""
    return self.net(params, self.x if x is None else x)[0]


def model(
  kind: str, dtype: str = 'float32', scale: int = 1, multiple_of: int = 1
) -> Model:
  """Returns a model of a kind, with params that nobody else holds.

  Args:
    kind: one of `KINDS`.
    dtype: dtype of its parameters.
    scale: how many times as wide its layers are, but for convolutions.
    multiple_of: what divides the numbers of inputs and outputs of its layers.
  """
  made = _made(kind, dtype, scale, multiple_of)
  params = bx.Params()
  for path, param in made.params.items():
    metadata = dict(param.metadata)
    params[path] = bx.Param(param.value, param.trainable, metadata)
  options = dict(made.options)
  return dataclasses.replace(made, params=params.locked(), options=options)


@functools.cache
def _made(kind: str, dtype: str, scale: int, times: int) -> Model:
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  net = _Net(graph.child('layers'), kind, rng, scale, times)
  numbers = np.random.default_rng(0)
  x: Any = jnp.asarray(numbers.normal(size=(3, 6 * scale * times)), 'float32')
  if kind == 'embed':
    x = jnp.asarray([[0, 3, 6], [1, 1, 5]])
  elif kind == 'conv':
    x = jnp.asarray(numbers.normal(size=(2, 6, 5, 3 * times)), 'float32')
  params = _filled(rng.seed(bx.Params(), seed=0), net, x, numbers).locked()
  if dtype != 'float32':
    params = verbs.cast(params, dtype)
    x = x if kind == 'embed' else x.astype(dtype)
  options: dict[str, Any] = {'stacked': 0}
  if kind == 'einsum':
    options['layout'] = {'**/kernel': 'ioo', '**/bias': 'oo'}
  if kind == 'stacked':
    options['stacked'] = 1
  return Model(net, params, x, options)


def _filled(
  params: bx.Params, net: Any, x: Any, numbers: np.random.Generator
) -> bx.Params:
  """Returns params with those that a net adds, drawn without a compiler."""
  shapes = jax.eval_shape(lambda p: net(p, x)[1], params)
  for path, param in shapes.items():
    if path not in params:
      drawn = 0.3 * numbers.normal(size=param.value.shape)
      value = jnp.asarray(drawn, param.value.dtype)
      params[path] = param.replace(value=value)
  return params


def attached(
  of: Model,
  adapter: Adapter,
  host: Host,
  *,
  name: str = 'default',
  seed: int = 0,
  to: str = 'net/layers/**',
  params: bx.Params | None = None,
) -> bx.Params:
  """Returns a model's params with the adapter."""
  return verbs.attach(
    of.params if params is None else params,
    adapter,
    to=to,
    name=name,
    seed=seed,
    host=host,
    **of.options,
  )


def is_weight(param: bx.Param) -> bool:
  """Whether a parameter belongs to an adapter."""
  return 'adapter' in param.metadata


def stirred(params: bx.Params, seed: int = 1) -> bx.Params:
  """Returns params whose trainable adapter weights are moved at random."""
  numbers = np.random.default_rng(seed)
  weights, rest = params.split(lambda path, p: is_weight(p) and p.trainable)
  weights = jax.tree.map(
    lambda w: w + jnp.asarray(0.3 * numbers.normal(size=w.shape), w.dtype),
    weights,
  )
  return weights.merge(rest)
