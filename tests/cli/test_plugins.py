import json

import surgery
from surgery.host import manager


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


class Mine:
  """Two passes and a method of mine."""

  @surgery.hookimpl
  def surgery_passes(self):
    return {'shift-it': shift_it}

  @surgery.hookimpl
  def surgery_methods(self):
    return {'largest-of': LargestOf}

  @surgery.hookimpl
  def surgery_freeze_param(self, site, policy):
    """Answers `mine`: scales train, and nothing else."""


def shift_it(checkpoint, *, select: str, by: float = 1.0, host):
  """Adds a number.

  Args:
    checkpoint: the model.
    select: which tensors.
    by: what is added.
    host: not told.
  """
  return checkpoint


class LargestOf(surgery.Method):
  """Takes the largest."""

  name = 'largest-of'
  power: float = surgery.field(default=2.0, gt=0, doc='Of each.')

  def combine(self, block):
    return block.tensors[0]


def test_a_plugin_is_shown_with_what_it_offers_and_all_options(surgery_cli):
  with manager.used(surgery.Host(plugins=[Mine()], only=())):
    shown = surgery_cli('plugins', 'show', 'Mine').out
    data = json.loads(surgery_cli('plugins', 'show', 'Mine', '--json').out)
    alone = surgery_cli('plugins', 'show', 'shift-it').out
  assert 'Two passes and a method of mine.' in shown
  for part in (
    'pass shift-it: Adds a number.\n'
    '    surgery shift-it --help\n'
    '    select=…  text, required\n'
    '        which tensors.\n'
    '    by=…  a number, = 1.0\n'
    '        what is added.\n',
    'method largest-of: Takes the largest.\n'
    '    --set power=…  float (> 0), = 2.0\n'
    '        Of each.\n',
    'policies: Answers `mine`: scales train, and nothing else.\n',
  ):
    assert part in shown
  assert 'host=' not in shown
  assert ['pass', 'method', 'policies'] == [o['kind'] for o in data['offers']]
  assert 'name: shift-it\nkind: pass\nplugin: Mine\n' in alone
  assert 'by=…' in alone and 'largest' not in alone


def test_all_passes_of_the_library_are_shown(surgery_cli):
  shown = surgery_cli('plugins', 'show', 'passes').out
  for name in surgery.Host(only=()).passes:
    assert f'\npass {name}: ' in shown or name == 'map'
