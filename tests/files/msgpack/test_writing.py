import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import serialization

from surgery import errors
from surgery.files import output
from surgery.files.digest import digest
from surgery.files.msgpack import chunks, walk
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.layers import LayerType
from surgery.model.manifest import KEY, Manifest
from surgery.naming.paths import Path

Leaves = dict[Path, Leaf]

KERNEL = np.arange(6, dtype=np.float32).reshape(2, 3)
# Shorter ones are not worth a call of the system.
LONG = np.arange(40_000, dtype=np.float32)


@pytest.fixture
def target(tmp_path):
  return tmp_path / 'out.msgpack'


@pytest.fixture
def copies(monkeypatch):
  """The ranges that are copied by the system."""
  found = []
  copy = output._copy

  def spy(file, fd, start, stop):
    found.append((start, stop))
    copy(file, fd, start, stop)

  monkeypatch.setattr(output, '_copy', spy)
  return found


def unread(*arguments):
  raise AssertionError('was read')


def read(msgpack, path):
  return {p: leaf.load() for p, leaf in msgpack.open(path).items()}


# What is written.


def test_jax_arrays_are_written_as_flax_does(msgpack, target):
  tree = {
    'a': jnp.arange(3, dtype=jnp.bfloat16),
    'b': jnp.zeros((2, 2), jnp.int4),
    'c': jnp.float8_e4m3fn(2),
  }
  leaves: Leaves = {
    (k,): Leaf(functools.partial(jnp.asarray, v), v.shape, str(v.dtype))
    for k, v in tree.items()
  }
  msgpack.write(Checkpoint(leaves), target, manifest=False)
  assert serialization.to_bytes(tree) == target.read_bytes()


def test_key_data_is_written_with_its_implementation(msgpack, target):
  data = np.asarray(jax.random.key_data(jax.random.key(3)))
  leaf = Leaf(lambda: data, (2,), 'uint32', key='threefry2x32')
  msgpack.write(Checkpoint({('key',): leaf}), target)
  found = msgpack.open(target)['key',]
  assert found.key == 'threefry2x32'
  assert data.tolist() == found.load().tolist()


def test_big_endian_arrays_are_turned(msgpack, target, leaf):
  msgpack.write(Checkpoint({('a',): leaf(KERNEL.astype('>f4'))}), target)
  found = msgpack.open(target)['a',]
  assert found.dtype == 'float32'
  np.testing.assert_array_equal(KERNEL, found.load())


def test_entries_of_one_map_are_brought_together(msgpack, target, checkpoint):
  values = {('a', 'x'): 1, ('b',): 2, ('a', 'y'): 3}
  msgpack.write(checkpoint(values), target)
  assert list(msgpack.open(target)) == [('a', 'x'), ('a', 'y'), ('b',)]


def test_a_computed_value_without_axes_stays_an_array(msgpack, target):
  # Numpy's arithmetic makes scalars of arrays without axes.
  leaf = Leaf(lambda: np.add(np.float32(1), 1), (), 'float32')
  msgpack.write(Checkpoint({('a',): leaf}), target)
  assert not msgpack.open(target)['a',].scalar


def test_a_scalar_that_was_computed_as_an_array_stays_a_scalar(msgpack, target):
  leaf = Leaf(lambda: np.array(1, np.int8), (), 'int8', scalar=True)
  msgpack.write(Checkpoint({('a',): leaf}), target)
  assert isinstance(msgpack.open(target)['a',].load(), np.int8)


def test_leaves_are_loaded_one_at_a_time(msgpack, target):
  alive: list[None] = []

  class Loaded(np.ndarray):
    def __del__(self):
      if self.base is None:
        alive.remove(None)

  def load():
    assert alive == []
    alive.append(None)
    return Loaded((4,), np.int8)

  leaves: Leaves = {(name,): Leaf(load, (4,), 'int8') for name in 'abc'}
  msgpack.write(Checkpoint(leaves), target)
  assert alive == []


# The manifest.


def test_flags_metadata_and_layer_types_come_back(msgpack, target):
  leaf = Leaf(lambda: KERNEL, (2, 3), 'float32', False, {'tags': ('a', 1)})
  manifest = Manifest(
    locked=False,
    layer_types={('net',): LayerType(('Linear',), {'kernel': 'io'})},
    history=({'pass': 'freeze'},),
  )
  msgpack.write(Checkpoint({('net', 'kernel'): leaf}, manifest), target)
  found = msgpack.open(target)
  assert manifest == found.manifest
  assert not found['net', 'kernel'].trainable
  assert found['net', 'kernel'].metadata == {'tags': ('a', 1)}


