"""What config.json states, against configurations that transformers wrote."""

import json
import pathlib

import pytest

import surgery
from surgery.interop import architectures, configs
from surgery.model.checkpoint import Leaf

DATA = pathlib.Path(__file__).parents[1] / 'data' / 'hf'
NAMES = sorted(path.name for path in DATA.iterdir() if path.is_dir())


def config_of(name):
  return json.loads((DATA / name / 'config.json').read_text())


def tensors_of(name):
  return dict(surgery.open(DATA / name))


def changes(edited):
  return {change.key: (change.old, change.new) for change in edited.changes}


def sized(tensors, ending, axis, size):
  """Tensors whose paths end so, with another length of an axis."""
  changed = dict(tensors)
  for path, leaf in tensors.items():
    if '/'.join(path).endswith(ending):
      shape = list(leaf.shape)
      shape[axis] = size
      changed[path] = Leaf(leaf.load, tuple(shape), leaf.dtype)
  return changed


@pytest.mark.parametrize('name', NAMES)
def test_formulae_give_what_transformers_wrote(name):
  config, tensors = config_of(name), tensors_of(name)
  one = architectures.ARCHITECTURES[config['model_type']]
  for key, measure in {**one.layers, **one.sizes}.items():
    stated = config[key]
    if stated is None:
      other, factor = one.implied[key]
      stated = config[other] * factor
    assert {stated} == measure(tensors), key
  size = config.get(one.head_size or '') or (
    config[one.hidden] // config[next(iter(one.heads))]
  )
  for key, measure in one.heads.items():
    assert {config[key] * size} == measure(tensors), key


@pytest.mark.parametrize('name', NAMES)
def test_what_does_not_change_is_not_changed(name):
  config, tensors = config_of(name), tensors_of(name)
  edited = configs.edited(config, tensors, tensors)
  assert (config, (), ()) == (edited.config, edited.changes, edited.warnings)


@pytest.mark.parametrize('name', NAMES)
def test_a_layer_less_is_one_less(name):
  config, before = config_of(name), tensors_of(name)
  one = architectures.ARCHITECTURES[config['model_type']]
  for key, measure in one.layers.items():
    last = config[key] - 1
    after = {
      path: leaf
      for path, leaf in before.items()
      if architectures.number(measure.pattern, path) != last
    }
    kept = list(range(last))
    edited = configs.edited(
      config, before, after, sources=lambda pattern, kept=kept: kept
    )
    assert (last + 1, last) == changes(edited)[key]
    lists = {
      name: value
      for name, value in config.items()
      if isinstance(value, list) and len(value) == last + 1 and last
    }
    assert changes(edited).keys() == {key, *lists}
    assert edited.warnings == ()


def test_layers_that_are_not_numbered_through_are_said():
  config, before = config_of('llama'), tensors_of('llama')
  after = {path: leaf for path, leaf in before.items() if '1' not in path}
  edited = configs.edited(config, before, after)
  assert edited.changes == ()
  [said] = edited.warnings
  assert 'num_hidden_layers is 3 in config.json, and no tensor tells it' in said


@pytest.mark.parametrize(
  ('name', 'ending', 'axis', 'expected'),
  [
    ('llama', 'mlp/gate_proj/weight', 0, {'intermediate_size': (24, 12)}),
    ('gemma', 'mlp/gate_proj/weight', 0, {'intermediate_size': (24, 12)}),
    ('qwen3', 'embed_tokens/weight', 0, {'vocab_size': (40, 12)}),
    ('bert', 'word_embeddings/weight', 0, {'vocab_size': (40, 12)}),
    (
      'bert', 'position_embeddings/weight', 0,
      {'max_position_embeddings': (32, 12)},
    ),
    ('gpt2', 'wpe/weight', 0, {'n_positions': (32, 12)}),
    ('gpt2', 'mlp/c_fc/weight', 1, {'n_inner': (None, 12)}),
    ('t5', 'DenseReluDense/wo/weight', 1, {'d_ff': (24, 12)}),
    ('vit', 'intermediate/dense/weight', 0, {'intermediate_size': (24, 12)}),
  ],
)  # fmt: skip
def test_sizes_follow(name, ending, axis, expected):
  before = tensors_of(name)
  after = sized(before, ending, axis, 12)
  assert expected == changes(configs.edited(config_of(name), before, after))


def test_heads_that_are_removed_keep_their_size():
  before = tensors_of('llama')  # Four heads of 4.
  after = sized(before, 'q_proj/weight', 0, 8)
  edited = configs.edited(config_of('llama'), before, after)
  assert {'num_attention_heads': (4, 2)} == changes(edited)
  assert edited.config['head_dim'] == 4

  config = config_of('llama')
  del config['head_dim']
  edited = configs.edited(config, before, after)
  assert {'num_attention_heads': (4, 2), 'head_dim': (None, 4)} == changes(
    edited
  )


def test_heads_that_transformers_cannot_load_are_said():
  before = tensors_of('bert')
  after = sized(before, 'attention/self/query/weight', 0, 8)
  edited = configs.edited(config_of('bert'), before, after)
  assert {'num_attention_heads': (4, 2)} == changes(edited)
  [said] = edited.warnings
  assert '2 heads of 4 are not hidden_size = 16' in said
  assert 'cannot load' in said


def test_half_a_head_is_said():
  before = tensors_of('llama')
  after = sized(before, 'q_proj/weight', 0, 10)
  edited = configs.edited(config_of('llama'), before, after)
  assert edited.changes == ()
  assert (
    'num_attention_heads: 10 places cannot be heads of 4'
    in (edited.warnings[0])
  )


