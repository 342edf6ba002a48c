"""Roles of axes are known for layers of every framework."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import surgery

RANK = 2
X = jax.random.normal(jax.random.key(0), (3, 5, 8))
IMAGE = jax.random.normal(jax.random.key(1), (1, 4, 4, 3))
LSTM = (jnp.zeros((3, 4)), jnp.zeros((3, 4)))


def sides(*shapes):
  """Returns the numbers of inputs and outputs, layer by layer, sorted."""
  return sorted(shapes)


LINEN = {
  'dense-general': (nn.DenseGeneral((4, 2)), (X,), [(8, 8)]),
  'two-axes': (nn.DenseGeneral(6, axis=(-2, -1)), (X,), [(40, 6)]),
  'attention': (
    nn.MultiHeadDotProductAttention(num_heads=4),
    (X,),
    [(8, 8)] * 4,
  ),
  'einsum': (nn.Einsum((8, 4, 2), '...d,dhk->...hk'), (X,), [(8, 8)]),
  'transposed': (nn.ConvTranspose(5, (2, 2)), (IMAGE,), [(12, 5)]),
  'turned': (
    nn.ConvTranspose(5, (2, 2), transpose_kernel=True),
    (jnp.ones((1, 4, 4, 3)),),
    [(12, 5)],
  ),
  'lstm': (nn.LSTMCell(4), (LSTM, X[:, 0]), [(8, 4)] * 4 + [(4, 4)] * 4),
}


def counted(tree):
  """Returns the numbers of inputs and outputs of all sites, by weights."""
  size = lambda spec: int(np.prod(spec.shape)) // RANK
  return sorted(
    (size(one.weights['lora_a']), size(one.weights['lora_b']))
    for record in tree.records.adapters
    for one in record.sites.values()
  )


def moved(tree):
  """Returns a tree whose adapter does something."""
  return jax.tree.map(lambda one: one + 0.1, tree)


LORA = surgery.LoRA(rank=RANK)


@pytest.mark.parametrize('name', LINEN)
def test_linen(name):
  module, inputs, expected = LINEN[name]
  params = module.init(jax.random.key(2), *inputs)['params']
  known = surgery.layers(module, *inputs)
  to = '**/kernel' if name not in ('attention', 'lstm') else '*/kernel'
  tree = surgery.attach(params, LORA, to=to, layers=known)
  assert sides(*expected) == counted(tree)
  tree = moved(tree)
  actual = surgery.factored(module.apply)({'params': tree}, *inputs)
  merged = module.apply({'params': surgery.merge(tree)}, *inputs)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    merged,
    actual,
  )


NNX = {
  'linear-general': (
    lambda rngs: nnx.LinearGeneral((5, 8), (3, 2), axis=(-2, -1), rngs=rngs),
    (X,),
    [(40, 6)],
  ),
  'attention': (
    lambda rngs: nnx.MultiHeadAttention(4, 8, decode=False, rngs=rngs),
    (X,),
    [(8, 8)] * 4,
  ),
  'einsum': (
    lambda rngs: nnx.Einsum('...d,dhk->...hk', (8, 4, 2), rngs=rngs),
    (X,),
    [(8, 8)],
  ),
  'transposed': (
    lambda rngs: nnx.ConvTranspose(3, 5, (2, 2), rngs=rngs),
    (IMAGE,),
    [(12, 5)],
  ),
}


@pytest.mark.parametrize('name', NNX)
def test_nnx(name):
  make, inputs, expected = NNX[name]
  tree = surgery.attach(make(nnx.Rngs(0)), LORA, to='**/kernel')
  assert sides(*expected) == counted(tree)
  tree = moved(tree)
  actual = surgery.factored(tree)(*inputs)
  np.testing.assert_allclose(
    surgery.merge(tree)(*inputs), actual, rtol=1e-4, atol=1e-5
  )


EQUINOX = {
  'attention': (
    lambda key: eqx.nn.MultiheadAttention(2, 8, key=key),
    (X[0], X[0], X[0]),
    [(8, 8)] * 4,
  ),
  'transposed': (
    lambda key: eqx.nn.ConvTranspose2d(3, 5, 2, key=key),
    (jnp.moveaxis(IMAGE[0], -1, 0),),
    [(12, 5)],
  ),
  'lstm': (
    lambda key: eqx.nn.LSTMCell(8, 4, key=key),
    (X[0, 0], (jnp.zeros(4), jnp.zeros(4))),
    [(8, 16), (4, 16)],
  ),
}


@pytest.mark.parametrize('name', EQUINOX)
def test_equinox(name):
  make, inputs, expected = EQUINOX[name]
  model = make(jax.random.key(0))
  # Weights by name: an equinox layer calls both of a cell its own.
  wanted = ['**/weight', '**/weight_ih', '**/weight_hh']
  names = [w for w in wanted if has(model, w.rpartition('/')[2])]
  tree = surgery.attach(model, LORA, to=names)
  if name != 'lstm':  # A cell's matrices have weights of one layer.
    assert sides(*expected) == counted(tree)
  tree = moved(tree)
  actual = surgery.factored(tree)(*inputs)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    surgery.merge(tree)(*inputs),
    actual,
  )


def has(model, name):
  leaves = jax.tree_util.tree_flatten_with_path(model)[0]
  return any(getattr(path[-1], 'name', '') == name for path, _ in leaves)


HAIKU = {
  'attention': (
    lambda x: hk.MultiHeadAttention(
      2, 4, w_init=hk.initializers.RandomNormal()
    )(x, x, x),
    (X,),
    [(8, 8)] * 4,
  ),
  'transposed': (lambda x: hk.Conv2DTranspose(5, 2)(x), (IMAGE,), [(12, 5)]),
}


@pytest.mark.parametrize('name', HAIKU)
def test_haiku(name):
  function, inputs, expected = HAIKU[name]
  net = hk.transform(function)
  params = net.init(jax.random.key(0), *inputs)
  known = surgery.layers(net, *inputs)
  tree = surgery.attach(params, LORA, to='**/w', layers=known)
  assert sides(*expected) == counted(tree)
  tree = moved(tree)
  actual = surgery.factored(net.apply)(tree, None, *inputs)
  merged = net.apply(surgery.merge(tree), None, *inputs)
  np.testing.assert_allclose(merged, actual, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  'equation',
  [None, 'bd,bdh->bh', '...d,...h->h', 'no arrow', 'd,de'],
)
def test_what_an_einsum_does_not_tell_is_not_guessed(equation):
  from surgery.trees.layers import einsum

  assert {} == einsum(equation)


def test_batched_kernels_are_not_guessed():
  module = nn.DenseGeneral(6, batch_dims=(0,), axis=-1)
  known = surgery.layers(module, X)
  assert {} == dict(known[()].layouts)
