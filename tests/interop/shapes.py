"""Models of which the names and shapes are kept, as transformers wrote them."""

import json
import pathlib

import numpy as np

from surgery.model.checkpoint import Checkpoint, Leaf

DATA = pathlib.Path(__file__).parents[1] / 'data' / 'hf_shapes'
NAMES = sorted(path.stem for path in DATA.glob('*.json'))


def config_of(name):
  """What `config.json` says."""
  return json.loads((DATA / f'{name}.json').read_text())['config']


def tensors_of(name):
  """Tensors with the names and shapes, and random numbers."""
  said = json.loads((DATA / f'{name}.json').read_text())['tensors']
  return {
    tuple(key.split('.')): _leaf(k, said[key]) for k, key in enumerate(said)
  }


def _leaf(number, shape):
  def load():
    size = int(np.prod(shape))
    values = np.random.default_rng(number).standard_normal(size, np.float32)
    return values.reshape(shape)

  return Leaf(load, tuple(shape), 'float32')


def folder_of(name, path, config=None):
  """Writes the model folder of such a model."""
  path.mkdir()
  Checkpoint(tensors_of(name)).write(path / 'model.safetensors')
  said = config_of(name) if config is None else config
  (path / 'config.json').write_text(json.dumps(said))
  return path
