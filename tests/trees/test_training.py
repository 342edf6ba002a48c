"""The ways in which people train: each moves the adapter and nothing else."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState

import surgery
from tests.trees.cases import CASES, HAIKU, Linen, Normed, X
from tests.trees.test_verbs import arrays, attached, same


def frozen(name: str) -> Any:
  return surgery.freeze(attached(CASES[name]))


@pytest.mark.parametrize('donated', [(), (0,)])
def test_train_state(donated):
  tree = frozen('linen')
  before = arrays(tree.base)
  state = TrainState.create(
    apply_fn=surgery.factored(Linen().apply, strict=True),
    params=jax.tree.map(jnp.copy, tree),
    tx=surgery.optimizer(optax.adam(1e-2), tree),
  )
  assert 9 == len(jax.tree.leaves(state.opt_state))

  def step(state, x):
    loss = lambda params: (state.apply_fn({'params': params}, x) ** 2).mean()
    value, gradients = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=gradients), value

  step = jax.jit(step, donate_argnums=donated)
  losses = []
  for _ in range(4):
    state, loss = step(state, X)
    losses.append(float(loss))
  assert losses == sorted(losses, reverse=True)
  assert all(map(np.array_equal, before, arrays(state.params.base)))


def test_multi_transform_by_labels():
  tree = frozen('linen')
  name = lambda trains: 'train' if trains else 'freeze'
  tx = optax.multi_transform(
    {'train': optax.adam(1e-2), 'freeze': optax.set_to_zero()},
    lambda tree: jax.tree.map(name, surgery.trainable_mask(tree)),
  )
  state = tx.init(tree)
  assert 9 == len(jax.tree.leaves(state))
  fast = surgery.factored(CASES['linen'].call)
  gradients = jax.grad(lambda tree: fast(tree, X).sum())(tree)
  updates, state = tx.update(gradients, state, tree)
  after = optax.apply_updates(tree, updates)
  assert all(map(np.array_equal, arrays(tree.base), arrays(after.base)))
  pairs = zip(arrays(tree.weights), arrays(after.weights), strict=True)
  assert not any(np.array_equal(a, b) for a, b in pairs)


def test_masked_has_state_of_what_trains():
  tx = optax.masked(optax.sgd(1e-2, momentum=0.9), surgery.trainable_mask)
  assert 4 == len(jax.tree.leaves(tx.init(frozen('haiku'))))


def test_partition_and_combine_of_equinox():
  tree = frozen('equinox')
  half, rest = eqx.partition(tree, surgery.trainable_mask(tree))
  fast = surgery.factored(CASES['equinox'].call, strict=True)

  @eqx.filter_jit
  @eqx.filter_value_and_grad
  def loss(half, rest, x):
    return (fast(eqx.combine(half, rest), x) ** 2).mean()

  before, gradients = loss(half, rest, X)
  tx = optax.adam(1e-2)
  state = tx.init(half)
  assert 9 == len(jax.tree.leaves(state))
  updates, state = tx.update(gradients, state)
  half = eqx.apply_updates(half, updates)
  assert loss(half, rest, X)[0] < before
  assert same(
    rest,
    eqx.partition(eqx.combine(half, rest), surgery.trainable_mask(tree))[1],
  )


def test_statistics_of_linen_are_given_back():
  variables = CASES['variables'].make()
  params = surgery.attach(variables['params'], surgery.LoRA(rank=2), to='first')
  apply = surgery.factored(Normed().apply, strict=True)
  given = {'params': params, 'batch_stats': variables['batch_stats']}
  _, changed = jax.jit(lambda v: apply(v, X, mutable=['batch_stats']))(given)
  assert ['batch_stats'] == list(changed)


def test_collections_but_params_do_not_train():
  tree = surgery.attach(
    CASES['variables'].make(), surgery.LoRA(rank=2), to='params/first'
  )
  trains = surgery.trainable_mask(tree)
  assert not any(jax.tree.leaves(trains.base['batch_stats']))
  assert all(jax.tree.leaves(trains.base['params']))


@pytest.mark.parametrize('name', ['linen', 'boxed', 'equinox', 'nnx'])
@pytest.mark.parametrize(
  'copied', [copy.deepcopy, lambda tree: pickle.loads(pickle.dumps(tree))]
)
def test_a_tree_is_copied_and_pickled(name, copied):
  tree = frozen(name)
  if name == 'equinox' and copied is not copy.deepcopy:
    pytest.skip('a lambda of equinox cannot be pickled')
  found = copied(tree)
  assert all(map(np.array_equal, arrays(tree), arrays(found)))
  assert surgery.adapters(tree)[0].sites == surgery.adapters(found)[0].sites
  if name != 'nnx':  # A copy of its modules has another static part.
    assert same(tree, found)


@pytest.mark.parametrize('name', ['linen', 'haiku'])
def test_orbax_keeps_an_adapted_tree(name, tmp_path):
  tree = frozen(name)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'c', tree)
    checkpointer.wait_until_finished()
    empty = jax.tree.map(jnp.zeros_like, tree)
    assert same(tree, checkpointer.restore(tmp_path / 'c', empty))


@pytest.mark.parametrize('name', ['linen', 'haiku', 'plain'])
def test_dropout_wants_the_number_of_the_step(name):
  case = CASES[name]
  lora = surgery.LoRA(rank=2, dropout=0.5)
  tree = surgery.attach(case.make(), lora, to=case.kernels)
  more = lambda w: w + 0.5 if w.dtype == 'float32' else w
  more = jax.tree.map(more, surgery.weights(tree))
  tree = surgery.with_weights(tree, 'default', more)
  fast = surgery.factored(case.call)
  with pytest.raises(surgery.AdapterError, match='dropout_step=step'):
    fast(tree, X)
  one, two = (jax.jit(fast)(tree, X, dropout_step=i) for i in (1, 2))
  assert not np.array_equal(one, two)
  np.testing.assert_array_equal(one, jax.jit(fast)(tree, X, dropout_step=1))
  np.testing.assert_array_equal(
    case.call(surgery.merge(tree), X), fast(tree, X, is_training=False)
  )


def test_types_of_layers_are_asked_of_modules():
  lora = surgery.LoRA(rank=2)
  known = surgery.layers(Linen(), X)
  params = CASES['linen'].make()
  tree = surgery.attach(params, lora, to='type:Dense', layers=known)
  assert 2 == len(surgery.adapters(tree)[0].sites)
  # In variables they lie beneath the collection.
  variables = CASES['variables'].make()
  known = surgery.layers(Normed(), X)
  tree = surgery.attach(variables, lora, to='type:Dense', layers=known)
  assert ('params', 'first', 'kernel') == surgery.adapters(tree)[0].sites[0]
  known = surgery.layers(HAIKU, X)
  made = CASES['haiku'].make()
  tree = surgery.attach(made, lora, to='type:Linear', layers=known)
  assert 2 == len(surgery.adapters(tree)[0].sites)
  alone = eqx.nn.Linear(3, 4, key=jax.random.key(0))
  (info,) = surgery.adapters(surgery.attach(alone, lora, to='type:Linear'))
  assert (('weight',),) == info.sites


def test_the_state_of_our_optimizer_migrates():
  tree = frozen('linen')
  tx = surgery.optimizer(optax.adam(1e-2), tree)
  less = surgery.prune_ranks(tree, {s: [0] for s in surgery.weights(tree)})
  moved = surgery.migrate(tx.init(tree), tree, less)
  tx = surgery.optimizer(optax.adam(1e-2), less)
  assert jax.tree.structure(tx.init(less)) == jax.tree.structure(moved)
  fast = surgery.factored(CASES['linen'].call)
  gradients = jax.grad(lambda tree: fast(tree, X).sum())(less)
  updates, _ = tx.update(gradients, moved, less)
  assert jax.tree.structure(less) == jax.tree.structure(updates)


def test_a_function_may_call_anything_params():
  tree = frozen('linen')
  call = lambda params, model: params['scale'] * CASES['linen'].call(model, X)
  made = surgery.factored(call)({'scale': 2.0}, tree)
  np.testing.assert_allclose(
    2 * np.asarray(CASES['linen'].call(surgery.merge(tree), X)), made, rtol=1e-5
  )


class ScannedBlock(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    return nn.tanh(nn.Dense(8, name='dense')(x)), None


class Scanned(nn.Module):
  length: int
  axis: int

  @nn.compact
  def __call__(self, x):
    block = nn.scan(
      ScannedBlock,
      variable_axes={'params': self.axis},
      split_rngs={'params': True},
      length=self.length,
    )
    return block(name='block')(x)[0]


def scanned(length, axis, **options):
  module = Scanned(length, axis)
  variables = module.init(jax.random.key(0), X)
  known = surgery.layers(module, X)
  tree = surgery.attach(
    variables, surgery.LoRA(rank=2), to='type:Dense', layers=known, **options
  )
  more = jax.tree.map(lambda w: w + 0.1, surgery.weights(tree))
  return module, surgery.with_weights(tree, 'default', more)


@pytest.mark.parametrize(
  ('length', 'options'), [(4, {}), (4, {'stacked': 1}), (8, {'stacked': 1})]
)
def test_layers_that_linen_scans_in_front_are_adapted(length, options):
  module, tree = scanned(length, 0, **options)
  (site,) = surgery.weights(tree).values()
  assert (length, 8, 2) == site['lora_a'].shape
  made = jax.jit(surgery.factored(module.apply, strict=True))(tree, X)
  expected = module.apply(surgery.merge(tree), X)
  np.testing.assert_allclose(expected, made, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('options', [{}, {'stacked': 1}])
def test_layers_that_are_stacked_elsewhere_are_refused(options):
  with pytest.raises(surgery.SiteError, match='another axis than the first'):
    scanned(4, 1, **options)


def test_sizes_that_leave_it_open_are_refused():
  with pytest.raises(surgery.SiteError, match='several axes'):
    scanned(8, 1)
