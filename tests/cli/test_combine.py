import json
import pathlib

import jax
import numpy as np
import pytest

import surgery


@pytest.fixture
def files(model, tmp_path):
  """Files of a base and of two adapters, and the params that have both."""
  found, params = [model.file], model.params
  for seed, name in enumerate('ab'):
    params = surgery.attach(
      params, surgery.LoRA(rank=2), to='**', name=name, seed=seed
    ).unlocked()
    for i, path in enumerate(list(params.keys())):
      if path[-1] == f'lora_b.{name}':
        key = jax.random.key(10 * seed + i)
        value = jax.random.normal(key, params[path].value.shape)
        params[path] = params[path].replace(value=value)
    params = params.locked()
    found.append(tmp_path / f'{name}.msgpack')
    surgery.save_adapter(found[-1], params, name=name)
  return *found, params


def update(base, params):
  """Returns what an adapter adds, by path, in float64."""
  merged = surgery.merge(params)
  return {
    path: np.asarray(merged[path].value, np.float64)
    - np.asarray(param.value, np.float64)
    for path, param in base.items()
    if path[-1] == 'kernel'
  }


def test_adapters_in_files_become_one(model, files, tmp_path, surgery_cli):
  base, a, b, params = files
  out = tmp_path / 'one.msgpack'
  result = surgery_cli(
    *('combine', base, '--with', f'a={a}', '--with', f'b={b}'),
    *('--weight', 'a=0.7', '--weight', 'b=-0.3', '-o', out),
  )
  assert 0 == result.code, result.err
  one = surgery.load(out)
  assert ['combined'] == [x.name for x in surgery.adapters(one)]
  alone = [
    update(model.params, surgery.detach(params, [other])) for other in 'ba'
  ]
  found = update(model.params, one)
  assert found
  for path, value in found.items():
    wanted = 0.7 * alone[0][path] - 0.3 * alone[1][path]
    np.testing.assert_allclose(value, wanted, atol=1e-5)


def test_adapters_of_one_file_by_a_method(model, files, tmp_path, surgery_cli):
  *_, params = files
  both, out = tmp_path / 'both.msgpack', tmp_path / 'one.msgpack'
  surgery.save(both, params)
  result = surgery_cli(
    *('combine', both, '--weight', 'a=1', '--weight', 'b=2', '--keep'),
    *('--method', 'dare_ties', '--density', '0.6', '--seed', '3'),
    *('--rank', '3', '--name', 'c', '-o', out),
  )
  assert 0 == result.code, result.err
  expected = surgery.combine_adapters(
    params,
    {'a': 1.0, 'b': 2.0},
    method='dare_ties',
    density=0.6,
    seed=3,
    rank=3,
    name='c',
    keep=True,
  )
  actual = surgery.load(out)
  assert expected.keys() == actual.keys()
  for path, param in expected.items():
    if 'rng' not in path:
      assert np.array_equal(param.value, actual[path].value), path


@pytest.mark.parametrize(
  ('words', 'code', 'said'),
  [
    ([], 2, "Missing option '--weight'"),
    (['--weight', 'a'], 2, "--weight 'a': expected --weight KEY=VALUE."),
    (
      ['--weight', 'a=much'],
      2,
      "--weight a=much: expected a number, found 'much'.",
    ),
    (['--weight', 'a=1', '--weight', 'a=2'], 2, '--weight a: given twice.'),
    (['--weight', 'z=1'], 3, "'z'"),
    (['--weight', 'a=1', '--method', 'mena'], 3, "no method is called 'mena'"),
    (['--weight', 'a=1', '--base', 'b'], 2, '--base cannot be given here'),
    (['--weight', 'a=1', 'b.msgpack'], 2, 'adapters of one file, found 2'),
    (['b.msgpack', '--density', '0.5'], 2, 'e.g. --set density=0.5'),
    (['--set', 'weight=['], 2, '--set weight'),
    (['--weight', 'a=1', '--method', 'ties', '--density', '2'], 3, 'density'),
    (['--weight', 'a=1', '--with', 'c=none.msgpack'], 3, 'none.msgpack'),
  ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
  files, tmp_path, surgery_cli, words, code, said
):
  both, out = tmp_path / 'both.msgpack', tmp_path / 'one.msgpack'
  surgery.save(both, files[-1])
  result = surgery_cli('combine', both, *words, '-o', out)
  assert code == result.code, result.err
  assert said in result.err
  assert not out.exists()


DATA = pathlib.Path(__file__).parents[1] / 'data' / 'mergekit'


def test_models_become_one(tmp_path, surgery_cli):
  out = tmp_path / 'out.safetensors'
  a, b, base = (DATA / f'{n}.safetensors' for n in ('a', 'b', 'base'))
  result = surgery_cli(
    *('combine', a, b, '--base', base, '--method', 'ties', '-o', out),
    *('--set', 'weight=0.7,0.3', '--set', 'density=0.5'),
  )
  assert 0 == result.code, result.err
  expected = surgery.combine(
    [surgery.open(a), surgery.open(b)],
    base=surgery.open(base),
    method='ties',
    weight=[0.7, 0.3],
    density=0.5,
  )
  found = surgery.open(out)
  assert expected.keys() == found.keys()
  for path, leaf in expected.items():
    assert np.array_equal(leaf.load(), found[path].load())


def test_options_by_selector_and_depth(tmp_path, surgery_cli):
  out = tmp_path / 'out.safetensors'
  a, b = (DATA / f'{n}.safetensors' for n in 'ab')
  result = surgery_cli(
    *('combine', a, b, '--method', 'slerp', '-o', out),
    *('--set', 't=0,1', '--set', '**/bias:t=0.5'),
  )
  assert 0 == result.code, result.err
  found = surgery.open(out)
  first, second = surgery.open(a), surgery.open(b)
  same = lambda path, other: np.array_equal(
    found[path].load(), other[path].load()
  )
  assert same(('layers', '0', 'dense', 'kernel'), first)
  assert same(('layers', '1', 'dense', 'kernel'), second)
  assert not same(('layers', '1', 'dense', 'bias'), second)


def test_the_methods_are_listed(surgery_cli):
  result = surgery_cli('plugins', '--methods', '--json')
  rows = {row['name']: row for row in json.loads(result.out)}
  assert {'linear', 'slerp', 'ties', 'della', 'model_stock'} <= set(rows)
  assert 'required' == rows['ties']['base']
  names = [one['name'] for one in rows['ties']['options']]
  assert 'lambda' in names and 'density' in names