def test_sizes_that_differ_between_layers_are_said():
  before = tensors_of('llama')
  after = sized(before, '1/mlp/gate_proj/weight', 0, 12)
  edited = configs.edited(config_of('llama'), before, after)
  assert edited.changes == ()
  assert (
    'intermediate_size: config.json has one number, and the tensors'
    in (edited.warnings[0])
  )


def test_a_statement_that_was_wrong_before_is_left():
  config = {**config_of('llama'), 'intermediate_size': 99}
  before = tensors_of('llama')
  after = sized(before, 'mlp/gate_proj/weight', 0, 12)
  edited = configs.edited(config, before, after)
  assert edited.changes == ()
  [said] = edited.warnings
  assert 'intermediate_size is 99 in config.json and 24 in the tensors' in said


def test_a_head_of_its_own_is_not_tied():
  before = tensors_of('gemma')
  embedding = before['model', 'embed_tokens', 'weight']
  after = {**before, ('lm_head', 'weight'): embedding}
  config = config_of('gemma')
  assert config['tie_word_embeddings'] is True
  edited = configs.edited(config, before, after)
  assert {'tie_word_embeddings': (True, False)} == changes(edited)
  # It is the default of Gemma where nothing is said.
  del config['tie_word_embeddings']
  edited = configs.edited(config, before, after)
  assert {'tie_word_embeddings': (None, False)} == changes(edited)


def test_a_head_that_is_gone_is_tied_only_by_tie():
  before = tensors_of('llama')
  after = {p: leaf for p, leaf in before.items() if p[0] != 'lm_head'}
  edited = configs.edited(config_of('llama'), before, after, tied=True)
  assert {'tie_word_embeddings': (False, True)} == changes(edited)
  edited = configs.edited(config_of('llama'), before, after)
  assert edited.changes == ()
  assert 'transformers would draw a new head' in edited.warnings[0]


@pytest.mark.parametrize('key', ['dtype', 'torch_dtype'])
def test_the_dtype_follows(key):
  config = config_of('llama')
  del config['dtype']
  config[key] = 'float32'
  before = tensors_of('llama')
  after = {
    path: Leaf(leaf.load, leaf.shape, 'bfloat16')
    for path, leaf in before.items()
  }
  assert {key: ('float32', 'bfloat16')} == changes(
    configs.edited(config, before, after)
  )


def test_a_dtype_that_transformers_does_not_load_is_said():
  before = tensors_of('llama')
  after = {
    path: Leaf(leaf.load, leaf.shape, 'float8_e4m3fn')
    for path, leaf in before.items()
  }
  edited = configs.edited(config_of('llama'), before, after)
  assert edited.changes == ()
  assert 'most numbers are float8_e4m3fn' in edited.warnings[0]


def test_tokens_beyond_the_vocabulary_are_said():
  config = {**config_of('llama'), 'eos_token_id': [2, 30]}
  before = tensors_of('llama')
  after = sized(before, 'embed_tokens/weight', 0, 20)
  edited = configs.edited(config, before, after)
  assert (
    'eos_token_id is [2, 30] in config.json, and the vocabulary has'
    in (edited.warnings[0])
  )


def test_items_by_layer_follow_their_layers():
  kinds = ['full_attention', 'sliding_attention', 'full_attention']
  config = {**config_of('qwen2'), 'layer_types': kinds}
  before = tensors_of('qwen2')
  after = {p: leaf for p, leaf in before.items() if '2' not in p}
  edited = configs.edited(config, before, after, sources=lambda pattern: [1, 0])
  assert edited.config['layer_types'] == [kinds[1], kinds[0]]
  edited = configs.edited(config, before, after)
  assert edited.config['layer_types'] == kinds
  assert 'which of the 3 each of the 2 is' in edited.warnings[0]


def test_what_the_user_states_decides():
  before = tensors_of('llama')
  after = sized(before, 'mlp/gate_proj/weight', 0, 12)
  given = {'intermediate_size': 7, 'rope.theta': 2.5, 'new': [1]}
  config = {**config_of('llama'), 'rope': {'theta': 1.0, 'kind': 'a'}}
  edited = configs.edited(config, before, after, given=given)
  assert edited.config['intermediate_size'] == 7
  assert edited.config['rope'] == {'theta': 2.5, 'kind': 'a'}
  assert edited.config['new'] == [1]
  assert config['rope'] == {'theta': 1.0, 'kind': 'a'}
  with pytest.raises(surgery.SurgeryError, match='nothing lies beneath it'):
    configs.edited(config, before, after, given={'hidden_act.kind': 1})


def test_of_an_unknown_architecture_stale_fields_are_named():
  config = {
    'model_type': 'mamba9',
    'num_layers': 3,
    'd_model': 16,
    'vocab_size': 40,
    'text': {'intermediate_size': 24, 'beams': 3},
  }
  before = tensors_of('llama')
  after = {p: leaf for p, leaf in before.items() if '1' not in p}
  after = sized(sized(after, 'weight', 0, 12), 'down_proj/weight', 1, 12)
  edited = configs.edited(config, before, after)
  assert edited.config == config
  [said] = edited.warnings
  assert "the architecture 'mamba9' is not known" in said
  assert (
    'stale: num_layers = 3, vocab_size = 40, text.intermediate_size = 24.'
    in said
  )
  edited = configs.edited(config, before, before)
  assert edited.warnings == ()


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('3', 3), ('true', True), ('null', None), ('"3"', '3'), ('silu', 'silu'),
    ('[1, 2]', [1, 2]), ('1e-5', 1e-5), ('', ''),
  ],
)  # fmt: skip
def test_values_are_json_or_text(text, expected):
  value = configs.value_of(text)
  assert (type(expected), expected) == (type(value), value)
