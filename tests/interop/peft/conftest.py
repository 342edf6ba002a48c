"""Folders that PEFT wrote, their models, and what came out of them."""

import dataclasses
import json
import pathlib
import shutil

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import surgery
from tests.adapters.test_lora_peft import Net

DATA = pathlib.Path(__file__).parents[2] / 'data' / 'peft'
CASES = ('lora', 'lora_rslora', 'lora_rank_alpha_pattern', 'netv_lora')


@dataclasses.dataclass
class Case:
  folder: pathlib.Path
  base: surgery.Checkpoint
  base_file: pathlib.Path
  tensors: dict[str, np.ndarray]
  config: dict[str, object]
  merged: dict[str, np.ndarray]
  model: Net
  params: bx.Params
  inputs: list[jax.Array]
  y: np.ndarray


def torch_params(base):
  """A torch checkpoint as the parameters of the JAX model."""
  graph = bx.Graph('root')
  model = Net(
    graph.child('net'), bx.Rng(graph.child('rng')), 'emb.weight' in base
  )
  params = bx.Params()
  for key, value in base.items():
    *layer, name = key.split('.')
    if name == 'weight':
      name = 'embedding' if layer == ['emb'] else 'kernel'
    if value.ndim > 1 and layer != ['emb']:
      value = value.transpose((*range(2, value.ndim), 1, 0))
    params[('root', 'net', *layer, name)] = bx.Param(jnp.asarray(value))
  return model, params.locked()


def made(name, tmp_path):
  """A case in a folder of its own, which a test may change."""
  kind = 'netv' if name.startswith('netv') else 'net'
  folder = tmp_path / 'peft'
  folder.mkdir()
  for one in ('adapter_config.json', 'adapter_model.safetensors'):
    shutil.copy(DATA / name / one, folder)
  base_file = tmp_path / 'base.safetensors'
  shutil.copy(DATA / f'base_{kind}.safetensors', base_file)
  base = load_file(base_file)
  model, params = torch_params(base)
  inputs = load_file(DATA / f'inputs_{kind}.safetensors')
  xs = [jnp.asarray(inputs[k]) for k in ('x0', 'x1') if k in inputs]
  if len(xs) > 1:
    xs[1] = xs[1].transpose(0, 2, 3, 1)
  return Case(
    folder,
    surgery.open(base_file),
    base_file,
    load_file(folder / 'adapter_model.safetensors'),
    json.loads((folder / 'adapter_config.json').read_text()),
    {**base, **load_file(DATA / name / 'merged_changed.safetensors')},
    model,
    params,
    xs,
    load_file(DATA / name / 'y.safetensors')['y'],
  )


@pytest.fixture(params=CASES)
def case(request, tmp_path):
  """Each case of LoRA in turn."""
  return made(request.param, tmp_path)


@pytest.fixture
def lora(tmp_path):
  """The plain case."""
  return made('lora', tmp_path)


@pytest.fixture
def config(lora):
  """Changes keys of the plain case's configuration."""

  def change(**changes):
    path = lora.folder / 'adapter_config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

  return change


@pytest.fixture
def tensors(lora):
  """Changes the plain case's tensors by a function on a dict of them."""

  def change(function):
    path = lora.folder / 'adapter_model.safetensors'
    found = load_file(path)
    function(found)
    save_file(found, path, metadata={'format': 'pt'})

  return change
