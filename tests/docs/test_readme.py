"""The examples of the README run."""

import pathlib
import re
import subprocess
import sys
from typing import Any

import blox as bx
import jax
import jax.numpy as jnp
import optax
import pytest

import surgery

README = (pathlib.Path(__file__).parents[2] / 'README.md').read_text()


def blocks(language):
  return re.findall(rf'```{language}\n(.*?)```', README, re.DOTALL)


@pytest.fixture
def model():
  """Returns the names of the README's first block, which makes a model."""
  names: dict[str, Any] = {}
  exec(blocks('python')[0], names)
  return names


def test_the_blocks_run_as_they_are_copied(model, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  before = model['params']
  for code in blocks('python')[1:3]:
    exec(code, model)
  path = ('net', 'hidden0', 'lora_b')
  assert jnp.any(model['params'][path].value)
  kernel = ('net', 'hidden0', 'kernel')
  assert jnp.array_equal(before[kernel].value, model['params'][kernel].value)


def test_the_python_example_runs(model, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  code = blocks('python')[1]
  assert len(code.strip().splitlines()) <= 10
  exec(code, model)
  assert type(model['plain']) is bx.Params
  assert 4 == len(model['base'])


def test_the_training_of_the_readme_counts_and_moves_what_trains(model):
  adapter = surgery.LoRA(rank=4, dropout=0.3)
  params = surgery.attach(model['params'], adapter, to='**/hidden*')
  params = surgery.freeze(params)
  names = {**model, 'params': params, 'jax': jax, 'optax': optax}
  names['surgery'] = surgery
  code = blocks('python')[2]
  exec(code, names)
  exec(code.split('state = tx.init')[1].split('\n', 1)[1], names)
  assert 2 == int(names['params']['net', 'hidden0', 'lora_dropout'].value[2])
  for path, param in params.items():
    if path[-1] in ('kernel', 'bias', 'lora_b'):
      same = jnp.array_equal(param.value, names['params'][path].value)
      assert same == (path[-1] != 'lora_b'), path


def test_the_adapter_of_the_readme_works(model):
  namespace = {}
  exec(next(c for c in blocks('python') if 'class IA3' in c), namespace)
  host = surgery.Host(plugins=[namespace['IA3']], entry_points=False)
  params = surgery.attach(
    model['params'], namespace['IA3'](), to='**', host=host
  )
  before, _ = model['model'](model['params'], model['x'])
  after, _ = model['model'](params, model['x'])
  assert jnp.array_equal(before, after)


def test_the_shell_example_runs(model, tmp_path):
  surgery.save(tmp_path / 'base.msgpack', model['params'])
  lines = blocks('sh')[1].strip().splitlines()
  assert 8 == len(lines)
  bin = pathlib.Path(sys.executable).parent
  for line in lines:
    done = subprocess.run(
      f'{bin}/{line}', shell=True, cwd=tmp_path, capture_output=True, text=True
    )
    assert 0 == done.returncode, (line, done.stderr)
  assert (tmp_path / 'merged.msgpack').exists()


def test_the_set_up_is_two_commands():
  commands = [
    line.split('#')[0].strip() for line in blocks('sh')[0].splitlines()
  ]
  assert ['make demo', 'make test'] == commands


def test_the_lines_of_other_frameworks_run():
  eqx = pytest.importorskip('equinox')
  import flax.linen as nn
  from flax import nnx

  (code,) = (one for one in blocks('python') if 'nnx.LoRAParam' in one)
  x, key = jnp.ones((2, 16)), jax.random.key(0)
  module = nn.Dense(8)
  names: dict[str, Any] = {
    'jax': jax,
    'optax': optax,
    'surgery': surgery,
    'nnx': nnx,
    'x': x,
    'module': module,
    'params': module.init(key, x)['params'],
    'net': nnx.Linear(16, 8, rngs=nnx.Rngs(0)),
    'mlp': eqx.nn.MLP(16, 8, 8, 1, key=key),
  }
  exec(code, names)
  assert (2, 8) == names['y'].shape
  assert 2 == len(jax.tree.leaves(names['half'])) // 2
