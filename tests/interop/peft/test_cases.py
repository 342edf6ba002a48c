"""Folders that `tests/data/peft_cases/make.py` made, merged and written again."""

import json
import pathlib
import shutil

import blox as bx
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import surgery

DATA = pathlib.Path(__file__).parents[2] / 'data' / 'peft_cases'
CASES = (
  'net/large_rank',
  'net/matrix',
  'net/mica',
  'net/pissa_niter',
  'net/rows',
  'tied/rows_tied',
  'tied/rows_ensured',
  'tied/saved_ensured',
  'moe/experts',
  'moe/experts_one',
  'moe/experts_patterns',
  'moe_turned/experts_turned',
  'moe_square/experts_square',
)


def run(steps, folder, out, base=None, **more):
  surgery.Recipe(
    steps,
    inputs={
      'model': base or folder.parent / 'base.safetensors',
      'adapter': folder,
    },
    outputs={'out': {'path': out, **more}},
  ).plan().write()
  return out


@pytest.mark.parametrize('name', CASES)
def test_a_merge_is_that_of_peft(name, tmp_path):
  folder = DATA / name
  expected = load_file(folder.parent / 'base.safetensors')
  expected |= load_file(folder / 'merged_changed.safetensors')
  steps = [{'merge': {'with': 'adapter'}}]
  found = load_file(run(steps, folder, tmp_path / 'out.safetensors'))
  assert set(expected) == set(found)
  for key, value in expected.items():
    np.testing.assert_allclose(found[key], value, atol=2e-5, err_msg=key)


@pytest.mark.parametrize('name', CASES)
def test_what_was_read_is_written_as_it_was(name, tmp_path):
  folder = DATA / name
  adapted = tmp_path / 'adapted.msgpack'
  run([{'attach': {'from': 'adapter'}}], folder, adapted)
  surgery.Recipe(
    [{'extract': None, 'as': 'alone'}],
    inputs={'model': adapted},
    outputs={
      'out': {'path': tmp_path / 'out', 'of': 'alone', 'format': 'peft'}
    },
  ).plan().write()
  expected = load_file(folder / 'adapter_model.safetensors')
  found = load_file(tmp_path / 'out' / 'adapter_model.safetensors')
  assert set(expected) == set(found)
  for key, value in expected.items():
    np.testing.assert_array_equal(found[key], value, err_msg=key)
  said = json.loads((folder / 'adapter_config.json').read_text())
  assert said == json.loads((tmp_path / 'out/adapter_config.json').read_text())


def test_an_update_of_a_grouped_convolution_is_refused(tmp_path):
  with pytest.raises(
    surgery.RecipeError, match='grouped convolution has no update of its shape'
  ):
    run(
      [{'merge': {'with': 'adapter'}}],
      DATA / 'conv/lora_groups',
      tmp_path / 'out.safetensors',
    )


def test_a_base_that_training_changed_is_taken_when_it_is_meant(
  experts, tmp_path
):
  name = 'residual/pissa_residual'
  with pytest.raises(surgery.RecipeError, match='the folder does not hold how'):
    merged(experts(name), tmp_path)
  shutil.rmtree(tmp_path / 'case')
  found = merged(experts(name, init_lora_weights=True), tmp_path)
  expected = load_file(DATA / name / 'merged_changed.safetensors')
  for key, value in expected.items():
    np.testing.assert_allclose(found[key], value, atol=2e-5, err_msg=key)


@pytest.mark.parametrize(
  ('begins', 'message'),
  [
    ('loftq', 'PEFT cannot save it as a difference'),
    ('corda', 'path_initial_model_for_weight_conversion=FOLDER'),
    ('lora_ga', 'as training had it .get_base_model..'),
    ('pissa_niter_16', 'set init_lora_weights to true in'),
    ('later', 'is not known, and may have changed the base'),
  ],
)
def test_a_beginning_that_changed_the_base_says_how_to_save_it(
  experts, tmp_path, begins, message
):
  with pytest.raises(surgery.RecipeError, match=message):
    merged(experts('net/mica', init_lora_weights=begins), tmp_path)


# Experts.


@pytest.fixture
def experts(tmp_path):
  """Copies a case, and returns it with a function that changes what it has."""

  def copied(name, *, tensors=None, base=None, **said):
    folder = tmp_path / 'case' / pathlib.Path(name).name
    shutil.copytree((DATA / name).parent, folder.parent)
    path = folder / 'adapter_config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}))
    for change, file in (
      (tensors, folder / 'adapter_model.safetensors'),
      (base, folder.parent / 'base.safetensors'),
    ):
      if change is not None:
        found = load_file(file)
        change(found)
        save_file(found, file)
    return folder

  return copied


