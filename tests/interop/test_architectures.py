"""Parts of configurations, experts, and what is stated of each layer.

What transformers derives from a configuration is written out here by hand.
"""

import json

import numpy as np
import pytest

import surgery
from surgery.interop import architectures, configs
from surgery.model.checkpoint import Leaf
from tests.interop.shapes import NAMES, config_of, folder_of, tensors_of


def changes(edited):
  return {change.key: (change.old, change.new) for change in edited.changes}


def parts_of(name):
  config = config_of(name)
  return [
    (part, config[part.above] if part.above else config)
    for part in architectures.parts(config)
    if part.architecture is not None
  ]


def without(tensors, *fronts):
  """Tensors that lie beneath none of some paths."""
  return {
    path: leaf
    for path, leaf in tensors.items()
    if not any(f'{one}/' in '/'.join(path) for one in fronts)
  }


def run(source, steps, **target):
  """The configuration and the report of a folder that a recipe writes."""
  out = source.with_name('out')
  outputs = {'out': {'path': f'{out}/', **target}}
  plan = surgery.Recipe(steps, outputs=outputs).run(model=source)
  found = json.loads((out / 'config.json').read_text())
  return found, plan.report()['folder']


@pytest.mark.parametrize('name', NAMES)
def test_formulae_give_what_transformers_wrote(name):
  tensors = tensors_of(name)
  found = 0
  for part, config in parts_of(name):
    one, own = part.architecture, part.of(tensors)
    for key, measure in {**one.layers, **one.sizes}.items():
      key = one.name(key, config)
      # What a file has none of is stated, too: dense layers, projections.
      if measure(own):
        assert {config[key]} == measure(own), (part.above, key)
        found += 1
    for key, measure in one.heads.items():
      size = config.get(one.head_size or '') or (
        config[one.hidden] // config[next(iter(one.heads))]
      )
      assert {config[key] * size} == measure(own), (part.above, key)
  assert found > 4


@pytest.mark.parametrize('name', NAMES)
def test_what_does_not_change_is_not_changed(name):
  config, tensors = config_of(name), tensors_of(name)
  edited = configs.edited(config, tensors, tensors)
  assert (config, (), ()) == (edited.config, edited.changes, edited.warnings)


@pytest.mark.parametrize('name', NAMES)
def test_of_each_part_the_first_layer_may_go(name):
  config, before = config_of(name), tensors_of(name)
  for part, inside in parts_of(name):
    for key, count in part.architecture.layers.items():
      old = inside[key]
      after, number = (
        {},
        lambda path, count=count: architectures.number(count.pattern, path),
      )
      for path, leaf in before.items():
        layer = number(path) if part.has(path) else None
        if layer is None or layer > 0:
          after[path if layer is None else lowered(path, layer)] = leaf
      kept = list(range(1, old))
      edited = configs.edited(
        config, before, after, sources=lambda number, kept=kept: kept
      )
      assert (old, old - 1) == changes(edited).pop(part.key(key))
      assert edited.warnings == ()
      # All else that changes has an item for each layer, or numbers of layers.
      assert all(
        isinstance(new, list)
        for changed, (_, new) in changes(edited).items()
        if changed != part.key(key)
      ), edited.changes


def lowered(path, layer):
  """A path with the number of its layer one less."""
  at = path.index(str(layer))
  return (*path[:at], str(layer - 1), *path[at + 1 :])


def test_a_language_model_inside_changes_alone(tmp_path):
  source = folder_of('gemma3-vision', tmp_path / 'in')
  before = config_of('gemma3-vision')
  layers = 'language_model/model/layers'
  steps = [
    {'cast': 'bf16'}, {'drop': f'{layers}/1'}, {'renumber': f'{layers}/<i>'},
  ]  # fmt: skip
  found, report = run(source, steps)
  # Which layer each one was is known although all were cast.
  before['text_config']['num_hidden_layers'] = 2
  before['text_config']['layer_types'] = ['sliding_attention'] * 2
  before['dtype'] = 'bfloat16'
  assert before == found
  assert [] == report['warnings']
  assert {
    'key': 'text_config.num_hidden_layers',
    'old': 3,
    'new': 2,
    'why': 'layers of layers/<i>/**',
  } in report['config']