def test_the_manifest_is_the_last_entry_for_flax(msgpack, target, checkpoint):
  msgpack.write(checkpoint({('z',): KERNEL}), target)
  restored = serialization.msgpack_restore(target.read_bytes())
  assert list(restored) == ['z', KEY]
  assert np.uint8 == restored[KEY].dtype
  assert restored[KEY].tobytes().startswith(b'{"version":1,')


def test_it_can_be_left_out(msgpack, target, leaf):
  frozen = leaf(KERNEL).replace(trainable=False)
  msgpack.write(Checkpoint({('a',): frozen}), target, manifest=False)
  assert serialization.to_bytes({'a': KERNEL}) == target.read_bytes()


def test_it_is_left_out_if_it_would_say_nothing(
  msgpack, put, target, checkpoint
):
  data = serialization.to_bytes({'a': KERNEL, 'b': 1})
  msgpack.write(msgpack.open(put(data)), target)
  assert data == target.read_bytes()


def test_notes_of_one_empty_name_come_back(msgpack, target, leaf):
  frozen = leaf(KERNEL).replace(trainable=False)
  msgpack.write(Checkpoint({('',): frozen}), target)
  assert not msgpack.open(target)['',].trainable


def test_it_is_found_wherever_it_is(msgpack, put, target, checkpoint):
  msgpack.write(checkpoint({('a',): KERNEL}), target)
  restored = serialization.msgpack_restore(target.read_bytes())
  found = msgpack.open(put(serialization.msgpack_serialize(restored)))
  assert list(found) == [('a',)]
  assert digest(KERNEL) == found['a',].digest


# Digests.


def test_digests_of_what_is_computed_are_computed(msgpack, target, leaf):
  stale = leaf(KERNEL).replace(digest='xxh3:stale')
  msgpack.write(Checkpoint({('a',): stale, ('b',): leaf(1)}), target)
  found = msgpack.open(target)
  assert digest(KERNEL) == found['a',].digest
  assert found['b',].digest is None


def test_digests_of_what_is_copied_are_carried_over(msgpack, put, target):
  opened = msgpack.open(put(serialization.to_bytes({'a': KERNEL, 'b': KERNEL})))
  leaves: Leaves = {
    ('a',): opened['a',].replace(digest='xxh3:carried'),
    ('b',): opened['b',],
  }
  msgpack.write(Checkpoint(leaves), target)
  found = msgpack.open(target)
  assert found['a',].digest == 'xxh3:carried'
  assert found['b',].digest is None


# Copying.


def test_an_unchanged_file_is_copied_at_once(
  msgpack, put, target, copies, monkeypatch
):
  data = serialization.to_bytes({'a': {'x': LONG, 'y': LONG}, 'b': LONG})
  opened = msgpack.open(put(data))
  monkeypatch.setattr('surgery.files.source.Source.__call__', unread)
  msgpack.write(opened, target)
  assert data == target.read_bytes()
  assert len(copies) == 1


def test_renamed_tensors_are_copied_unread(
  msgpack, put, target, copies, monkeypatch
):
  opened = msgpack.open(put(serialization.to_bytes({'a': LONG, 'b': LONG})))
  monkeypatch.setattr('surgery.files.source.Source.__call__', unread)
  leaves: Leaves = {('net', 'x'): opened['b',], ('net', 'y'): opened['a',]}
  msgpack.write(Checkpoint(leaves), target)
  expected = serialization.to_bytes({'net': {'x': LONG, 'y': LONG}})
  assert expected == target.read_bytes()
  assert len(copies) == 2


def test_what_a_pass_puts_in_the_place_of_load_is_written(msgpack, put, target):
  opened = msgpack.open(put(serialization.to_bytes({'a': KERNEL})))
  doubled = opened['a',].replace(load=lambda: 2 * KERNEL)
  msgpack.write(opened.replace(leaves={('a',): doubled}), target)
  np.testing.assert_array_equal(2 * KERNEL, read(msgpack, target)['a',])


