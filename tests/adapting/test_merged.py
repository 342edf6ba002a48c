"""What merging puts into the base, against numpy; and what it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from tests.adapting.saved import leaf, model, numbers, values, with_values

A, B = numbers(4, 2, seed=1), numbers(2, 6, seed=2)
C, D = numbers(4, 3, seed=3), numbers(3, 6, seed=4)


class Double(surgery.Adapter):
  """Doubles the kernel: it depends on what lies beneath."""

  name = 'double'

  def init(self, site, key):
    del site, key
    return {'two': jnp.full((1,), 2.0)}

  def apply(self, site, name, base, weights):
    del site, name
    return base * weights['two']


def net():
  return model(a__kernel=numbers(4, 6), a__bias=numbers(6))


def attached(*more):
  """Returns the model with a LoRA of known values, and further adapters."""
  result = surgery.attach(net(), surgery.LoRA(rank=2, alpha=3.0), to='a')
  result = with_values(result, a__lora_a=A, a__lora_b=B)
  for name, adapter in more:
    result = surgery.attach(result, adapter, to='a', name=name)
  return result


W = values(net())['a/kernel']
ONE = W + 1.5 * (A.astype('f8') @ B)


def test_a_merge_is_the_formula_and_leaves_the_rest():
  merged = surgery.merge(attached())
  assert {('a', 'kernel'), ('a', 'bias')} == set(merged)
  np.testing.assert_allclose(values(merged)['a/kernel'], ONE, rtol=2e-6)
  np.testing.assert_array_equal(
    values(merged)['a/bias'], values(net())['a/bias']
  )


def test_adapters_are_merged_innermost_first():
  both = attached(('outer', Double()))
  got = values(surgery.merge(both))['a/kernel']
  np.testing.assert_allclose(got, 2 * ONE, rtol=2e-6)
  inner = surgery.merge(both, 'default')
  np.testing.assert_allclose(values(inner)['a/kernel'], ONE, rtol=2e-6)
  got = values(surgery.merge(inner))['a/kernel']
  np.testing.assert_allclose(got, 2 * ONE, rtol=2e-6)


def test_what_does_not_commute_is_not_merged_alone():
  both = attached(('outer', Double()))
  with pytest.raises(surgery.OrderError, match="over 'default'.*not commute"):
    surgery.merge(both, 'outer')


def test_additive_adapters_are_merged_in_any_order():
  both = attached(('more', surgery.LoRA(rank=3, alpha=3.0)))
  names = {p[-1] for p in both}
  assert {'lora_a.more', 'lora_b.more'} <= names
  both = with_values(both, **{'a__lora_a.more': C, 'a__lora_b.more': D})
  outer = surgery.merge(both, 'more')
  expected = W + (C.astype('f8') @ D)
  np.testing.assert_allclose(values(outer)['a/kernel'], expected, rtol=2e-6)
  got = values(surgery.merge(outer))['a/kernel']
  np.testing.assert_allclose(got, ONE + (C.astype('f8') @ D), rtol=2e-6)


def test_a_disabled_adapter_is_not_merged():
  off = surgery.disable(attached(), 'default')
  with pytest.raises(surgery.AdapterError, match="'default' is disabled, so"):
    surgery.merge(off)
  np.testing.assert_array_equal(
    values(surgery.detach(off))['a/kernel'], values(net())['a/kernel']
  )


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_result_that_is_not_finite_is_refused(bad):
  broken = A.copy()
  broken[1, 0] = bad
  one = with_values(attached(), a__lora_a=broken)
  with pytest.raises(surgery.SiteError, match='a/kernel'):
    surgery.merge(one)['a', 'kernel'].load()
  kept = surgery.merge(one, check_finite=False)['a', 'kernel'].load()
  assert not np.isfinite(np.asarray(kept)[1]).any()


def test_half_an_adapter_is_not_merged():
  whole = attached()
  leaves = {p: leaf for p, leaf in whole.items() if p[-1] != 'lora_b'}
  with pytest.raises(surgery.AdapterError, match='a/lora_b'):
    surgery.merge(whole.replace(leaves=leaves))


def test_large_parameters_are_merged_block_by_block_to_the_same_bits():
  rows, columns = 1536, 1024
  kernel = numbers(rows, columns)
  stored = leaf(kernel, part=lambda index: kernel[index])
  base = surgery.Checkpoint({('a', 'kernel'): stored})
  big = surgery.attach(base, surgery.LoRA(rank=2, alpha=3.0), to='a')
  a, b = numbers(rows, 2, seed=5), numbers(2, columns, seed=6)
  big = with_values(big, a__lora_a=a, a__lora_b=b)
  merged = surgery.merge(big)['a', 'kernel']
  assert merged.part is not None
  blocks = [np.asarray(one) for one in merged.parts()]
  assert 1 < len(blocks)
  scale = 1.5
  expected = kernel + scale * (a.astype('f8') @ b)
  joined = np.concatenate(blocks)
  np.testing.assert_allclose(joined, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(joined, np.asarray(merged.load()))


def test_rounding_happens_once_at_the_end():
  kernel = numbers(4, 6).astype(jnp.bfloat16)
  one = surgery.attach(
    model(a__kernel=kernel), surgery.LoRA(rank=2, alpha=3.0), to='a'
  )
  one = with_values(one, a__lora_a=A, a__lora_b=B)
  got = values(surgery.merge(one))['a/kernel']
  exact = kernel.astype('f8') + 1.5 * (A.astype('f8') @ B)
  assert jnp.bfloat16 == got.dtype
  np.testing.assert_array_equal(
    got.view('u2'), exact.astype('f4').astype(jnp.bfloat16).view('u2')
  )
