import json

import flax.serialization
import numpy as np

import surgery


def test_a_model_is_shown_as_a_tree(model, surgery_cli):
  result = surgery_cli('inspect', model.file)
  assert 0 == result.code
  lines = result.out.splitlines()
  assert 'model/' == lines[0]
  assert any('query/' in li and '(Linear)' in li for li in lines)
  assert any('kernel' in li and 'float32[6,8]' in li for li in lines)
  assert any('seed' in li and 'key threefry2x32' in li for li in lines)
  assert 'model: 6 tensors, 131 elements (128 trainable), 524 B' == lines[-1]


def test_selectors_narrow_it_down(model, surgery_cli):
  result = surgery_cli('inspect', model.file, '**/bias')
  assert 'kernel' not in result.out
  assert 'model: 2 tensors' in result.out


def test_json_has_all_of_it(model, tmp_path, surgery_cli):
  file = tmp_path / 'adapted.msgpack'
  surgery.save(
    file, surgery.attach(model.params, surgery.LoRA(rank=2), to='**')
  )
  data = json.loads(surgery_cli('inspect', file, '--json').out)
  assert 10 == len(data['tensors'])
  assert ['default'] == [a['name'] for a in data['adapters']]
  [tensor] = [
    t for t in data['tensors'] if t['path'] == 'model/net/query/lora_a'
  ]
  assert [6, 2] == tensor['shape']
  assert 'default' == tensor['adapter']
  assert tensor['digest'].startswith('xxh3:')


def test_a_file_from_flax_is_shown_too(tmp_path, surgery_cli):
  file = tmp_path / 'flax.msgpack'
  file.write_bytes(
    flax.serialization.to_bytes({'a': {'b': np.ones((2, 3))}, 'step': 3})
  )
  result = surgery_cli('inspect', file)
  assert 0 == result.code
  assert 'float64[2,3]' in result.out


def test_an_adapter_whose_type_is_not_installed_is_shown(
  model, tmp_path, surgery_cli
):
  class Mine(surgery.Adapter):
    name = 'mine'

    def init(self, site, key):
      return {}

    def apply(self, site, name, base, weights):
      return base

  host = surgery.Host(plugins=[Mine])
  file = tmp_path / 'mine.msgpack'
  params = surgery.attach(model.params, Mine(), to='**', host=host)
  surgery.save(file, params, host=host)
  result = surgery_cli('inspect', file)
  assert 0 == result.code
  assert 'adapter default: mine() on 2' in result.out


def test_history_is_shown_on_request(model, tmp_path, surgery_cli):
  out = tmp_path / 'o.msgpack'
  surgery_cli(
    'attach',
    model.file,
    '--adapter',
    'lora',
    '--to',
    '**',
    '--set',
    'rank=1',
    '-o',
    out,
  )
  lines = surgery_cli('inspect', out, '--history').out.splitlines()
  assert '  model: base.msgpack' in lines
  assert '      adapter: lora' in lines


def test_a_selector_that_matches_nothing_is_an_error(model, surgery_cli):
  result = surgery_cli('inspect', model.file, '**/kernal')
  assert 3 == result.code
  assert 'Nearest: model/net/query/kernel, model/net/value/kernel' in result.err
