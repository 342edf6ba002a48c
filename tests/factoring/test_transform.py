"""Factored parameters give what dense ones give, and stay factored."""

import functools
import re
import subprocess
import sys
from typing import Any

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from tests.live.models import close, normal, stirred


class Layer(bx.Module):
  """A layer that uses its kernel as it likes."""

  def __init__(self, graph, shape, use, dtype='float32'):
    super().__init__(graph)
    self.shape, self.use, self.dtype = shape, use, dtype

  def __call__(self, params, x):
    kernel, params = self.get_param(
      params, 'kernel', self.shape, jax.nn.initializers.zeros, dtype=self.dtype
    )
    return self.use(kernel, x), params


def layer(use, shape, dtype='float32', adapter=None, **options):
  """Returns a layer and params with a random kernel and adapter."""
  module = Layer(bx.Graph('net').child('layer'), shape, use, dtype)
  params = bx.Params()
  params['net', 'layer', 'kernel'] = bx.Param(normal(0, shape, dtype))
  params = surgery.attach(
    params.locked(), adapter or surgery.LoRA(rank=2), to='**', **options
  )
  return module, stirred(params)


def both(model, params, *args, transform=jax.jit, tolerance=2e-5):
  """Asserts that values and gradients are those of dense parameters."""

  def loss(model):
    def of(half, rest, *args):
      y, _ = model(half.merge(rest), *args)
      weights = [
        normal(7, v.shape) if v.shape else 1.0 for v in jax.tree.leaves(y)
      ]
      return sum(
        (w * v.astype(jnp.float32)).sum()
        for w, v in zip(weights, jax.tree.leaves(y), strict=True)
      )

    return transform(jax.value_and_grad(of, argnums=(0, 2)))

  half, rest = surgery.freeze(params).split()
  dense = loss(model)(half, rest, *args)
  fast = loss(surgery.factored(model))(half, rest, *args)
  assert jax.tree.structure(dense) == jax.tree.structure(fast)
  for a, b in zip(jax.tree.leaves(dense), jax.tree.leaves(fast), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    size = max(1.0, float(np.abs(np.asarray(a, np.float32)).max(initial=0)))
    close(np.asarray(a) / size, np.asarray(b) / size, tolerance)


def states(model, params, *args):
  """Returns what becomes of each parameter, without its path."""
  explained = surgery.explain(model, params, *args)
  return [str(use) for use in explained.values()]


X = normal(1, (3, 6))
X3 = normal(1, (2, 3, 6))
HEADS = {'layout': 'ioo'}
CONV = ('NHWC', 'HWIO', 'NHWC')


def conv(k, x, strides=(1, 1), padding='SAME', **options):
  return jax.lax.conv_general_dilated(
    x, k, strides, padding, dimension_numbers=CONV, **options
  )


IMAGE = normal(2, (2, 6, 5, 4))
# name: how the kernel is used, its shape, an input, options of attach.
FACTORED: dict[str, Any] = {
  'dot': (lambda k, x: jnp.dot(x, k), (6, 5), X, {}),
  'matmul of three axes': (lambda k, x: x @ k, (6, 5), X3, {}),
  'matmul of a vector': (lambda k, x: x[0] @ k, (6, 5), X, {}),
  'kernel on the left': (lambda k, x: k.T @ x.T, (6, 5), X, {}),
  'kernel turned first': (lambda k, x: x @ k.T, (5, 6), X, {}),
  'left, of three axes': (
    lambda k, x: jnp.einsum('io,bti->obt', k, x), (6, 5), X3, {},
  ),
  'dot_general': (
    lambda k, x: jax.lax.dot_general(k, x, (((0,), (1,)), ((), ()))),
    (6, 5), X, {},
  ),
  'einsum of heads': (
    lambda k, x: jnp.einsum('btd,dhk->bthk', x, k), (6, 2, 4), X3, HEADS,
  ),
  'einsum of heads, last against the rest': (
    lambda k, x: jnp.einsum('btd,dhk->bthk', x, k), (6, 2, 4), X3, {},
  ),
  'einsum of heads, in': (
    lambda k, x: jnp.einsum('bhk,hko->bo', x.reshape(3, 2, 3), k),
    (2, 3, 4), X, {},
  ),
  'einsum over an axis of each': (
    lambda k, x: jnp.einsum('bhk,hko->bo', x.reshape(3, 2, 3), k),
    (2, 3, 4), X, {'layout': 'ioo'},
  ),
  'reshaped to heads': (
    lambda k, x: jnp.einsum('bd,dhk->bhk', x, k.reshape(6, 2, 4)),
    (6, 8), X, {},
  ),
  'reshaped from heads': (
    lambda k, x: x @ k.reshape(6, 8), (6, 2, 4), X, HEADS,
  ),
  'cast': (
    lambda k, x: (x.astype('bfloat16') @ k.astype('bfloat16')).astype('float32'),
    (6, 5), X, {},
  ),
  'scaled by numbers': (lambda k, x: x @ (-k * 0.5 / 3), (6, 5), X, {}),
  'scaled by a value': (lambda k, x: x @ (k * x[0, 0]), (6, 5), X, {}),
  'scaled by columns': (
    lambda k, x: x @ (k * jnp.arange(1.0, 6.0)), (6, 5), X, {},
  ),
  'scaled by rows': (
    lambda k, x: x @ (k / jnp.arange(1.0, 7.0)[:, None]), (6, 5), X, {},
  ),
  'split': (
    lambda k, x: sum(x @ p for p in jnp.split(k, 2, -1)), (6, 8), X, {},
  ),
  'split of inputs': (
    lambda k, x: sum(x[:, :3] @ p for p in jnp.split(k, 2)), (6, 5), X, {},
  ),
  'reshaped to one axis': (
    lambda k, x: jnp.concatenate([x] * 5, -1) @ k.reshape(30), (6, 5), X, {},
  ),
  'joined over factors': (
lambda k, x: x @ k.reshape(6, 8),
    (3, 2, 8), X, {'layout': 'ioo'},
  ),
  'sliced': (lambda k, x: x[:, 1:5:2] @ k[1:5:2, 2:], (6, 5), X, {}),
  'turned around': (lambda k, x: x @ k[::-1, ::-1], (6, 5), X, {}),
  'a new axis': (lambda k, x: (x @ k[None])[0], (6, 5), X, {}),
  'side by side': (
    lambda k, x: x @ jnp.concatenate([k, 2 * k], -1), (6, 5), X, {},
  ),
  'one below the other': (
    lambda k, x: jnp.concatenate([x, x], -1) @ jnp.concatenate([k, k]),
    (6, 5), X, {},
  ),
  'a sum of two': (lambda k, x: x @ (k + k[::-1]), (6, 5), X, {}),
  'an array added': (
    lambda k, x: x @ (k - jnp.ones((6, 5))), (6, 5), X, {},
  ),
  'two uses': (lambda k, x: jnp.tanh(x @ k) @ k.T, (6, 5), X, {}),
  'inner jit': (
    lambda k, x: jax.jit(lambda k, x: x @ k)(k, x), (6, 5), X, {},
  ),
  'inner vmap': (
    lambda k, x: jax.vmap(lambda v: v @ k)(x), (6, 5), X, {},
  ),
  'inner scan, kernel outside': (
    lambda k, x: jax.lax.scan(lambda c, v: (c, v @ k), 0, x)[1], (6, 5), X, {},
  ),
  'inner scan over a stack': (
    lambda k, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, k)[0],
    (3, 6, 6), X, {'stacked': 1},
  ),
  'one of a stack': (lambda k, x: x @ k[1], (3, 6, 5), X, {'stacked': 1}),
  'one of a stack, by a value': (
    lambda k, x: x @ k[jnp.argmax(x) % 3], (3, 6, 5), X, {'stacked': 1},
  ),
  'all of a stack': (
    lambda k, x: jnp.einsum('bi,lio->lbo', x, k), (3, 6, 5), X, {'stacked': 1},
  ),
  'experts': (
    lambda k, x: jnp.einsum('ei,eio->eo', x, k), (3, 6, 5), X, {'stacked': 1},
  ),
  'inner while': (
    lambda k, x: jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ k), x),
    (6, 6), X, {},
  ),
  'inner cond': (
    lambda k, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ k, lambda: 2 * (x @ k)),
    (6, 5), X, {},
  ),
  'inner checkpoint': (
    lambda k, x: jax.checkpoint(lambda k, x: jnp.sin(x @ k))(k, x),
    (6, 5), X, {},
  ),
  'convolution': (conv, (3, 2, 4, 5), IMAGE, {}),
  'convolution with strides': (
    functools.partial(conv, strides=(2, 1), padding='VALID'),
    (3, 2, 4, 5), IMAGE, {},
  ),
  'dilated convolution': (
    functools.partial(conv, rhs_dilation=(2, 2)), (3, 2, 4, 5), IMAGE, {},
  ),
  'convolution in groups': (
    functools.partial(conv, feature_group_count=2), (3, 2, 2, 6), IMAGE, {},
  ),
  'transposed convolution': (
    lambda k, x: jax.lax.conv_transpose(
      x, k, (2, 2), 'SAME', dimension_numbers=CONV
    ),
    (3, 2, 4, 5), IMAGE, {},
  ),
  'transposed convolution, stored turned': (
    lambda k, x: jax.lax.conv_transpose(
      x, k, (2, 2), 'SAME', dimension_numbers=CONV, transpose_kernel=True
    ),
    (3, 2, 5, 4), IMAGE, {},
  ),
  'a kernel of another order': (
    lambda k, x: jax.lax.conv_general_dilated(
      x, k, (1, 1), 'SAME', dimension_numbers=('NCHW', 'OIHW', 'NCHW')
    ),
    (5, 6, 3, 2), normal(2, (2, 6, 5, 4)), {'layout': 'oiii'},
  ),
  'rows looked up': (
    lambda k, x: k[jnp.argsort(x, axis=-1)], (6, 5), X, {},
  ),
  'rows taken, some outside': (
    lambda k, x: jnp.nan_to_num(
      jnp.take(k, jnp.array([0, 9, 2]), axis=0, mode='fill')
    ),
    (6, 5), X, {},
  ),
  'columns looked up': (
    lambda k, x: jnp.take(k, jnp.array([[0, 3], [1, 1]]), axis=1), (6, 5), X, {},
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', FACTORED)
def test_it_stays_factored_and_gives_the_dense_result(name):
  use, shape, x, options = FACTORED[name]
  model, params = layer(use, shape, **options)
  both(model, params, x, tolerance=2e-2 if name == 'cast' else 2e-5)
  cast = ' in bfloat16, stored in float32' if name == 'cast' else ''
  assert [f'factored{cast}'] == states(model, params, x)


@jax.custom_jvp
def _custom(k, x):
  return x @ k


@_custom.defjvp
def _custom_jvp(primals, tangents):
  (k, x), (dk, dx) = primals, tangents
  return _custom(k, x), dx @ k + x @ dk


@jax.custom_vjp
def _custom_back(k, x):
  return x @ k


_custom_back.defvjp(
  lambda k, x: (x @ k, (k, x)), lambda kx, g: (kx[1].T @ g, g @ kx[0].T)
)

# name: how the kernel is used, its shape, and what makes it dense.
DENSE = {
  'custom_jvp': (_custom, (6, 5), 'custom_jvp_call'),
  'custom_vjp': (_custom_back, (6, 5), 'custom_vjp_call'),
  'nonlinear': (lambda k, x: x @ jnp.tanh(k), (6, 5), 'tanh'),
  'a product of kernels': (lambda k, x: x @ (k @ k), (6, 6), 'dot_general'),
  'reshaped across': (lambda k, x: k.reshape(-1)[:3] * x[:, 0], (6, 5), 'slice'),
  'a mask': (
    lambda k, x: x @ jnp.where(k > 0, k, 0), (6, 5), 'gt, select_n',
  ),
  'a carry of a scan': (
    lambda k, x: jax.lax.scan(lambda c, v: (c * 1, v @ c), k, x)[1],
    (6, 5), 'scan (carry)',
  ),
  'divided anew': (lambda k, x: x[:, :3] @ k.reshape(3, 10), (6, 5), 'reshape'),
  'a result': (lambda k, x: k * x[0, 0], (6, 5), 'result'),
}  # fmt: skip


@pytest.mark.filterwarnings('ignore::surgery.DenseFallbackWarning')
@pytest.mark.parametrize('name', DENSE)
def test_what_nobody_rewrites_is_dense_and_right(name):
  use, shape, because = DENSE[name]
  model, params = layer(use, shape)
  both(model, params, X)
  assert [f'dense ({because})'] == states(model, params, X)


def test_the_norm_of_a_kernel_stays_factored():
  def use(k, x):
    return x @ (k / jnp.sqrt((k**2).sum(0)))

  model, params = layer(use, (6, 5))
  both(model, params, X)
  assert ['factored'] == states(model, params, X)


def test_names_of_scopes_are_those_of_the_model():
  @jax.named_scope('above')
  def use(kernel, x):
    with jax.named_scope('product'):
      y = x @ kernel
    with jax.named_scope('behind'):
      return jax.lax.map(jax.named_scope('within')(jnp.sin), y)

  model, params = layer(use, (6, 5))

  def names(model):
    loss = lambda params: model(params, X)[0].sum()
    lowered = jax.jit(jax.grad(loss)).lower(params)
    text = lowered.as_text(debug_info=True)
    return set(re.findall(r'"([^"]*\b(?:product|behind|within))\b', text))

  expected = names(model)
  for name in ('jvp(above)/product', 'transpose(jvp(above))/behind', 'within'):
    assert any(found.endswith(name) for found in expected)
  assert expected == names(surgery.factored(model))


def test_a_base_narrower_than_its_factors_gives_what_the_dense_value_does():
  p = {
    'w': normal(0, (6, 5), 'bfloat16'),
    'a': normal(1, (6, 2)),
    'b': normal(2, (2, 5)),
  }

  def model(p, x):
    kernel = surgery.LowRank(p['w'], p['a'], p['b'], 1.5).dense()
    return x @ kernel, kernel

  dense, fast = (jax.jit(f)(p, X) for f in (model, surgery.factored(model)))
  for one, other in zip(dense, fast, strict=True):
    assert jnp.float32 == one.dtype == other.dtype
    close(one, other, 1e-5)


@pytest.mark.parametrize('dtype', ['float8_e4m3fn', 'int4'])
def test_narrow_activations_are_no_matter(dtype):
  def use(k, x):
    return (x @ k).astype(dtype).astype('float32') @ k.T

  model, params = layer(use, (6, 5))
  assert ['factored'] == states(model, params, X)
  dropped, with_dropout = layer(
    use, (6, 5), adapter=surgery.LoRA(rank=2, dropout=0.5)
  )
  y, _ = surgery.factored(dropped)(with_dropout, X)
  assert (3, 6) == y.shape


def test_rows_that_are_filled_stay_filled_where_the_base_is_repeated():
  def rows(w, a, b):
    bank = jax.vmap(lambda s: surgery.LowRank(w, s * a, b).dense())
    return jnp.take(bank(jnp.arange(3.0)), jnp.array([0, 7]), axis=0)

  args = normal(0, (4, 5)), normal(1, (4, 2)), normal(2, (2, 5))
  dense, fast = jax.jit(rows)(*args), jax.jit(surgery.factored(rows))(*args)
  assert np.isnan(dense[1]).all() and np.isnan(fast[1]).all()
  close(dense[0], fast[0])


def test_a_model_that_raises_by_itself_is_not_explained():
  model, params = layer(lambda k, x: x @ k, (6, 5))
  with pytest.raises(TypeError, match='contracting dimensions'):
    surgery.explain(model, params, normal(0, (3, 7)))


# Tenants that have inputs of their own: behind an optimization barrier, XLA's
# compiler for CPU aborts here, which ends the process.
TENANTS = """
import math, jax, jax.numpy as jnp, surgery
model = lambda p, x: x @ surgery.LowRank(p['w'], p['a'], p['b'], 2.0).dense()
n = lambda *shape: jnp.sin(jnp.arange(1.0 * math.prod(shape))).reshape(shape)
def loss(f):
  return lambda q, x: (f({'w': n(6, 5), **q}, x) ** 2).sum()
tenants, xs = {'a': n(2, 6, 2), 'b': n(2, 2, 5)}, n(2, 3, 6)
found = [
  jax.jit(jax.vmap(jax.grad(loss(f))))(tenants, xs)
  for f in (model, surgery.factored(model))
]
for one, other in zip(*map(jax.tree.leaves, found), strict=True):
  assert jnp.allclose(one, other, atol=1e-4), abs(one - other).max()
"""


def test_tenants_with_inputs_of_their_own_are_compiled():
  done = subprocess.run(
    [sys.executable, '-c', TENANTS], capture_output=True, text=True
  )
  assert 0 == done.returncode, done.stderr[-2000:]
