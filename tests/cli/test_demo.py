import json

import jax.numpy as jnp
import pytest

import surgery


def test_the_demo_does_what_it_promises(tmp_path, surgery_cli):
  result = surgery_cli('demo', '--keep', tmp_path, '--json')
  assert 0 == result.code, result.err
  figures = json.loads(result.out)
  scores = figures['accuracy']
  assert scores['base']['0-4'] >= 0.97
  assert scores['base']['5-9'] < 0.2
  assert scores['adapted']['5-9'] >= 0.95
  assert scores['adapter off'] == scores['base']
  assert scores['merged'] == scores['adapted']
  assert 0 < figures['trainable share'] < 0.25
  assert figures['base bit-unchanged'] is True
  assert figures['merged equals adapted'] is True

  # What it says of the files is so.
  base = surgery.load(tmp_path / 'base.msgpack')
  trained = surgery.load(tmp_path / 'trained.msgpack')
  again = surgery.load_adapter(tmp_path / 'adapter.msgpack', base)
  bare = surgery.detach(trained)
  assert 5 == len(list(tmp_path.glob('*.msgpack')))
  for path, param in base.items():
    if path[1] == 'mlp':
      assert jnp.array_equal(param.value, bare[path].value), path
  for path in surgery.adapters(trained)[0].sites:
    weight = (*path[:-1], 'lora_a')
    assert jnp.array_equal(trained[weight].value, again[weight].value)


@pytest.mark.parametrize('framework', ['linen', 'nnx', 'equinox'])
def test_the_demo_does_the_same_in_other_frameworks(
  framework, surgery_cli, monkeypatch
):
  from surgery.cli import demo

  if framework == 'equinox':
    pytest.importorskip('equinox')
  # What it promises of bits does not need long training.
  monkeypatch.setattr(demo, 'PRETRAIN_STEPS', 150)
  monkeypatch.setattr(demo, 'ADAPT_STEPS', 150)
  result = surgery_cli('demo', '--framework', framework, '--json')
  assert 0 == result.code, result.err
  figures = json.loads(result.out)
  scores = figures['accuracy']
  assert scores['base']['0-4'] >= 0.9
  assert scores['base']['5-9'] < 0.2
  assert scores['adapted']['5-9'] >= 0.6
  assert scores['adapter off'] == scores['base']
  assert scores['merged'] == scores['adapted']
  assert 0 < figures['trainable share'] < 0.25
