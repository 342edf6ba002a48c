"""Maps against the trees of flax classes, and there and back."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

import surgery
from surgery.interop import maps
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.naming import paths
from tests.cli.saved import values

DATA = pathlib.Path(__file__).parents[2] / 'data' / 'hf'
TREES = json.loads((DATA / 'flax_trees.json').read_text())
HOST = surgery.default_host()
# Which maps are for which models.
MODELS = {
  'bert': 'bert', 'bert-mlm': 'bert', 'gpt2': 'gpt2', 'llama': 'llama',
  'mistral': 'mistral', 'gemma': 'gemma', 'gemma2': 'gemma',
  'gemma3': 'gemma', 'qwen2': 'qwen', 'qwen3': 'qwen',
}  # fmt: skip
CASES = [
  (model, f'{name}-{tree}')
  for model, name in MODELS.items()
  for tree in ('flax', 'nnx', 'blox')
]


def mapped(checkpoint, name, **options):
  step = {'map': {'name': name, **options}}
  return surgery.Recipe([step]).apply(checkpoint)


@pytest.mark.parametrize('model', TREES)
def test_the_tree_is_that_of_the_flax_class(model):
  opened = surgery.open(DATA / model)
  after = mapped(opened, f'{MODELS[model]}-flax')
  found = {paths.show(path): list(leaf.shape) for path, leaf in after.items()}
  # The head of a tied model is nowhere in a file.
  assert TREES[model] == found


@pytest.mark.parametrize(('model', 'name'), CASES)
def test_there_and_back_is_the_same_file(model, name, tmp_path, surgery_cli):
  source = DATA / model / 'model.safetensors'
  there, back = tmp_path / 'tree.msgpack', tmp_path / 'back.safetensors'
  done = surgery_cli('convert', source, there, '--map', name)
  assert 0 == done.code, done.err
  done = surgery_cli('convert', there, back, '--map', name, '--no-manifest')
  assert 0 == done.code, done.err
  assert source.read_bytes() == back.read_bytes()


@pytest.mark.parametrize(('model', 'name'), CASES)
def test_kernels_are_in_out(model, name):
  opened = surgery.open(DATA / model)
  after = mapped(opened, name)
  turned = 0
  for path, leaf in after.items():
    kind = {'kernel': 'weight', 'embedding': 'weight', 'scale': 'weight'}
    old = opened[(*path[:-1], kind.get(path[-1], path[-1]))]
    conv1d = len(path) > 1 and path[-2].startswith('c_')
    expected = old.load()
    if path[-1] == 'kernel' and conv1d == (name == 'gpt2-flax'):
      expected, turned = expected.T, turned + 1
    assert leaf.load().tobytes() == expected.tobytes(), path
    assert leaf.shape == expected.shape
  assert turned or model == 'gpt2'


def test_an_nnx_model_takes_the_tree():
  class Attention(nnx.Module):
    def __init__(self, rngs):
      self.q_proj = nnx.Linear(16, 16, rngs=rngs)
      self.k_proj = nnx.Linear(16, 8, rngs=rngs)
      self.v_proj = nnx.Linear(16, 8, rngs=rngs)
      self.o_proj = nnx.Linear(16, 16, use_bias=False, rngs=rngs)

  class Mlp(nnx.Module):
    def __init__(self, rngs):
      linear = lambda *sizes: nnx.Linear(*sizes, use_bias=False, rngs=rngs)
      self.gate_proj, self.up_proj = linear(16, 24), linear(16, 24)
      self.down_proj = linear(24, 16)

  class Layer(nnx.Module):
    def __init__(self, rngs):
      self.self_attn, self.mlp = Attention(rngs), Mlp(rngs)
      self.input_layernorm = nnx.RMSNorm(16, rngs=rngs)
      self.post_attention_layernorm = nnx.RMSNorm(16, rngs=rngs)

  class Model(nnx.Module):
    def __init__(self, rngs):
      self.embed_tokens = nnx.Embed(40, 16, rngs=rngs)
      self.layers = nnx.List([Layer(rngs) for _ in range(3)])
      self.norm = nnx.RMSNorm(16, rngs=rngs)

  class CausalLM(nnx.Module):
    def __init__(self, rngs):
      self.model = Model(rngs)
      self.lm_head = nnx.Linear(16, 40, use_bias=False, rngs=rngs)

  state = nnx.state(CausalLM(nnx.Rngs(0)), nnx.Param)
  flat = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state))
  expected = {
    '/'.join(str(key.key) for key in path): leaf.shape for path, leaf in flat
  }
  after = mapped(surgery.open(DATA / 'qwen2'), 'qwen-nnx')
  assert expected == {paths.show(p): leaf.shape for p, leaf in after.items()}


# What finds no place.


def test_a_tensor_without_a_place_is_an_error_that_names_it():
  opened = surgery.open(DATA / 'llama')
  extra: dict[paths.Path, Leaf] = {
    ('model', 'odd', 'weight'): Leaf(lambda: 0, (1,), 'float32')
  }
  more = opened.replace(leaves={**opened, **extra})
  with pytest.raises(
    surgery.SurgeryError,
    match=r"map 'llama-flax', to jax: 1 of 31 tensors have no place: "
    r'model/odd/weight\. Its rules have other names on the left \(surgery maps',
  ):
    mapped(more, 'llama-flax')


def test_another_map_places_few():
  with pytest.raises(surgery.SurgeryError, match='have no place'):
    mapped(surgery.open(DATA / 'gpt2'), 'llama-flax')


def test_an_unknown_map_is_suggested():
  with pytest.raises(surgery.SurgeryError, match=r"Did you mean 'llama-flax'"):
    mapped(surgery.open(DATA / 'llama'), 'lama-flax')


def test_two_tensors_of_one_place_are_an_error():
  said = {'rules': ['{a,b}/weight <-> {c,d}/kernel', 'e/weight <-> c/kernel']}
  leaf = Leaf(lambda: np.ones(2), (2,), 'float64')
  tree = Checkpoint({('a', 'weight'): leaf, ('e', 'weight'): leaf})
  with pytest.raises(surgery.SurgeryError, match='would all be c/kernel'):
    mapped(tree, said)


def test_other_axes_than_the_map_says_are_an_error():
  said = {'rules': [{'rule': 'a/weight <-> a/kernel', 'axes': [1, 0]}]}
  leaf = Leaf(lambda: np.ones(2), (2,), 'float64')
  with pytest.raises(surgery.SurgeryError, match='expects 2 axes, found'):
    mapped(Checkpoint({('a', 'weight'): leaf}), said)


def test_a_way_that_is_open_has_to_be_said():
  said = {'rules': ['{a,b}/weight <-> {b,a}/weight']}
  leaf = Leaf(lambda: np.ones(2), (2,), 'float64')
  tree = Checkpoint({('a', 'weight'): leaf})
  with pytest.raises(surgery.SurgeryError, match='both ways'):
    mapped(tree, said)
  assert [('b', 'weight')] == list(mapped(tree, said, to='torch'))


def test_what_models_compute_is_left_out_and_said(tmp_path, surgery_cli):
  opened = surgery.open(DATA / 'bert')
  ids = np.arange(32)[None]
  extra: dict[paths.Path, Leaf] = {
    ('embeddings', 'position_ids'): Leaf(lambda: ids, (1, 32), 'int64')
  }
  file = tmp_path / 'old.safetensors'
  opened.replace(leaves={**opened, **extra}).write(file)
  plan = surgery_cli(
    'convert', file, tmp_path / 'o.msgpack', '--map', 'bert-blox', '--dry-run'
  )
  assert 0 == plan.code, plan.err
  assert 'gone      embeddings/position_ids' in plan.out
  after = mapped(surgery.open(file), 'bert-blox')
  assert after.keys() == mapped(opened, 'bert-blox').keys()


# Layouts and adapters.


def test_layouts_follow():
  lora = surgery.LoRA(rank=2)
  for name, expected in (('gpt2-flax', (16, 2)), ('gpt2-nnx', (16, 2))):
    tree = mapped(surgery.open(DATA / 'gpt2'), name)
    after = surgery.attach(tree, lora, to='**/0/attn/c_attn')
    path = next(p for p in after if p[-1] == 'lora_a')
    assert expected == after[path].shape, name


@pytest.mark.parametrize('first', ['map', 'merge'])
def test_an_adapter_goes_along(first):
  opened = surgery.open(DATA / 'llama')
  adapted = surgery.attach(
    opened, surgery.LoRA(rank=2), to=['**/q_proj', '**/embed_tokens']
  )
  rng = np.random.default_rng(0)
  drawn = {
    path: rng.standard_normal(leaf.shape).astype('float32')
    for path, leaf in adapted.items()
    if 'lora' in path[-1]
  }
  leaves = {
    path: leaf.replace(load=functools.partial(drawn.get, path))
    if path in drawn
    else leaf
    for path, leaf in adapted.items()
  }
  adapted = adapted.replace(leaves=leaves)
  one = mapped(surgery.merge(adapted), 'llama-flax')
  two = surgery.merge(mapped(adapted, 'llama-flax'))
  assert list(one) == list(two)
  for path, leaf in one.items():
    np.testing.assert_allclose(
      leaf.load(), two[path].load(), rtol=1e-5, atol=1e-6
    )
  base = mapped(opened, 'llama-flax')
  path = ('model', 'layers', '0', 'self_attn', 'q_proj', 'kernel')
  assert not np.allclose(base[path].load(), two[path].load())


# Maps of one's own.

MINE = """
about: mine
rules:
  - '**/{q_proj,k_proj,v_proj,o_proj}/weight <-> **/{q,k,v,o}/w'
  - rule: '**/{gate_proj,up_proj,down_proj}/weight <-> **/{g,u,d}/w'
    axes: [1, 0]
  - 'lm_head/weight <-> head/w'
  - 'model/layers/<i>/{input_layernorm,post_attention_layernorm}/weight
    <-> model/layers/<i>/{n1,n2}/w'
  - 'model/{norm,embed_tokens}/weight <-> x/{n,e}'