def test_an_encoder_of_images_inside_changes_alone(tmp_path):
  source = folder_of('gemma3-vision', tmp_path / 'in')
  found, report = run(source, [{'drop': 'vision_tower/encoder/layers/1'}])
  expected = config_of('gemma3-vision')
  expected['vision_config']['num_hidden_layers'] = 1
  assert expected == found
  assert [] == report['warnings']


def test_the_vocabulary_of_a_language_model_inside(tmp_path):
  config = {**config_of('llava'), 'vocab_size': 40}
  config['text_config']['torch_dtype'] = 'float32'
  source = folder_of('llava', tmp_path / 'in', config)
  tables = ['**/embed_tokens/weight', '**/lm_head/weight']
  found, report = run(
    source, [{'resize-vocab': {'select': tables, 'size': 39}}, {'cast': 'bf16'}]
  )
  # The whole repeats it, and both say a dtype.
  assert 39 == found['text_config']['vocab_size'] == found['vocab_size']
  assert 'bfloat16' == found['dtype'] == found['text_config']['torch_dtype']
  [said] = report['warnings']
  assert 'image_token_index is 39 in config.json, and the vocabulary' in said


def test_older_files_describe_the_language_model_by_the_whole():
  # As Qwen2-VL-7B-Instruct has it.
  said = config_of('qwen2-vl')
  vision = said['vision_config']
  del vision['model_type']
  config = {**said, **said['text_config'], 'model_type': 'qwen2_vl'}
  del config['text_config'], config['layer_types']
  before = tensors_of('qwen2-vl')
  after = without(before, 'visual/blocks/1', 'layers/2')
  edited = configs.edited(config, before, after)
  assert {
    'num_hidden_layers': (3, 2),
    'vision_config.depth': (2, 1),
  } == changes(edited)
  assert edited.warnings == ()


def test_parts_that_are_repeated_for_older_programs_follow():
  # As openai/clip-vit-large-patch14 has it.
  config = config_of('clip')
  config['text_config_dict'] = {'num_hidden_layers': 3, 'projection_dim': 12}
  before = tensors_of('clip')
  edited = configs.edited(
    config, before, without(before, 'text_model/encoder/layers/2')
  )
  assert {
    'text_config.num_hidden_layers': (3, 2),
    'text_config_dict.num_hidden_layers': (3, 2),
  } == changes(edited)


def test_what_a_part_leaves_out_is_stated_when_it_changes():
  # As gemma-3-4b-it has it: 3 layers of 34, heads and vocabulary by default.
  config = config_of('gemma3-vision')
  config['text_config'] = {
    'model_type': 'gemma3_text',
    'num_hidden_layers': 3,
    'sliding_window_pattern': 2,
  }
  before = tensors_of('gemma3-vision')
  after = without(before, 'language_model/model/layers/0')
  kinds = ['sliding_attention', 'full_attention', 'sliding_attention']
  after = {
    lowered(p, int(p[3])) if p[:3] == ('language_model', 'model', 'layers')
    else p: leaf
    for p, leaf in after.items()
  }  # fmt: skip
  edited = configs.edited(config, before, after, sources=lambda number: [1, 2])
  # By its pattern the first would have a window now.
  assert {
    'text_config.num_hidden_layers': (3, 2),
    'text_config.layer_types': (None, kinds[1:]),
  } == changes(edited)
  last = configs.edited(
    config, before, without(before, 'model/layers/2'),
    sources=lambda number: [0, 1],
  )  # fmt: skip
  assert {'text_config.num_hidden_layers': (3, 2)} == changes(last)


def test_a_part_of_an_unknown_architecture_names_what_looks_stale():
  config = config_of('llava')
  config['text_config']['model_type'] = 'mamba9'
  before = tensors_of('llava')
  edited = configs.edited(config, before, without(before, 'model/layers/2'))
  assert edited.changes == ()
  [said] = edited.warnings
  assert "the architecture 'mamba9' is not known, so text_config is" in said
  assert 'text_config.num_hidden_layers = 3' in said


