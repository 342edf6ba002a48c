"""What a layer gets inside of `jax.checkpoint` is what is merged.

Without `jit` that runs a model's operations one by one, and a formula that is
run so rounds otherwise than one that is compiled as a whole.
"""

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from surgery_lora_family import DoRA
from surgery_orthogonal import HRA
from surgery_products import LoHa, LoKr

import surgery

# Compiled as users do: bits are compared (see conftest.py).
OPTIMIZED = True

KERNEL = ('net', 'layer', 'kernel')


@pytest.fixture(scope='module', params=['lora', 'dora', 'hra', 'loha', 'lokr'])
def adapted(request):
  """Params of 32×32 with an adapter whose weights are random."""
  types = {
    'lora': surgery.LoRA(rank=4),
    'dora': DoRA(rank=4),
    'hra': HRA(rank=4),
    'loha': LoHa(rank=4),
    'lokr': LoKr(rank=4),
  }
  numbers = np.random.default_rng(0)
  params = bx.Params()
  params[KERNEL] = bx.Param(jnp.asarray(numbers.normal(size=(32, 32)), 'f4'))
  params = surgery.attach(params.locked(), types[request.param], to='**')
  params = params.unlocked()
  for path in [p for p in params.keys() if p != KERNEL]:
    value = params[path].value
    drawn = jnp.asarray(numbers.normal(size=value.shape), value.dtype)
    params[path] = params[path].replace(value=value + drawn)
  return params.locked()


def kernel(params):
  return params._get(KERNEL, (32, 32), None)[0]


@pytest.mark.parametrize(
  'run',
  [
    jax.checkpoint(kernel),
    jax.checkpoint(jax.checkpoint(kernel)),
    jax.jit(jax.checkpoint(kernel)),
    jax.checkpoint(lambda p: jax.lax.cond(True, kernel, kernel, p)),
  ],
  ids=['eager', 'nested', 'jit', 'cond'],
)
def test_what_is_answered_is_what_is_merged(adapted, run):
  expected = surgery.merge(adapted)[KERNEL].value
  np.testing.assert_array_equal(expected, run(adapted))


def test_gradients_through_it_are_those_without(adapted):
  half, rest = surgery.freeze(adapted).split()
  loss = lambda run: lambda half: (run(half.merge(rest)) ** 2).sum()
  expected = jax.grad(loss(kernel))(half)
  found = jax.grad(loss(jax.checkpoint(kernel)))(half)
  for path, param in expected.items():
    np.testing.assert_allclose(
      param.value, found[path].value, rtol=1e-4, atol=1e-4
    )
