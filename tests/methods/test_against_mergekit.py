"""Whole model folders that mergekit merges, too; run by `nox -s mergekit`."""

import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import surgery
from tests.methods.vocabularies import bpe

pytest.importorskip('mergekit', reason='mergekit is not installed here')

pytestmark = pytest.mark.filterwarnings('ignore')

LLAMA = pathlib.Path(__file__).parents[1] / 'data' / 'hf' / 'llama'
WORDS = [f'w{k}' for k in range(40)]


def folder(path, seed, tokens=None, base=None):
  """Writes a tiny Llama with other numbers, and a tokenizer."""
  shutil.copytree(LLAMA, path)
  config = json.loads((path / 'config.json').read_text())
  rng = np.random.default_rng(seed)
  tensors = load_file(path / 'model.safetensors')
  if base is not None:
    tensors = load_file(base / 'model.safetensors')
  scale = 0.3 if base is not None else 1.0
  for name, value in tensors.items():
    drawn = rng.normal(size=value.shape).astype('f4') * scale
    tensors[name] = value + drawn if base is not None else drawn
  if tokens is not None:
    config['vocab_size'] = len(tokens)
    for name in ('model.embed_tokens.weight', 'lm_head.weight'):
      tensors[name] = rng.normal(size=(len(tokens), 16)).astype('f4')
    (path / 'tokenizer.json').write_text(json.dumps(bpe(tokens)))
    (path / 'tokenizer_config.json').write_text(
      '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
  (path / 'config.json').write_text(json.dumps(config))
  save_file(tensors, path / 'model.safetensors', metadata={'format': 'pt'})
  return path


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  tmp = tmp_path_factory.mktemp('models')
  found = {'base': folder(tmp / 'base', 0)}
  for seed, name in enumerate('abc', start=1):
    found[name] = folder(tmp / name, seed, base=found['base'])
  return found


def merged(config, out):
  """Returns what mergekit makes of a configuration."""
  from mergekit.config import MergeConfiguration
  from mergekit.merge import run_merge
  from mergekit.options import MergeOptions

  said = MergeConfiguration.model_validate(config)
  run_merge(
    said, str(out), MergeOptions(copy_tokenizer=False, quiet=True, device='cpu')
  )
  found: dict[str, Any] = {}
  for file in sorted(out.glob('*.safetensors')):
    found |= load_file(file)
  return found


def tensors(model):
  return {'.'.join(p): np.asarray(leaf.load()) for p, leaf in model.items()}


def close(expected, found):
  assert expected.keys() == found.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(
      found[name], value, rtol=0, atol=4e-6, err_msg=name
    )


# Each with what mergekit calls options of models, and of all.
CASES: list[tuple[str, str, str | None, dict[str, Any], dict[str, Any]]] = [
  ('linear', 'abc', None, {'weight': [0.7, 0.3, 0.2]}, {}),
  ('linear', 'ab', None, {'weight': [1.5, -0.25]}, {'normalize': False}),
  ('slerp', 'ab', 'a', {}, {'t': 0.3}),
  ('slerp', 'ab', 'a', {}, {'t': 0.0}),
  ('slerp', 'ab', 'a', {}, {'t': 1.0}),
  ('nuslerp', 'ab', None, {'weight': [0.6, 0.2]}, {}),
  ('multislerp', 'abc', None, {'weight': [0.5, 0.3, 0.2]}, {}),
  ('karcher', 'abc', None, {}, {}),
  (
    'task_arithmetic', 'abc', 'base',
    {'weight': [0.6, 0.3, 0.5]}, {'lambda': 0.7},
  ),
  (
    'ties', 'abc', 'base',
    {'weight': [0.6, 0.3, 0.5], 'density': [0.5, 0.3, 0.9]}, {},
  ),
  (
    'ties', 'abc', 'base', {'weight': [0.6, 0.3, 0.5], 'density': [0.2] * 3},
    {'normalize': False, 'lambda': 1.3},
  ),
  (
    'breadcrumbs', 'ab', 'base',
    {'weight': [0.6, 0.3], 'density': [0.5] * 2, 'gamma': [0.1] * 2}, {},
  ),
  (
    'breadcrumbs_ties', 'ab', 'base',
    {'weight': [0.6, 0.3], 'density': [0.5] * 2, 'gamma': [0.1] * 2}, {},
  ),
  ('sce', 'abc', 'base', {}, {'select_topk': 0.5}),
  ('model_stock', 'abc', 'base', {}, {}),
  ('model_stock', 'abc', 'base', {}, {'filter_wise': True}),
  ('nearswap', 'a', 'base', {}, {'t': 0.1}),
  ('arcee_fusion', 'a', 'base', {}, {}),
]  # fmt: skip


@pytest.mark.parametrize('case', CASES, ids=lambda case: case[0])
def test_a_merge_is_that_of_mergekit(case, models, tmp_path):
  method, names, base, each, every = case
  config: dict[str, Any] = {
    'merge_method': method, 'dtype': 'float32', 'parameters': every,
    'models': [
      {
        'model': str(models[name]),
        'parameters': {key: values[k] for key, values in each.items()},
      }
      for k, name in enumerate(names)
    ],
  }  # fmt: skip
  if base is not None:
    config['base_model'] = str(models[base])
  # Its slerp has no base: that is the first of the two.
  based = base if base == 'base' else None
  found = surgery.combine(
    [surgery.open(models[name]) for name in names],
    base=based and surgery.open(models[based]),
    method=method,
    **each,
    **every,
  )
  close(merged(config, tmp_path / 'out'), tensors(found))


def test_a_gradient_over_layers_is_that_of_mergekit(models, tmp_path):
  t = [0.0, 0.3, 1.0]
  layers = [0, 3]
  config = {
    'merge_method': 'slerp', 'dtype': 'float32',
    'base_model': str(models['a']),
    'slices': [
      {
        'sources': [
          {'model': str(models[name]), 'layer_range': layers} for name in 'ab'
        ]
      }
    ],
    'parameters': {'t': [{'filter': 'mlp', 'value': t}, {'value': 0.5}]},
  }  # fmt: skip
  found = surgery.combine(
    [surgery.open(models[name]) for name in 'ab'],
    method='slerp',
    t={'**/mlp': t, '**': 0.5},
  )
  close(merged(config, tmp_path / 'out'), tensors(found))


@pytest.mark.parametrize('source', ['union', 'a', 'b'])
def test_two_vocabularies_are_matched_as_mergekit_does(source, tmp_path):
  first = WORDS
  second = [*reversed(WORDS[5:]), *(f'v{k}' for k in range(9))]
  given = {
    'a': folder(tmp_path / 'a', 1, first),
    'b': folder(tmp_path / 'b', 2, second),
  }
  config = {
    'merge_method': 'linear', 'dtype': 'float32',
    'models': [
      {'model': str(given['a']), 'parameters': {'weight': 0.7}},
      {'model': str(given['b']), 'parameters': {'weight': 0.3}},
    ],
    'tokenizer': {
      # Their `base` is any of the models, where none is the base.
      'source': str(given[source]) if source in given else source
    },
  }  # fmt: skip
  want = merged(config, tmp_path / 'out')
  tokens: Any = {'union': 'union', 'a': 0, 'b': 1}[source]
  found = surgery.combine(
    [surgery.open(given[name]) for name in 'ab'],
    weight=[0.7, 0.3],
    tokens=tokens,
  )
  made = tensors(found)
  if source == 'union':
    # They number tokens of the union in another order.
    said = json.loads((tmp_path / 'out' / 'tokenizer.json').read_text())
    ids = dict(said['model']['vocab'])
    ids |= {one['content']: one['id'] for one in said['added_tokens']}
    ours = [*first, *(t for t in second if t not in first)]
    order = [ids[token] for token in ours]
    for name in ('model.embed_tokens.weight', 'lm_head.weight'):
      want[name] = want[name][order]
  close(want, made)
