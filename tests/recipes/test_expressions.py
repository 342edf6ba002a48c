"""Expressions of variables, against Python's own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery.recipes import expressions
from surgery.recipes.recipe import Recipe

VALUES = {'t': 0.3, 'n': 4, 'flag': True, 'name': 'x', 'wide': 1 << 63}


def value(text):
  return expressions.evaluated(text, VALUES.__getitem__)


ATOMS = st.sampled_from(['t', 'n', '1', '2.5', '1e-3'])
TEXTS = st.recursive(
  ATOMS,
  lambda inner: st.one_of(
    st.tuples(inner, st.sampled_from('+-*'), inner).map(' '.join),
    inner.map('({})'.format),
    inner.map('-{}'.format),
  ),
  max_leaves=6,
)


@given(TEXTS)
def test_numbers_are_those_of_python(text):
  want = eval(text, {}, VALUES)
  got = value(text)
  assert (type(want), want) == (type(got), got)


def test_division_and_powers():
  assert (2, 0, 0.5, 16, 1) == (
    value('9 // n'), value('n % 2'), value('2 / n'), value('n ** 2'),
    value(' n / 4'),
  )  # fmt: skip
  assert int is type(value('n // 2'))


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    ('', 'expected a variable, or an expression'),
    ('1 -', 'expected a variable, or an expression'),
    ('f(1)', 'expected a variable, or an expression'),
    ('t.real', 'expected a variable, or an expression'),
    ('[1][0]', 'expected a variable, or an expression'),
    ('1 < t', 'expected a variable, or an expression'),
    ('__import__', 'no variable'),
    ("'x' * 3", 'expected a variable, or an expression'),
    ('t := 1', 'expected a variable, or an expression'),
    ('n if t else 1', 'expected a variable, or an expression'),
    ('1 + ' * 80 + '1', 'expected a variable, or an expression'),
    ('name + 1', "expected numbers, the variable 'name' is 'x'"),
    ('flag + 1', "expected numbers, the variable 'flag' is True"),
    ('1 / (n - 4)', 'division by zero'),
    ('9 ** 9 ** 9', 'an exponent up to 64'),
    ('wide * wide', 'expected numbers, it gives'),
    ('1e300 * 1e300', 'expected numbers, it gives inf'),
    ('1e999', 'expected numbers, it has inf'),
    ('1j + 1', 'expected a variable, or an expression'),
    ('(0 - 1) ** 0.5', 'expected numbers, it gives'),
  ],
)
def test_what_is_no_expression_of_numbers(text, said):
  def variable(name):
    if name not in VALUES:
      raise surgery.RecipeError('no variable')
    return VALUES[name]

  with pytest.raises(surgery.RecipeError, match=said.replace('+', r'\\+')):
    expressions.evaluated(text, variable)


def steps(written, **values):
  recipe = Recipe(
    [{'scale': {'select': 'x', 'by': written}}], vars={'t': 0.25, **values}
  )
  [step] = recipe.spec.steps
  return step.value['by']


def test_in_a_recipe():
  assert 0.75 == steps('${1 - t}')
  assert 0.25 == steps('${ t }')
  assert 'a0.75b-0.25' == steps('a${1 - t}b${-t}')
  assert '${1 - t}' == steps('$${1 - t}')
  with pytest.raises(surgery.RecipeError, match="no variable is called 'u'"):
    steps('${1 - u}')
  with pytest.raises(
    surgery.RecipeError, match="the variable 'v' has no value"
  ):
    steps('${1 - v}', v=None)
  with pytest.raises(surgery.RecipeError, match='or an expression of numbers'):
    steps('${1 - }')