def test_what_the_user_states_of_a_part_decides(tmp_path):
  source = folder_of('gemma3-vision', tmp_path / 'in')
  found, report = run(
    source,
    [{'drop': 'language_model/model/layers/2'}],
    config={'text_config.num_hidden_layers': 7},
  )
  assert 7 == found['text_config']['num_hidden_layers']
  assert ['sliding_attention', 'full_attention'] == (
    found['text_config']['layer_types']
  )
  assert [] == report['warnings']


def test_a_head_of_a_language_model_inside_is_tied_by_both(tmp_path):
  config = config_of('llava')
  source = folder_of('llava', tmp_path / 'in', config)
  assert config['tie_word_embeddings'] is False
  rule = 'language_model/{model/embed_tokens,lm_head}/weight'
  left, right = (
    f'language_model/{n}/weight' for n in ('model/embed_tokens', 'lm_head')
  )
  del rule
  found, _ = run(
    source, [{'tie': {'rules': f'{left} -> {right}', 'check': False}}]
  )
  assert found['tie_word_embeddings'] is True
  assert found['text_config']['tie_word_embeddings'] is True


# Experts.


def test_experts_that_go_are_stated(tmp_path):
  source = folder_of('mixtral', tmp_path / 'in')
  experts = 'model/layers/*/block_sparse_moe/experts'
  steps = [
    {'drop': [f'{experts}/1', f'{experts}/2', f'{experts}/3']},
    {'slice': {'select': '**/gate/weight', 'axis': 0, 'keep': ':1'}},
  ]
  found, report = run(source, steps)
  # A token cannot go to two experts of one.
  expected = {'num_local_experts': 1, 'num_experts_per_tok': 1}
  assert {**config_of('mixtral'), **expected} == found
  assert [] == report['warnings']


@pytest.mark.parametrize('name', ['mixtral', 'qwen2-moe', 'qwen3-moe'])
def test_routers_for_other_experts_are_said(name):
  config, before = config_of(name), tensors_of(name)
  key = 'num_experts' if name == 'qwen2-moe' else 'num_local_experts'
  edited = configs.edited(config, before, without(before, 'experts/3'))
  assert {key: (4, 3)} == changes(edited)
  [said] = edited.warnings
  assert f'{key}: there are 3 experts, and routers for 4' in said
  # Layers with gaps, or with different numbers, have no number.
  for gone in ('experts/1', 'layers/2/mlp/experts/3'):
    after = without(before, gone)
    if after != before:
      edited = configs.edited(config, before, after)
      assert edited.changes == ()
      assert edited.warnings


def test_layers_without_experts_keep_being_so():
  config, before = config_of('qwen2-moe'), tensors_of('qwen2-moe')
  order = [1, 0, 2]
  after = {}
  for path, leaf in before.items():
    if path[1] == 'layers':
      path = (*path[:2], str(order.index(int(path[2]))), *path[3:])
    after[path] = leaf
  edited = configs.edited(config, before, after, sources=lambda number: order)
  full, window = 'full_attention', 'sliding_attention'
  assert {
    'mlp_only_layers': ([1], [0]),
    'layer_types': ([window, full, full], [full, window, full]),
  } == changes(edited)
  # Where each second layer has experts, a list has to say which.
  config['mlp_only_layers'], config['decoder_sparse_step'] = [], 2
  edited = configs.edited(config, before, after, sources=lambda number: order)
  assert [1, 2] == edited.config['mlp_only_layers']
  assert 1 == edited.config['decoder_sparse_step']


