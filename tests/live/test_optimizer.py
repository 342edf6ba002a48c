"""An optimizer that moves what trains and nothing else."""

import subprocess
import sys

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import surgery
from tests.live.models import assert_equal_params, bits, mlp, stirred

LORA = surgery.LoRA(rank=2)
OPTIMIZERS = {
  'adamw': optax.adamw(0.1, weight_decay=0.3),
  'chain': optax.chain(
    optax.clip_by_global_norm(0.5),
    optax.add_decayed_weights(0.2),
    optax.sgd(0.1, momentum=0.9),
  ),
  'hyperparams': optax.inject_hyperparams(optax.adamw)(learning_rate=0.1),
  'steps': optax.MultiSteps(optax.adamw(0.1), 2),
  'schedule': optax.adamw(optax.cosine_decay_schedule(0.1, 10)),
  'labels': optax.multi_transform(
    {'a': optax.adamw(0.1), 'rest': optax.sgd(0.2, momentum=0.9)},
    lambda params: params_map(
      lambda path: 'a' if path[-1] == 'lora_a' else 'rest', params
    ),
  ),
  'finite': optax.apply_if_finite(optax.adamw(0.1), 3),
  'frugal': optax.adafactor(0.1, min_dim_size_to_factor=2),
}


def params_map(change, params):
  """Returns params with what is said of each path for values."""
  result = params.unlocked()
  for path, param in params.items():
    result[path] = param.replace(value=change(path))
  return result.locked() if params.is_locked else result


def frozen(seed=0):
  """Returns a model, its params without an Rng, and inputs."""
  model, base, x = mlp()
  base = base.split(lambda path, _: 'rng' not in path)[0]
  params = stirred(surgery.attach(base, LORA, to='**/hidden*'), seed)
  return model, surgery.freeze(params), x


def gradients(model, params, x, wrong=jnp.nan):
  """Returns gradients of all params, of which those of frozen ones are NaN."""
  found = jax.grad(lambda p: (model(p, x)[0] ** 2).sum())(params)
  return params_map(
    lambda path: (
      found[path].value
      if params[path].trainable
      else jnp.full_like(found[path].value, wrong)
    ),
    found,
  )


@pytest.mark.parametrize(
  ('kind', 'compiled'),
  [('adamw', False), *((kind, True) for kind in OPTIMIZERS)],
)
def test_all_params_train_as_their_half_does_alone(kind, compiled):
  model, params, x = frozen()
  inner = OPTIMIZERS[kind]
  tx = surgery.optimizer(inner, params)
  half, rest = params.split()
  state, expected_state = tx.init(params), inner.init(half)
  update = jax.jit(tx.update) if compiled else tx.update
  alone = jax.jit(inner.update) if compiled else inner.update
  now = params
  for _ in range(4):
    grads = gradients(model, now, x)
    updates, state = update(grads, state, now)
    assert jax.tree.structure(now) == jax.tree.structure(updates)
    now = optax.apply_updates(now, updates)
    moved, expected_state = alone(grads.split()[0], expected_state, half)
    half = optax.apply_updates(half, moved)
  assert_equal_params(half.merge(rest), now)
  same = jax.tree.map(np.array_equal, expected_state, state)
  assert all(jax.tree.leaves(same))
  assert not np.array_equal(
    params['net', 'mlp', 'hidden0', 'lora_a'].value,
    now['net', 'mlp', 'hidden0', 'lora_a'].value,
  )


@pytest.mark.parametrize('kind', ['adamw', 'chain', 'labels'])
def test_halves_that_split_made_train_alike(kind):
  model, params, x = frozen()
  tx = surgery.optimizer(OPTIMIZERS[kind], params)
  half = params.split()[0]
  state = tx.init(half)
  assert_alike(tx.init(params), state)
  grads = gradients(model, params, x)
  updates, _ = tx.update(grads, state, params)
  moved, _ = tx.update(grads.split()[0], state, half)
  assert_equal_params(updates.split()[0], moved)


def assert_alike(expected, actual):
  assert jax.tree.structure(expected) == jax.tree.structure(actual)
  for a, b in zip(
    jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True
  ):
    assert bits(np.asarray(a)) == bits(np.asarray(b))


def test_an_optimizer_that_was_made_for_the_half_takes_all_params():
  model, params, x = frozen()
  tx = surgery.optimizer(optax.adamw(0.1), params.split()[0])
  state = tx.init(params)
  updates, _ = tx.update(gradients(model, params, x), state, params)
  assert sorted(params.keys()) == sorted(updates.keys())


