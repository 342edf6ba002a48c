"""What verbs check of values, under `jit` too."""

import blox as bx
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import checkify

import surgery
from surgery.live import checkpoints
from tests.live.models import assert_equal_params, mlp, stirred

LORA = surgery.LoRA(rank=2)


def adapted(wrong=None, weight='lora_b'):
  """Returns adapted params; one element of a weight may be of another value."""
  _, base, _ = mlp()
  params = stirred(surgery.attach(base, LORA, to='**/hidden*'))
  if wrong is None:
    return params
  path = ('net', 'mlp', 'hidden1', weight)
  changed = params.unlocked()
  value = params[path].value.at[0, 1].set(wrong)
  changed[path] = params[path].replace(value=value)
  return changed.locked()


def merged(params):
  return surgery.merge(params, checkify=True)


def half(params):
  return surgery.cast(params, 'f16', checkify=True)


@pytest.mark.parametrize('wrong', [jnp.nan, jnp.inf])
def test_a_merge_that_is_compiled_says_what_is_not_finite(wrong):
  error, _ = checkify.checkify(jax.jit(merged))(adapted(wrong))
  message = (
    'net/mlp/hidden1/kernel: the merged parameter has NaN or infinity, '
    r'first at index 1 of \(6, 5\)'
  )
  with pytest.raises(checkify.JaxRuntimeError, match=message):
    error.throw()


def test_a_merge_that_is_finite_is_as_without():
  params = adapted()
  error, plain = checkify.checkify(jax.jit(merged))(params)
  error.throw()
  assert type(plain) is bx.Params
  assert_equal_params(surgery.merge(params), plain)


def test_a_cast_that_is_compiled_says_what_overflows():
  params = adapted(1e6, 'kernel')
  error, _ = checkify.checkify(jax.jit(half))(params)
  message = (
    'net/mlp/hidden1/kernel: a finite value of float32 is none in float16, '
    r'first at index 1 of \(6, 5\)'
  )
  with pytest.raises(checkify.JaxRuntimeError, match=message):
    error.throw()
  # What was infinite before is not lost.
  error, _ = checkify.checkify(jax.jit(half))(adapted(jnp.inf, 'kernel'))
  error.throw()


def test_a_cast_that_fits_is_as_without():
  params = adapted()
  error, small = checkify.checkify(jax.jit(half))(params)
  error.throw()
  assert_equal_params(surgery.cast(params, 'f16'), small)


def test_members_of_a_batch_are_checked_too():
  three = jax.tree.map(
    lambda *v: jnp.stack(v), adapted(), adapted(), adapted(jnp.nan)
  )
  error, _ = checkify.checkify(jax.vmap(merged))(three)
  with pytest.raises(checkify.JaxRuntimeError, match='hidden1/kernel'):
    error.throw()


def test_without_the_transformation_jax_says_so():
  with pytest.raises(ValueError, match='checkify'):
    jax.jit(merged)(adapted())


def test_values_that_are_known_raise_errors_of_this_library():
  with pytest.raises(surgery.SiteError, match='hidden1/kernel'):
    merged(adapted(jnp.nan))
  with pytest.raises(surgery.CastError, match='hidden1/kernel'):
    half(adapted(1e6, 'kernel'))
  assert_equal_params(surgery.merge(adapted()), merged(adapted()))


def test_checkpoints_are_checked_as_ever():
  checkpoint = checkpoints.to_checkpoint(adapted(jnp.nan))
  path = ('net', 'mlp', 'hidden1', 'kernel')
  with pytest.raises(surgery.SiteError, match='hidden1/kernel'):
    surgery.merge(checkpoint, checkify=True)[path].load()
  with pytest.raises(surgery.CastError, match='hidden1/kernel'):
    large = checkpoints.to_checkpoint(adapted(1e6, 'kernel'))
    surgery.cast(large, 'f16', checkify=True)[path].load()


def test_a_check_that_is_switched_off_is_not_asked_for():
  with pytest.raises(surgery.ConfigError, match='check_finite=False switches'):
    surgery.merge(adapted(), check_finite=False, checkify=True)
  with pytest.raises(surgery.ConfigError, match='overflow=True switches'):
    surgery.cast(adapted(), 'f16', overflow=True, checkify=True)


def test_without_checkify_a_compiled_merge_looks_at_nothing():
  plain = jax.jit(surgery.merge)(adapted(jnp.nan))
  assert jnp.isnan(plain['net', 'mlp', 'hidden1', 'kernel'].value).any()


def test_names_with_braces_are_shown_as_they_are():
  params = bx.Params()
  params['net', 'a{b}', 'kernel'] = bx.Param(jnp.full((2, 2), 1e6))
  error, _ = checkify.checkify(jax.jit(half))(params.locked())
  with pytest.raises(checkify.JaxRuntimeError, match=r'net/a{b}/kernel'):
    error.throw()
