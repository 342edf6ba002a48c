import sys

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from surgery_lora_family import BiasLoRA, DoRA, lora_plus, lora_plus_labels

import surgery

SHAPES = {
  ('net', 'h0', 'kernel'): (4, 3),
  ('net', 'h0', 'bias'): (3,),
  ('net', 'h1', 'kernel'): (4, 3),
  ('net', 'blocks', 'kernel'): (2, 4, 3),
}


def network():
  draw = np.random.default_rng(0)
  params = bx.Params()
  for path, shape in SHAPES.items():
    params[path] = bx.Param(jnp.asarray(draw.normal(size=shape), 'float32'))
  params = params.locked()
  lora = surgery.LoRA(rank=2)
  params = surgery.attach(params, lora, to='**/h0')
  params = surgery.attach(params, lora, to='**/h1', name='style')
  params = surgery.attach(params, lora, to='**/blocks', name='deep', stacked=1)
  params = surgery.unfreeze(surgery.freeze(params), '**/h0/bias')
  moved, rest = params.split(lambda path, p: path[-1].startswith('lora_b'))
  return jax.tree.map(lambda b: b + 0.5, moved).merge(rest)


def loss(half, rest):
  # Its gradient for a kernel or bias is SLOPES, whatever that is.
  merged = surgery.merge(half.merge(rest))
  return sum(jnp.sum(SLOPES[p] * one.value) for p, one in merged.items())


SLOPES = {
  path: np.random.default_rng(k).normal(size=shape).astype(np.float32)
  for k, (path, shape) in enumerate(SHAPES.items())
}


def by_hand(params, rate, ratio):
  """Returns what a step of gradient descent makes of what trains."""
  stepped = {}
  for path, suffix in (
    (('net', 'h0', 'kernel'), ''),
    (('net', 'h1', 'kernel'), '.style'),
    (('net', 'blocks', 'kernel'), '.deep'),
  ):
    one, two = ((*path[:-1], n + suffix) for n in ('lora_a', 'lora_b'))
    a, b = params[one], params[two]
    scale = 2.0  # Twice the rank, by the rank.
    stepped[one] = a - rate * scale * SLOPES[path] @ b.swapaxes(-1, -2)
    stepped[two] = b - ratio * rate * scale * a.swapaxes(-1, -2) @ SLOPES[path]
  bias = ('net', 'h0', 'bias')
  stepped[bias] = params[bias] - rate * SLOPES[bias]
  return stepped


@pytest.mark.parametrize('of', ['a half', 'all'])
def test_two_steps_are_those_by_hand(of):
  params = network()
  half, rest = params.split()
  optimizer = lora_plus(optax.sgd, 0.01, ratio=4.0)
  state = optimizer.init(half if of == 'a half' else params)

  @jax.jit
  def step(half, rest, state):
    gradients = jax.grad(loss)(half, rest)
    if of == 'a half':
      updates, state = optimizer.update(gradients, state, half)
      return optax.apply_updates(half, updates), rest, state
    # What is frozen stays, whatever its gradient.
    whole = half.merge(rest)
    gradients = gradients.merge(jax.tree.map(jnp.ones_like, rest))
    updates, state = optimizer.update(gradients, state, whole)
    return *optax.apply_updates(whole, updates).split(), state

  expected = {p: np.asarray(one.value) for p, one in half.items()}
  for _ in range(2):
    half, rest, state = step(half, rest, state)
    expected = by_hand(expected, 0.01, 4.0)
  assert expected.keys() == set(half.keys())
  for path, value in expected.items():
    np.testing.assert_allclose(value, half[path].value, rtol=1e-5, atol=1e-6)
  for path, one in rest.items():
    assert jnp.array_equal(one.value, params[path].value)


def test_a_schedule_is_the_schedule_of_both():
  half, rest = network().split()
  rates = [0.01, 0.001]
  optimizer = lora_plus(optax.sgd, lambda count: jnp.asarray(rates)[count])
  state = optimizer.init(half)
  for rate in rates:
    before = {p: np.asarray(one.value) for p, one in half.items()}
    updates, state = optimizer.update(jax.grad(loss)(half, rest), state, half)
    half = optax.apply_updates(half, updates)
    for path, value in by_hand(before, rate, 16.0).items():
      np.testing.assert_allclose(value, half[path].value, rtol=1e-5, atol=1e-6)


def test_labels_say_what_each_parameter_is():
  labels = lora_plus_labels(network())
  assert {
    ('net', 'h0', 'kernel'): 'frozen',
    ('net', 'h0', 'bias'): 'other',
    ('net', 'h0', 'lora_a'): 'a',
    ('net', 'h0', 'lora_b'): 'b',
    ('net', 'h1', 'kernel'): 'frozen',
    ('net', 'h1', 'lora_a.style'): 'a',
    ('net', 'h1', 'lora_b.style'): 'b',
    ('net', 'blocks', 'kernel'): 'frozen',
    ('net', 'blocks', 'lora_a.deep'): 'a',
    ('net', 'blocks', 'lora_b.deep'): 'b',
  } == {path: one.value for path, one in labels.items()}


def test_labels_have_the_structure_of_what_is_labelled():
  params = network()
  for tree in (params, *params.split(), {'net': params, 'step': jnp.zeros(())}):
    labels = lora_plus_labels(tree)
    assert jax.tree.structure(tree) == jax.tree.structure(labels)
  assert 'other' == labels['step']
  loose = params.unlocked()
  assert not lora_plus_labels(loose).is_locked


def test_relatives_and_designed_layers_have_labels_too():
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  made = surgery.LoraLinear(graph.child('h0'), 3, rng, rank=2)
  _, params = made(rng.seed(bx.Params(), seed=0), jnp.ones((1, 4)))
  params['net', 'h1', 'kernel'] = bx.Param(jnp.ones((4, 3)))
  params['net', 'h1', 'bias'] = bx.Param(jnp.ones(3))
  # A parameter of a model that is called as LoRA's are is none of these.
  params['net', 'mine', 'lora_b'] = bx.Param(jnp.ones(3))
  params = params.locked()
  params = surgery.attach(params, DoRA(rank=2), to='**/h1', name='dora')
  params = surgery.attach(params, BiasLoRA(rank=2), to='**/h1', name='bias')
  labels = {
    '/'.join(path[1:]): one.value
    for path, one in lora_plus_labels(params).items()
  }
  assert 'a' == labels['h0/lora_a'] == labels['h1/lora_a.dora']
  assert 'b' == labels['h0/lora_b'] == labels['h1/lora_b.dora']
  assert 'b' == labels['h1/lora_bias.bias']
  assert 'other' == labels['h1/magnitude.dora'] == labels['mine/lora_b']


def test_without_a_b_that_trains_nothing_begins():
  optimizer = lora_plus(optax.sgd, 0.1)
  with pytest.raises(
    surgery.AdapterError,
    match=r"expected a trainable weight lora_b .* found only {'frozen': 3}",
  ):
    optimizer.init(network().split()[1])


@pytest.mark.parametrize('ratio', [0.5, float('inf'), float('nan')])
def test_a_ratio_is_a_number_of_at_least_one(ratio):
  with pytest.raises(surgery.ConfigError, match=f'at least 1.* found {ratio}'):
    lora_plus(optax.sgd, 0.1, ratio=ratio)


def test_without_optax_it_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'optax', None)
  with pytest.raises(ImportError, match=r"'surgery-lora-family\[optax\]'"):
    lora_plus(lambda rate: rate, 0.1)
