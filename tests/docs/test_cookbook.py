"""The recipes of docs/cookbook/, against plain numpy."""

import json
import pathlib
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import surgery
from surgery.files.digest import digest
from tests.methods.vocabularies import bpe, ids
from tests.recipes.models import by_name, close, held, same, values

BOOK = pathlib.Path(__file__).parents[2] / 'docs' / 'cookbook'


def drawn(shapes, seed=0, dtype='float32'):
  rng = np.random.default_rng(seed)
  return {
    path: rng.standard_normal(shape).astype(dtype)
    for path, shape in shapes.items()
  }


def gpt2(width=16, layers=12):
  """160 tensors for 12 layers, as a GPT-2 has them."""
  shapes: dict[str, Any] = {'wte/weight': (40, width), 'wpe/weight': (8, width)}
  for i in range(layers):
    beneath: dict[str, Any] = {
      'ln_1/weight': (width,),
      'ln_1/bias': (width,),
      'attn/bias': (1, 1, 8, 8),
      'attn/c_attn/weight': (width, 3 * width),
      'attn/c_attn/bias': (3 * width,),
      'attn/c_proj/weight': (width, width),
      'attn/c_proj/bias': (width,),
      'ln_2/weight': (width,),
      'ln_2/bias': (width,),
      'mlp/c_fc/weight': (width, 4 * width),
      'mlp/c_fc/bias': (4 * width,),
      'mlp/c_proj/weight': (4 * width, width),
      'mlp/c_proj/bias': (width,),
    }
    shapes |= {f'h/{i}/{path}': shape for path, shape in beneath.items()}
  return drawn({**shapes, 'ln_f/weight': (width,), 'ln_f/bias': (width,)})


def llama(width=32, layers=12, seed=0):
  """A decoder with torch's kernels, (out, in)."""
  shapes: dict[str, Any] = {'model/embed_tokens/weight': (40, width)}
  for i in range(layers):
    beneath: dict[str, Any] = {
      f'self_attn/{p}_proj/weight': (width, width) for p in 'qkvo'
    }
    for p, shape in (
      ('gate', (2 * width, width)),
      ('up', (2 * width, width)),
      ('down', (width, 2 * width)),
    ):
      beneath[f'mlp/{p}_proj/weight'] = shape
    for p in ('input', 'post_attention'):
      beneath[f'{p}_layernorm/weight'] = (width,)
    shapes |= {f'model/layers/{i}/{p}': s for p, s in beneath.items()}
  shapes |= {'model/norm/weight': (width,), 'lm_head/weight': (40, width)}
  return drawn(shapes, seed)


def digests(arrays):
  return {path: digest(np.ascontiguousarray(v)) for path, v in arrays.items()}


@pytest.fixture(params=['msgpack', 'safetensors'])
def run(request, tmp_path, surgery_cli):
  """Runs a recipe of the book on models in files; returns its output."""
  suffix = request.param

  def run(name, models, index='', **variables):
    given = []
    for alias, arrays in models.items():
      file = arrays
      if not isinstance(arrays, pathlib.Path):
        file = tmp_path / f'{alias}.{suffix}'
        held(arrays).write(file, overwrite=True)
      given.append(f'{alias}={file}')
    out = tmp_path / f'out.{suffix}'
    given += [f'{k}={v}' for k, v in variables.items()]
    recipe = BOOK / f'{name}.yaml'
    result = surgery_cli('run', recipe, *given, f'out={out}', '--force')
    assert 0 == result.code, result.err
    return surgery.open(f'{out}{index}')

  return run


def test_delete_blocks(run):
  net = gpt2()
  assert 160 == len(net)
  after = values(run('delete-blocks', {'model': net}))
  assert 121 == len(after)
  kept = [i for i in range(12) if i not in (2, 5, 8)]
  expected = {p: v for p, v in net.items() if not p.startswith('h/')}
  for new, old in enumerate(kept):
    for path, value in net.items():
      if path.startswith(f'h/{old}/'):
        expected[path.replace(f'h/{old}/', f'h/{new}/')] = value
  same(by_name(expected), by_name(after))


def test_remove_head(run):
  net = llama()
  after = values(run('remove-head', {'model': net}))
  rows = [*range(10), *range(12, 32)]  # A head has 2 of 32.
  expected = {}
  for path, value in net.items():
    if re.search(r'/[qkv]_proj/', path):
      value = value[rows]
    elif '/o_proj/' in path:
      value = np.ascontiguousarray(value[:, rows])
    expected[path] = value
  same(expected, after)