def test_llama_4_says_more_of_its_layers():
  config, before = config_of('llama4'), tensors_of('llama4')
  text = config['text_config']
  text['no_rope_layers'] = [1, 0, 1]
  text['layer_types'] = [
    'chunked_attention',
    'full_attention',
    'chunked_attention',
  ]
  after = {
    lowered(p, int(p[3])) if p[:3] == ('language_model', 'model', 'layers')
    else p: leaf
    for p, leaf in without(before, 'language_model/model/layers/0').items()
  }  # fmt: skip
  edited = configs.edited(config, before, after, sources=lambda number: [1, 2])
  assert {
    'text_config.num_hidden_layers': (3, 2),
    'text_config.no_rope_layers': ([1, 0, 1], [0, 1]),
    'text_config.layer_types': (
      text['layer_types'], ['full_attention', 'chunked_attention'],
    ),
    'text_config.moe_layers': ([1], [0]),
  } == changes(edited)  # fmt: skip
  # And where nothing is listed, so that intervals decide.
  text.update(moe_layers=None, no_rope_layers=[], no_rope_layer_interval=2)
  del text['layer_types']
  edited = configs.edited(config, before, after, sources=lambda number: [1, 2])
  assert {
    'text_config.num_hidden_layers': (3, 2),
    'text_config.no_rope_layers': ([], [0, 1]),
    'text_config.moe_layers': (None, [0]),
  } == changes(edited)


# What is stated of each layer.


def test_windows_of_the_last_layers_follow():
  full, window = 'full_attention', 'sliding_attention'
  config = {
    **config_of('qwen2-vl')['text_config'],
    'model_type': 'qwen2',
    'use_sliding_window': True,
    'sliding_window': 8,
    'max_window_layers': 2,
  }
  del config['layer_types']
  before = without(tensors_of('qwen2-vl'), 'visual')
  order = {'first gone': [1, 2], 'turned': [2, 1, 0]}
  expected = {
    'first gone': {'max_window_layers': (2, 1), 'num_hidden_layers': (3, 2)},
    # No number of layers says this.
    'turned': {'layer_types': (None, [window, full, full])},
  }
  for what, sources in order.items():
    after = without(before, *(f'layers/{k}' for k in range(len(sources), 3)))
    edited = configs.edited(
      config, before, after, sources=lambda number, s=sources: s
    )
    assert expected[what] == changes(edited), what


def test_layers_that_changed_places_take_their_items_along(tmp_path):
  config = config_of('gemma3-vision')
  source = folder_of('gemma3-vision', tmp_path / 'in', config)
  layers = 'language_model/model/layers'
  found, _ = run(
    source,
    [
      {
        'rename': [
          f'{layers}/0/** -> {layers}/1/**',
          f'{layers}/1/** -> {layers}/0/**',
        ]
      }
    ],
  )
  assert ['full_attention', 'sliding_attention', 'sliding_attention'] == (
    found['text_config']['layer_types']
  )


def test_what_was_stacked_tells_no_layer(tmp_path):
  source = folder_of('gemma3-vision', tmp_path / 'in')
  layers = 'language_model/model/layers'
  steps = [
    {'drop': f'{layers}/0'}, {'renumber': f'{layers}/<i>'},
    {'stack': f'{layers}/<i>/** -> {layers}/**'},
    {'unstack': f'{layers}/** -> {layers}/<i>/**'},
  ]  # fmt: skip
  found, report = run(source, steps)
  assert 2 == found['text_config']['num_hidden_layers']
  [said] = report['warnings']
  assert (
    'text_config.layer_types tells the layers of '
    'text_config.num_hidden_layers apart in config.json, and it is not known '
    'which of the 3 each of the 2 is' in said
  )


def test_lists_of_other_things_stay():
  config = {
    **config_of('roberta'),
    'eos_token_id': [2, 3], 'sections': [1, 2], 'attention_kinds': ['a', 'b'],
  }  # fmt: skip
  before = tensors_of('roberta')
  edited = configs.edited(
    config, before, without(before, 'layer/1'), sources=lambda number: [0]
  )
  assert {
    'num_hidden_layers': (2, 1),
    'attention_kinds': (['a', 'b'], ['a']),
  } == changes(edited)


def test_what_follows_from_another_key_is_stated_where_it_stays():
  config = config_of('mt5')
  config['num_layers'] = config['num_decoder_layers'] = 2
  del config['num_decoder_layers']
  before = without(tensors_of('mt5'), 'encoder/block/2')
  after = without(before, 'encoder/block/1')
  edited = configs.edited(config, before, after)
  assert {
    'num_layers': (2, 1), 'num_decoder_layers': (None, 2),
  } == changes(edited)  # fmt: skip
  both = without(after, 'decoder/block/1')
  edited = configs.edited(config, before, both)
  assert {'num_layers': (2, 1)} == changes(edited)
  assert edited.warnings == ()


