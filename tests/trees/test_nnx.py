"""What is particular to nnx: modules that are objects and hold state."""

from __future__ import annotations

import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import surgery
from tests.trees.cases import Nnx, X

LORA = surgery.LoRA(rank=2)


def grown(tree: Any) -> Any:
  more = jax.tree.map(lambda w: w + 0.1, surgery.weights(tree))
  return surgery.with_weights(tree, 'default', more)


def adapted() -> Any:
  return grown(surgery.attach(Nnx(nnx.Rngs(0)), LORA, to='type:Linear'))


def call(model: Any, x: Any) -> Any:
  return model(x)


def test_a_training_step_moves_the_adapter_and_writes_state_back():
  model = Nnx(nnx.Rngs(0))
  original = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey)))
  original = jax.tree.map(np.asarray, original)
  tree = surgery.attach(model, LORA, to='type:Linear')
  opt = nnx.Optimizer(tree, optax.adam(1e-2), wrt=nnx.LoRAParam)
  # A count, and two moments of two factors at two sites.
  assert 9 == len(jax.tree.leaves(opt.opt_state))
  fast = surgery.factored(
    lambda model, x: (model(x, train=True) ** 2).mean(), strict=True
  )

  @nnx.jit
  def step(tree, opt, x):
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    loss, gradients = nnx.value_and_grad(fast, argnums=wrt)(tree, x)
    opt.update(tree, gradients)
    return loss

  losses = [float(step(tree, opt, X)) for _ in range(6)]
  assert losses[-1] < losses[0]
  # Statistics and counts of the tree's own model have moved, …
  assert 6 == tree.base.dropout.rngs.count[...]
  assert np.abs(tree.base.norm.mean[...]).sum() > 0
  assert np.array_equal(
    original['first']['kernel'], tree.base.first.kernel[...]
  )
  # … and nothing of the user's.
  after = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey)))
  assert jax.tree.all(jax.tree.map(np.array_equal, original, after))


def test_an_eager_call_writes_state_back():
  tree = adapted()
  surgery.factored(tree)(X, train=True)
  assert 1 == tree.base.dropout.rngs.count[...]


class Sowing(nnx.Module):
  def __init__(self, rngs):
    self.linear = nnx.Linear(8, 4, rngs=rngs)

  def __call__(self, x):
    y = self.linear(x)
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      self.sow(nnx.Intermediate, 'seen', y)
    return y


@pytest.mark.parametrize('jit', [lambda f: f, nnx.jit])
def test_what_a_module_sows_is_in_the_tree(jit):
  tree = grown(surgery.attach(Sowing(nnx.Rngs(0)), LORA, to='linear'))
  y = jit(surgery.factored(call))(tree, X)
  found = nnx.pop(tree.base, nnx.Intermediate)
  np.testing.assert_array_equal(y, found['seen'].get_raw_value()[0])


class Shared(nnx.Module):
  def __init__(self, rngs):
    self.a = nnx.Linear(8, 8, rngs=rngs)
    self.b = nnx.Linear(8, 8, rngs=rngs)
    self.b.kernel = self.a.kernel
    self.again = self.a

  def __call__(self, x):
    return self.again(self.b(self.a(x)))


def test_a_shared_variable_is_adapted_wherever_it_is_used():
  tree = grown(surgery.attach(Shared(nnx.Rngs(0)), LORA, to='a/kernel'))
  merged = surgery.merge(tree)
  assert merged.a.kernel is merged.b.kernel
  expected = merged(X)
  tight = {'rtol': 1e-5, 'atol': 1e-6}
  np.testing.assert_allclose(expected, surgery.factored(tree)(X), **tight)
  jitted = nnx.jit(surgery.factored(call))(tree, X)
  np.testing.assert_allclose(expected, jitted, rtol=1e-4, atol=1e-5)
  half, rest = surgery.freeze(tree).split()
  whole = surgery.factored(half.merge(rest))(X)
  np.testing.assert_allclose(expected, whole, **tight)


def test_a_shared_variable_that_jax_separates_is_refused():
  tree = surgery.attach(Shared(nnx.Rngs(0)), LORA, to='a/kernel')
  with pytest.raises(
    surgery.AdapterError, match=r'have been|were one.*nnx\.jit'
  ):
    jax.jit(surgery.factored(call))(tree, X)


class Block(nnx.Module):
  def __init__(self, rngs):
    self.linear = nnx.Linear(8, 8, rngs=rngs)

  def __call__(self, x):
    return x + jnp.tanh(self.linear(x))


def stack() -> Any:
  make = nnx.vmap(lambda key: Block(nnx.Rngs(key)), in_axes=0, out_axes=0)
  return make(jax.random.split(jax.random.key(0), 5))


