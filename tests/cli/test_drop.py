import pytest

from tests.cli.saved import assert_same, planned, steps, values


def test_a_layer_goes_with_all_beneath_it(model, out, surgery_cli):
  plan = planned(surgery_cli, 'drop', model.file, '**/value', '-o', out)
  left = {p: v for p, v in values(model.file).items() if 'value' not in p}
  assert_same(left, values(out))
  assert {'copied': 4, 'gone': 2} == {
    what: sum(r['what'] == what for r in plan['tensors'])
    for what in ('copied', 'gone')
  }
  assert 0 == plan['memory']


def test_the_selectors_are_recorded(model, out, surgery_cli):
  surgery_cli('drop', model.file, '**/bias', '!**/query', '-o', out)
  assert [('drop', ['**/bias', '!**/query'])] == steps(out)


@pytest.mark.parametrize(
  ('arguments', 'code', 'message'),
  [
    ((), 2, 'SELECTOR'),
    (('**/valeu',), 3, 'Nearest: model/net/value'),
  ],
)
def test_bad_input_is_refused_with_its_reason(
  model, out, surgery_cli, arguments, code, message
):
  result = surgery_cli('drop', model.file, *arguments, '-o', out)
  assert code == result.code
  assert message in result.err
  assert not out.exists()
