"""No step makes NaN or infinity of finite numbers without a word."""

import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import surgery
from tests.recipes.models import SmallBlocks, held, saved, values

DTYPES = ('float32', 'bfloat16', 'float16', 'float64')


def largest(dtype, *shape):
  kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
  return np.full(shape, float(ml_dtypes.finfo(kind).max)).astype(kind)


def small(dtype, *shape):
  return np.ones(shape, getattr(ml_dtypes, dtype, dtype))


def lone(dtype):
  """A tensor of ones but for its last element, the largest number."""
  value = small(dtype, 3, 4)
  value[2, 3] = largest(dtype)
  return value


def matrices(dtype):
  # 2·max in the last element of the product.
  a, b = small(dtype, 3, 2), small(dtype, 2, 4) * 0
  a[2] = largest(dtype, 2)
  b[:, 3] = 1
  return {'a': a, 'b': b}


def norms(dtype):
  return {
    'c/kernel': lone(dtype),
    'n/scale': small(dtype, 4) * 2,
    'n/mean': small(dtype, 4),
    'n/var': small(dtype, 4),
  }


STEPS: dict[str, Any] = {
  'add': (lambda d: {'w': lone(d), 'x': lone(d)}, {'terms': 'x -> w'}, 'w'),
  'subtract': (
    lambda d: {'w': lone(d), 'x': -lone(d)},
    {'terms': 'x -> w'},
    'w',
  ),
  'scale': (lambda d: {'w': lone(d)}, {'select': 'w', 'by': 2}, 'w'),
  'matmul': (matrices, {'rules': '{a,b} -> w'}, 'w'),
  'fold-norm': (norms, {'rules': 'c -> n'}, 'c/kernel'),
}


@pytest.mark.parametrize('elements', [1 << 20, 5])
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('verb', STEPS)
def test_what_is_too_large_is_named(tmp_path, verb, dtype, elements):
  make, options, path = STEPS[verb]
  source, out = saved(make(dtype), tmp_path), tmp_path / 'out.msgpack'
  with SmallBlocks(elements), warnings.catch_warnings():
    warnings.simplefilter('error')
    with pytest.raises(
      surgery.CastError,
      match=rf'{verb}: {path}: the result at index \[2, 3\] is .*too large for '
      rf'{dtype}, whose largest number is .*nonfinite: allow',
    ):
      surgery.Recipe([{verb: options}]).run(model=source, out=out)
  assert not out.exists()


@pytest.mark.parametrize('step', ['add', 'scale'])
def test_complex_numbers_are_too_large_likewise(step):
  value = np.asarray([1 + 1j, 1 + 3e38j], 'complex64')
  options = {'add': 'b -> a', 'scale': {'select': 'a', 'by': 2}}[step]
  recipe = surgery.Recipe([{step: options}])
  with pytest.raises(
    surgery.CastError, match=r'a: the result at index \[1\] is .*complex64'
  ):
    values(recipe.apply(held({'a': value, 'b': value})))
  small = {'a': value[:1], 'b': value[:1]}
  assert 2 + 2j == values(recipe.apply(held(small)))['a'][0]


@pytest.mark.parametrize('verb', STEPS)
def test_it_is_written_where_it_is_allowed(verb):
  make, options, path = STEPS[verb]
  step = {verb: {**options, 'nonfinite': 'allow'}}
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    after = values(surgery.Recipe([step]).apply(held(make('float32'))))
  wrong = np.argwhere(~np.isfinite(after[path]))
  assert [[2, 3]] == wrong.tolist()


def test_nothing_else_can_be_asked_for():
  with pytest.raises(surgery.RecipeError, match="'refuse' or 'allow'"):
    surgery.apply(
      held({'w': np.ones(2)}),
      {'scale': {'select': 'w', 'by': 2, 'nonfinite': 'no'}},
    )


@pytest.mark.parametrize('dtype', DTYPES)
def test_what_was_not_finite_before_stays(dtype):
  kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
  mask = np.asarray([0, -np.inf, np.inf, np.nan]).astype(kind)
  net = {'mask': mask, 'x': np.ones(4, kind)}
  steps: list[dict[str, Any]] = [
    {'add': {'x -> mask': 2}},
    {'scale': {'select': 'mask', 'by': -1}},
    {'subtract': 'mask -> x'},
  ]
  after = values(surgery.Recipe(steps).apply(held(net)))
  np.testing.assert_array_equal(
    after['mask'].astype('float64'), [-2, np.inf, -np.inf, np.nan]
  )
  np.testing.assert_array_equal(
    after['x'].astype('float64'), [3, -np.inf, np.inf, np.nan]
  )


@pytest.mark.parametrize(
  'step',
  [
    {'add': {'b::mask': 0.5, 'c::mask': -0.5}},
    {'subtract': 'b::mask'},
    {'scale': {'select': 'mask', 'by': 0}},
  ],
)
def test_a_mask_does_not_become_nan(step: dict[str, Any]):
  mask = {'mask': np.asarray([0, 0, -np.inf], 'float32')}
  recipe = surgery.Recipe([step], inputs={'a': None, 'b': None, 'c': None})
  after = recipe.apply(held(mask), b=held(mask), c=held(mask))
  with pytest.raises(
    surgery.CastError, match=r'mask: the result at index \[2\] is NaN: an input'
  ):
    values(after)


def test_a_variance_of_zero_is_named():
  net = norms('float32') | {'n/var': np.asarray([1, 1, 0, 1], 'float32')}
  step = {'fold-norm': {'rules': 'c -> n', 'epsilon': 0}}
  with pytest.raises(
    surgery.CastError, match=r'c/kernel: the result at index \[0, 2\]'
  ):
    values(surgery.Recipe([step]).apply(held(net)))


def test_random_numbers_that_are_too_large_are_named():
  step = {'random': {'rules': 'x', 'scale': 1e6}}
  with pytest.raises(surgery.CastError, match=r'random: x: .* too large'):
    values(surgery.Recipe([step]).apply(held({'x': small('float16', 2, 3)})))
