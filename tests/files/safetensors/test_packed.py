"""Tensors whose elements share bytes are copied, renamed and dropped."""

import json

import numpy as np
import pytest

import surgery
from surgery.looking import verify

TAGS = {'F4': 4, 'F6_E2M3': 6, 'F6_E3M2': 6}
BODY = bytes(range(48))


@pytest.fixture(params=TAGS)
def file(request, tmp_path):
  """A file with 16 packed elements in a matrix, and a bias, made by hand."""
  size = 16 * TAGS[request.param] // 8
  bias = np.arange(4, dtype=np.float32).tobytes()
  header = {
    'l.bias': {'dtype': 'F32', 'shape': [4], 'data_offsets': [0, 16]},
    'l.weight': {
      'dtype': request.param,
      'shape': [4, 4],
      'data_offsets': [16, 16 + size],
    },
  }
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  path = tmp_path / 'm.safetensors'
  path.write_bytes(len(text).to_bytes(8, 'little') + text + bias + BODY[:size])
  return path


def raw(path):
  data = path.read_bytes()
  length = int.from_bytes(data[:8], 'little')
  header = json.loads(data[8 : 8 + length])
  header.pop('__metadata__', None)
  return {
    name: (
      entry['dtype'],
      entry['shape'],
      data[8 + length :][slice(*entry['data_offsets'])],
    )
    for name, entry in header.items()
  }


def test_it_opens_and_counts_its_bytes(file):
  leaf = surgery.open(file)['l', 'weight']

  assert (4, 4) == leaf.shape
  assert leaf.nbytes == len(raw(file)['l.weight'][2])


def test_it_is_copied_renamed_and_cast_around(file, tmp_path):
  out = tmp_path / 'out.safetensors'
  model = surgery.rename(surgery.open(file), 'l -> m')

  surgery.cast(model, 'bf16').write(out)

  before, after = raw(file), raw(out)
  assert before['l.weight'] == after['m.weight']
  assert 'BF16' == after['m.bias'][0]


def test_it_is_dropped(file, tmp_path):
  out = tmp_path / 'out.safetensors'

  surgery.drop(surgery.open(file), 'l/weight').write(out)

  assert {'l.bias'} == raw(out).keys()


def test_it_is_not_read(file, tmp_path):
  model = surgery.open(file)

  with pytest.raises(
    surgery.FormatError, match='l/weight: elements of packed_'
  ):
    model['l', 'weight'].load()
  with pytest.raises(surgery.FormatError, match='share bytes. Write safetens'):
    model.write(tmp_path / 'out.msgpack')
  with pytest.raises(surgery.SurgeryError):
    surgery.Recipe([{'transpose': 'l/weight'}]).run(
      model=file, out=tmp_path / 'out.safetensors'
    )


def test_it_is_verified(file):
  states = {
    one.path[-1]: one.state for one in verify.verify(surgery.open(file))
  }

  assert {'weight': 'missing', 'bias': 'missing'} == states


def test_sets_hold_it(file, tmp_path):
  surgery.open(file).write(tmp_path / 'out.safetensors', shard_size=10)

  again = surgery.open(tmp_path / 'out.safetensors.index.json')
  assert again['l', 'weight'].dtype == surgery.open(file)['l', 'weight'].dtype
