import typing

import click
import jax
import numpy as np
import pytest

import surgery
from surgery.cli import combine as combining
from surgery.passes import combine


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


def test_the_shell_knows_the_methods_that_there_are():
  [option] = [p for p in combining.command.params if p.name == 'method']
  assert isinstance(option.type, click.Choice)
  assert set(typing.get_args(combine.Method)) == set(option.type.choices)


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
    (['--weight', 'a=1', '--method', 'mean'], 2, "'mean' is not one of"),
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