def test_half_precision(run, tmp_path):
  net = gpt2(64)
  after = run('half-precision', {'model': net}, index='.index.json')
  expected = {}
  for path, value in net.items():
    if path.endswith('/attn/bias'):
      continue
    if re.search(r'/(c_attn|c_proj|c_fc)/weight$', path):
      value = value.astype(ml_dtypes.bfloat16)
    expected[path] = value
  assert 48 == sum(v.dtype == ml_dtypes.bfloat16 for v in expected.values())
  same(expected, values(after))


def test_task_arithmetic(run, surgery_cli, tmp_path):
  base = llama()
  tuned = []
  for seed in (1, 2):
    other = llama(seed=seed)
    tuned.append({p: other[p] if '/mlp/' in p else v for p, v in base.items()})
  models = {'base': base, 'ft1': tuned[0], 'ft2': tuned[1]}
  after = values(run('task-arithmetic', models))
  wide = lambda net, p: net[p].astype('float64')
  expected = {
    p: (
      wide(base, p)
      + 0.4 * (wide(tuned[0], p) - wide(base, p))
      + 0.4 * (wide(tuned[1], p) - wide(base, p))
    ).astype('float32')
    for p in base
    if '/mlp/' in p
  }
  close(expected, {p: after[p] for p in expected})
  rest = [p for p in base if p not in expected]
  assert digests({p: base[p] for p in rest}) == digests(
    {p: after[p] for p in rest}
  )
  # One bit elsewhere, and nothing is written.
  tuned[1]['model/norm/weight'] = tuned[1]['model/norm/weight'] * 2
  with pytest.raises(AssertionError, match="'s model/norm/weight|differ by"):
    run('task-arithmetic', models)


def test_task_arithmetic_names_what_a_model_lacks(run):
  base = llama()
  lost = 'model/layers/3/mlp/up_proj/weight'
  models = {
    'base': base,
    'ft1': {p: v for p, v in base.items() if p != lost},
    'ft2': base,
  }
  with pytest.raises(AssertionError, match=f'ft1 has no {lost}, and the model'):
    run('task-arithmetic', models)


def test_merge_peft_lora(run, tmp_path):
  net = gpt2()
  prefix = 'base_model.model.transformer'
  shapes = {}
  for i in range(12):
    shapes[f'{prefix}.h.{i}.attn.c_attn.lora_A.weight'] = (4, 16)
    shapes[f'{prefix}.h.{i}.attn.c_attn.lora_B.weight'] = (48, 4)
  factors = drawn(shapes, seed=1)
  folder = tmp_path / 'peft'
  folder.mkdir()
  save_file(factors, folder / 'adapter_model.safetensors')
  said = {
    'peft_type': 'LORA',
    'r': 4,
    'lora_alpha': 4,
    'use_rslora': True,
    'alpha_pattern': {r'h\.0\.attn\.c_attn': 8},
    'target_modules': ['c_attn'],
    'fan_in_fan_out': True,
  }
  (folder / 'adapter_config.json').write_text(json.dumps(said))
  after = values(run('merge-peft-lora', {'model': net, 'peft': folder}))
  expected = dict(net)
  for i in range(12):
    at = f'h/{i}/attn/c_attn'
    a, b = (
      factors[f'{prefix}.h.{i}.attn.c_attn.lora_{m}.weight'].astype('float64')
      for m in 'AB'
    )
    scale = (8 if i == 0 else 4) / 2
    wide = net[f'{at}/weight'].astype('float64') + scale * (b @ a).T
    expected[f'{at}/weight'] = wide.astype('float32')
  close(expected, after)
  rest = [p for p in net if not p.endswith('c_attn/weight')]
  same({p: net[p] for p in rest}, {p: after[p] for p in rest})


def test_mixture_of_experts(run):
  one, two = llama(), llama(seed=1)
  models = {'model': one, 'other': two}
  after = values(run('mixture-of-experts', models, hidden=32))
  expected = {p: v for p, v in one.items() if '/mlp/' not in p}
  for expert, net in enumerate((one, two)):
    for path, value in net.items():
      if '/mlp/' in path:
        expected[path.replace('/mlp/', f'/moe/experts/{expert}/')] = value
  for i in range(12):
    gate = np.zeros((2, 32), 'float32')
    expected[f'model/layers/{i}/moe/gate/weight'] = gate
  same(by_name(expected), by_name(after))


