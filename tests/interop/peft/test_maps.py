"""Adapters of PEFT on trees of JAX, by the maps of names."""

import pathlib

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import surgery
from surgery.interop import maps

DATA = pathlib.Path(__file__).parents[2] / 'data' / 'hf'
WEIGHTS = 'adapter_model.safetensors'
# By map a model, and what is adapted of it.
CASES = {
  'llama-flax': ('llama', ['**/q_proj', '**/down_proj', '**/embed_tokens']),
  'llama-nnx': ('llama', ['**/v_proj', 'lm_head']),
  'gemma-blox': ('gemma', ['**/{q,o}_proj']),
  'bert-blox': ('bert', ['**/query', '**/output/dense', '**/word_embeddings']),
  'gpt2-flax': ('gpt2', ['**/c_attn', '**/c_fc']),
  'gpt2-nnx': ('gpt2', ['**/c_attn', '**/mlp/c_proj']),
}


def drawn(checkpoint, seed):
  """A checkpoint whose adapter does something."""
  rng = np.random.default_rng(seed)
  leaves = dict(checkpoint)
  for path, leaf in checkpoint.items():
    if path[-1].startswith('lora'):
      value = rng.standard_normal(leaf.shape).astype('float32')
      leaves[path] = leaf.replace(load=lambda value=value: value)
  return checkpoint.replace(leaves=leaves)


def adapted(name, tmp_path):
  """A model of PyTorch with an adapter, and the adapter as a folder of PEFT."""
  model, to = CASES[name]
  whole = surgery.attach(
    surgery.open(DATA / model), surgery.LoRA(rank=2, alpha=3.0), to=to
  )
  whole = drawn(whole, 0)
  file = tmp_path / 'whole.safetensors'
  whole.write(file)
  out = tmp_path / 'peft'
  recipe = surgery.Recipe(
    [{'extract': 'default'}], outputs={'out': {'path': out, 'format': 'peft'}}
  )
  recipe.run(model=file)
  return whole, out


@pytest.mark.parametrize('beneath', [None, 'params', 'net/inner'])
@pytest.mark.parametrize('name', CASES)
def test_a_map_says_what_modules_are_called(
  name, beneath, tmp_path, surgery_cli
):
  whole, folder = adapted(name, tmp_path)
  source = DATA / CASES[name][0]
  tree, out = tmp_path / 'tree.msgpack', tmp_path / 'merged.msgpack'
  step = {'map': {'name': name, 'root': beneath}}
  surgery.Recipe([step]).run(model=source, out=tree)
  expected = surgery.Recipe([step]).apply(surgery.merge(whole))
  done = surgery_cli(
    'merge', tree, '--with', folder, '--names', name, '-o', out
  )
  assert 0 == done.code, done.err
  merged = surgery.open(out)
  assert set(expected) == set(merged)
  for path, leaf in expected.items():
    np.testing.assert_allclose(
      leaf.load(), merged[path].load(), rtol=1e-5, atol=1e-6
    )


# FlaxConv1D's kernels are (out, in), which params without adapters do not say.
@pytest.mark.parametrize('name', sorted(CASES.keys() - {'gpt2-flax'}))
def test_what_was_trained_on_a_tree_is_written_for_peft(name, tmp_path):
  _, folder = adapted(name, tmp_path)
  tree = surgery.Recipe([{'map': {'name': name, 'root': 'net'}}]).apply(
    surgery.open(DATA / CASES[name][0])
  )
  file = tmp_path / 'tree.msgpack'
  tree.write(file)
  params = surgery.load_adapter(folder, surgery.load(file), names=name)
  # Out of a transformation of JAX it does not know any more where it came from.
  params = jax.jit(lambda some: some)(params)
  out = tmp_path / 'again'
  names = {'name': name, 'root': 'net'}
  surgery.save_adapter(
    out, params, format='peft', names=names, modules_to_save=[]
  )
  first, again = load_file(folder / WEIGHTS), load_file(out / WEIGHTS)
  assert first.keys() == again.keys()
  for key, value in first.items():
    assert value.tobytes() == again[key].tobytes(), key


def test_a_map_of_ones_own_may_be_a_file_or_its_text(tmp_path):
  _, folder = adapted('llama-flax', tmp_path)
  host = surgery.default_host()
  said = dict(maps.data('llama-flax', host))
  file = tmp_path / 'my.yaml'
  file.write_text(yaml.safe_dump(said))
  tree = surgery.Recipe([{'map': said}]).apply(surgery.open(DATA / 'llama'))
  tree.write(tmp_path / 'tree.msgpack')
  base = surgery.load(tmp_path / 'tree.msgpack')
  expected = surgery.load_adapter(folder, base, names='llama-flax')
  for names in (str(file), said):
    found = surgery.load_adapter(folder, base, names=names)
    assert expected.keys() == found.keys()
    for path in expected.keys():
      np.testing.assert_array_equal(expected[path].value, found[path].value)


def test_an_unknown_map_lists_those_that_there_are(tmp_path, surgery_cli):
  _, folder = adapted('llama-flax', tmp_path)
  done = surgery_cli(
    'merge', DATA / 'llama', '--with', folder, '--names', 'lama-flax',
    '-o', tmp_path / 'o.msgpack',
  )  # fmt: skip
  assert 3 == done.code
  assert "no map is called 'lama-flax'. Did you mean 'llama-flax'" in done.err
  assert 'There are bert-blox, bert-flax, bert-nnx, ' in done.err


def test_layers_without_a_place_in_a_map_are_named(tmp_path):
  _, folder = adapted('llama-flax', tmp_path)
  tree = surgery.Recipe([{'map': 'llama-flax'}]).apply(
    surgery.open(DATA / 'llama')
  )
  tree.write(tmp_path / 'tree.msgpack')
  base = surgery.load(tmp_path / 'tree.msgpack')
  with pytest.raises(
    surgery.RenameError, match=r"map 'gpt2-flax', to jax: \d+ of \d+"
  ):
    surgery.load_adapter(folder, base, names='gpt2-flax')
  params = surgery.load_adapter(folder, base, names='llama-flax')
  with pytest.raises(
    surgery.RenameError, match=r"map 'bert-flax', to torch: \d+ of \d+"
  ):
    surgery.save_adapter(
      tmp_path / 'out', params, format='peft', names='bert-flax'
    )