def scanned(model: Any, x: Any) -> Any:
  @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
  @nnx.remat
  def run(block, x):
    return block(x)

  return run(model, x)


def test_scanned_and_rematerialised_layers_stay_factored():
  tree = grown(surgery.attach(stack(), LORA, to='type:Linear', stacked=1))
  uses = surgery.explain(scanned, tree, X)
  assert ['factored'] == [use.state for use in uses.values()]
  made = nnx.jit(surgery.factored(scanned, strict=True))(tree, X)
  expected = scanned(surgery.merge(tree), X)
  np.testing.assert_allclose(expected, made, rtol=1e-4, atol=1e-5)


class Writing(nnx.Module):
  def __init__(self, rngs):
    self.linear = nnx.Linear(8, 8, rngs=rngs)

  def __call__(self, x):
    y = self.linear(x)
    self.linear.kernel[...] = self.linear.kernel[...] * 0.5
    return y


@pytest.mark.parametrize(
  'function', [call, nnx.jit(call)], ids=['plain', 'nnx.jit']
)
@pytest.mark.parametrize('jit', [lambda f: f, nnx.jit], ids=['eager', 'jit'])
def test_a_model_that_writes_an_adapted_parameter_is_refused(function, jit):
  tree = grown(surgery.attach(Writing(nnx.Rngs(0)), LORA, to='linear'))
  with pytest.raises(surgery.AdapterError, match='the model writes'):
    jit(surgery.factored(function))(tree, X)


def test_linen_in_nnx_is_adapted():
  wrapped = nnx.bridge.ToNNX(nn.Dense(4), rngs=nnx.Rngs(0))
  model = nnx.bridge.lazy_init(wrapped, X)
  tree = grown(surgery.attach(model, LORA, to='**/kernel'))
  expected = surgery.merge(tree)(X)
  assert not np.array_equal(model(X), expected)
  made = nnx.jit(surgery.factored(call, strict=True))(tree, X)
  np.testing.assert_allclose(expected, made, rtol=1e-5, atol=1e-6)


def test_a_state_is_adapted_and_merged_inside():
  graph, state = nnx.split(Nnx(nnx.Rngs(0)))
  tree = grown(surgery.attach(state, LORA, to='**/kernel'))
  apply = lambda state, x: nnx.merge(graph, state)(x)
  made = jax.jit(surgery.factored(apply, strict=True))(tree, X)
  expected = apply(surgery.merge(tree), X)
  np.testing.assert_allclose(expected, made, rtol=1e-4, atol=1e-5)


def test_dropout_draws_anew_at_each_call():
  model = Nnx(nnx.Rngs(0))
  tree = surgery.attach(model, surgery.LoRA(rank=2, dropout=0.5), to='first')
  more = lambda w: w + 0.5 if w.dtype == 'float32' else w
  more = jax.tree.map(more, surgery.weights(tree))
  tree = surgery.with_weights(tree, 'default', more)
  fast = nnx.jit(surgery.factored(call))
  assert not np.array_equal(fast(tree, X), fast(tree, X))
  first, again = fast(tree, X, dropout_step=3), fast(tree, X, dropout_step=3)
  np.testing.assert_array_equal(first, again)


def test_weights_that_do_not_train_are_no_lora_params():
  tree = surgery.disable(adapted())
  assert 0 == len(jax.tree.leaves(nnx.state(tree, nnx.LoRAParam)))


@pytest.mark.parametrize(
  'misuse',
  [
    lambda tree: tree(X),
    lambda tree: tree.first(X),
    lambda tree: nnx.jit(call)(tree, X),
  ],
)
def test_a_tree_that_is_used_as_the_model_is_an_error(misuse):
  with pytest.raises((TypeError, surgery.AdapterError)):
    misuse(adapted())


@pytest.mark.parametrize(
  ('replace', 'match'),
  [
    (
      lambda m: setattr(m, 'first', nnx.Linear(8, 17, rngs=nnx.Rngs(0))),
      r'shape \(8, 17\) there now',
    ),
    (lambda m: delattr(m.first, 'kernel'), 'not in this tree'),
  ],
)
def test_a_variable_that_was_replaced_by_another_shape_is_named(replace, match):
  tree = adapted()
  replace(tree.base)
  with pytest.raises(surgery.AdapterError, match=match):
    surgery.factored(tree)(X)


def test_a_module_beside_the_adapted_one_is_written_to_as_well():
  tree, rngs = adapted(), nnx.Rngs(7)

  def noisy(model, x, rngs):
    return model(x) + jax.random.normal(rngs.params(), (3, 4))

  fast = surgery.factored(noisy, strict=True)
  first = nnx.jit(fast)(tree, X, rngs)
  assert 1 == rngs.params.count[...]
  assert not np.array_equal(first, fast(tree, X, rngs))
  assert 2 == rngs.params.count[...]
