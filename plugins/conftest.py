"""What the tests of all plugins share: a network, and PEFT's outputs on it."""

import dataclasses
import json
import pathlib

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import surgery

LAYERS = {'hidden0': 64, 'hidden1': 32, 'output': 10}


class MLP(bx.Module):
  """16 → 64 → 32 → 10 with ReLU between."""

  def __init__(self, graph, rng):
    super().__init__(graph)
    self.layers = [
      bx.Linear(graph.child(name), size, rng=rng)
      for name, size in LAYERS.items()
    ]

  def __call__(self, params, x):
    for layer in self.layers[:-1]:
      x, params = layer(params, x)
      x = jax.nn.relu(x)
    return self.layers[-1](params, x)


@dataclasses.dataclass
class Net:
  """A network with PEFT's base weights, and what PEFT made of it."""

  model: MLP
  params: bx.Params
  config: dict
  weights: dict
  x: jax.Array
  y: jax.Array
  merged: dict

  def path(self, layer, name):
    return ('net', 'mlp', layer, name)

  def output(self, params):
    return self.model(params, self.x)[0]

  def written(self, params, values):
    """Returns params with values of adapter weights written in."""
    locked, params = params.is_locked, params.unlocked()
    for path, value in values.items():
      assert params[path].value.shape == value.shape, path
      params[path] = params[path].replace(value=jnp.asarray(value))
    return params.locked() if locked else params

  def randomised(self, params, seed=0):
    """Returns params in which what trains of adapters is random."""
    draw = np.random.default_rng(seed)
    values = {
      path: params[path].value
      + 0.3 * draw.normal(size=params[path].value.shape).astype(np.float32)
      for path, param in params.items()
      if 'adapter' in param.metadata and param.trainable
    }
    return self.written(params, values)

  def of_layer(self, layer):
    """Returns PEFT's weights of a layer, by their names."""
    prefix = f'base_model.model.mlp.{layer}.'
    return {
      key.removeprefix(prefix): value
      for key, value in self.weights.items()
      if key.startswith(prefix)
    }

  def assert_equals_peft(self, params):
    """Output and merged weights are PEFT's."""
    np.testing.assert_allclose(
      self.output(params), self.y, rtol=1e-5, atol=1e-5
    )
    merged = surgery.merge(params)
    assert type(merged) is bx.Params
    for key, value in self.merged.items():
      _, layer, kind = key.split('.')
      name = 'kernel' if kind == 'weight' else 'bias'
      np.testing.assert_allclose(
        merged[self.path(layer, name)].value, value.T, rtol=1e-5, atol=1e-5
      )

  def assert_lawful(self, params):
    """The laws that every adapter type keeps, on the adapter `default`."""
    base = self.output(self.params)
    adapted = self.randomised(params)
    changed = self.output(adapted)
    assert not jnp.allclose(base, changed), 'random weights change nothing'
    merged = surgery.merge(adapted)
    assert jnp.array_equal(changed, self.output(merged))
    off = surgery.disable(adapted)
    assert jnp.array_equal(base, self.output(off))
    bare = surgery.detach(adapted)
    assert set(self.params.keys()) == set(bare.keys())
    for path, param in self.params.items():
      if path[-1] in ('kernel', 'bias'):
        assert jnp.array_equal(param.value, bare[path].value), path

  def gradients(self, params):
    """Returns gradients of what trains when the base is frozen, by path."""
    trainable, rest = surgery.freeze(params).split()

    def loss(trainable):
      return jnp.sum(self.output(trainable.merge(rest)) ** 2)

    return dict(jax.grad(loss)(trainable).items())


def pytest_configure(config):
  config.addinivalue_line(
    'markers', 'peft(case): which output of PEFT is meant'
  )


@pytest.fixture
def net(request):
  data = pathlib.Path(request.path).parent / 'data'
  # A plugin with several types has a folder for each case of PEFT.
  marker = request.node.get_closest_marker('peft')
  case = data / marker.args[0] if marker else data
  base = load_file(data / 'base_net.safetensors')
  inputs = load_file(data / 'inputs_net.safetensors')
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  model = MLP(graph.child('mlp'), rng)
  params = bx.Params()
  for layer in LAYERS:
    for kind, name in (('weight', 'kernel'), ('bias', 'bias')):
      value = base.get(f'mlp.{layer}.{kind}')
      params[('net', 'mlp', layer, name)] = bx.Param(jnp.asarray(value.T))
  return Net(
    model,
    params.locked(),
    json.loads((case / 'adapter_config.json').read_text()),
    load_file(case / 'adapter_model.safetensors'),
    jnp.asarray(inputs['x0']),
    load_file(case / 'y.safetensors')['y'],
    load_file(case / 'merged_changed.safetensors'),
  )


