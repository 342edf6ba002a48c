"""Integer keys and bytes, which flax reads, come back as they were."""

import msgpack  # type: ignore[import-untyped]
import numpy as np
import pytest
from flax import serialization

import surgery

KEYS = (0, 5, 127, 128, 255, 256, 70000, 2**40, -1, -32, -33, -200, -(2**40))
TREE = {
  'net': {key: {'kernel': np.ones(3, np.float32)} for key in KEYS},
  'blob': b'\x00\xff' * 200,
  'empty': b'',
  'more': {1: 2, 2: b'x', 3: {}},
}


def restored(data):
  """Reads as flax does; its older releases do not restore such keys."""
  unpack = serialization._msgpack_ext_unpack
  return msgpack.unpackb(data, ext_hook=unpack, raw=False, strict_map_key=False)


@pytest.fixture
def file(tmp_path):
  path = tmp_path / 'm.msgpack'
  path.write_bytes(serialization.msgpack_serialize(TREE))
  return path


def test_a_copy_has_the_same_bytes(file, tmp_path):
  out = tmp_path / 'out.msgpack'

  surgery.open(file).write(out)

  assert file.read_bytes() == out.read_bytes()


def test_paths_have_their_text(file):
  model = surgery.open(file)

  assert ('net', '-200', 'kernel') in model
  assert b'\x00\xff' * 200 == model['blob',].load()
  chosen = surgery.select(model, 'net/{5,256}')
  assert {('net', '5', 'kernel'), ('net', '256', 'kernel')} == set(chosen)


@pytest.mark.parametrize(
  ('change', 'expected'),
  [
    (lambda m: surgery.cast(m, 'bf16'), ('net', 'more')),
    (lambda m: surgery.rename(m, 'net -> other'), ('other', 'more')),
    (lambda m: surgery.rename(m, 'blob -> lump'), ('net', 'more')),
    (lambda m: surgery.drop(m, 'blob'), ('net', 'more')),
  ],
  ids=['cast', 'rename-layer', 'rename-other', 'drop'],
)
def test_passes_keep_integers(change, expected, file, tmp_path):
  out = tmp_path / 'out.msgpack'
  change(surgery.open(file)).write(out, manifest=False)

  found = restored(out.read_bytes())

  assert list(KEYS) == sorted(found[expected[0]], key=KEYS.index)
  assert {1: 2, 2: b'x', 3: {}} == found[expected[1]]


def test_sets_and_params_keep_them(file, tmp_path):
  surgery.open(file).write(tmp_path / 'set.msgpack', shard_size=300)
  index = tmp_path / 'set.msgpack.index.json'
  surgery.open(index).write(tmp_path / 'one.msgpack', manifest=False)
  surgery.save(tmp_path / 'saved.msgpack', surgery.load(file))

  for name in ('one', 'saved'):
    data = (tmp_path / f'{name}.msgpack').read_bytes()
    found = restored(data)
    assert set(KEYS) == set(found['net'])
    assert TREE['blob'] == found['blob']


def test_bytes_go_through_safetensors(file, tmp_path):
  surgery.open(file).write(tmp_path / 'm.safetensors')

  model = surgery.open(tmp_path / 'm.safetensors')

  assert TREE['blob'] == model['blob',].load()
  assert b'' == model['empty',].load()


@pytest.mark.parametrize(
  ('tree', 'said'),
  [
    ({3: 1, '3': 1}, "the key '3' occurs twice"),
    ({True: 1}, 'expected text or an integer as a key'),
    ({2.5: 1}, 'expected text or an integer as a key'),
    ({None: 1}, 'expected text or an integer as a key'),
  ],
  ids=['twice', 'bool', 'float', 'none'],
)
def test_other_keys_are_refused(tree, said, tmp_path):
  path = tmp_path / 'm.msgpack'
  path.write_bytes(msgpack.packb(tree))

  with pytest.raises(surgery.FormatError, match=said):
    surgery.open(path)