"""


def test_a_file_of_ones_own(tmp_path, surgery_cli):
  file = tmp_path / 'my.yaml'
  file.write_text(MINE)
  source = DATA / 'llama' / 'model.safetensors'
  out, back = tmp_path / 'o.msgpack', tmp_path / 'back.safetensors'
  done = surgery_cli('convert', source, out, '--map', file)
  assert 0 == done.code, done.err
  assert ('model', 'layers', '0', 'mlp', 'g', 'w') in surgery.open(out)
  # What is recorded needs no file any more.
  recipe = tmp_path / 'again.yaml'
  recipe.write_text(surgery_cli('inspect', out, '--history').out)
  file.unlink()
  again = tmp_path / 'again.msgpack'
  surgery.Recipe.load(recipe).bound(model=source, out=again).run()
  assert values(out).keys() == values(again).keys()
  [said] = surgery.open(out).manifest.history[-1]['recipe']['steps']
  step = {'map': {**said['map'], 'to': 'torch'}}
  target = {'path': str(back), 'manifest': False}
  surgery.Recipe([step], outputs={'out': target}).run(model=out)
  assert values(source).keys() == values(back).keys()
  for path, value in values(source).items():
    assert value.tobytes() == values(back)[path].tobytes()


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('rules: x', "expected a mapping with 'rules', a list"),
    ('rules: [*a]', 'not YAML'),
    ("rules: ['a -> b']", "expected one '<->', found 0"),
    ("rules: ['**/a <-> b']", "1 '**' on the left and 0 on the right"),
    ("{rules: ['a <-> b'], abuot: c}", "has no 'abuot'. Did you mean 'about'"),
    ('rules: [{rule: a <-> b, axes: [0, 2]}]', 'expected all axes'),
    ('rules: [{rule: a <-> b, axis: [0]}]', "a rule has no 'axis'"),
    ("{rules: ['a <-> b'], left-out: x}", 'left-out: expected a list'),
  ],
)
def test_a_map_that_cannot_be_read_is_named(
  tmp_path, surgery_cli, text, expected
):
  file = tmp_path / 'my.yaml'
  file.write_text(text)
  done = surgery_cli(
    'convert', DATA / 'llama', tmp_path / 'o.msgpack', '--map', file
  )
  assert 3 == done.code
  assert str(file) in done.err
  assert expected in done.err


def test_a_plugin_offers_maps():
  class Plugin:
    @surgery.hookimpl
    def surgery_maps(self):
      return {'mine': {'about': 'x', 'rules': ['a/weight <-> a/kernel']}}

  host = surgery.Host(plugins=[Plugin()])
  leaf = Leaf(lambda: np.ones(2), (2,), 'float64')
  after = surgery.Recipe([{'map': 'mine'}]).apply(
    Checkpoint({('a', 'weight'): leaf}), host=host
  )
  assert [('a', 'kernel')] == list(after)


def test_all_maps_are_listed_and_can_be_read(surgery_cli):
  listed = surgery_cli('maps').out.splitlines()
  assert sorted(HOST.maps) == [line.split()[0] for line in listed]
  assert {name for _, name in CASES} <= set(HOST.maps)
  for name in HOST.maps:
    shown = surgery_cli('maps', name).out
    again = maps.parse(name, maps.read(shown, name))
    assert again == maps.find(name, HOST)


def test_a_direction_needs_a_map(tmp_path, surgery_cli):
  done = surgery_cli(
    'convert', DATA / 'llama', tmp_path / 'o.msgpack', '--direction', 'jax'
  )
  assert 2 == done.code
  assert '--direction goes with --map' in done.err


def test_a_root_lies_above_all_of_the_tree(tmp_path, surgery_cli):
  source = DATA / 'llama' / 'model.safetensors'
  there, back = tmp_path / 'tree.msgpack', tmp_path / 'back.safetensors'
  options = ('--map', 'llama-flax', '--root', 'params')
  done = surgery_cli('convert', source, there, *options)
  assert 0 == done.code, done.err
  assert {'params'} == {path[0] for path in surgery.open(there)}
  done = surgery_cli('convert', there, back, '--map', 'llama-flax')
  assert 0 == done.code, done.err
  # Its wildcards take the root for a part of PyTorch's names.
  assert ('params', 'model', 'norm', 'weight') in surgery.open(back)
  done = surgery_cli(
    'convert', there, back, *options, '--no-manifest', '--force'
  )
  assert 0 == done.code, done.err
  assert source.read_bytes() == back.read_bytes()


def test_no_maps_are_no_lines(surgery_cli):
  done = surgery_cli('--no-plugin', 'maps', 'maps')
  assert (0, '') == (done.code, done.out)
