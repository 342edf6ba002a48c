import dataclasses
import pathlib

import blox as bx
import jax
import jax.numpy as jnp
import pytest

import surgery


class Net(bx.Module):
  def __init__(self, graph, rng):
    super().__init__(graph)
    self.query = bx.Linear(graph.child('query'), 8, rng=rng)
    self.value = bx.Linear(graph.child('value'), 8, rng=rng)

  def __call__(self, params, x):
    q, params = self.query(params, x)
    v, params = self.value(params, jax.nn.relu(q))
    return v, params


@dataclasses.dataclass
class Model:
  graph: bx.Graph
  net: Net
  params: bx.Params
  file: pathlib.Path
  x: jax.Array


@pytest.fixture
def model(tmp_path):
  """A small model, in memory and saved with types of layers."""
  graph = bx.Graph('model')
  rng = bx.Rng(graph.child('rng'))
  net = Net(graph.child('net'), rng)
  x = jnp.linspace(0, 1, 12).reshape(2, 6)
  _, params = net(rng.seed(bx.Params(), seed=1), x)
  params = params.locked()
  file = tmp_path / 'base.msgpack'
  surgery.save(file, params, graph=graph)
  return Model(graph, net, params, file, x)


@pytest.fixture
def adapted(model):
  """The model with a LoRA whose weights are random, as a file."""
  params = surgery.attach(
    model.params, surgery.LoRA(rank=2), to='**/{query,value}', seed=1
  ).unlocked()
  for i, path in enumerate(list(params.keys())):
    if path[-1] == 'lora_b':
      value = jax.random.normal(jax.random.key(i), params[path].value.shape)
      params[path] = params[path].replace(value=value)
  file = model.file.with_name('adapted.msgpack')
  surgery.save(file, params.locked(), graph=model.graph)
  return file


@pytest.fixture
def out(tmp_path):
  return tmp_path / 'out.msgpack'