def merged(folder, tmp_path):
  return load_file(
    run([{'merge': {'with': 'adapter'}}], folder, tmp_path / 'out.safetensors')
  )


WRAPPER = 'base_model.model.layers.0.experts'


def without_one(found):
  for name in 'AB':
    del found[f'{WRAPPER}.base_layer.lora_{name}.weight']


def alike(found):
  # Both parameters and both weights have the same shapes.
  for place in ('base_layer.', ''):
    found[f'{WRAPPER}.{place}lora_A.weight'] = np.ones((6, 6), 'float32')
    found[f'{WRAPPER}.{place}lora_B.weight'] = np.ones((6, 6), 'float32')


def square(found):
  for name in ('gate_up_proj', 'down_proj'):
    found[f'layers.0.experts.{name}'] = np.ones((3, 6, 6), 'float32')


@pytest.mark.parametrize(
  ('name', 'changes', 'message'),
  [
    (
      'moe/experts',
      {'tensors': without_one},
      'no tensors for: layers.0.experts.gate_up_proj',
    ),
    (
      'moe/experts',
      {'target_parameters': ['experts.down_proj']},
      r'expected weights of 1 parameters.*found weights of 2',
    ),
    (
      'moe/experts',
      {'target_parameters': None},
      'no place in the base for: layers.0.experts',
    ),
    (
      'moe/experts',
      {'tensors': alike, 'base': square},
      'do not tell which parameter its weights are for',
    ),
    (
      'moe_square/experts_square',
      {
        'tensors': without_one,
        'target_parameters': ['experts.down_proj'],
      },
      r'experts/down_proj \(6, 6\) are square, and nothing tells whether',
    ),
    ('moe/experts_one', {'r': 3}, r'expected shape \(9, 10\), found \(6, 10\)'),
    ('moe/experts', {'target_parameters': 'x'}, 'expected a list of names'),
  ],
)
def test_experts_that_do_not_fit_are_refused(
  experts, tmp_path, name, changes, message
):
  folder = experts(name, **changes)
  with pytest.raises(surgery.RecipeError, match=message):
    merged(folder, tmp_path)


def test_experts_whose_ranks_were_pruned_are_written(tmp_path):
  folder = DATA / 'moe/experts'
  base = surgery.open(folder.parent / 'base.safetensors')
  params = surgery.load_adapter(folder, surgery.load(base.origin))
  site = 'layers/0/experts/down_proj'
  params = surgery.prune_ranks(params, {site: [1]})
  surgery.save_adapter(tmp_path / 'out', params, format='peft')
  said = json.loads((tmp_path / 'out/adapter_config.json').read_text())
  assert said['rank_pattern'] == {r'^layers\.0\.experts\.down_proj': 1}
  assert said['target_modules'] == ['layers.0.q_proj']
  assert said['target_parameters'] == [
    'layers.0.experts.down_proj',
    'layers.0.experts.gate_up_proj',
  ]
  plain = surgery.load(base.origin)
  again = surgery.load_adapter(tmp_path / 'out', plain)
  for path, value in surgery.merge(params).items():
    np.testing.assert_allclose(
      surgery.merge(again)[path].value, value.value, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
  ('names', 'options', 'message'),
  [
    (('a', 'b'), {}, 'not known of experts .a, b.. Merge it instead'),
    (('up_proj',), {'dropout': 0.5}, 'does not have for parameters of experts'),
    (('kernel',), {}, 'unstack the model first'),
  ],
)
def test_experts_that_peft_cannot_have_are_not_written(
  tmp_path, names, options, message
):
  params = bx.Params()
  for name in names:
    params['experts', name] = bx.Param(jnp.ones((3, 8, 4)))
  params = surgery.attach(
    params.locked(), surgery.LoRA(rank=2, **options), to='all', stacked=1
  )
  with pytest.raises(surgery.FormatError, match=message):
    surgery.save_adapter(tmp_path / 'out', params, format='peft')
  assert not (tmp_path / 'out').exists()


# Rows of embeddings, and what is tied.