def test_tensors_of_two_files_go_into_one(msgpack, tmp_path, target):
  parts = {}
  for name in 'ab':
    path = tmp_path / f'{name}.msgpack'
    path.write_bytes(serialization.to_bytes({name: KERNEL}))
    parts.update(msgpack.open(path))
  msgpack.write(Checkpoint(parts), target)
  expected = serialization.to_bytes({'a': KERNEL, 'b': KERNEL})
  assert expected == target.read_bytes()


def test_a_file_can_be_written_over_itself(msgpack, put):
  path = put(serialization.to_bytes({'a': KERNEL, 'b': 1}))
  opened = msgpack.open(path)
  leaves: Leaves = {('c',): opened['a',], ('d',): opened['b',]}
  msgpack.write(Checkpoint(leaves), path, overwrite=True)
  assert serialization.to_bytes({'c': KERNEL, 'd': 1}) == path.read_bytes()
  np.testing.assert_array_equal(KERNEL, opened['a',].load())


def test_headers_that_flax_would_write_shorter_are_written_shorter(
  msgpack, put, target
):
  # The same array with lengths of four bytes.
  body = b'\x93\xdd\0\0\0\x01\xce\0\0\0\x02\xdb\0\0\0\x04int8\xc6\0\0\0\x02ab'
  array = b'\xc9' + len(body).to_bytes(4, 'big') + b'\x01' + body
  opened = msgpack.open(put(b'\xdf\0\0\0\x01\xdb\0\0\0\x01a' + array))
  msgpack.write(opened, target)
  expected = {'a': np.frombuffer(b'ab', np.int8)}
  assert serialization.to_bytes(expected) == target.read_bytes()


# Chunks.


@pytest.mark.parametrize('shape', [(), (5,), (2, 0, 3), (3, 5)])
def test_large_arrays_are_written_in_chunks(
  msgpack, target, monkeypatch, checkpoint, shape
):
  for module in (chunks, serialization):
    monkeypatch.setattr(module, 'MAX_CHUNK_SIZE', 7)
  value = np.ones(shape, np.float64)
  msgpack.write(checkpoint({('a',): value}), target, manifest=False)
  assert serialization.to_bytes({'a': value}) == target.read_bytes()
  np.testing.assert_array_equal(value, read(msgpack, target)['a',])


def test_the_size_of_chunks_is_that_of_flax():
  assert serialization.MAX_CHUNK_SIZE == chunks.MAX_CHUNK_SIZE


# What is refused.


@pytest.mark.parametrize(
  ('path', 'said'),
  [
    ((), 'expected a path of one or more strings'),
    ((1,), 'expected a path of one or more strings'),
    ((KEY,), 'reserved'),
    ((KEY, 'a'), 'reserved'),
    (('a', chunks.MARK), 'reserved'),
    (('a', '\ud800'), 'cannot be written as UTF-8'),
    (('a', 'x' * 4097), 'names of at most 4096 bytes'),
    (('a',) * 99, 'at most 98 segments, found 99'),
  ],
)
def test_names_that_a_file_cannot_hold_are_refused(
  msgpack, target, checkpoint, path, said
):
  with pytest.raises(errors.FormatError, match=said):
    msgpack.write(checkpoint({path: 1}), target)
  assert not target.exists()


def test_the_deepest_path_that_is_written_is_read(
  msgpack, target, checkpoint, monkeypatch
):
  monkeypatch.setattr(chunks, 'MAX_CHUNK_SIZE', 7)
  path = ('a',) * 98
  msgpack.write(checkpoint({path: KERNEL}), target)
  np.testing.assert_array_equal(KERNEL, read(msgpack, target)[path])


def test_a_tensor_beneath_another_is_refused(msgpack, target, checkpoint):
  with pytest.raises(errors.FormatError, match=r'a .*a/b'):
    msgpack.write(checkpoint({('a',): 1, ('a', 'b'): 2}), target)


@pytest.mark.parametrize('name', ['MAX_NODES', 'MAX_PATHS'])
def test_what_could_not_be_read_is_not_written(
  msgpack, target, checkpoint, monkeypatch, name
):
  monkeypatch.setattr(walk, name, 2)
  with pytest.raises(errors.FormatError, match='expected at most'):
    msgpack.write(checkpoint({('a', 'b'): 1, ('c',): 2}), target)


