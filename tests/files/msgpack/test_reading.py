import os
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import serialization

from surgery.files.source import Source
from surgery.model.manifest import Manifest

TREE: dict[str, Any] = {
  'net': {
    'kernel': np.arange(6, dtype=np.float32).reshape(2, 3),
    'scale': np.ones(3, ml_dtypes.bfloat16),
    'step': np.int32(7),
  },
  'rate': 0.5,
  'name': 'model',
  'nothing': None,
  'empty': {},
}


@pytest.fixture
def opened(msgpack, put):
  return msgpack.open(put(serialization.to_bytes(TREE)))


def test_paths_come_in_the_order_of_the_file(opened):
  expected = [
    ('net', 'kernel'),
    ('net', 'scale'),
    ('net', 'step'),
    ('rate',),
    ('name',),
    ('nothing',),
    ('empty',),
  ]
  assert expected == list(opened)


def test_shapes_and_dtypes_are_known_unread(opened):
  kernel, scale = opened['net', 'kernel'], opened['net', 'scale']
  assert (kernel.shape, kernel.dtype, kernel.nbytes) == ((2, 3), 'float32', 24)
  assert (scale.shape, scale.dtype, scale.nbytes) == ((3,), 'bfloat16', 6)


def test_values_are_those_that_were_saved(opened):
  np.testing.assert_array_equal(
    TREE['net']['kernel'], opened['net', 'kernel'].load()
  )
  assert opened['net', 'scale'].load().tolist() == [1, 1, 1]


def test_a_numpy_scalar_is_one_again(opened):
  leaf = opened['net', 'step']
  assert leaf.scalar
  assert (leaf.shape, leaf.dtype) == ((), 'int32')
  assert isinstance(leaf.load(), np.int32)


@pytest.mark.parametrize('name', ['rate', 'name', 'nothing', 'empty'])
def test_what_is_no_array_has_no_shape(opened, name):
  leaf = opened[name,]
  assert (leaf.shape, leaf.dtype, leaf.source) == (None, None, None)
  assert TREE[name] == leaf.load()


def test_an_empty_dict_is_a_new_one_each_time(opened):
  opened['empty',].load()['x'] = 1
  assert opened['empty',].load() == {}


def test_a_file_from_flax_says_nothing_else(opened):
  assert Manifest() == opened.manifest
  assert opened.manifest.locked
  leaf = opened['net', 'kernel']
  assert leaf.trainable
  assert (leaf.key, leaf.digest, leaf.metadata) == (None, None, {})


def test_its_origin_is_the_file(opened, tmp_path):
  assert str(tmp_path / 'm.msgpack') == opened.origin


def test_the_source_says_where_the_bytes_are(opened, tmp_path):
  source = opened['net', 'kernel'].source
  assert isinstance(source, Source)
  ((start, stop),) = source.spans
  data = (tmp_path / 'm.msgpack').read_bytes()
  assert TREE['net']['kernel'].tobytes() == data[start:stop]


def test_arrays_survive_that_the_file_is_replaced(opened, tmp_path):
  array = opened['net', 'kernel'].load()
  other = tmp_path / 'other'
  other.write_bytes(b'something else')
  other.replace(tmp_path / 'm.msgpack')
  np.testing.assert_array_equal(TREE['net']['kernel'], array)
  assert opened['net', 'scale'].load().tolist() == [1, 1, 1]


def test_sorted_files_are_read_too(msgpack, put):
  # `msgpack_serialize` sorts the keys of what it is given.
  checkpoint = msgpack.open(put(serialization.msgpack_serialize(TREE)))
  assert next(iter(checkpoint)) == ('empty',)


def test_jax_arrays_that_flax_wrote_are_read(msgpack, put):
  tree = {'a': jnp.arange(3, dtype=jnp.bfloat16), 'b': jnp.zeros((), bool)}
  found = msgpack.open(put(serialization.to_bytes(tree)))
  assert found['a',].dtype == 'bfloat16'
  assert found['a',].load().tolist() == [0, 1, 2]
  assert found['b',].shape == ()


def test_lists_that_flax_wrote_are_maps(msgpack, put):
  tree = {'a': [np.int8(1), (np.int8(2),)]}
  found = msgpack.open(put(serialization.to_bytes(tree)))
  assert list(found) == [('a', '0'), ('a', '1', '0')]


def test_an_empty_model_is_a_model(msgpack, put):
  assert len(msgpack.open(put(serialization.to_bytes({})))) == 0


def test_arrays_of_the_same_size_and_other_shapes_are_told_apart(msgpack, put):
  # Headers that were seen before are not read again.
  tree = {
    'a': np.zeros((2, 6), np.int8),
    'b': np.zeros((3, 4), np.int8),
    'c': np.zeros((4, 3), np.uint8)[:, :2],
    'd': np.zeros((2, 6), np.bool_),
    'e': np.zeros((2, 6), np.int8),
  }
  found = msgpack.open(put(serialization.to_bytes(tree)))
  for (name,), leaf in found.items():
    assert (tree[name].shape, tree[name].dtype.name) == (leaf.shape, leaf.dtype)


def test_a_missing_file_is_the_usual_error(msgpack, tmp_path):
  with pytest.raises(FileNotFoundError):
    msgpack.open(tmp_path / 'none.msgpack')


def test_a_folder_is_the_usual_error(msgpack, tmp_path):
  with pytest.raises(IsADirectoryError):
    msgpack.open(tmp_path)


@pytest.mark.parametrize('kind', [str, os.fsencode])
def test_paths_may_be_text_or_bytes(msgpack, put, kind):
  assert (
    len(msgpack.open(kind(str(put(serialization.to_bytes({'a': 1})))))) == 1
  )