def test_frozen_weights_keep_each_bit_also_the_sign_of_zero():
  params = bx.Params()
  values = jnp.array([-0.0, 0.0, 1.0, jnp.inf, -jnp.inf], 'float32')
  for dtype in ('float32', 'bfloat16', 'float16', 'float8_e4m3fn', 'complex64'):
    own = values[:3] if '8' in dtype else values
    params['net', dtype] = bx.Param(own.astype(dtype), False)
  params['net', 'count'] = bx.Param(jnp.array([3], 'uint32'), False)
  params['net', 'flag'] = bx.Param(jnp.array([True]), False)
  params['net', 'trains'] = bx.Param(jnp.ones(2))
  params = params.locked()
  tx = surgery.optimizer(optax.adamw(0.1), params)
  grads = jax.tree.map(jnp.ones_like, params)
  for update in (tx.update, jax.jit(tx.update)):
    updates, _ = update(grads, tx.init(params), params)
    for path, param in optax.apply_updates(params, updates).items():
      same = bits(params[path].value) == bits(param.value)
      assert same is (path[-1] != 'trains'), path


def test_a_state_has_nothing_of_what_is_frozen():
  _, params, _ = frozen()
  state = surgery.optimizer(optax.adam(0.1), params).init(params)
  expected = {path for path, param in params.items() if param.trainable}
  assert expected == set(state[0].mu.keys()) == set(state[0].nu.keys())


def test_frozen_gradients_do_not_count_in_a_global_norm():
  _, params, _ = frozen()
  tx = surgery.optimizer(optax.clip_by_global_norm(1.0), params)
  ones = jax.tree.map(jnp.ones_like, params)
  huge = params_map(
    lambda path: ones[path].value * (1 if params[path].trainable else 1e6),
    ones,
  )
  updates, _ = tx.update(huge, tx.init(params), params)
  squares = [float((v**2).sum()) for v in jax.tree.leaves(updates)]
  assert np.isclose(1.0, sum(squares))


def test_disabled_adapters_get_no_update_no_decay_and_no_state():
  model, params, x = frozen()
  two = surgery.attach(params, LORA, to='**/hidden*', name='two')
  two = surgery.disable(stirred(two), 'default')
  tx = surgery.optimizer(optax.adamw(0.1, weight_decay=0.5), two)
  state = tx.init(two)
  assert all(path[-1].endswith('.two') for path in state[0].mu.keys())
  updates, _ = tx.update(gradients(model, two, x), state, two)
  after = optax.apply_updates(two, updates)
  for path, param in two.items():
    same = bits(param.value) == bits(after[path].value)
    assert same is not path[-1].endswith('.two'), path


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      lambda p: surgery.unfreeze(p, '**/hidden0/kernel'),
      'net/mlp/hidden0/kernel did not train and does now',
    ),
    (
      lambda p: surgery.freeze(p, '**/hidden0/lora_a'),
      'net/mlp/hidden0/lora_a trained and is frozen or disabled',
    ),
    (surgery.disable, 'lora_b trained and are frozen or disabled'),
    (surgery.detach, 'trained when the optimizer was made and are not in'),
    (
      lambda p: surgery.attach(p, LORA, to='**', name='two'),
      'lora_a.two did not train|did not train and do now',
    ),
  ],
)
def test_params_of_which_other_weights_train_are_refused(change, message):
  model, params, x = frozen()
  tx = surgery.optimizer(optax.adamw(0.1), params)
  state = tx.init(params)
  after = change(params)
  with pytest.raises(surgery.AdapterError, match=message):
    tx.init(after)
  grads = jax.grad(lambda p: (model(p, x)[0] ** 2).sum())
  with pytest.raises(surgery.AdapterError, match=message):
    jax.jit(tx.update)(grads(after), state, after)
  with pytest.raises(surgery.AdapterError, match=message):
    tx.update(grads(params), state, after)


@pytest.mark.parametrize(
  'change',
  [
    lambda p: surgery.unfreeze(p, '**/hidden0/kernel'),
    lambda p: surgery.freeze(p, '**/hidden0/lora_a'),
    lambda p: surgery.disable(p, 'two'),
    lambda p: surgery.detach(p, 'two'),
    lambda p: surgery.rename(p, 'net/mlp/hidden0 -> net/mlp/first'),
    lambda p: surgery.attach(p, LORA, to='**', name='three'),
  ],
)
def test_migrate_brings_the_state_along(change):
  _, params, _ = frozen()
  params = surgery.attach(params, LORA, to='**/hidden*', name='two')
  inner = optax.adamw(0.1)
  tx = surgery.optimizer(inner, params)
  ones = jax.tree.map(jnp.ones_like, params)
  _, state = tx.update(ones, tx.init(params), params)
  after = change(params)
  later = surgery.optimizer(inner, after)
  moved = surgery.migrate(state, params, after, tx=later)
  fresh = later.init(after)
  assert jax.tree.structure(fresh) == jax.tree.structure(moved)
  kept = {p for p in moved[0].mu.keys() if moved[0].mu[p].value.any()}
  expected = len(set(fresh[0].mu.keys()) & set(state[0].mu.keys()))
  assert expected <= len(kept) <= len(state[0].mu.keys())
  later.update(jax.tree.map(jnp.ones_like, after), moved, after)


