"""Verbs on optimizer states, which hold params."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import surgery
from tests.live import models

LORA = surgery.LoRA(rank=2)


@pytest.fixture(scope='module')
def net():
  model, base, x = models.mlp()
  params = base
  for name in ('one', 'two'):
    params = surgery.attach(params, LORA, to='**/hidden*', name=name)
  return model, surgery.freeze(models.stirred(params)), x


def _labels(params):
  """Returns what each parameter is called, for `multi_transform`."""
  return type_preserving(
    params, lambda path, param: param.metadata.get('adapter', 'base')
  )


def type_preserving(params, label):
  leaves = {p: label(p, q) for p, q in params.items()}
  paths = sorted(leaves)
  return jax.tree.unflatten(
    jax.tree.structure(params), [leaves[p] for p in paths]
  )


OPTIMIZERS = {
  'adam': lambda params: optax.adam(0.1),
  'chain': lambda params: optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(0.1)
  ),
  'masked': lambda params: optax.masked(
    optax.adam(0.1),
    type_preserving(params, lambda path, param: path[-1].startswith('lora_a')),
  ),
  'multi_transform': lambda params: optax.multi_transform(
    {
      'one': optax.adam(0.1),
      'two': optax.sgd(0.1, momentum=0.9),
      'base': optax.set_to_zero(),
    },
    _labels(params),
  ),
}


@pytest.fixture(scope='module', params=OPTIMIZERS)
def make(request):
  return OPTIMIZERS[request.param]


def _step(net, optimizer, params, state):
  model, _, x = net
  trainable, rest = params.split()
  grads = jax.jit(jax.grad(lambda t: (model(t.merge(rest), x)[0] ** 2).mean()))(
    trainable
  )
  updates, state = optimizer.update(grads, state, trainable)
  return optax.apply_updates(trainable, updates).merge(rest), state


def _off(params, state, make):
  after = surgery.disable(params, 'one')
  tx = make(after.split()[0])
  return after, surgery.migrate(state, params, after, tx=tx)


@pytest.mark.parametrize(
  'verb',
  [
    pytest.param(lambda t, tx: surgery.detach(t, 'one'), id='detach'),
    pytest.param(lambda t, tx: _off(t[0], t[1], tx), id='disable'),
  ],
)
def test_a_state_follows_its_params(net, make, verb):
  _, params, _ = net
  optimizer = make(params.split()[0])
  params, state = _step(
    net, optimizer, params, optimizer.init(params.split()[0])
  )
  params, state = verb((params, state), make)
  # As an optimizer made for what is left.
  optimizer = make(params.split()[0])
  fresh = optimizer.init(params.split()[0])
  assert jax.tree.structure(fresh) == jax.tree.structure(state)
  params, after = _step(net, optimizer, params, state)
  assert jax.tree.structure(state) == jax.tree.structure(after)


def _moved(before, after):
  """Returns whose weights differ."""
  return {
    param.metadata.get('adapter', 'base')
    for path, param in after.items()
    if 'rng' not in path
    and models.bits(before[path].value) != models.bits(param.value)
  }


def test_a_disabled_adapter_neither_trains_nor_decays(net):
  _, params, _ = net
  off = surgery.disable(params, 'one')
  optimizer = optax.adamw(0.1, weight_decay=0.5)
  after, _ = _step(net, optimizer, off, optimizer.init(off.split()[0]))
  assert {'two'} == _moved(off, after)


def test_the_mask_leaves_out_a_disabled_adapter(net):
  _, params, _ = net
  for names in ([], ['one'], ['one', 'two']):
    now = surgery.disable(params, names) if names else params
    mask = surgery.trainable_mask(now)
    trains = {q.metadata['adapter'] for q in mask.values() if q.value is True}
    assert {'one', 'two'} - set(names) == trains
    assert {p for p, q in mask.items() if q.value is True} == set(
      now.split()[0].keys()
    )


def test_flags_come_back_when_an_adapter_is_enabled_again(net):
  _, params, _ = net
  params = surgery.freeze(params, '**/lora_a.one')
  off = surgery.disable(params, 'one')
  assert not [p for p in off.split()[0].keys() if '.one' in p[-1]]
  for half in off.split():
    assert half.records == off.records
  back = surgery.enable(off.split()[0].merge(off.split()[1]), 'one')
  for one, other in zip(params.split(), back.split(), strict=True):
    assert one.keys() == other.keys()
  names = {p[-1] for p in back.split()[0].keys()}
  assert {'lora_b.one', 'lora_a.two', 'lora_b.two'} == names


def test_a_state_that_was_made_before_is_not_used_unnoticed(net):
  _, params, _ = net
  optimizer = optax.adam(0.1)
  state = optimizer.init(params.split()[0])
  with pytest.raises(ValueError, match='structure|Mismatch custom node'):
    _step(net, optimizer, surgery.disable(params, 'one'), state)


def test_moments_of_an_adapter_that_is_enabled_begin_anew(net):
  _, params, _ = net
  optimizer = optax.adam(0.1)
  off = surgery.disable(params, 'one')
  off, state = _step(net, optimizer, off, optimizer.init(off.split()[0]))
  on = surgery.enable(off)
  moved = surgery.migrate(state, off, on)
  assert on.split()[0].keys() == moved[0].mu.keys()
  for path, param in moved[0].mu.items():
    if '.two' in path[-1]:
      assert models.bits(state[0].mu[path].value) == models.bits(param.value)
    else:
      assert not np.asarray(param.value).any()


def test_a_state_keeps_its_moments(net):
  _, params, _ = net
  optimizer = optax.adam(0.1)
  params, state = _step(
    net, optimizer, params, optimizer.init(params.split()[0])
  )
  left = surgery.detach(state, 'one')
  for path, param in left[0].mu.items():
    assert models.bits(state[0].mu[path].value) == models.bits(param.value)
  assert {'two'} == {q.metadata['adapter'] for _, q in left[0].mu.items()}


def test_a_state_comes_back_when_the_adapter_does(net):
  _, params, _ = net
  state = optax.adam(0.1).init(params.split()[0])
  back = surgery.enable(surgery.disable(state, 'one'), 'one')
  assert jax.tree.structure(state) == jax.tree.structure(back)


def test_detaching_all_leaves_a_state_of_the_base(net):
  model, base, _ = models.mlp()
  del model
  _, params, _ = net
  weights = lambda p: p.split(lambda path, q: 'rng' not in path)[0]
  base = weights(surgery.freeze(base))
  state = surgery.detach(optax.adam(0.1).init(weights(params)))
  expected = optax.adam(0.1).init(base)
  assert jax.tree.structure(expected) == jax.tree.structure(state)


def test_a_train_state_of_ones_own_is_followed(net):
  _, params, _ = net
  state = {
    'step': 3,
    'params': params,
    'opt': [optax.adam(0.1).init(params.split()[0])],
  }
  after = surgery.detach(state, 'one')
  assert 3 == after['step']
  assert ['two'] == [i.name for i in surgery.adapters(after['params'])]
  assert ('two',) == after['opt'][0][0].mu.records.names


def test_params_that_lack_the_adapter_are_left_alone(net):
  _, params, _ = net
  other = surgery.detach(params, 'one')
  both = surgery.disable([params, other], 'one')
  assert other is both[1]
  assert not surgery.adapters(both[0])[0].enabled


def test_a_state_without_the_adapter_is_refused(net):
  _, params, _ = net
  state = optax.adam(0.1).init(surgery.detach(params, 'one').split()[0])
  with pytest.raises(surgery.AdapterError, match="'one'"):
    surgery.detach(state, 'one')


def test_a_state_without_any_params_is_refused():
  state = optax.adam(0.1).init({'w': jnp.ones(3)})
  with pytest.raises(surgery.SurgeryError, match='no adapter is attached'):
    surgery.detach(state)


def test_a_state_of_designed_in_weights_alone_is_followed():
  _, params, _ = models.mlp(layer=surgery.LoraLinear, rank=2)
  weights, _ = params.split(models.is_weight)
  state = optax.adam(0.1).init(weights)
  assert 0 == len(surgery.detach(state)[0].mu)
  assert not surgery.adapters(surgery.disable(state)[0].mu)[0].enabled


def test_a_masked_state_of_designed_in_weights_is_followed():
  _, params, _ = models.mlp(layer=surgery.LoraLinear, rank=2)
  mask = type_preserving(params, models.is_weight)
  state = optax.masked(optax.adam(0.1), mask).init(params)
  left = surgery.detach(state)
  assert 4 == len(state.inner_state[0].mu) - len(left.inner_state[0].mu)
