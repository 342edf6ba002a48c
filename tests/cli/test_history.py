import json

import flax.serialization
import numpy as np
import pytest

import surgery
from surgery.recipes import history
from tests.cli.saved import assert_same, values

HOST = surgery.default_host()


@pytest.fixture
def here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return tmp_path


def shown(surgery_cli, file, tmp_path):
  """Writes the recipe that a file's history shows to a file."""
  result = surgery_cli('inspect', file, '--history')
  assert 0 == result.code, result.err
  recipe = tmp_path / 'again.yaml'
  recipe.write_text(result.out)
  return recipe


ATTACH = (
  '--adapter', 'lora', '--to', '**/{query,value}', '--set', 'rank=2', '--seed',
  '3', '--set', '**/value:rank=1', '--layout', '**/kernel=io',
)  # fmt: skip


def test_people_read_a_recipe(model, here, surgery_cli):
  surgery_cli('attach', 'base.msgpack', *ATTACH, '-o', 'adapted.msgpack')
  surgery_cli(
    'freeze', 'adapted.msgpack', '**/bias', '!**/query', '-o', 'out.msgpack'
  )
  first, second, *lines = surgery_cli(
    'inspect', 'out.msgpack', '--history'
  ).out.splitlines()
  assert first.startswith('# surgery 0.1.0, base.msgpack xxh3:')
  assert second.startswith('# surgery 0.1.0, adapted.msgpack xxh3:')
  assert (
    """\
inputs:
  model: base.msgpack
steps:
  - attach:
      adapter: lora
      to: '**/{query,value}'
      set:
        rank: 2
        alpha: null
        rslora: false
        dropout: 0.0
        patterns:
          '**/value':
            rank: 1
      name: default
      seed: 3
      layout:
        '**/kernel': io
  - freeze:
      - '**/bias'
      - '!**/query'
outputs:
  out: out.msgpack""".splitlines()
    == lines
  )


def test_one_verb_is_made_again_to_the_byte(model, here, surgery_cli):
  surgery_cli('attach', 'base.msgpack', *ATTACH, '-o', 'out.msgpack')
  before = (here / 'out.msgpack').read_bytes()
  recipe = shown(surgery_cli, 'out.msgpack', here)
  result = surgery_cli('run', recipe, '--force')
  assert 0 == result.code, result.err
  assert before == (here / 'out.msgpack').read_bytes()


@pytest.mark.parametrize('suffix', ['msgpack', 'safetensors'])
def test_several_verbs_become_one_recipe(model, here, surgery_cli, suffix):
  out = f'out.{suffix}'
  for arguments in (
    ('attach', 'base.msgpack', *ATTACH, '--name', 'a', '-o', '1.msgpack'),
    ('extract', '1.msgpack', '-o', 'a.msgpack'),
    ('merge', '1.msgpack', '-o', '2.msgpack'),
    ('merge', '2.msgpack', '--with', 'a.msgpack', '--no-check-base', '-o', '3.msgpack'),
    ('merge', '3.msgpack', '--with', 'a.msgpack', '--no-check-base', '-o', '4.msgpack'),
    ('rename', '4.msgpack', 'model/net -> model/other', '-o', '5.msgpack'),
    ('convert', '5.msgpack', out),
  ):  # fmt: skip
    result = surgery_cli(*arguments)
    assert 0 == result.code, result.err
  expected = values(out)
  recipe = shown(surgery_cli, out, here)
  # Each adapter's file has a name of its own, though both had one.
  assert 2 == recipe.read_text().count(': a.msgpack')
  for file in here.glob('[1-5].msgpack'):
    file.unlink()
  assert 0 == surgery_cli('run', recipe, '--force').code
  assert_same(expected, values(out))


def test_an_output_of_another_model_is_made_again(model, here, surgery_cli):
  (here / 'r.yaml').write_text("""
inputs: {a: base.msgpack, b: base.msgpack}
steps:
  - {scale: {select: '**/kernel', by: 2}, in: b, as: c}
  - {add: 'c::**/bias', in: c}
outputs:
  one: {path: one.msgpack, of: c}
  two: two.msgpack
""")
  assert 0 == surgery_cli('run', 'r.yaml').code
  expected = values('one.msgpack')
  assert not np.array_equal(
    expected['model/net/query/kernel'],
    values('two.msgpack')['model/net/query/kernel'],
  )
  recipe = shown(surgery_cli, 'one.msgpack', here)
  (here / 'one.msgpack').unlink()
  assert 0 == surgery_cli('run', recipe).code
  assert_same(expected, values('one.msgpack'))


