"""Layouts against what torch's and transformers' classes say of themselves."""

import pathlib

import numpy as np
import pytest

import surgery
from surgery.model import layouts
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.layers import LayerType
from surgery.model.manifest import Manifest

DATA = pathlib.Path(__file__).parents[1] / 'data' / 'hf'
NAMES = sorted(path.name for path in DATA.iterdir() if path.is_dir())
PT = Manifest(metadata={'format': 'pt'})


def tree(**shapes):
  return {
    tuple(name.split('__')): Leaf(lambda: None, shape, 'float32')
    for name, shape in shapes.items()
  }


def found(manifest=PT, **shapes):
  return {
    '__'.join(path): one.letters if one.sure else f'{one.letters}?'
    for path, one in layouts.found(tree(**shapes), manifest).items()
  }


# Which classes of torch these are, from the source of transformers.
EMBEDDINGS = (
  'word_embeddings', 'position_embeddings', 'token_type_embeddings',
  'embed_tokens', 'wte', 'wpe', 'shared', 'relative_attention_bias',
)  # fmt: skip
CONV1D = ('c_attn', 'c_proj', 'c_fc')


@pytest.mark.parametrize('name', NAMES)
def test_models_of_transformers_are_known_and_certain(name):
  opened = surgery.open(DATA / name)
  said = layouts.found(opened, opened.manifest)
  for path, leaf in opened.items():
    rank = len(leaf.shape or ())
    if path[-1] != 'weight' or rank < 2:
      continue
    expected = 'io' if path[-2] in EMBEDDINGS + CONV1D else 'oi'
    if rank == 4:
      expected = 'oiii'
    assert said[path].letters == expected, path
    assert said[path].sure, path


@pytest.mark.parametrize('name', NAMES)
def test_names_alone_tell_models_of_transformers(name):
  opened = surgery.open(DATA / name)
  assert layouts.is_torch(opened, Manifest())
  bare = layouts.found(opened, Manifest())
  assert bare == layouts.found(opened, PT)


def test_a_bias_decides():
  assert {'a__weight': 'oi'} == found(a__weight=(3, 4), a__bias=(3,))
  assert {'a__weight': 'io'} == found(a__weight=(3, 4), a__bias=(4,))
  assert {'a__weight': 'oiii'} == found(a__weight=(3, 4, 5, 5), a__bias=(3,))
  # A transposed convolution of torch has its outputs second.
  assert {'a__weight': 'ioii'} == found(a__weight=(3, 4, 5, 5), a__bias=(4,))
  assert {'a__weight': 'oii'} == found(a__weight=(3, 4, 5), a__bias=(3,))
  # Layers that were stacked.
  assert {'a__weight': 'soi'} == found(a__weight=(2, 3, 4), a__bias=(2, 3))
  assert {'a__in_proj_weight': 'oi'} == found(
    a__in_proj_weight=(9, 3), a__in_proj_bias=(9,)
  )


def test_layers_of_one_name_are_alike():
  said = found(
    a__c__weight=(3, 3), a__c__bias=(3,), b__c__weight=(3, 4), b__c__bias=(4,)
  )
  assert {'a__c__weight': 'io', 'b__c__weight': 'io'} == said


@pytest.mark.parametrize(
  'name', ['emb', 'tok_emb', 'embed', 'token_embedding', 'embed_in', 'wte']
)
def test_embeddings_are_rows_of_features(name):
  assert {f'{name}__weight': 'io'} == found(**{f'{name}__weight': (9, 4)})


def test_what_gives_words_takes_features():
  assert {'embed_out__weight': 'oi'} == found(embed_out__weight=(9, 4))


def test_what_nothing_tells_is_not_certain():
  assert {'odd__weight': 'oi?'} == found(odd__weight=(4, 4))
  assert {'odd__weight': 'oi?'} == found(odd__weight=(4, 5))
  assert {'odd__weight': 'oii?'} == found(odd__weight=(4, 5, 6))
  assert {'experts__gate_up': 'iio?'} == found(experts__gate_up=(4, 5, 6))


def test_a_kernel_in_a_file_of_torch_is_jax():
  assert {} == found(a__kernel=(3, 4), b__embedding=(5, 6))


