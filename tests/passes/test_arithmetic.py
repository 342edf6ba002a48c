"""Sums over several models: what one of them lacks, and how they are rounded."""

from fractions import Fraction
from typing import Any

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

import surgery
from tests.recipes.models import by_name, held, same, values


def net(*names, seed=0):
  rng = np.random.default_rng(seed)
  return {n: rng.standard_normal((2, 3)).astype('float32') for n in names}


ALL = ('h/0/down', 'h/0/up', 'h/1/down', 'h/1/up', 'head')


def added(base, step, /, **others):
  recipe = surgery.Recipe([step], inputs=dict.fromkeys(['model', *others]))
  given: Any = {alias: held(arrays) for alias, arrays in others.items()}
  return values(recipe.apply(held(base), **given))


@pytest.mark.parametrize('verb', ['add', 'subtract'])
@pytest.mark.parametrize(
  'terms',
  [
    {'a::**/{up,down}': 0.4, 'b::**/{up,down}': 0.4, '**/{up,down}': -0.8},
    {'b::**': 0.5, 'a::**': -0.5},
    ['a::h/*/*'],
    'a::**',
    'a::h/<i>/up -> h/<i>/up',
  ],
)
def test_a_tensor_that_an_input_lacks_is_an_error_that_names_it(verb, terms):
  lacking = {p: v for p, v in net(*ALL).items() if p != 'h/1/up'}
  with pytest.raises(
    surgery.RecipeError, match=r'a has no h/1/up, and .* partial: true'
  ):
    added(net(*ALL), {verb: terms}, a=lacking, b=net(*ALL))


def test_all_that_is_lacking_is_listed():
  with pytest.raises(
    surgery.RecipeError,
    match='a has no h/0/down, a has no h/0/up, a has no h/1/down, a has no '
    'h/1/up, and the model has',
  ):
    added(net(*ALL), {'add': 'a::**'}, a=net('head'))
  many = [f'w{i}' for i in range(9)]
  with pytest.raises(surgery.RecipeError, match='w5 and 3 more, and the model'):
    added(net(*many), {'add': 'a::**'}, a=net('w0'))


def test_a_head_that_is_tied_in_one_model_is_an_error():
  tied, whole = net('embed'), net('embed', 'head')
  step = {'add': {'tuned::**': 0.5, 'base::**': -0.5}}
  with pytest.raises(surgery.RecipeError, match='tuned has no head'):
    added(whole, step, tuned=tied, base=whole)
  with pytest.raises(
    surgery.RecipeError, match='is no head to which base::head'
  ):
    added(tied, step, tuned=tied, base=whole)


def test_what_only_another_model_has_is_listed():
  with pytest.raises(
    surgery.RecipeError,
    match='there is no h/0/up to which a::h/0/up could be added, no h/1/up to '
    'which a::h/1/up could be added. Change',
  ):
    added(net('head'), {'add': 'a::**'}, a=net('head', 'h/0/up', 'h/1/up'))


def test_with_partial_what_one_lacks_is_left_as_it_is():
  base = net(*ALL)
  lacking = {p: v for p, v in net(*ALL, seed=1).items() if p != 'h/1/up'}
  more = {**net(*ALL, seed=2), 'other': np.ones(3, 'float32')}
  terms = {'a::**': 0.5, 'b::**': 0.25, '**': -0.75}
  step = {'add': {'terms': terms, 'partial': True}}
  wide = lambda arrays, p: arrays[p].astype('float64')
  expected = {
    p: v
    if p == 'h/1/up'
    else (
      wide(base, p)
      + 0.5 * wide(lacking, p)
      + 0.25 * wide(more, p)
      - 0.75 * wide(base, p)
    ).astype('float32')
    for p, v in base.items()
  }
  same(by_name(expected), by_name(added(base, step, a=lacking, b=more)))


def test_partial_sums_need_something_in_common():
  step = {'add': {'terms': 'a::**', 'partial': True}}
  with pytest.raises(surgery.RecipeError, match='no tensor is in all'):
    added(net('x'), step, a=net('y'))


def test_rules_of_one_model_may_leave_tensors_out():
  base = net('h/0/delta', 'h/0/w', 'h/1/w')
  after = added(base, {'add': 'h/<i>/delta -> h/<i>/w'})
  assert base['h/1/w'].tobytes() == after['h/1/w'].tobytes()


numbers = st.floats(-(2**20), 2**20, width=32, allow_subnormal=False)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
  st.lists(numbers, min_size=2, max_size=6),
  st.sampled_from(['float32', 'bfloat16', 'float16']),
)
def test_a_sum_is_rounded_once(terms, dtype):
  kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
  terms = [np.asarray([t / 2**8]).astype(kind) for t in terms]
  base = {f'x{k}': t for k, t in enumerate(terms)}
  rules = {f'x{k} -> x0': 1.0 for k in range(1, len(terms))}
  total = added(base, {'add': rules})['x0']
  exact = sum(Fraction(float(t[0])) for t in terms)
  # The nearest number of the dtype, found by looking at its neighbours.
  found = Fraction(float(total[0]))
  bits = total.view(f'u{kind.itemsize}')
  for step in (-1, 1):
    with np.errstate(over='ignore'):
      other = float((bits + np.asarray(step).astype(bits.dtype)).view(kind)[0])
    if np.isfinite(other):
      apart = abs(found - exact) - abs(Fraction(other) - exact)
      assert apart <= abs(exact) * Fraction(1, 2**50)


def test_what_cancels_may_be_too_large_on_the_way():
  base = {k: np.full(2, v, 'float32') for k, v in (('a', 3e38), ('b', 3e38))}
  base['c'] = np.full(2, -3e38, 'float32')
  after = added(base, {'add': ['b -> a', 'c -> a']})
  same({**base}, after)
