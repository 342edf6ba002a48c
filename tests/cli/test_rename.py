import pytest

import surgery
from tests.cli.saved import assert_same, planned, values


def renamed(file, old, new):
  return {p.replace(old, new): v for p, v in values(file).items()}


def test_a_layer_is_renamed_with_all_beneath_it(model, out, surgery_cli):
  rule = 'model/net/query -> model/net/q'
  plan = planned(surgery_cli, 'rename', model.file, rule, '-o', out)
  assert_same(renamed(model.file, '/query/', '/q/'), values(out))
  rows = {r['path']: r for r in plan['tensors']}
  assert ('renamed', 'model/net/query/kernel') == (
    rows['model/net/q/kernel']['what'],
    rows['model/net/q/kernel']['from'],
  )
  assert 'model/net/query/kernel' not in rows
  assert 0 == plan['memory']


def test_the_plan_says_where_tensors_came_from(model, out, surgery_cli):
  rule = 'model/net/query -> model/net/q'
  args = ('rename', model.file, rule, '-o', out, '--dry-run')
  said = surgery_cli(*args).out
  assert (
    'renamed   model/net/q/bias  float32(8,)  from model/net/query/bias' in said
  )
  assert '4 copied' in said
  assert '2 renamed' in said


def test_two_layers_are_swapped(model, out, surgery_cli):
  rules = (
    'model/net/query/bias -> model/net/value/bias',
    'model/net/value/bias -> model/net/query/bias',
  )
  assert 0 == surgery_cli('rename', model.file, *rules, '-o', out).code
  before, after = values(model.file), values(out)
  for one, other in (('query', 'value'), ('value', 'query')):
    expected = before[f'model/net/{one}/bias']
    assert expected.tobytes() == after[f'model/net/{other}/bias'].tobytes()


def test_an_adapter_goes_along(adapted, out, surgery_cli):
  rule = 'model/net/query -> model/net/q'
  assert 0 == surgery_cli('rename', adapted, rule, '-o', out).code
  assert_same(renamed(adapted, '/query/', '/q/'), values(out))
  [info] = surgery.adapters(surgery.load(out))
  assert ('model', 'net', 'q', 'kernel') in info.sites


@pytest.mark.parametrize(
  ('rules', 'code', 'message'),
  [
    ((), 2, 'OLD -> NEW'),
    (('model/net/quary -> x',), 3, 'model/net/quary'),
    (('no arrow',), 3, 'no arrow'),
  ],
)
def test_bad_input_is_refused_with_its_reason(
  model, out, surgery_cli, rules, code, message
):
  result = surgery_cli('rename', model.file, *rules, '-o', out)
  assert code == result.code
  assert message in result.err
  assert not out.exists()
