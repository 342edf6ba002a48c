"""Where a parameter stays factored, nothing as large as it is computed."""

from __future__ import annotations

import itertools

import blox as bx
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from tests.factoring.test_transform import layer
from tests.live import models
from tests.live.models import normal
from tests.live.test_awkward_models import Model, _built

LORA = surgery.LoRA(rank=2)
# What only moves the frozen base, or says in which dtype it is read.
MOVES = {
  'transpose',
  'reshape',
  'squeeze',
  'broadcast_in_dim',
  'convert_element_type',
  'copy',
  'slice',
  'rev',
  'stop_gradient',
}


def equations(jaxpr):
  """Yields all equations, those of inner jaxprs too."""
  for eqn in jaxpr.eqns:
    inner = list(jex.jaxprs_in_params(eqn.params))
    yield from itertools.chain.from_iterable(map(equations, inner))
    if not inner:
      yield eqn


def as_large_as(jaxpr, sizes):
  """Returns which primitives make something as large as a kernel."""
  return {
    eqn.primitive.name
    for eqn in equations(jaxpr)
    for var in eqn.outvars
    if getattr(var.aval, 'size', 0) in sizes
  }


def gradient(model, params, *args):
  """Returns the jaxpr of the gradient of adapters and of inputs."""
  weights, rest = params.split(models.is_weight)
  floats = [a for a in args if jnp.issubdtype(a.dtype, jnp.floating)]

  def loss(weights, floats):
    given = iter(floats)
    given = [
      next(given) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in args
    ]
    y, _ = model(weights.merge(rest), *given)
    return sum((v**2).sum() for v in jax.tree.leaves(y))

  return jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(weights, floats).jaxpr


def kernels(params):
  """Returns the sizes of adapted parameters."""
  return {params[path].value.size for path in params.records.chains}


def mlp():
  model, base, x = models.mlp((11, 5), inputs=13)
  return model, surgery.attach(base, LORA, to='**/{hidden0,output}'), x


def heads():
  use = lambda k, x: jnp.einsum('btd,dhk->bthk', x, k)
  model, params = layer(use, (13, 5, 7), layout='ioo')
  return model, params, normal(0, (2, 3, 13))


def conv():
  x = normal(0, (2, 5, 5, 7))
  _, model, base = _built(
    lambda g, r: bx.Conv(g.child('layer'), (3, 3), 11, r), x
  )
  return model, surgery.attach(base, LORA, to='**/layer'), x


def embedding():
  tokens = jnp.array([[0, 3, 5], [1, 1, 2]])

  def call(self, p, tokens):
    x, p = self.embed(p, tokens)
    return self.embed.attend(p, jnp.tanh(x))

  _, model, base = _built(
    lambda g, r: Model(
      g.child('m'), call, embed=bx.Embed(g.child('layer'), 13, 11, r)
    ),
    tokens,
  )
  return model, surgery.attach(base, LORA, to='**/layer'), tokens


def lstm():
  x = normal(0, (2, 5, 3))
  _, model, base = _built(
    lambda g, r: Model(
      g.child('m'),
      lambda self, p, x: self.inner.apply(p, x),
      inner=bx.LSTM(g.child('lstm'), 11, r),
    ),
    x,
  )
  return model, surgery.attach(base, LORA, to='**/gates'), x


def stacked():
  x = normal(0, (3, 7))
  scan = lambda k, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, k)
  model, params = layer(lambda k, x: scan(k, x)[0], (5, 7, 7), stacked=1)
  return model, params, x


def scaled(make, inputs):
  """Returns a model of which kernels are scaled in the place of LoRA."""
  model, adapted, x = make()
  base = surgery.detach(adapted)
  adapter = models.ScaleAside(inputs=inputs)
  host = models.host(models.ScaleAside)
  to = ['**/layer'] if make is not mlp else ['**/hidden0', '**/output']
  return model, surgery.attach(base, adapter, to=to, host=host), x


def scaled_outputs():
  return scaled(mlp, inputs=False)


def scaled_inputs():
  return scaled(mlp, inputs=True)


def scaled_channels():
  return scaled(conv, inputs=False)


MODELS = [
  *(mlp, heads, conv, embedding, lstm, stacked),
  *(scaled_outputs, scaled_inputs, scaled_channels),
]


@pytest.mark.parametrize('make', MODELS, ids=lambda make: make.__name__)
def test_the_gradient_makes_nothing_as_large_as_a_kernel(make):
  model, params, x = make()
  params = models.stirred(params)
  sizes = kernels(params)
  if make is stacked:
    sizes |= {size // 5 for size in sizes}
  # A convolution is one with the sum; its gradient is not.
  allowed = MOVES | {'low_rank'} if make is conv else MOVES
  fast = gradient(surgery.factored(model), params, x)
  assert as_large_as(fast, sizes) <= allowed
  # The dense model does: else this test could not fail.
  dense = as_large_as(gradient(model, params, x), sizes)
  products = {'low_rank', 'dot_general', 'conv_general_dilated', 'mul'}
  assert products & dense - allowed


# A base in bf16, adapters in f32.


def narrow():
  """Returns a layer with a bf16 kernel, and inputs."""
  model, params = layer(lambda k, x: x @ k, (13, 11), dtype='bfloat16')
  return model, params, normal(0, (4, 13), 'bfloat16')


def test_a_base_in_bf16_gives_f32_gradients_close_to_the_exact_ones():
  model, params, x = narrow()
  weights, rest = params.split(models.is_weight)

  @jax.jit
  def step(weights):
    def loss(weights):
      y, _ = surgery.factored(model)(weights.merge(rest), x)
      return (y.astype('float32') ** 2).mean(), y

    return jax.value_and_grad(loss, has_aux=True)(weights)

  (_, y), grads = step(weights)
  assert jnp.bfloat16 == y.dtype
  w, a, b = (
    np.asarray(params['net', 'layer', name].value.astype('float32'), np.float64)
    for name in ('kernel', 'lora_a', 'lora_b')
  )
  xs = np.asarray(x.astype('float32'), np.float64)
  expected = xs @ (w + 2 * a @ b)
  g = 2 * expected / expected.size
  exact = {
    'lora_a': 2 * xs.T @ g @ b.T,
    'lora_b': 2 * a.T @ xs.T @ g,
  }
  size = abs(expected).max()
  np.testing.assert_allclose(
    np.asarray(y.astype('float32')) / size, expected / size, atol=1e-2
  )
  for name, wanted in exact.items():
    found = grads['net', 'layer', name].value
    assert jnp.float32 == found.dtype
    size = abs(wanted).max()
    np.testing.assert_allclose(
      np.asarray(found) / size, wanted / size, atol=1e-2
    )


def test_a_base_in_bf16_is_never_copied_to_f32():
  model, params, x = narrow()
  jaxpr = gradient(surgery.factored(model), params, x)
  wide = [
    eqn.primitive.name
    for eqn in equations(jaxpr)
    for var in eqn.outvars
    if var.aval.shape in ((13, 11), (11, 13))
    and jnp.dtype('float32') == var.aval.dtype
  ]
  assert [] == wide
  # As for a dense model.
  dense = equations(gradient(model, params, x))
  shapes = {(v.aval.shape, str(v.aval.dtype)) for e in dense for v in e.outvars}
  assert ((13, 11), 'float32') in shapes
