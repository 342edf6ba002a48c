"""Assertions: what a plan knows of them, and where one that failed stood."""

import numpy as np
import pytest

import surgery
from surgery.recipes.recipe import Recipe
from tests.recipes.models import saved

NET = {
  'a': np.ones((2, 3), 'float32'),
  'b': np.ones((2, 3), 'float32'),
  'c': np.full(3, np.nan, 'float32'),
}


def planned(condition, tmp_path, before=()):
  recipe = Recipe([*before, {'assert': condition}])
  return recipe.plan(model=saved(NET, tmp_path), out=tmp_path / 'out.msgpack')


# What needs no values is known beside conditions that do, however they are
# nested.
FINITE, ONE = {'finite': 'a'}, {'count': {'of': 'a', 'is': 1}}
TWO, GONE = {'count': {'of': 'a', 'is': 2}}, {'exists': 'zzz'}


@pytest.mark.parametrize(
  'condition',
  [
    {**FINITE, **TWO},
    {**TWO, **FINITE},
    {'finite': 'a', 'exists': 'zzz'},
    {'finite': 'a', 'shape': {'of': 'a', 'is': [7]}},
    {'finite': 'a', 'dtype': {'of': 'a', 'is': 'bf16'}},
    {'all': [FINITE, {'all': [FINITE, TWO]}]},
    {'any': [{**FINITE, **TWO}, GONE]},
    {'not': {'any': [FINITE, ONE]}},
    {'not': {'not': {**FINITE, **TWO}}},
    {'equal': 'a -> c'},  # Their shapes differ.
    {'any': [{'equal': 'a -> c'}, TWO]},
  ],
)
def test_a_plan_refuses_what_cannot_hold(tmp_path, condition):
  with pytest.raises(surgery.CheckError, match=r'step 1 \(assert\): '):
    planned(condition, tmp_path)


@pytest.mark.parametrize(
  ('condition', 'holds'),
  [
    ({**FINITE, **ONE}, True),
    ({'any': [FINITE, TWO]}, True),
    ({'any': [TWO, FINITE]}, True),
    ({'any': [TWO, {'finite': 'c'}]}, False),
    ({'not': {**FINITE, **ONE}}, False),
    ({'not': {**FINITE, **TWO}}, True),
    ({'not': {'finite': 'c'}}, True),
    ({'not': {'any': [{'finite': 'c'}, TWO]}}, True),
    ({'not': {'equal': 'a -> c'}}, True),
    ({'not': {'equal': 'a -> b'}}, False),
    ({'all': [{'equal': 'a -> b'}, {'not': {'zero': 'a'}}]}, True),
  ],
)
def test_what_values_decide_is_left_to_the_run(tmp_path, condition, holds):
  plan = planned(condition, tmp_path)
  assert 1 == len(plan.report()['checks'])
  if holds:
    plan.write()
  else:
    with pytest.raises(surgery.CheckError):
      plan.write()


@pytest.mark.parametrize(
  ('step', 'message'),
  [
    ({'drop': 'b'}, 'b is gone'),
    ({'rename': 'b -> d'}, 'b is gone; d is new'),
    ({'cast': {'to': 'bf16', 'keep': 'c'}}, 'b has changed'),
  ],
)
def test_a_plan_knows_what_changed_of_names_and_dtypes(tmp_path, step, message):
  with pytest.raises(surgery.CheckError, match=message):
    planned({'unchanged-except': 'a'}, tmp_path, [step])


@pytest.mark.parametrize(
  'line', ['{finite: c}', '{zero: a}', '{equal: a -> b}']
)
def test_what_fails_later_says_where_it_is_asked_for(tmp_path, line):
  recipe = tmp_path / 'r.yaml'
  recipe.write_text(
    '# checked\n'
    'steps:\n'
    '  - fill: {rules: b, value: 2}\n'
    '  - assert: {count: {of: a, is: 1}}\n'
    f'  - assert: {line}\n'
    '  - drop: c\n'
  )
  plan = surgery.Recipe.load(recipe).plan(
    model=saved(NET, tmp_path), out=tmp_path / 'out.msgpack'
  )
  with pytest.raises(surgery.CheckError) as caught:
    plan.write()
  assert str(caught.value).startswith(f'{recipe}:5: step 3 (assert): ')
  assert 1 == str(caught.value).count('step 3')


def test_checks_of_other_steps_say_where_they_are_too(tmp_path):
  recipe = tmp_path / 'r.yaml'
  recipe.write_text('steps:\n  - fill: {rules: b, value: 2}\n  - tie: a -> b\n')
  plan = surgery.Recipe.load(recipe).plan(
    model=saved(NET, tmp_path), out=tmp_path / 'out.msgpack'
  )
  with pytest.raises(surgery.CheckError, match=r'r\.yaml:3: step 2 \(tie\): '):
    plan.write()


def test_a_dry_run_of_the_shell_says_it(tmp_path, surgery_cli):
  recipe, file = tmp_path / 'r.yaml', saved(NET, tmp_path)
  recipe.write_text(
    '- assert: {count: {of: a, is: 2}, finite: "**"}\n- drop: c\n'
  )
  result = surgery_cli(
    'run', recipe, f'model={file}', f'out={tmp_path / "o.msgpack"}', '--dry-run'
  )
  assert 3 == result.code
  assert f'{recipe}:1: step 1 (assert): ' in result.err
  assert '2 tensors are a: found 1.' in result.err