def test_a_weight_alone_is_not_torch():
  blox = tree(net__weight=(3, 4), net__bias=(4,))
  assert {} == layouts.found(blox, Manifest())
  assert {} == layouts.found(tree(net__weight=(3, 4)), Manifest())
  known = Manifest(layer_types={('net',): LayerType(('Mine',))})
  proven = tree(net__weight=(3, 4), net__bias=(3,))
  assert {} == layouts.found(proven, known)
  assert layouts.found(proven, Manifest())


# What uses them.


def written(tmp_path, **arrays):
  leaves = {
    tuple(name.split('__')): Leaf(lambda a=a: a, a.shape, str(a.dtype))
    for name, a in arrays.items()
  }
  file = tmp_path / 'torch.safetensors'
  Checkpoint(leaves, PT).write(file, manifest=False)
  return file


def drawn(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype('float32')


@pytest.fixture
def file(tmp_path):
  return written(
    tmp_path,
    q_proj__weight=drawn(6, 4),
    conv__weight=drawn(6, 4, 3, 3),
    conv__bias=drawn(6),
    embed_tokens__weight=drawn(7, 4),
    odd__weight=drawn(5, 5),
  )


def attached(file, to, **options):
  return surgery.attach(surgery.open(file), surgery.LoRA(rank=2), to=to, **options)  # fmt: skip


def shapes(checkpoint):
  return {
    '/'.join(path): leaf.shape
    for path, leaf in checkpoint.items()
    if 'lora' in path[-1]
  }


def test_attach_uses_the_layout_and_records_it(file):
  after = attached(file, ['q_proj', 'conv', 'embed_tokens'])
  assert shapes(after) == {
    'q_proj/lora_a.default.weight': (4, 2),
    'q_proj/lora_b.default.weight': (2, 6),
    'conv/lora_a.default.weight': (4, 3, 3, 2),
    'conv/lora_b.default.weight': (2, 6),
    'embed_tokens/lora_a.default.weight': (7, 2),
    'embed_tokens/lora_b.default.weight': (2, 4),
  }
  out = file.with_name('adapted.msgpack')
  after.write(out)
  [said] = surgery.open(out).manifest.adapters
  found = {s['layer']: s['params'][0]['layout'] for s in said['sites']}
  assert found == {'q_proj': 'oi', 'conv': 'oiii', 'embed_tokens': 'io'}


def test_a_merge_adds_the_transposed_product(file):
  after = surgery.attach(
    surgery.open(file), surgery.LoRA(rank=2, alpha=4.0), to='q_proj'
  )
  a, b = drawn(4, 2, seed=1), drawn(2, 6, seed=2)
  values = {'lora_a.default.weight': a, 'lora_b.default.weight': b}
  leaves = {
    path: leaf.replace(load=lambda v=values[path[-1]]: v)
    if path[-1] in values
    else leaf
    for path, leaf in after.items()
  }
  merged = surgery.merge(after.replace(leaves=leaves))
  base = surgery.open(file)['q_proj', 'weight'].load()
  np.testing.assert_allclose(
    base + 2 * (a @ b).T, merged['q_proj', 'weight'].load(), rtol=1e-5
  )


def test_an_option_overrides(file):
  after = attached(file, 'q_proj', layout='io')
  assert shapes(after)['q_proj/lora_a.default.weight'] == (6, 2)
  assert after.remarks == ()


def test_python_warns_of_what_is_not_certain(file):
  with pytest.warns(surgery.SiteWarning, match='attach: layout .* not certain'):
    attached(file, ['q_proj', 'odd'])
  recipe = surgery.Recipe(
    [{'factorise': {'rules': 'odd/weight -> {a,b}/weight', 'rank': 2}}]
  )
  with pytest.warns(surgery.SiteWarning, match='factorise: layout'):
    recipe.apply(surgery.open(file))


def test_names_of_torch_with_the_layout_of_jax_are_not_torch():
  leaves = tree(
    model__embed_tokens__weight=(40, 16), model__q_proj__weight=(16, 8)
  )
  assert not layouts.is_torch(leaves, Manifest())
  leaves = tree(
    model__embed_tokens__weight=(40, 16), model__q_proj__weight=(8, 16)
  )
  assert layouts.is_torch(leaves, Manifest())


def test_a_bias_proves_the_layout_whatever_features_there_are():
  # fc1 is behind another matrix, and has as many outputs as rows have features.
  said = found(
    Manifest(),
    emb__weight=(20, 16),
    fc0__weight=(24, 16),
    fc0__bias=(24,),
    fc1__weight=(16, 24),
    fc1__bias=(16,),
  )
  assert (said['fc0__weight'], said['fc1__weight']) == ('oi', 'oi')


@pytest.mark.filterwarnings('ignore::surgery.errors.SiteWarning')
def test_the_plan_says_it_and_what_is_not_certain(file, surgery_cli):
  out = file.with_name('out.msgpack')
  done = surgery_cli(
    'attach', file, '--adapter', 'lora', '--set', 'rank=2',
    '--to', 'q_proj', '--to', 'odd', '-o', out, '--dry-run',
  )  # fmt: skip
  assert 0 == done.code, done.err
  assert (
    'note      layout (out, in), by the name of a linear layer: '
    'q_proj/weight.' in done.out
  )
  assert (
    'note      layout (out, in) is not certain (a square kernel under an '
    'unknown name); assumed as PyTorch usually has it: odd/weight. State it '
    "with --layout 'odd/weight=oi', or other letters." in done.out
  )
  done = surgery_cli(
    'attach', file, '--adapter', 'lora', '--set', 'rank=2',
    '--to', 'odd', '-o', out, '--layout', 'odd/weight=io', '--dry-run',
  )  # fmt: skip
  assert 0 == done.code, done.err
  assert 'note' not in done.out


def test_factors_are_two_layers_of_torch(file):
  after = surgery.Recipe(
    [{'factorise': {'rules': 'q_proj/weight -> {down,up}/weight', 'rank': 4}}]
  ).apply(surgery.open(file))
  down, up = (after[name, 'weight'].load() for name in ('down', 'up'))
  assert ((4, 4), (6, 4)) == (down.shape, up.shape)
  base = surgery.open(file)['q_proj', 'weight'].load()
  x = drawn(3, 4, seed=5)
  np.testing.assert_allclose(x @ base.T, x @ down.T @ up.T, rtol=1e-4)
  assert 'layout (out, in)' in after.remarks[0]


def test_a_convolution_of_torch_has_no_factors(file):
  recipe = surgery.Recipe(
    [{'factorise': {'rules': 'conv/weight -> {a,b}/weight', 'rank': 2}}]
  )
  with pytest.raises(surgery.SurgeryError, match='kernel of a convolution'):
    recipe.apply(surgery.open(file))


def test_what_is_transposed_is_known_to_be(file):
  turned = surgery.Recipe(
    [
      {'transpose': '{q_proj,odd}/weight'},
      {'transpose': {'select': 'conv/weight', 'axes': [2, 3, 1, 0]}},
      {'rename': 'odd -> other'},
    ]
  ).apply(surgery.open(file))
  out = file.with_name('turned.safetensors')
  turned.write(out)
  for base in (turned, surgery.open(out)):
    after = surgery.attach(
      base, surgery.LoRA(rank=2), to=['q_proj', 'conv', 'other', 'embed_tokens']
    )
    assert shapes(after) == {
      'q_proj/lora_a.default.weight': (4, 2),
      'q_proj/lora_b.default.weight': (2, 6),
      'conv/lora_a.default.weight': (3, 3, 4, 2),
      'conv/lora_b.default.weight': (2, 6),
      'other/lora_a.default.weight': (5, 2),
      'other/lora_b.default.weight': (2, 5),
      'embed_tokens/lora_a.default.weight': (7, 2),
      'embed_tokens/lora_b.default.weight': (2, 4),
    }


def test_adapters_of_torch_models_are_combined(file):
  both = attached(attached_file(file), 'q_proj', name='b')
  after = surgery.combine_adapters(both, {'a': 0.5, 'b': 2.0})
  [site] = after.records(surgery.default_host()).get('combined').sites.values()
  assert site.site.primary.layout == 'oi'


def attached_file(file):
  out = file.with_name('a.msgpack')
  attached(file, 'q_proj', name='a').write(out)
  return out