def test_low_rank_expert(run):
  shapes = {}
  for i in range(3):
    for e in range(2):
      shapes[f'h/{i}/experts/{e}/up/weight'] = (60, 30)
      shapes[f'h/{i}/experts/{e}/down/weight'] = (30, 60)
    shapes[f'h/{i}/gate/weight'] = (2, 30)
  net = drawn(shapes)
  for path in [p for p in net if '/experts/1/' in p]:
    # As after training: a difference of low rank, and a little more.
    rows, columns = net[path].shape
    low = drawn({'a': (rows, 8), 'b': (8, columns)}, seed=1)
    other = net[path.replace('experts/1', 'experts/0')]
    net[path] = other + low['a'] @ low['b'] + net[path] / 1000
  after = values(run('low-rank-expert', {'model': net}, rank=8))
  expected = {}
  for path, value in net.items():
    if '/experts/1/' in path:
      other = net[path.replace('experts/1', 'experts/0')]
      u, s, v = np.linalg.svd((value - other).astype('float64'))
      near = (u[:, :8] * s[:8]) @ v[:8]
      value = (other + near).astype('float32')
    expected[path] = value
  close(by_name(expected), by_name(after))
  rest = [p for p in net if '/experts/1/' not in p]
  same({p: net[p] for p in rest}, {p: after[p] for p in rest})


def test_deepen(run):
  net = llama()
  after = values(run('deepen', {'model': net}))
  order = [*range(8), *range(4, 12)]
  assert 16 == len(order)
  expected = {p: v for p, v in net.items() if '/layers/' not in p}
  for new, old in enumerate(order):
    for path, value in net.items():
      if f'/layers/{old}/' in path:
        expected[path.replace(f'/layers/{old}/', f'/layers/{new}/')] = value
  same(by_name(expected), by_name(after))


def test_blend(run):
  a, b = llama(), llama(seed=1)
  after = values(run('blend', {'a': a, 'b': b}, t=0.3))
  wide = {p: a[p].astype('f8') * 0.7 + b[p].astype('f8') * 0.3 for p in a}
  close({p: v.astype('f4') for p, v in wide.items()}, after)


def folder(path, arrays, tokens=None):
  """Writes a model folder of a Llama."""
  path.mkdir()
  held(arrays).write(path / 'model.safetensors')
  rows = len(arrays['lm_head/weight'])
  said = {'model_type': 'llama', 'vocab_size': rows, 'eos_token_id': 0}
  (path / 'config.json').write_text(json.dumps(said))
  if tokens is not None:
    (path / 'tokenizer.json').write_text(json.dumps(bpe(tokens)))
  return path


def test_ties(tmp_path, surgery_cli):
  base = llama()
  tuned = [
    {p: v + (0.1 * delta[p]).astype('f4') for p, v in base.items()}
    for delta in (llama(seed=1), llama(seed=2))
  ]
  one = folder(tmp_path / 'a', tuned[0], [f't{k}' for k in range(40)])
  given = [f'a={one}']
  for name, arrays in (('b', tuned[1]), ('base', base)):
    held(arrays).write(tmp_path / f'{name}.safetensors')
    given.append(f'{name}={tmp_path / name}.safetensors')
  out = tmp_path / 'out'
  result = surgery_cli('run', BOOK / 'ties.yaml', *given, f'out={out}/')
  assert 0 == result.code, result.err
  assert {'config.json', 'model.safetensors', 'tokenizer.json'} == {
    p.name for p in out.iterdir()
  }
  after = values(surgery.open(out))
  expected = {}
  for path, value in base.items():
    deltas = []
    for weight, model in zip((0.6, 0.4), tuned, strict=True):
      delta = model[path].astype('f8') - value
      least = np.sort(np.abs(delta), axis=None)[-int(delta.size * 0.5)]
      deltas.append(weight * np.where(np.abs(delta) >= least, delta, 0))
    stacked = np.stack(deltas)
    agree = np.sign(stacked) == np.where(stacked.sum(0) >= 0, 1, -1)
    share = (agree * np.reshape([0.6, 0.4], (2, *[1] * value.ndim))).sum(0)
    total = (stacked * agree).sum(0) / np.where(share, share, 1)
    expected[path] = (value + total).astype('f4')
  close(expected, after, 1e-5)


def test_gradient(run):
  a, b = llama(layers=3), llama(layers=3, seed=1)
  after = values(run('gradient', {'a': a, 'b': b}))
  layer = lambda k, part: next(
    p for p in a if f'/layers/{k}/{part}' in p and 'norm' not in p
  )
  # The ends are the models themselves.
  same({p: a[p] for p in [layer(0, 'self_attn'), layer(2, 'mlp')]},
       {p: after[p] for p in [layer(0, 'self_attn'), layer(2, 'mlp')]})  # fmt: skip
  same({p: b[p] for p in [layer(2, 'self_attn'), layer(0, 'mlp')]},
       {p: after[p] for p in [layer(2, 'self_attn'), layer(0, 'mlp')]})  # fmt: skip
  for path in ('lm_head/weight', layer(1, 'mlp'), 'model/norm/weight'):
    x, y = (m[path].astype('f8').ravel() for m in (a, b))
    angle = np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    want = np.sin(angle / 2) / np.sin(angle) * (x + y)
    np.testing.assert_allclose(after[path].ravel(), want, atol=1e-6)


