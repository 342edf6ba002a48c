"""Layers are known by their classes, not by the names of these."""

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from surgery.model import layers


class Linear(bx.Module):
  """Somebody's own, whose kernel has heads."""

  def __init__(self, graph, rng):
    super().__init__(graph)
    self.rng = rng

  def __call__(self, params, x):
    shape, init = (6, 2, 3), jax.nn.initializers.normal(1.0)
    kernel, params = self.get_param(params, 'kernel', shape, init, rng=self.rng)
    return jnp.einsum('bi,ihd->bhd', x, kernel), params


class Conv(Linear):
  """Somebody's own, without a `kernel_size`."""


class Derived(bx.Linear):
  """A blox layer under another name."""


def made(cls):
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  layer = cls(graph.child('layer'), rng)
  x = jnp.ones((2, 6))
  _, params = layer(rng.seed(bx.Params(), seed=1), x)
  return graph, layer, params.locked(), x


@pytest.mark.parametrize('cls', [Linear, Conv])
def test_a_class_of_that_name_is_not_the_layer_of_blox(cls, tmp_path):
  graph, layer, params, x = made(cls)
  lora = surgery.LoRA(rank=1)
  alone = surgery.attach(params, lora, to='**/kernel')
  known = surgery.attach(params, lora, to='**/kernel', graph=graph)
  assert alone.keys() == known.keys()
  for path in alone.records.owned:
    assert alone[path].value.shape == known[path].value.shape, path
    np.testing.assert_array_equal(alone[path].value, known[path].value)
  # Types are about names all the same.
  found = surgery.select(params, f'type:{cls.__name__}', graph=graph)
  assert 1 == len([p for p in found if p[-1] == 'kernel'])
  surgery.save(tmp_path / 'm.msgpack', params, graph=graph)
  assert {} == layers.of_graph(graph)[('net', 'layer')].layouts


def test_what_is_derived_of_a_layer_of_blox_is_one():
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  layer = Derived(graph.child('layer'), 3, rng=rng)
  found = layers.of_module(layer)
  assert ('Derived', 'Linear') == found.names
  assert {'kernel': 'io', 'bias': 'o'} == found.layouts
