import json


def test_paths_are_printed_one_a_line(model, surgery_cli):
  result = surgery_cli('select', model.file, '**/kernel')
  assert (0, '') == (result.code, result.err)
  assert 'model/net/query/kernel\nmodel/net/value/kernel\n' == result.out


def test_several_selectors_are_one_list(model, surgery_cli):
  result = surgery_cli('select', model.file, 'type:Linear', '!**/bias')
  assert 'model/net/query/kernel\nmodel/net/value/kernel\n' == result.out


def test_they_are_counted(model, surgery_cli):
  result = surgery_cli('select', model.file, '**/kernel', '--count')
  assert '2\n' == result.out
  args = ('select', model.file, '**/kernel', '--count', '--json')
  assert 2 == json.loads(surgery_cli(*args).out)


def test_json_is_a_list(model, surgery_cli):
  result = surgery_cli('select', model.file, '**/bias', '--json')
  expected = ['model/net/query/bias', 'model/net/value/bias']
  assert expected == json.loads(result.out)


def test_nothing_is_an_error(model, surgery_cli):
  result = surgery_cli('select', model.file, '**/kernal', '--count')
  assert (3, '') == (result.code, result.out)
  assert 'Nearest: model/net/query/kernel' in result.err