def test_two_vocabularies(tmp_path, surgery_cli):
  first = [f't{k}' for k in range(40)]
  second = [*first[39:9:-1], *(f'u{k}' for k in range(10))]
  models = [llama(), llama(seed=1)]
  given = [
    f'{name}={folder(tmp_path / name, arrays, tokens)}'
    for name, arrays, tokens in zip('ab', models, (first, second), strict=True)
  ]
  out = tmp_path / 'out'
  recipe = BOOK / 'two-vocabularies.yaml'
  result = surgery_cli('run', recipe, *given, f'out={out}/')
  assert 0 == result.code, result.err
  assert 50 == json.loads((out / 'config.json').read_text())['vocab_size']
  assert [*first, *second[30:]] == list(ids(out))
  after = values(surgery.open(out))
  for name in ('model/embed_tokens/weight', 'lm_head/weight'):
    a, b = (model[name] for model in models)
    want = np.concatenate([a[:10], (a[10:] + b[29::-1]) / 2, b[30:]])
    np.testing.assert_allclose(after[name], want, atol=1e-6)


def test_transplant_lora(run, tmp_path):
  base, other = llama(), llama(seed=1)
  rng = np.random.default_rng(2)
  learned = {
    p: rng.standard_normal((v.shape[0], 2))
    @ rng.standard_normal((2, v.shape[1]))
    for p, v in base.items()
    if '_proj/' in p
  }
  tuned = {
    p: (v + learned.get(p, 0)).astype('float32') for p, v in base.items()
  }
  models = {'other': other, 'base': base, 'tuned': tuned}
  adapter = tmp_path / 'adapter.msgpack'
  after = values(run('transplant-lora', models, rank=2, adapter=adapter))
  for path, value in other.items():
    want = value + learned.get(path, 0)
    np.testing.assert_allclose(after[path], want, atol=1e-4)
  assert 'adapter' == surgery.open(adapter).manifest.kind


def test_grouped_query(run):
  net = llama()
  after = values(run('grouped-query', {'model': net}, groups=4, size=2))
  expected = dict(net)
  for path, value in net.items():
    if re.search(r'/[kv]_proj/', path):
      heads = value.reshape(4, 4, 2, 32).astype('float64').mean(1)
      expected[path] = heads.astype('float32').reshape(8, 32)
  same(by_name(expected), by_name(after))


def test_longer_context(run):
  net = gpt2()
  after = values(run('longer-context', {'model': net}, positions=16))
  old = net['wpe/weight'].astype('float64')
  # Places lie a quarter of the way to a neighbour, which the ends have not.
  near = np.repeat(old, 2, axis=0)
  far = np.stack([old[[0, *range(7)]], old[[*range(1, 8), 7]]], 1)
  want = 0.75 * near + 0.25 * far.reshape(16, -1)
  expected = {p: v for p, v in net.items() if not p.endswith('/attn/bias')}
  expected['wpe/weight'] = want.astype('float32')
  close(by_name(expected), by_name(after))


def test_rename_scheme_and_back(run, tmp_path, surgery_cli):
  net = llama()
  opened = run('rename-scheme', {'model': net})
  after = values(opened)
  assert {p.split('/')[0] for p in after} == {'params'}
  assert len(net) == len(after)
  kernel = after['params/h_10/mlp/down/kernel']
  same({'x': net['model/layers/10/mlp/down_proj/weight']}, {'x': kernel})
  same(
    {'x': net['model/layers/3/post_attention_layernorm/weight']},
    {'x': after['params/h_3/ln_2/scale']},
  )
  back = tmp_path / f'back{pathlib.Path(opened.origin).suffix}'
  result = surgery_cli(
    'run', BOOK / 'rename-scheme-back.yaml', f'model={opened.origin}',
    f'out={back}',
  )  # fmt: skip
  assert 0 == result.code, result.err
  same(by_name(net), by_name(values(surgery.open(back))))


def test_all_recipes_are_short_and_in_the_table():
  table = (BOOK / 'README.md').read_text()
  for recipe in BOOK.glob('*.yaml'):
    assert f'({recipe.name})' in table
    lines = [
      line
      for line in recipe.read_text().splitlines()
      if line.strip() and not line.startswith('#')
    ]
    assert len(lines) <= 10, recipe.name
