"""Passes that run together do what they do one after another, by files."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import surgery
from surgery.model.checkpoint import (
  Checkpoint,
  Leaf,
)
from surgery.model.grid import (
  BLOCK,
)
from tests.passes.test_rename import adapted, model, saved, stirred

OPTIMIZED = True


class Noise(surgery.Adapter):
  """Adds what it draws, so that a merge is never nothing."""

  name = 'noise'
  adds = True

  def init(self, site, key):
    return {'n': jax.random.normal(key, site.in_shape + site.out_shape)}

  def apply(self, site, name, base, weights):
    return base + weights['n']


HOST = surgery.Host(plugins=[Noise])
LORA = surgery.LoRA(rank=2)

# Each can follow any other; names of layers are those of `rename`, or before.
STEPS = {
  'freeze': lambda c: _run('freeze', c, '**/bias'),
  'freeze all': lambda c: _run('freeze', c),
  'cast': lambda c: _run('cast', c, 'bf16', keep='**/bias'),
  'cast wide': lambda c: _run('cast', c, 'f32'),
  'rename': lambda c: _run('rename', c, ['net/{a,b} -> net/{b,a}']),
  'number': lambda c: _run('rename', c, ['**/x<i> -> **/x<i+1>']),
  'drop': lambda c: _run('drop', c, 'net/b/bias') if _has_bias(c) else c,
  'keep': lambda c: _run('keep', c, 'net/{a,b,x*}'),
  'attach': lambda c: _attached(c),
  'merge': lambda c: _run('merge', c) if c.records(HOST).names else c,
  'disable': lambda c: _switched(c, 'disable'),
  'enable': lambda c: _switched(c, 'enable'),
}


def _run(verb, ckpt, *args, **kwargs):
  return HOST.passes[verb](ckpt, *args, host=HOST, **kwargs)


def _has_bias(ckpt):
  return ('net', 'b', 'bias') in ckpt and ('net', 'a', 'bias') in ckpt


def _attached(ckpt):
  name = f'n{len(ckpt.records(HOST).names)}'
  return _run('attach', ckpt, Noise(), to='net/{a,b}/kernel', name=name, seed=7)


def _switched(ckpt, verb):
  # A disabled adapter cannot be merged: it is on again before the end.
  if not ckpt.records(HOST).names:
    return ckpt
  ckpt = _run(verb, ckpt)
  return _run('enable', ckpt) if verb == 'disable' else ckpt


def source():
  return model(
    'net/a/bias',
    'net/a/kernel',
    'net/b/bias',
    'net/b/kernel',
    'net/x1/kernel',
    'net/x9/kernel',
    'other/kernel',
  )


def tensors(ckpt):
  return {
    path: (leaf.dtype, leaf.shape, leaf.trainable, leaf.metadata, leaf.digest)
    for path, leaf in ckpt.items()
  }


@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=5))
@settings(deadline=None, max_examples=30)
def test_in_one_go_is_one_after_another(tmp_path_factory, names):
  folder = tmp_path_factory.mktemp('compose')
  first = saved(source(), folder / 'in.msgpack')
  together, single = first, first
  for index, name in enumerate(names):
    together = STEPS[name](together)
    single = saved(STEPS[name](single), folder / f'{index}.msgpack')
  once = saved(together, folder / 'once.msgpack')
  assert tensors(single) == tensors(once)
  assert single.manifest == once.manifest
  file = folder / f'{len(names) - 1}.msgpack'
  assert file.read_bytes() == (folder / 'once.msgpack').read_bytes()


def test_a_large_tensor_goes_through_all_of_them_in_blocks(tmp_path):
  value = np.random.default_rng(0).normal(size=(3000, 701)).astype('float32')
  assert value.size > BLOCK
  leaf = Leaf(lambda: value, value.shape, 'float32')
  base = Checkpoint({('net', 'a', 'kernel'): leaf, ('net', 'head'): leaf})
  first = saved(base, tmp_path / 'in.msgpack')
  ckpt = stirred(_run('attach', first, LORA, to='net/a'))
  ckpt = saved(ckpt, tmp_path / 'adapted.msgpack')
  steps = [
    lambda c: _run('merge', c),
    lambda c: _run('cast', c, 'bf16'),
    lambda c: _run('rename', c, 'net/a -> net/layer'),
    lambda c: _run('drop', c, '**/head'),
    lambda c: _run('cast', c, 'f64'),
  ]
  together, single = ckpt, ckpt
  for index, step in enumerate(steps):
    together = step(together)
    single = saved(step(single), tmp_path / f'{index}.msgpack')
  [(path, one)] = together.items()
  assert ('net', 'layer', 'kernel') == path
  assert one.part is not None
  assert 3 == len(list(one.parts()))
  once = saved(together, tmp_path / 'once.msgpack')
  assert tensors(single) == tensors(once)


@pytest.mark.parametrize('first', ['cast', 'rename'])
def test_a_cast_before_a_merge_rounds_before_it(tmp_path, first):
  ckpt = saved(stirred(adapted()), tmp_path / 'in.msgpack')
  steps = {
    'cast': lambda c: _run('cast', c, 'bf16'),
    'rename': lambda c: _run('rename', c, 'net/query -> net/q'),
  }
  second = next(s for s in steps if s != first)
  one = _run('merge', steps[second](steps[first](ckpt)))
  two = _run('merge', steps[first](steps[second](ckpt)))
  assert set(one) == set(two)
  for path, leaf in one.items():
    expected = np.asarray(two[path].load())
    assert expected.tobytes() == np.asarray(leaf.load()).tobytes()