def test_a_lora_on_a_tied_embedding_is_one_update_for_both(tmp_path):
  folder = DATA / 'tied/lora_ensured'
  found = merged(folder, tmp_path)
  x = load_file(folder.parent / 'inputs.safetensors')['x']
  table = found['model.embed_tokens.weight']
  weight, bias = found['model.fc.weight'], found['model.fc.bias']
  h = table[x]
  y = (h + np.tanh(h @ weight.T + bias)) @ table.T
  expected = load_file(folder / 'y.safetensors')['y']
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_copies_for_a_tied_head_are_written_again(tmp_path):
  for name in ('tied/lora_ensured', 'tied/saved_ensured'):
    folder = DATA / name
    plain = surgery.load(folder.parent / 'base.safetensors')
    params = surgery.load_adapter(folder, plain)
    out = tmp_path / folder.name
    surgery.save_adapter(out, params, format='peft')
    expected = {
      key: value
      for key, value in load_file(folder / 'adapter_model.safetensors').items()
      # Embeddings that PEFT saves along, as the base has them.
      if 'base_layer' not in key
    }
    tensors = load_file(out / 'adapter_model.safetensors')
    assert set(expected) == set(tensors)
    for key, value in expected.items():
      np.testing.assert_array_equal(tensors[key], value, err_msg=key)


def test_a_head_that_is_no_copy_has_no_place(experts, tmp_path):
  def other(found):
    found['base_model.model.lm_head.weight'][0, 0] += 1

  folder = experts('tied/saved_ensured', tensors=other)
  with pytest.raises(
    surgery.RecipeError, match='no place .*for: lm_head.weight'
  ):
    merged(folder, tmp_path)


ROWS = 'base_model.model.emb.token_adapter.trainable_tokens_delta'


def widened(found):
  found[ROWS] = np.ones((3, 9), 'float32')


def gone(found):
  del found[ROWS]


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'trainable_token_indices': {'emb': [7, 2]}}, r'shape is \(12, 8\), by'),
    (
      {'trainable_token_indices': {'emb': [7, 2, 12]}},
      'resize that of the base',
    ),
    ({'trainable_token_indices': {'emb': [7, 2, 7]}}, 'is there twice'),
    ({'trainable_token_indices': {'emb': [7, 2, -1]}}, 'a list of row numbers'),
    ({'trainable_token_indices': {'emb': 'x'}}, 'a list of row numbers'),
    ({'trainable_token_indices': {'fc0': [7, 2, 9]}}, 'no tensors for: fc0'),
    ({'trainable_token_indices': None}, r'by trainable_token_indices None'),
    ({'tensors': widened}, r'found a tensor of shape \(3, 9\)'),
    ({'tensors': gone}, 'no tensors for: emb'),
  ],
)
def test_rows_that_do_not_fit_are_refused(experts, tmp_path, changes, message):
  folder = experts('net/rows', **changes)
  with pytest.raises(surgery.RecipeError, match=message):
    merged(folder, tmp_path)


def test_rows_are_those_of_a_jax_model_too_and_no_others_are_lost(tmp_path):
  folder = DATA / 'net/rows'
  base = load_file(folder.parent / 'base.safetensors')
  params = bx.Params()
  for name, value in base.items():
    layer, last = name.split('.')
    if last == 'weight':
      last, value = (
        ('embedding', value) if layer == 'emb' else ('kernel', value.T)
      )
    params['net', layer, last] = bx.Param(jnp.asarray(value))
  params = surgery.load_adapter(folder, params.locked())
  expected = load_file(folder / 'merged_changed.safetensors')
  table = surgery.merge(params)['net', 'emb', 'embedding'].value
  np.testing.assert_array_equal(table, expected['emb.weight'])
  surgery.save_adapter(tmp_path / 'out', params, format='peft')
  tensors = load_file(tmp_path / 'out/adapter_model.safetensors')
  np.testing.assert_array_equal(
    tensors[ROWS], load_file(folder / 'adapter_model.safetensors')[ROWS]
  )
  [path] = surgery.adapters(params)[0].saved
  where = next(
    p for p in params.keys() if p[:2] == path[:2] and 'saved' in p[-1]
  )
  # PEFT trains these rows alone, so nothing of it trains here by itself.
  assert not params[where].trainable
  changed = params.unlocked()
  value = jnp.asarray(params[where].value)
  changed[where] = params[where].replace(value=value.at[7].add(1))
  surgery.save_adapter(tmp_path / 'row', changed.locked(), format='peft')
  found = load_file(tmp_path / 'row/adapter_model.safetensors')[ROWS]
  np.testing.assert_array_equal(found[0], value[7] + 1)
  changed[where] = params[where].replace(value=value.at[0].add(1))
  with pytest.raises(
    surgery.FormatError, match='other rows than .7, 2, 9. have'
  ):
    surgery.save_adapter(tmp_path / 'other', changed.locked(), format='peft')
  surgery.save_adapter(
    tmp_path / 'all', changed.locked(), format='peft', names={'emb': 'net/emb'}
  )
  said = json.loads((tmp_path / 'all/adapter_config.json').read_text())
  assert said['modules_to_save'] == ['emb']
