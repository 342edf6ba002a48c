"""Models to adapt, and what adapting them must come to.

`dense` is the oracle: plain params that hold `W + s·A·B` in place of each
adapted `W`, worked out here by plain JAX from what is stored. A model that gets
them knows of no adapter.
"""

from __future__ import annotations

import re

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np

import surgery


class MLP(bx.Module):
  """The model of the blox LoRA notebook."""

  def __init__(self, graph, output_sizes, rng, layer=bx.Linear, **kwargs):
    super().__init__(graph)
    self.layers = []
    for i, size in enumerate(output_sizes):
      last = i == len(output_sizes) - 1
      name, make = ('output', bx.Linear) if last else (f'hidden{i}', layer)
      options = {} if last else kwargs
      self.layers.append(make(graph.child(name), size, rng=rng, **options))

  def __call__(self, params, x):
    for i, layer in enumerate(self.layers):
      x, params = layer(params, x)
      if i < len(self.layers) - 1:
        x = jax.nn.relu(x)
    return x, params


def mlp(sizes=(6, 5, 3), inputs=4, seed=42, locked=True, **kwargs):
  """Returns a small MLP, its initialised params and some inputs."""
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  model = MLP(graph.child('mlp'), list(sizes), rng, **kwargs)
  x = normal(0, (7, inputs))
  _, params = model(rng.seed(bx.Params(), seed=seed), x)
  model.root, model.rng = graph, rng
  return model, params.locked() if locked else params, x


def normal(seed, shape, dtype='float32'):
  """Returns the same normal numbers every time."""
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def is_weight(path, param):
  """Whether a parameter is an adapter's."""
  del path
  return 'adapter' in param.metadata


def stirred(params, seed=0, size=0.5):
  """Returns params whose adapter weights are all random, none zero."""
  weights, rest = params.split(is_weight)
  rng = np.random.default_rng(seed)
  weights = jax.tree.map(
    lambda w: jnp.asarray(rng.normal(size=w.shape) * size, w.dtype), weights
  )
  return weights.merge(rest)


_NAME = re.compile(r'lora_a(?:\.([^.]+)(?:\.(.+))?)?')


def dense(params, alpha=None, outs=1):
  """Returns plain params with `W + alpha / rank · A·B` for each adapted `W`.

  Args:
    params: params with LoRA adapters.
    alpha: the adapters' alpha; twice the rank by default.
    outs: number of output axes of an adapted parameter.
  """
  result = bx.Params()
  for path, param in params.items():
    if not is_weight(path, param):
      result[path] = param
  for path, param in params.items():
    match = _NAME.fullmatch(path[-1])
    if not match or not is_weight(path, param):
      continue
    target = (*path[:-1], match[2] or 'kernel')
    a = param.value
    b = next(
      params[(*path[:-1], name)].value
      for name in (path[-1].replace('lora_a', 'lora_b'), 'lora_b')
      if (*path[:-1], name) in params
    )
    base = result[target].value
    w = base.astype(jnp.promote_types(base.dtype, jnp.float32))
    rank, stack = a.shape[-1], w.shape[: b.ndim - 1 - outs]
    product = jnp.matmul(
      a.reshape(*stack, -1, rank).astype(w.dtype),
      b.reshape(*stack, rank, -1).astype(w.dtype),
      precision='highest',
    )
    scale = 2.0 if alpha is None else alpha / rank
    new = (w + scale * product.reshape(w.shape)).astype(base.dtype)
    result[target] = result[target].replace(value=new)
  return result.locked() if params.is_locked else result


def assert_equal_params(expected, actual):
  """Asserts equal paths, flags and bits."""
  assert sorted(expected.keys()) == sorted(actual.keys())
  for path, param in expected.items():
    other = actual[path]
    assert param.trainable == other.trainable, path
    for a, b in zip(
      jax.tree.leaves(param.value), jax.tree.leaves(other.value), strict=True
    ):
      assert bits(a) == bits(b), path


def bits(value):
  """Returns dtype, shape and bytes of an array or key."""
  if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
    value = jax.random.key_data(value)
  value = np.asarray(value)
  return str(value.dtype), value.shape, value.tobytes()


def close(expected, actual, tolerance=1e-5):
  """Asserts that two pytrees of arrays agree, and are finite."""
  for a, b in zip(
    jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True
  ):
    a, b = (np.asarray(v, np.float64) for v in (a, b))
    assert np.isfinite(b).all()
    np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance)


def weights_of(params, name):
  """Returns an adapter's weights by path."""
  return {
    p: q.value for p, q in params.items() if q.metadata.get('adapter') == name
  }


# Adapter types that do not add.


class Scale(surgery.Adapter):
  """Learned scaling of outputs, of kernel and bias: IA3."""

  name = 'scale'
  rewrites = ('kernel', 'bias')

  def init(self, site, key):
    del key
    return {'scale': jnp.ones(site.out_shape)}

  def apply(self, site, name, base, weights):
    del site, name
    return base * weights['scale']


class ScaleAside(surgery.Adapter):
  """Learned scaling of outputs, or of inputs, kept apart from the kernel."""

  name = 'scale_aside'

  inputs: bool = surgery.field(default=False, doc='Scale inputs.')

  def init(self, site, key):
    del key
    return {'scale': jnp.ones(site.in_shape if self.inputs else site.out_shape)}

  def apply(self, site, name, base, weights):
    del name
    scale = weights['scale']
    if self.inputs:
      scale = scale.reshape(scale.shape + (1,) * len(site.out_shape))
    return surgery.LowRank(base).dense() * scale


class Magnitude(surgery.Adapter):
  """Keeps the norm of each column apart: the magnitude of DoRA."""

  name = 'magnitude'

  def init(self, site, key):
    del key
    return {'magnitude': _norm(site.base())}

  def apply(self, site, name, base, weights):
    del site, name
    return base / _norm(base) * weights['magnitude']


def _norm(matrix):
  axes = tuple(range(matrix.ndim - 1))
  return jnp.sqrt((matrix * matrix).sum(axes) + 1e-12)


class Shared(surgery.Adapter):
  """Adds the same matrix everywhere, each site with its own size: VeRA."""

  name = 'shared'
  adds = True
  frozen = ('matrix',)

  def init_shared(self, sites, key):
    return {'matrix': jax.random.normal(key, (*sites[0].in_shape, 3))}

  def init(self, site, key):
    del key
    return {'size': jnp.zeros((3, *site.out_shape))}

  def apply(self, site, name, base, weights):
    del site, name
    return base + weights['matrix'] @ weights['size']


def host(*plugins):
  """Returns a host that knows LoRA and what it is given."""
  return surgery.Host(plugins=plugins)
