"""What becomes of a small update where a base is stored in few bits.

The oracle is numpy in float64: `x·W + s·(x·A)·B` of what is stored.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import surgery
from tests.factoring.test_transform import IMAGE, conv, layer, states
from tests.live import models
from tests.live.models import bits, normal

NARROW = ('bfloat16', 'float16', 'float8_e4m3fn', 'float8_e5m2')
X = normal(1, (8, 64))
RANK, SCALE = 2, 2.0


def small(use, shape=(64, 48), stored='bfloat16', size=9e-4):
  """Returns a layer and params with an update much smaller than the base."""
  model, params = layer(use, shape, dtype=stored)
  changed = params.unlocked()
  for seed, name in ((2, 'lora_a'), (3, 'lora_b')):
    path = ('net', 'layer', name)
    value = normal(seed, params[path].value.shape)
    value = value * size if name == 'lora_b' else value
    changed[path] = params[path].replace(value=value)
  return model, changed.locked()


def exactly(params):
  """Returns base and factors in float64."""
  get = lambda name: np.asarray(
    params['net', 'layer', name].value.astype('float32'), np.float64
  )
  return get('kernel'), get('lora_a'), get('lora_b')


def lost(update, expected):
  """Returns which share of an update is not there."""
  return np.linalg.norm(update - expected) / np.linalg.norm(expected)


def called(model, params, x=X):
  return np.asarray(jax.jit(lambda p: model(p, x)[0])(params), np.float64)


def wide(k, x):
  """Multiplies in float32, as blox.Linear does with inputs in float32."""
  return x @ k.astype('float32')


def own(k, x):
  """Multiplies in the dtype of the kernel and sums in float32."""
  return jax.lax.dot_general(
    x.astype(k.dtype),
    k,
    (((x.ndim - 1,), (0,)), ((), ())),
    preferred_element_type='float32',
  )


@pytest.mark.parametrize('stored', NARROW)
def test_factors_are_as_wide_as_they_are_stored(stored):
  model, params = small(wide, stored=stored)
  fast = surgery.factored(model)
  w, a, b = exactly(params)
  x = np.asarray(X, np.float64)
  update = called(fast, params) - called(fast, surgery.disable(params))
  assert lost(update, SCALE * (x @ a) @ b) < 1e-4
  np.testing.assert_allclose(x @ w + SCALE * (x @ a) @ b, called(fast, params),
    rtol=1e-4, atol=1e-4)  # fmt: skip
  weights, rest = params.split(models.is_weight)
  loss = lambda w: fast(w.merge(rest), X)[0].sum()
  grads = jax.jit(jax.grad(loss))(weights)
  ones = np.ones((8, 48))
  exact = {
    'lora_a': SCALE * x.T @ ones @ b.T,
    'lora_b': SCALE * a.T @ x.T @ ones,
  }
  for name, wanted in exact.items():
    found = grads['net', 'layer', name].value
    assert jnp.float32 == found.dtype
    assert lost(np.asarray(found, np.float64), wanted) < 1e-5
  state = f'factored in float32, stored in {stored}'
  assert [state] == states(model, params, X)


def test_an_update_that_8_bits_cannot_hold_is_there_all_the_same():
  model, params = small(wide, stored='float8_e4m3fn')
  fill = lambda name: jnp.full_like(params['net', 'layer', name].value, 1.0)
  changed = params.unlocked()
  for name, value in (('lora_a', 1.0), ('lora_b', 9e-4)):
    path = ('net', 'layer', name)
    changed[path] = params[path].replace(value=fill(name) * value)
  params = changed.locked()
  off = surgery.disable(params)
  fast = surgery.factored(model)
  # The smallest number of the dtype is 2^-9, so rounded factors would be zero.
  assert 0 == float(jnp.asarray(9e-4, 'float8_e4m3fn'))
  update = called(fast, params) - called(fast, off)
  expected = np.asarray(X.sum(1), np.float64)[:, None] * SCALE * RANK * 9e-4
  np.testing.assert_allclose(
    update, np.broadcast_to(expected, update.shape), rtol=1e-2, atol=1e-4
  )
  weights, rest = params.split(models.is_weight)
  gradient = jax.grad(lambda w: fast(w.merge(rest), X)[0].sum())(weights)
  exact = SCALE * 48 * 9e-4 * np.asarray(X.sum(0), np.float64)
  np.testing.assert_allclose(
    gradient['net', 'layer', 'lora_a'].value[:, 0], exact, rtol=1e-4
  )


@pytest.mark.parametrize(
  ('stored', 'tolerance'),
  [
    ('bfloat16', 1e-2),
    ('float16', 1e-3),
    # The input is in 8 bits there, so x·A is that of such an x.
    ('float8_e4m3fn', 0.05),
    ('float8_e5m2', 0.1),
  ],
)
def test_a_layer_that_multiplies_in_few_bits_keeps_the_update(
  stored, tolerance
):
  model, params = small(own, stored=stored)
  fast = surgery.factored(model)
  _, a, b = exactly(params)
  update = called(fast, params) - called(fast, surgery.disable(params))
  assert lost(update, SCALE * (np.asarray(X, np.float64) @ a) @ b) < tolerance
  used = 'float32' if '8' in stored else stored
  suffix = f', stored in {stored}' if used != stored else ''
  assert [f'factored in {used}{suffix}'] == states(model, params, X)


@pytest.mark.parametrize('stored', NARROW)
def test_a_call_that_is_not_traced_keeps_the_update_too(stored):
  model, params = small(wide, stored=stored)
  fast = surgery.factored(model)
  eager = np.asarray(fast(params, X)[0], np.float64)
  np.testing.assert_allclose(called(fast, params), eager, rtol=1e-5, atol=1e-4)
  assert not np.allclose(called(model, params), eager, rtol=1e-5, atol=1e-4)


# What the page on `factored` states.


@pytest.mark.parametrize('stored', NARROW)
def test_the_model_by_itself_rounds_the_parameter_as_a_merge_does(stored):
  model, params = small(wide, stored=stored)
  plain = called(model, params)
  assert bits(plain) == bits(called(model, surgery.merge(params)))
  # By at most half a step of each stored number.
  w, a, b = exactly(params)
  whole = np.abs(w + SCALE * a @ b)
  info = ml_dtypes.finfo(stored)
  step = np.maximum(whole * float(info.eps), float(info.smallest_subnormal))
  bound = np.abs(np.asarray(X, np.float64)) @ (step / 2)
  fast = called(surgery.factored(model), params)
  assert (np.abs(plain - fast) <= 1.01 * bound + 1e-4).all()


@pytest.mark.parametrize('stored', ['bfloat16', 'float8_e4m3fn'])
def test_so_a_small_update_is_lost_that_factored_keeps(stored):
  model, params = small(wide, stored=stored)
  off = surgery.disable(params)
  _, a, b = exactly(params)
  expected = SCALE * (np.asarray(X, np.float64) @ a) @ b
  plain = called(model, params) - called(model, off)
  fast = called(surgery.factored(model), params) - called(model, off)
  assert lost(plain, expected) > 0.3
  assert lost(fast, expected) < 1e-4


def test_with_a_wide_base_both_are_the_same():
  model, params = small(wide, stored='float32')
  plain, fast = called(model, params), called(surgery.factored(model), params)
  np.testing.assert_allclose(plain, fast, rtol=1e-5, atol=1e-5)
  half = small(wide)[1]
  wider = surgery.cast(half, 'f32')
  merged = called(model, surgery.merge(wider))
  np.testing.assert_allclose(
    merged, called(surgery.factored(model), half), rtol=1e-4, atol=1e-4
  )


# Other uses than a product.


@pytest.mark.parametrize('stored', ['bfloat16', 'float8_e4m3fn'])
def test_rows_that_are_cast_after_a_look_up_keep_the_update(stored):
  places = jnp.array([[1, 3], [0, 5]])
  look = lambda k, x: k[x].astype('float32') * 2
  model, params = small(look, (6, 5), stored)
  w, a, b = exactly(params)
  fast = surgery.factored(model)
  expected = 2 * (w + SCALE * a @ b)[np.asarray(places)]
  np.testing.assert_allclose(
    called(fast, params, places), expected, rtol=1e-6, atol=1e-6
  )
  stays = f'factored in float32, stored in {stored}'
  assert [stays] == states(model, params, places)
  # Rows that stay in the dtype of the table are rounded to it.
  model, params = small(lambda k, x: k[x], (6, 5), stored)
  y = jax.jit(lambda p: surgery.factored(model)(p, places)[0])(params)
  assert stored == str(y.dtype)


@pytest.mark.parametrize('stored', ['bfloat16', 'float8_e4m3fn'])
@pytest.mark.parametrize('inside', [False, True])
def test_convolutions_keep_the_update(stored, inside):
  if inside:  # In the dtype of the kernel.
    use = lambda k, x: jax.lax.conv_general_dilated(
      x.astype(k.dtype), k, (1, 1), 'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      preferred_element_type='float32',
    )  # fmt: skip
  else:
    use = lambda k, x: conv(k.astype('float32'), x)
  model, params = small(use, (3, 2, 4, 5), stored)
  exact, _ = small(lambda k, x: conv(k, x), (3, 2, 4, 5), 'float32')
  wider = surgery.cast(params, 'f32')
  fast = surgery.factored(model)
  expected = called(exact, wider, IMAGE) - called(
    exact, surgery.disable(wider), IMAGE
  )
  update = called(fast, params, IMAGE) - called(
    fast, surgery.disable(params), IMAGE
  )
  assert lost(update, expected) < (0.1 if inside else 1e-2)


def test_a_scale_that_8_bits_cannot_hold_is_there_all_the_same():
  host = models.host(models.ScaleAside)
  model, plain = layer(wide, (64, 48), dtype='float8_e4m3fn')
  base = surgery.detach(plain)
  params = surgery.attach(base, models.ScaleAside(), to='**', host=host)
  path = ('net', 'layer', 'scale')
  changed = params.unlocked()
  changed[path] = params[path].replace(value=params[path].value * 1.003)
  params = changed.locked()
  fast = called(surgery.factored(model), params)
  np.testing.assert_allclose(
    1.003 * called(model, base), fast, rtol=1e-4, atol=1e-4
  )


def test_a_stack_under_scan_keeps_the_update():
  use = lambda k, x: jax.lax.scan(
    lambda h, w: (h @ w.astype('float32') / 8, None), x, k
  )[0]
  model, params = layer(use, (3, 64, 64), dtype='float8_e4m3fn', stacked=1)
  wider = surgery.cast(params, 'f32')
  np.testing.assert_allclose(
    called(model, wider),
    called(surgery.factored(model), params),
    rtol=1e-3,
    atol=1e-3,
  )


DTYPES = st.sampled_from(['float32', *NARROW])


@given(stored=DTYPES, casts=st.lists(DTYPES, max_size=3))
@settings(max_examples=30, deadline=None)
def test_casts_round_the_base_and_never_the_update(stored, casts):
  def use(k, x):
    for dtype in casts:
      k = k.astype(dtype)
    return x @ k.astype('float32')

  model, params = small(use, (16, 6), stored, 1e-3)
  x = X[:, :16]
  off = surgery.disable(params)
  fast = surgery.factored(model)
  _, a, b = exactly(params)
  update = called(fast, params, x) - called(model, off, x)
  expected = SCALE * (np.asarray(x, np.float64) @ a) @ b
  assert lost(update, expected) < 1e-3