@dataclasses.dataclass
class Folder:
  """A folder of PEFT, its base, and what PEFT made of both.

  Attributes:
    path: the folder, which no test changes.
    base: the base in torch's names and axes.
    merged: all tensors after PEFT's merge.
    y: PEFT's outputs.
    tmp: where tests write.
  """

  path: pathlib.Path
  base: pathlib.Path
  merged: dict
  y: np.ndarray
  tmp: pathlib.Path

  def attached(self):
    """The base with the adapter, as a file that was written and opened."""
    out = self.tmp / 'adapted.safetensors'
    self._run([{'attach': {'from': 'adapter'}}], out)
    return out

  def merged_file(self):
    """The tensors of a file into which the adapter was merged."""
    out = self.tmp / 'merged.safetensors'
    self._run([{'merge': {'with': 'adapter'}}], out)
    return load_file(out)

  def written(self):
    """The tensors and the configuration that are written of it again."""
    out = self.tmp / 'again'
    surgery.Recipe(
      [{'extract': None, 'as': 'alone'}],
      inputs={'model': self.attached()},
      outputs={'out': {'path': out, 'of': 'alone', 'format': 'peft'}},
    ).plan().write()
    config = json.loads((out / 'adapter_config.json').read_text())
    return load_file(out / 'adapter_model.safetensors'), config

  def _run(self, steps, out):
    recipe = surgery.Recipe(
      steps,
      inputs={'model': self.base, 'adapter': self.path},
      outputs={'out': out},
    )
    recipe.plan().write()

  def live(self):
    """The parameters of a JAX model after the adapter was loaded and merged."""
    params = bx.Params()
    for name, value in load_file(self.base).items():
      *layer, last = name.split('.')
      if last == 'weight' and value.ndim > 1:
        last = 'embedding' if 'emb' in '.'.join(layer) else 'kernel'
      params['net', *layer, last] = bx.Param(jnp.asarray(_turned(last, value)))
    params = surgery.load_adapter(self.path, params.locked())
    merged = surgery.merge(params)
    return {path[1:]: np.asarray(p.value) for path, p in merged.items()}

  def check(self, exact=True, live=True):
    """Checks merging, in a file and live, and that writing gives it back."""
    found = self.merged_file()
    assert set(self.merged) == set(found)
    for name, value in self.merged.items():
      np.testing.assert_allclose(found[name], value, atol=2e-5, err_msg=name)
    there = self.live() if live else {}
    for name, value in self.merged.items() if live else ():
      *layer, last = name.split('.')
      if last == 'weight' and value.ndim > 1:
        last = 'embedding' if 'emb' in '.'.join(layer) else 'kernel'
      expected = _turned(last, value)
      np.testing.assert_allclose(
        there[*layer, last], expected, atol=2e-5, err_msg=name
      )
    tensors, config = self.written()
    expected = load_file(self.path / 'adapter_model.safetensors')
    assert set(expected) == set(tensors)
    compare = np.testing.assert_array_equal if exact else _almost
    for name, value in expected.items():
      assert (value.shape, value.dtype) == (
        tensors[name].shape,
        tensors[name].dtype,
      )
      compare(tensors[name], value, err_msg=name)
    said = json.loads((self.path / 'adapter_config.json').read_text())
    assert said == config

  def as_single_file(self, roles, alphas):
    """The folder as kohya's scripts spell it; merges it.

    Args:
      roles: ends of names in PEFT, and in such a file.
      alphas: by module.
    """
    found = {}
    for name, value in load_file(
      self.path / 'adapter_model.safetensors'
    ).items():
      name = name.removeprefix('base_model.model.')
      role = next(r for r in roles if name.endswith(f'.{r}'))
      module = name[: -len(role) - 1]
      flat = f'lora_unet_{module.replace(".", "_")}'
      if roles[role] == 'dora_scale':
        value = value.reshape(-1, 1)
      found[f'{flat}.{roles[role]}'] = value
      found[f'{flat}.alpha'] = np.array(alphas[module], 'float32')
    path = self.tmp / 'single.safetensors'
    save_file(found, path)
    out = self.tmp / 'merged.safetensors'
    surgery.Recipe(
      [{'merge': {'with': 'adapter'}}],
      inputs={'model': self.base, 'adapter': path},
      outputs={'out': out},
    ).plan().write()
    merged = load_file(out)
    for name, value in self.merged.items():
      np.testing.assert_allclose(merged[name], value, atol=2e-5, err_msg=name)


def _turned(name, value):
  if name != 'kernel':
    return value
  return value.transpose((*range(2, value.ndim), 1, 0))


def _almost(found, expected, err_msg):
  np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=err_msg)


@pytest.fixture
def folder(request, tmp_path):
  """Returns a folder of PEFT by its path within a plugin's data."""
  data = pathlib.Path(request.path).parent / 'data'

  def made(name):
    path = data / name
    base = next(path.parent.glob('base*.safetensors'))
    merged = load_file(path / 'merged_changed.safetensors')
    return Folder(
      path,
      base,
      {**load_file(base), **merged},
      load_file(path / 'y.safetensors')['y'],
      tmp_path,
    )

  return made