def test_json_is_as_recorded(model, out, surgery_cli):
  surgery_cli('freeze', model.file, '-o', out)
  said = json.loads(surgery_cli('inspect', out, '--history', '--json').out)
  assert list(surgery.open(out).manifest.history) == said


def test_no_history_is_told(model, surgery_cli):
  result = surgery_cli('inspect', model.file, '--history')
  assert (0, '') == (result.code, result.out)
  assert 'no history is recorded' in result.err


@pytest.mark.parametrize(
  'entry',
  [
    {},
    {'pass': 'x', 'version': '9'},
    {'recipe': 'x'},
    {'recipe': {'steps': [], 'outputs': {}}},
    {'recipe': {'steps': ['x'], 'outputs': {'o': None}}, 'inputs': ['?']},
  ],
)
def test_entries_of_others_are_counted(entry):
  [line] = history.lines([entry], 'out.msgpack', HOST)
  assert '# entries that are no recipes of surgery: 1' == line


def test_steps_of_plugins_that_are_gone_are_shown():
  step = {'theirs': {'x': 1}, 'in': 'b'}
  entry = {
    'recipe': {'steps': [step, 'theirs'], 'outputs': {'o': None}},
    'main': 'a',
    'inputs': [{'name': n, 'file': n, 'digest': ''} for n in 'ab'],
  }
  made = history.as_recipe([entry], 'out.msgpack', HOST)
  assert [step, 'theirs'] == made['steps']


def test_a_digest_of_the_structure_is_not_called_one_of_the_model(
  here, surgery_cli
):
  said = {}
  for name, value in (('a', 1), ('b', 2)):
    tree = {'net': {'w': np.full(3, value, 'float32')}, 'steps': 7}
    (here / f'{name}.msgpack').write_bytes(flax.serialization.to_bytes(tree))
    out = f'{name}-out.msgpack'
    surgery_cli('freeze', f'{name}.msgpack', '-o', out)
    first, second, *rest = surgery_cli('inspect', out, '--history').out.split(
      '\n'
    )
    said[name] = first.rpartition(' ')[2]
    assert '# structure-…: tensors had no digest' in second
    assert 'inputs:' == rest[0]
    recorded = surgery.open(out).manifest.history[-1]['inputs'][0]['digest']
    assert said[name] == recorded
  # Other values, and nothing that tells them apart.
  assert said['a'] == said['b']
  assert said['a'].startswith('structure-xxh3:')
  for name in said:
    surgery_cli('verify', f'{name}.msgpack', '--write')
    surgery_cli('freeze', f'{name}.msgpack', '-o', f'{name}2.msgpack')
    history = surgery.open(f'{name}2.msgpack').manifest.history
    said[name] = history[-1]['inputs'][0]['digest']
    assert said[name].startswith('xxh3:')
  assert said['a'] != said['b']


def test_one_tensor_without_a_digest_is_enough(here):
  def of(*digests, value=3):
    leaves: dict[tuple[str, ...], surgery.Leaf] = {
      (str(k),): surgery.Leaf(
        lambda: np.zeros(2, 'float32'), (2,), 'float32', digest=digest
      )
      for k, digest in enumerate(digests)
    }
    plain = surgery.Leaf(lambda: value, None, None)
    return history.fingerprint(surgery.Checkpoint({**leaves, ('step',): plain}))

  assert of('xxh3:0', 'xxh3:1').startswith('xxh3:')
  assert of('xxh3:0', None).startswith('structure-xxh3:')
  # Plain values have no digests of their own.
  assert of('xxh3:0').startswith('xxh3:')
  assert of('xxh3:0') != of('xxh3:0', value=4)


def test_a_dollar_sign_of_a_verb_names_no_variable(model, here, surgery_cli):
  rule = '**/query -> **/${q}'
  result = surgery_cli('rename', 'base.msgpack', rule, '-o', 'first.msgpack')
  assert (3, True) == (result.code, 'no variable' not in result.err)
  rule = '**/query -> **/$$q'
  result = surgery_cli('rename', 'base.msgpack', rule, '-o', 'first.msgpack')
  assert 0 == result.code, result.err
  assert any('$$q' in path for path in surgery.open('first.msgpack'))
  again = shown(surgery_cli, 'first.msgpack', here)
  (here / 'first.msgpack').rename(here / 'kept.msgpack')
  assert 0 == surgery_cli('run', again).code
  assert_same(values('kept.msgpack'), values('first.msgpack'))