def test_key_heads_that_are_as_many_as_heads_need_no_word():
  config = config_of('llava')['text_config']
  config['num_key_value_heads'] = None
  before = {
    path[1:]: cut(leaf, 16)
    if path[-2:-1] in (('k_proj',), ('v_proj',))
    else leaf
    for path, leaf in tensors_of('llava').items()
    if path[0] == 'language_model'
  }
  fewer = {
    path: cut(leaf, 8) if path[-2][:1] in 'qkv' and path[-2][1:] == '_proj'
    else leaf
    for path, leaf in before.items()
  }  # fmt: skip
  edited = configs.edited(config, before, fewer)
  assert {'num_attention_heads': (4, 2)} == changes(edited)
  assert edited.warnings == ()
  only = {
    path: cut(leaf, 8) if path[-2] == 'q_proj' else leaf
    for path, leaf in before.items()
  }
  edited = configs.edited(config, before, only)
  assert {
    'num_attention_heads': (4, 2), 'num_key_value_heads': (None, 4),
  } == changes(edited)  # fmt: skip


def cut(leaf, rows):
  return Leaf(leaf.load, (rows, *leaf.shape[1:]), leaf.dtype)


# Names of classes.


@pytest.mark.parametrize(
  ('steps', 'names'),
  [
    ([{'slice': {'axis': 0, 'keep': ':2'}}], ['neg', 'neutral']),
    ([{'slice': {'axis': 0, 'keep': '1:'}}], ['neutral', 'pos']),
    ([{'slice': {'axis': 0, 'keep': '1:'}}, {'cast': 'bf16'}], None),
    ([{'resize-vocab': {'size': 5}}], ['neg', 'neutral', 'pos', 'LABEL_3', 'LABEL_4']),
  ],
  ids=['first', 'last', 'cast', 'more'],
)  # fmt: skip
def test_names_of_classes_follow_the_rows(tmp_path, steps, names):
  source = folder_of('bert-classes', tmp_path / 'in')
  head = ['classifier/weight', 'classifier/bias']
  steps = [
    {
      k: {'select': head, **v} if isinstance(v, dict) else v
      for k, v in s.items()
    }
    for s in steps
  ]
  found, report = run(source, steps)
  names = names or ['neutral', 'pos']
  assert {str(k): name for k, name in enumerate(names)} == found['id2label']
  assert {name: k for k, name in enumerate(names)} == found['label2id']
  assert [] == report['warnings']


def test_a_head_of_other_classes_has_no_names(tmp_path):
  source = folder_of('bert-classes', tmp_path / 'in')
  steps = [
    {'slice': {'select': 'classifier/*', 'axis': 0, 'keep': ':2'}},
    {'scale': {'select': 'classifier/*', 'by': 2.0}},
  ]
  found, report = run(source, steps)
  assert {'0': 'LABEL_0', '1': 'LABEL_1'} == found['id2label']
  [said] = report['warnings']
  assert '2 of the 2 rows of classifier/weight equal none, or' in said
  assert "--config id2label='{" in said
  stated = {'id2label': {'0': 'no', '1': 'yes'}}
  source.with_name('out').rename(tmp_path / 'first')
  found, report = run(source, steps, config=stated)
  assert stated['id2label'] == found['id2label']
  assert [] == report['warnings']


def test_two_classes_are_stated_once_they_are_three():
  config, before = config_of('bert-classes'), tensors_of('bert-classes')
  head = ('classifier', 'weight')
  rows = np.arange(48, dtype=np.float32).reshape(3, 16)
  two = {**before, head: Leaf(lambda: rows[:2], (2, 16), 'float32')}
  three = {**before, head: Leaf(lambda: rows, (3, 16), 'float32')}
  del config['id2label'], config['label2id']
  edited = configs.edited(config, two, three)
  names = {str(k): f'LABEL_{k}' for k in range(3)}
  assert names == edited.config['id2label']
  config['num_labels'] = 2
  assert 3 == configs.edited(config, two, three).config['num_labels']
