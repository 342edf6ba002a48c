import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from surgery_lora_family import OLoRA, PiSSA

import surgery


def network():
  params = bx.Params()
  for k, shape in enumerate(((8, 6), (6, 10))):
    value = jax.random.normal(jax.random.key(k), shape)
    params['net', f'h{k}', 'kernel'] = bx.Param(value)
  return params.locked()


def weight(params, name, layer='h0'):
  return np.asarray(params['net', layer, name].value)


def test_pissa_begins_with_the_largest_singular_values():
  params = surgery.attach(network(), PiSSA(rank=3), to='**')
  for layer in ('h0', 'h1'):
    w = weight(params, 'kernel', layer)
    u, s, v = np.linalg.svd(w)
    best = (u[:, :3] * s[:3]) @ v[:3]
    a, b = weight(params, 'lora_a', layer), weight(params, 'lora_b', layer)
    np.testing.assert_allclose(best, a @ b, atol=1e-5)
    # Both factors have their share.
    np.testing.assert_allclose(a.T @ a, b @ b.T, atol=1e-4)


def test_olora_begins_with_orthonormal_columns():
  params = surgery.attach(network(), OLoRA(rank=3), to='**')
  a, b = weight(params, 'lora_a'), weight(params, 'lora_b')
  np.testing.assert_allclose(np.eye(3), a.T @ a, atol=1e-5)
  q, r = np.linalg.qr(weight(params, 'kernel'))
  np.testing.assert_allclose(q[:, :3] @ r[:3], a @ b, atol=1e-5)


@pytest.mark.parametrize('adapter', [PiSSA(rank=2), OLoRA(rank=2)])
def test_the_base_is_never_touched(adapter):
  before = network()
  params = surgery.attach(before, adapter, to='**')
  for path, param in before.items():
    assert param.value is params[path].value
  again = surgery.detach(params)
  assert all(
    np.array_equal(param.value, again[path].value)
    for path, param in before.items()
  )
  frozen = surgery.freeze(params)
  trains = {path[-1] for path, p in frozen.items() if p.trainable}
  assert {'lora_a', 'lora_b'} == trains


@pytest.mark.parametrize('cls', [PiSSA, OLoRA])
def test_what_trained_is_what_changed(cls):
  params = surgery.attach(network(), cls(rank=2), to='**/h0')
  a0, b0 = weight(params, 'lora_a0'), weight(params, 'lora_b0')
  moved, rest = params.split(lambda path, p: path[-1] == 'lora_a')
  moved = jax.tree.map(lambda w: w + 1.0, moved)
  merged = surgery.merge(moved.merge(rest))
  expected = weight(network(), 'kernel') + (a0 + 1) @ b0 - a0 @ b0
  np.testing.assert_allclose(
    expected, merged['net', 'h0', 'kernel'].value, atol=1e-5
  )
  with pytest.raises(surgery.SiteError, match='rank 7 exceeds the smaller'):
    surgery.attach(network(), cls(rank=7), to='**')
  assert jnp.float32 == moved['net', 'h0', 'lora_a'].value.dtype


@pytest.mark.parametrize('adapter', [PiSSA(rank=3), OLoRA(rank=3)])
def test_pruned_ranks_take_their_own_change_along(adapter):
  params = bx.Params()
  kernel = np.random.default_rng(0).normal(size=(6, 5)).astype('float32')
  params['net', 'h', 'kernel'] = bx.Param(jnp.asarray(kernel))
  params = surgery.attach(params.locked(), adapter, to='**')
  [[path, w]] = surgery.weights(params).items()
  moved = {'lora_a': w['lora_a'] + 0.5, 'lora_b': w['lora_b'] - 0.25}
  params = surgery.with_weights(params, 'default', {path: moved})
  found = surgery.merge(surgery.prune_ranks(params, {path: [0, 2]}))
  first = np.asarray(w['lora_a'])[:, [0, 2]], np.asarray(w['lora_b'])[[0, 2]]
  expected = kernel + (first[0] + 0.5) @ (first[1] - 0.25) - first[0] @ first[1]
  np.testing.assert_allclose(found[path].value, expected, rtol=1e-4, atol=1e-5)