@pytest.mark.parametrize(
  ('value', 'said'),
  [
    (np.array([None]), 'dtype object'),
    (np.array(['x']), 'dtype <U1'),
    (np.zeros(2, 'f4,f4'), 'expected an array of numbers'),
    (np.str_('x'), 'expected an array of numbers'),
    (bytearray(b'bytes'), 'a value of type bytearray cannot be saved'),
    ([1], 'a value of type list'),
    ({'a': 1}, 'a value of type dict'),
    (range(3), 'a value of type range'),
    (2**64, 'cannot be saved'),
    (-(2**63) - 1, 'cannot be saved'),
    ('\ud800', 'cannot be saved'),
  ],
  ids=str,
)
def test_values_that_a_file_cannot_hold_are_refused(
  msgpack, target, checkpoint, value, said
):
  with pytest.raises(errors.FormatError, match=f'^net/x: .*{said}'):
    msgpack.write(checkpoint({('net', 'x'): value}), target)
  assert list(target.parent.iterdir()) == []


def test_a_key_instead_of_its_data_is_refused(msgpack, target):
  key = jax.random.key(0)
  with pytest.raises(errors.FormatError, match='net/key'):
    msgpack.write(Checkpoint({('net', 'key'): Leaf(lambda: key)}), target)


@pytest.mark.parametrize(
  'value',
  [KERNEL.T, KERNEL.astype(np.float64), KERNEL.astype(ml_dtypes.bfloat16), 3],
)
def test_a_leaf_must_load_what_it_says(msgpack, target, value):
  leaf = Leaf(lambda: value, (2, 3), 'float32')
  with pytest.raises(
    errors.FormatError, match=r'^a: expected float32\[2,3\], found'
  ):
    msgpack.write(Checkpoint({('a',): leaf}), target)


def test_a_scalar_has_no_axes(msgpack, target):
  leaf = Leaf(lambda: KERNEL, (2, 3), 'float32', scalar=True)
  with pytest.raises(errors.FormatError, match='expected a numpy scalar'):
    msgpack.write(Checkpoint({('a',): leaf}), target)


@pytest.mark.parametrize('metadata', [{'x': object()}, {'x': '\ud800'}])
def test_metadata_that_cannot_be_said_is_refused_first(
  msgpack, target, metadata
):
  leaf = Leaf(unread, (2, 3), 'float32', metadata=metadata)
  with pytest.raises(errors.FormatError):
    msgpack.write(Checkpoint({('a',): leaf}), target)


def test_a_manifest_that_is_no_json_is_refused(msgpack, target):
  manifest = Manifest(history=({'pass': object()},))
  with pytest.raises(errors.FormatError, match='cannot be written as JSON'):
    msgpack.write(Checkpoint({}, manifest), target)


def test_an_existing_file_is_refused_and_nothing_is_loaded(msgpack, put):
  path = put(b'old')
  with pytest.raises(FileExistsError, match='overwrite=True'):
    msgpack.write(Checkpoint({('a',): Leaf(unread, (1,), 'int8')}), path)
  assert path.read_bytes() == b'old'


def test_an_error_of_a_pass_comes_as_it_is(msgpack, put):
  def load():
    raise errors.SiteError('net/a: no')

  path = put(b'old')
  leaves: Leaves = {
    ('a',): Leaf(lambda: KERNEL, (2, 3), 'float32'),
    ('b',): Leaf(load),
  }
  with pytest.raises(errors.SiteError, match=r'^net/a: no$'):
    msgpack.write(Checkpoint(leaves), path, overwrite=True)
  assert path.read_bytes() == b'old'
  assert [p.name for p in path.parent.iterdir()] == ['m.msgpack']


def test_a_full_disk_leaves_the_old_file(put):
  path = put(b'old')
  code = """
import resource, sys
import numpy as np
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.files.msgpack import write_file
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
leaf = Leaf(lambda: np.zeros(1 << 20), (1 << 20,), 'float64')
try:
  write_file(Checkpoint({('a',): leaf}), sys.argv[1], overwrite=True)
except OSError as error:
  print(error)
"""
  run = subprocess.run(
    [sys.executable, '-c', code, path],
    capture_output=True,
    text=True,
    check=True,
  )
  assert 'File too large' in run.stdout
  assert path.read_bytes() == b'old'
  assert [p.name for p in path.parent.iterdir()] == ['m.msgpack']
