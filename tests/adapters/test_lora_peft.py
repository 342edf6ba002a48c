"""LoRA equals PEFT's outputs and merged weights (tests/data/peft)."""

import json
import pathlib

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import surgery

DATA = pathlib.Path(__file__).parents[1] / 'data' / 'peft'


class Net(bx.Module):
  """An MLP; beside it, if there is an image, embedding and convolution."""

  def __init__(self, graph, rng, whole):
    super().__init__(graph)
    mlp = graph.child('mlp')
    self.layers = [
      bx.Linear(mlp.child(name), size, rng=rng)
      for name, size in (('hidden0', 64), ('hidden1', 32), ('output', 10))
    ]
    if whole:
      self.emb = bx.Embed(graph.child('emb'), 50, 16, rng=rng)
      self.conv = bx.Conv(
        graph.child('conv'), (3, 3), 8, rng=rng, padding='VALID'
      )
      self.head = bx.Linear(graph.child('head'), 10, rng=rng)

  def __call__(self, params, x, image=None):
    if image is not None:
      x, params = self.emb(params, x)
      x = x.mean(axis=1)
    for layer in self.layers[:-1]:
      x, params = layer(params, x)
      x = jax.nn.relu(x)
    x, params = self.layers[-1](params, x)
    if image is None:
      return x, params
    z, params = self.conv(params, image)
    # PEFT's model flattens channels first.
    z = jax.nn.relu(z).transpose(0, 3, 1, 2).reshape(len(z), -1)
    z, params = self.head(params, z)
    return x + z, params


def ours(key):
  """Returns our path of a torch parameter."""
  *layer, name = key.split('.')
  names = {'weight': 'embedding' if layer == ['emb'] else 'kernel'}
  return ('root', 'net', *layer, names.get(name, name))


def turned(key, value):
  """Returns a torch parameter in our order of axes."""
  if key.startswith('emb') or value.ndim == 1:
    return value
  return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def factors(layer, weights):
  """Returns PEFT's two factors of a layer in our order of axes."""
  if layer == 'emb':
    return (
      weights['lora_embedding_A'].T,
      weights['lora_embedding_B'].T,
    )
  a, b = weights['lora_A.weight'], weights['lora_B.weight']
  if a.ndim == 4:
    return a.transpose(2, 3, 1, 0), b[:, :, 0, 0].T
  return a.T, b.T


def case(name, adapter, to):
  """Returns model, inputs, adapted params, and PEFT's results."""
  whole = name.startswith('netv')
  kind = 'netv' if whole else 'net'
  base = load_file(DATA / f'base_{kind}.safetensors')
  inputs = load_file(DATA / f'inputs_{kind}.safetensors')
  graph = bx.Graph('root')
  rng = bx.Rng(graph.child('rng'))
  model = Net(graph.child('net'), rng, whole)
  params = bx.Params()
  for key, value in base.items():
    params[ours(key)] = bx.Param(jnp.asarray(turned(key, value)))
  params = surgery.attach(params.locked(), adapter, to=to).unlocked()
  theirs = load_file(DATA / name / 'adapter_model.safetensors')
  by_layer = {}
  for key, value in theirs.items():
    key = key.removeprefix('base_model.model.')
    layer, _, weight = key.partition('.lora_')
    by_layer.setdefault(layer, {})[f'lora_{weight}'] = value
  for layer, weights in by_layer.items():
    for weight, value in zip('ab', factors(layer, weights), strict=True):
      stored = f'lora_{weight}' + (
        '.default.embedding' if layer == 'emb' else ''
      )
      path = ('root', 'net', *layer.split('.'), stored)
      assert value.shape == params[path].value.shape, path
      params[path] = params[path].replace(value=jnp.asarray(value))
  assert len(by_layer) == len(surgery.adapters(params)[0].sites)
  x = [jnp.asarray(inputs['x0'].astype('int32' if whole else 'float32'))]
  if whole:
    x.append(jnp.asarray(inputs['x1'].transpose(0, 2, 3, 1)))
  return model, x, params.locked()


def config_of(name):
  """Returns PEFT's configuration of a case as ours."""
  said = json.loads((DATA / name / 'adapter_config.json').read_text())
  patterns = {}
  for key, option in (('rank_pattern', 'rank'), ('alpha_pattern', 'alpha')):
    for layer, value in said[key].items():
      selector = '**/' + layer.removeprefix('^mlp.')
      patterns.setdefault(selector, {})[option] = value
  return surgery.LoRA(
    rank=said['r'],
    alpha=said['lora_alpha'],
    rslora=said['use_rslora'],
    patterns=patterns,
  )


@pytest.mark.parametrize(
  ('name', 'to'),
  [
    ('lora', '**'),
    ('lora_rslora', '**'),
    ('lora_rank_alpha_pattern', '**'),
    ('netv_lora', '**/{emb,conv,hidden0,head}'),
  ],
)
def test_lora_equals_peft(name, to):
  model, x, params = case(name, config_of(name), to)
  y = load_file(DATA / name / 'y.safetensors')['y']
  # PEFT's own merge of these differs from its output by up to 4e-5, on values
  # of up to 134.
  np.testing.assert_allclose(model(params, *x)[0], y, rtol=1e-5, atol=1e-5)
  merged = surgery.merge(params)
  changed = load_file(DATA / name / 'merged_changed.safetensors')
  for key, value in changed.items():
    np.testing.assert_allclose(
      merged[ours(key)].value, turned(key, value), rtol=1e-5, atol=1e-5
    )


def test_patterns_give_each_site_its_own_rank_and_scale():
  name = 'lora_rank_alpha_pattern'
  _, _, params = case(name, config_of(name), '**')
  ranks = [
    params[('root', 'net', 'mlp', layer, 'lora_a')].value.shape[-1]
    for layer in ('hidden0', 'hidden1', 'output')
  ]
  assert [4, 2, 6] == ranks
