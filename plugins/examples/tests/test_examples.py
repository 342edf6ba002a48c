"""The examples work, each in a host of its own."""

import importlib.util
import json
import pathlib

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surgery

HERE = pathlib.Path(__file__).parents[1]


def example(name):
  spec = importlib.util.spec_from_file_location(name, HERE / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def network():
  params = bx.Params()
  for name, size in (('small', 2), ('large', 40)):
    params['net', name, 'kernel'] = bx.Param(
      jnp.linspace(-1, 1, size * size).reshape(size, size)
    )
    params['net', name, 'bias'] = bx.Param(jnp.zeros(size))
  return params.locked()


def test_a_selector_term():
  host = surgery.Host(plugins=[example('selector_term')], only=())
  params = network()
  chosen = surgery.select(params, 'larger:1000', host=host)
  assert {'large'} == {path[1] for path in chosen}
  adapted = surgery.attach(
    params, surgery.LoRA(rank=1), to='larger:3', host=host
  )
  assert 2 == len(surgery.adapters(adapted)[0].sites)
  with pytest.raises(surgery.SelectorError, match='expected a number of elem'):
    surgery.select(params, 'larger:x', host=host)


def test_a_freeze_policy():
  host = surgery.Host(plugins=[example('freeze_policy')], only=())
  frozen = surgery.freeze(network(), policy='bitfit', host=host)
  assert {'bias'} == {p[-1] for p, one in frozen.items() if one.trainable}


def test_an_interceptor_that_is_no_adapter(tmp_path):
  plugin = example('fake_quantise').FakeQuantise(bits=3)
  host = surgery.Host(plugins=[plugin], only=())
  lora = surgery.LoRA(rank=2)
  params = surgery.attach(network(), lora, to='**', host=host)
  plain = surgery.attach(network(), lora, to='**')
  merged = surgery.merge(params, host=host)
  exact = surgery.merge(plain)
  for name in ('small', 'large'):
    kernel = np.asarray(merged['net', name, 'kernel'].value)
    wanted = np.asarray(exact['net', name, 'kernel'].value)
    assert len(np.unique(kernel.round(5))) <= 2**3
    assert 0 < np.abs(kernel - wanted).max() <= 1 / 6 + 1e-6

  def loss(half, rest):
    merged = half.merge(rest)
    graph = bx.Graph('net')
    layer = bx.Linear(graph.child('large'), 40, None)
    return layer(merged, jnp.ones((1, 40)))[0].sum()

  # Gradients pass as if nothing was rounded.
  gradients = [
    dict(jax.grad(loss)(*surgery.freeze(p).split()).items())
    for p in (params, plain)
  ]
  for path, gradient in gradients[0].items():
    assert np.array_equal(gradient.value, gradients[1][path].value)
  assert any(np.any(g.value) for g in gradients[0].values())
  # A file is loaded by the same host, and answers alike.
  surgery.save(tmp_path / 'm.msgpack', params, host=host)
  loaded = surgery.load(tmp_path / 'm.msgpack', host=host)
  again = surgery.merge(loaded, host=host)
  path = ('net', 'large', 'kernel')
  assert np.array_equal(merged[path].value, again[path].value)


def test_a_pass(tmp_path):
  host = surgery.Host(plugins=[example('clip')], only=())
  surgery.save(tmp_path / 'm.msgpack', network())
  step = {'clip': {'select': '**/kernel', 'at': 0.5}}
  surgery.Recipe([step]).run(
    model=tmp_path / 'm.msgpack', out=tmp_path / 'o.msgpack', host=host
  )
  live = surgery.apply(network(), step, host=host)
  for path, param in surgery.load(tmp_path / 'o.msgpack').items():
    expected = np.clip(network()[path].value, -0.5, 0.5)
    assert np.array_equal(expected, param.value)
    assert np.array_equal(expected, live[path].value)
  with pytest.raises(surgery.RecipeError, match='expected a bound above 0'):
    surgery.apply(network(), {'clip': {'select': '**', 'at': 0}}, host=host)
  with pytest.raises(surgery.RecipeError, match="'at' must be given"):
    surgery.apply(network(), {'clip': '**'}, host=host)


def test_a_format(tmp_path):
  host = surgery.Host(plugins=[example('npz')], only=())
  surgery.save(tmp_path / 'm.msgpack', network())
  ckpt = surgery.open(tmp_path / 'm.msgpack', host=host)
  ckpt.write(tmp_path / 'm.npz', host=host)
  with np.load(tmp_path / 'm.npz') as file:
    assert {'/'.join(p) for p in network().keys()} == set(file.files)
  again = surgery.open(tmp_path / 'm.npz', host=host)
  for path, leaf in again.items():
    assert np.array_equal(network()[path].value, leaf.load())
  with pytest.raises(FileExistsError):
    ckpt.write(tmp_path / 'm.npz', host=host)
  adapted = surgery.attach(again, surgery.LoRA(rank=1), to='**', host=host)
  with pytest.raises(surgery.FormatError, match='no place for adapters'):
    adapted.write(tmp_path / 'a.npz', host=host)
  assert ['m.msgpack', 'm.npz'] == sorted(p.name for p in tmp_path.iterdir())


def test_an_observer(tmp_path):
  observer = example('provenance').Provenance(tmp_path / 'done.jsonl')
  host = surgery.Host(plugins=[observer], only=())
  params = surgery.attach(
    network(), surgery.LoRA(rank=1), to='**', seed=3, host=host
  )
  surgery.merge(params, host=host)
  with pytest.raises(surgery.AdapterError):
    surgery.merge(params, 'x', host=host)
  lines = (tmp_path / 'done.jsonl').read_text().splitlines()
  first, second, third = map(json.loads, lines)
  assert ('attach', 3) == (first['verb'], first['arguments']['seed'])
  assert ('merge', None) == (second['verb'], second['failed'])
  assert "no adapter 'x'" in third['failed']


def test_the_table_has_all():
  table = (HERE / 'README.md').read_text()
  for file in HERE.glob('*.py'):
    assert f'({file.name})' in table
