import json


def test_all_are_listed_with_state_and_origin(surgery_cli):
  result = surgery_cli('plugins')
  assert 0 == result.code
  rows = {line.split()[1]: line.split() for line in result.out.splitlines()}
  assert ['adapter', 'lora'] == rows['lora'][:2]
  assert 'blox-surgery' in rows['lora']
  assert 'surgery_formats' in rows['files']


def test_json_has_the_same(surgery_cli):
  infos = json.loads(surgery_cli('plugins', '--json').out)
  assert {'lora', 'files'} <= {i['name'] for i in infos}


def test_a_type_is_shown_with_its_options(surgery_cli):
  result = surgery_cli('plugins', 'show', 'lora')
  assert 0 == result.code
  assert '--set rank=…  int (>= 1), = 8' in result.out
  assert 'arXiv 2106.09685' in result.out


def test_a_type_as_json(surgery_cli):
  data = json.loads(surgery_cli('plugins', 'show', 'lora', '--json').out)
  assert ['rank', 'alpha', 'rslora', 'dropout'] == [
    o['name'] for o in data['options']
  ]


def test_a_plugin_is_shown_with_its_hooks(surgery_cli):
  assert 'hooks: surgery_formats' in surgery_cli('plugins', 'show', 'files').out


def test_an_unknown_name_is_an_error(surgery_cli):
  result = surgery_cli('plugins', 'show', 'lorra')
  assert 3 == result.code
  assert "Did you mean 'lora'" in result.err
