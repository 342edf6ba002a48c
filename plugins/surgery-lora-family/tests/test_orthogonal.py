import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from surgery_lora_family import OrthogonalLoRA

import surgery

PATH = ('net', 'h', 'kernel')


def network(*shape):
  params = bx.Params()
  params[PATH] = bx.Param(jax.random.normal(jax.random.key(0), shape))
  return params.locked()


def factors(params):
  return [
    np.asarray(params['net', 'h', name].value, 'float64')
    for name in ('lora_a', 'lora_b')
  ]


def test_the_product_is_zero_and_the_factors_are_not():
  params = surgery.attach(network(200, 120), OrthogonalLoRA(rank=8), to='**')
  a, b = factors(params)
  assert (200, 8) == a.shape
  assert (8, 120) == b.shape
  assert np.abs(a @ b).max() < 1e-7
  # Each spans one half of the inner space.
  assert 4 == np.linalg.matrix_rank(a, 1e-4)
  assert 4 == np.linalg.matrix_rank(b, 1e-4)
  # A tenth of Gaussians, each row of Q having the length one.
  for factor, long in ((a, 200), (b, 120)):
    size = (factor**2).sum() / (long * 4)
    np.testing.assert_allclose(0.01, size, rtol=0.15)


def test_both_factors_learn_from_the_first_step_on():
  params = surgery.attach(network(6, 5), OrthogonalLoRA(rank=2), to='**')
  trainable, rest = surgery.freeze(params).split()
  merged = lambda half: surgery.merge(half.merge(rest))[PATH].value
  found = jax.grad(lambda half: jnp.sum(merged(half)))(trainable)
  a, b = factors(params)
  scale, ones = 2.0, np.ones((6, 5))
  expected = {'lora_a': scale * ones @ b.T, 'lora_b': scale * a.T @ ones}
  for name, value in expected.items():
    np.testing.assert_allclose(
      found['net', 'h', name].value, value, rtol=1e-5, atol=1e-6
    )


def test_axes_of_inputs_and_outputs_are_kept():
  params = surgery.attach(
    network(3, 4, 2, 5), OrthogonalLoRA(rank=4), to='**', layout='iioo'
  )
  a, b = factors(params)
  assert (3, 4, 4) == a.shape
  assert (4, 2, 5) == b.shape
  assert np.abs(np.tensordot(a, b, 1)).max() < 1e-7


def test_the_rank_is_even_everywhere():
  with pytest.raises(
    surgery.ConfigError,
    match=r"'lora-orthogonal', option 'rank': expected an even .* found 3\.",
  ):
    OrthogonalLoRA(rank=3)
  with pytest.raises(surgery.ConfigError, match=r'even number.* found 5\.'):
    OrthogonalLoRA(rank=2, patterns={'**/h': {'rank': 5}})
  with pytest.warns(surgery.SiteWarning, match=r'rank 4 of .* 6×3.*net/h/k'):
    surgery.attach(network(6, 3), OrthogonalLoRA(rank=4), to='**')


def test_it_is_found_by_its_name():
  found = surgery.default_host().adapter_type('lora-orthogonal')
  assert OrthogonalLoRA is found