def test_a_state_without_a_disabled_adapter_is_migrated():
  _, params, _ = frozen()
  params = surgery.attach(params, LORA, to='**/hidden*', name='two')
  off = surgery.disable(params, 'two')
  tx = surgery.optimizer(optax.adam(0.1), off)
  after = surgery.rename(off, 'net/mlp/hidden0 -> net/mlp/first')
  moved = surgery.migrate(tx.init(off), off, after)
  later = surgery.optimizer(optax.adam(0.1), after)
  assert_alike(later.init(after), moved)


def test_verbs_keep_the_state_in_step():
  _, params, _ = frozen()
  params = surgery.attach(params, LORA, to='**/hidden*', name='two')
  state = surgery.optimizer(optax.adam(0.1), params).init(params)
  after = surgery.detach(params, 'two')
  expected = surgery.optimizer(optax.adam(0.1), after).init(after)
  assert_alike(expected, surgery.detach(state, 'two'))


def test_integers_and_keys_of_a_model_stay():
  model, base, x = mlp()
  params = surgery.freeze(surgery.attach(base, LORA, to='**/hidden*'))
  tx = surgery.optimizer(optax.adamw(0.1), params)
  loss = lambda p: (model(p, x)[0] ** 2).sum()
  grads = jax.grad(loss, allow_int=True)(params)
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  counter = updates['net', 'rng', 'counter'].value
  assert ('uint32', 0) == (str(counter.dtype), int(counter))
  half = optax.apply_updates(params.split()[0], updates.split()[0])
  assert sorted(params.split()[0].keys()) == sorted(half.keys())


def test_other_arrays_beside_params_train():
  _, params, _ = frozen()
  tree = {'net': params, 'temperature': jnp.ones(())}
  tx = surgery.optimizer(optax.sgd(0.5), tree)
  grads = jax.tree.map(jnp.ones_like, tree)
  updates, _ = tx.update(grads, tx.init(tree), tree)
  assert -0.5 == float(updates['temperature'])
  for path, param in params.items():
    expected = -0.5 if param.trainable else 0.0
    assert (updates['net'][path].value == expected).all()
  with pytest.raises(surgery.SurgeryError, match='pytree with 1 bx.Params'):
    tx.update({'temperature': jnp.ones(())}, tx.init(tree))


def test_a_linesearch_gets_functions_of_the_half():
  model, params, x = frozen()
  loss = lambda p: (model(p, x)[0] ** 2).sum()
  tx = surgery.optimizer(optax.lbfgs(), params)
  state, now = tx.init(params), params
  for _ in range(3):
    value, grads = jax.value_and_grad(loss)(now)
    updates, state = tx.update(
      grads, state, now, value=value, grad=grads, value_fn=loss
    )
    now = optax.apply_updates(now, updates)
  assert loss(now) < 0.5 * loss(params)
  assert_equal_params(params.split()[1], now.split()[1])


def test_it_is_a_part_of_other_optimizers():
  model, params, x = frozen()
  tx = optax.MultiSteps(surgery.optimizer(optax.adamw(0.1), params), 2)
  state, now = tx.init(params), params
  update = jax.jit(tx.update)
  for _ in range(2):
    updates, state = update(gradients(model, now, x, 0.0), state, now)
    now = optax.apply_updates(now, updates)
  assert_equal_params(params.split()[1], now.split()[1])


def test_labels_for_all_params_are_told_apart():
  _, params, _ = frozen()
  labels = params_map(lambda _: 'all', params)
  tx = surgery.optimizer(
    optax.multi_transform({'all': optax.adam(0.1)}, labels), params
  )
  with pytest.raises(ValueError) as info:
    tx.init(params)
  assert 'params.split()[0]' in info.value.__notes__[0]


def test_what_is_no_optimizer_or_trains_nothing_is_refused():
  _, params, _ = frozen()
  with pytest.raises(surgery.SurgeryError, match='found AdaptedParams and'):
    surgery.optimizer(params, optax.adam(0.1))
  plain = surgery.freeze(params, '**')
  for nothing in (plain, surgery.disable(params)):
    with pytest.raises(surgery.SurgeryError, match='nothing trains'):
      surgery.optimizer(optax.adam(0.1), nothing)


def test_optax_is_needed_only_when_it_is_called():
  code = (
    'import sys; sys.modules["optax"] = None\n'
    'import surgery, blox as bx\n'
    'try: surgery.optimizer(None, bx.Params())\n'
    'except surgery.SurgeryError as error: print(error)\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True
  )
  assert 'pip install optax' in done.stdout, done.stderr


def test_gradients_of_frozen_weights_that_are_large_change_nothing():
  model, params, x = frozen()
  tx = surgery.optimizer(optax.adamw(0.1), params)
  state = tx.init(params)
  some = [
    tx.update(gradients(model, params, x, wrong), state, params)[0]
    for wrong in (0.0, 1e30, jnp.inf, jnp.nan)
  ]
  for other in some[1:]:
    assert_equal_params(some[0], other)
