"""What is not exactly a flax msgpack file is refused, and the error says why.

Most cases write msgpack by hand, because no library would.
"""

import struct
import subprocess
import sys
from typing import Any

import msgpack as library  # type: ignore[import-untyped]
import numpy as np
import pytest

from surgery import errors
from surgery.files import arrays
from surgery.files.msgpack import chunks, values, walk
from surgery.model import manifest

pack = library.packb
MARK = chunks.MARK


def ext(code, body):
  return pack(library.ExtType(code, body))


def array(shape, dtype, data, code=1):
  return ext(code, pack([shape, dtype, data]))


def under(value, *path):
  """A file with one value."""
  for key in reversed(path or ('a', 'b')):
    value = b'\x81' + pack(key) + value
  return value


GOOD = array([2], 'float32', bytes(8))


def refused(msgpack, path, *said):
  """Asserts that a file is refused with a message; returns the error."""
  with pytest.raises(errors.FormatError) as info:
    msgpack.open(path)
  text = str(info.value)
  assert text.startswith(str(path))
  for part in said:
    assert part in text
  return info.value


# Each: bytes, offset, what the message says. `a/b` starts at byte 5.
START = len(under(b''))
VALUES = {
  'ends after the key': (b'', START, 'expected 1 more byte, found 0'),
  'ends in a number': (
    b'\xcb\0\0',
    START + 1,
    'expected 8 more bytes, found 2',
  ),
  'ends in text': (b'\xa5abc', START + 1, 'expected 5 more bytes, found 3'),
  'ends in a length': (b'\xdb\0\0', START + 1, 'expected 4 more bytes'),
  'ends in an extension': (GOOD[:-1], START + 3, 'more bytes, found'),
  'ends in the header of an extension': (b'\xc7', START + 1, 'expected 1 more'),
  'ends before the code': (b'\xc7\x05', START + 2, 'expected 1 more byte'),
  'an extension longer than the file': (
    b'\xc9\xff\xff\xff\xff\x01\x93',
    START + 6,
    'expected 4294967295 more bytes, found 1',
  ),
  'text longer than the file': (
    b'\xdb\xff\xff\xff\xff',
    START + 5,
    'expected 4294967295 more bytes, found 0',
  ),
  'a map longer than the file': (
    b'\xdf\xff\xff\xff\xff\xa1a',
    START,
    'expected a map of 4294967295 entries, found 2 bytes',
  ),
  'a byte without meaning': (b'\xc1', START, 'a byte that msgpack never uses'),
  'bytes that end': (b'\xc4\x05abc', START + 2, 'expected 5 more bytes'),
  'a list': (pack([1]), START, 'as which flax writes a list, too'),
  'text that is not UTF-8': (
    b'\xa2a\xff',
    START + 2,
    'text is not valid UTF-8',
  ),
  'an unknown extension': (ext(7, b'abc'), START, 'found extension 7'),
  'a timestamp': (b'\xd6\xffabcd', START, 'found extension -1'),
  'an array that is no list': (
    ext(1, pack({})),
    START + 2,
    'expected an array (a list of shape, dtype and bytes), found a map',
  ),
  'an array of two parts': (
    ext(1, pack([[1], 'int8'])),
    START + 2,
    'found a list of 2',
  ),
  'a shape that is no list': (
    array(3, 'int8', b'abc'),
    START + 4,
    'expected a shape (a list), found an integer',
  ),
  'a negative size': (
    array([-2], 'int8', b'ab'),
    START + 5,
    'expected the size of an axis (0 or more), found -2',
  ),
  'a size that is no integer': (
    array([2.0], 'int8', b'ab'),
    START + 5,
    'expected the size of an axis (0 or more), found 2.0',
  ),
  'a size that is a boolean': (
    array([True], 'int8', b'a'),
    START + 5,
    'found True',
  ),
  'a size that is text': (
    array(['2'], 'int8', b'ab'),
    START + 5,
    'expected the size of an axis, found text',
  ),
  'too many axes': (
    array([1] * 65, 'int8', b'a'),
    START + 4,
    'expected at most 64 axes, found 65',
  ),
  'a shape of more axes than bytes': (
    ext(1, b'\x93\xdd\xff\xff\xff\xff'),
    START + 4,
    'expected at most 64 axes, found 4294967295',
  ),
  'a shape that overflows': (
    array([2**63, 2**63], 'int8', b''),
    START + 30,
    'too large for any array',
  ),
  'an empty shape that overflows': (
    array([0, 2**63], 'int8', b''),
    START + 22,
    'too large for any array',
  ),
  'a dtype that is no text': (
    array([1], 7, b'a'),
    START + 6,
    'expected the name of a dtype, found an integer',
  ),
  'objects': (array([1], 'object', bytes(8)), START + 7, "found 'object'"),
  'structured elements': (
    array([1], 'f4,f4', bytes(8)),
    START + 7,
    "expected a dtype of numbers, found 'f4,f4'. A file can hold: bool, int8",
  ),
  'void elements': (array([1], 'V8', bytes(8)), START + 6, "found 'V8'"),
  'text elements': (array([1], 'str32', bytes(4)), START + 7, "found 'str32'"),
  'dates': (
    array([1], 'datetime64[s]', bytes(8)),
    START + 7,
    "found 'datetime64[s]'",
  ),
  'a dtype that is not ASCII': (
    ext(1, b'\x93\x90\xa2\xff\xfe\xc4\x00'),
    START + 6,
    'expected a dtype of numbers',
  ),
  'elements that are text': (
    array([1], 'int8', 'a'),
    START + 11,
    'expected the bytes of an array, found text',
  ),
  'too few bytes': (
    array([2, 2], 'float32', bytes(12)),
    START + 17,
    'expected 16 bytes of float32[2,2], found 12',
  ),
  'too many bytes': (
    array([], 'int8', b'ab'),
    START + 12,
    'expected 1 bytes of int8[], found 2',
  ),
  'bytes beyond the array': (
    ext(1, b'\x93\x91\x01\xa4int8\xc4\x05a') + bytes(9),
    START + 11,
    'expected the bytes of an array to end at byte',
  ),
  'something after the bytes': (
    ext(1, pack([[1], 'int8', b'a']) + b'\xc0'),
    START + 11,
    'expected the bytes of an array to end at byte',
  ),
  'a numpy scalar with an axis': (
    array([1], 'int8', b'a', code=3),
    START + 3,
    'expected a numpy scalar, found the shape (1,)',
  ),
  'a complex number of three parts': (
    ext(2, pack([1.0, 2.0, 3.0])),
    START + 3,
    'expected a complex number (a list of two floats)',
  ),
  'a complex number of integers': (
    ext(2, pack([1, 2])),
    START + 3,
    'expected a complex number',
  ),
  'a complex number and more': (
    ext(2, pack([1.0, 2.0]) + b'\xc0'),
    START + 3,
    'expected a complex number',
  ),
}


@pytest.mark.parametrize('name', VALUES)
def test_a_bad_value_is_refused_with_path_and_offset(msgpack, put, name):
  value, offset, said = VALUES[name]
  error = refused(msgpack, put(under(value)), 'a/b', said)
  assert offset == error.offset
  assert f'at byte {offset}' in str(error)


def test_an_empty_file_is_refused(msgpack, put):
  assert refused(msgpack, put(b''), 'found an empty file').offset == 0


@pytest.mark.parametrize(
  ('data', 'found'),
  [
    (GOOD, 'an extension'),
    (pack([1]), 'a list'),
    (pack(7), 'an integer'),
    (pack(-7), 'an integer'),
    (pack(None), 'nil'),
    (pack(True), 'a boolean'),
    (pack(1.5), 'a float'),
    (pack('text'), 'text'),
    (b'\x1f\x8b gzip', 'an integer'),
  ],
)
def test_only_a_map_is_a_model(msgpack, put, data, found):
  said = 'at byte 0: expected a map (a dict of parameters), found ' + found
  assert refused(msgpack, put(data), said).offset == 0


def test_bytes_after_the_end_are_refused(msgpack, put):
  data = under(GOOD)
  error = refused(msgpack, put(data + b'xyz'), 'found 3 further bytes')
  assert len(data) == error.offset


@pytest.mark.parametrize('cut', range(1, len(under(GOOD))))
def test_no_beginning_of_a_file_is_a_file(msgpack, put, cut):
  refused(msgpack, put(under(GOOD)[:cut]))


@pytest.mark.parametrize('key', [None, 1.5, True, b'a', []])
def test_keys_must_be_text_or_integers(msgpack, put, key):
  data = b'\x81\xa1a\x81' + pack(key) + GOOD
  error = refused(
    msgpack, put(data), ', a: expected text or an integer as a key'
  )
  assert error.offset == 4


def test_keys_must_be_utf8(msgpack, put):
  error = refused(
    msgpack, put(b'\x81\xa1a\x81\xa2\xc3\x28\xc0'), 'a key is not valid UTF-8'
  )
  assert error.offset == 5


def test_keys_must_not_occur_twice(msgpack, put):
  data = b'\x81\xa1a\x82\xa1b' + GOOD + b'\xa1b' + GOOD
  error = refused(msgpack, put(data), ", a: the key 'b' occurs twice")
  assert 6 + len(GOOD) == error.offset


def test_equal_keys_in_two_maps_are_fine(msgpack, put):
  data = b'\x82\xa1a\x81\xa1b' + GOOD + b'\xa1b\x81\xa1b' + GOOD
  assert list(msgpack.open(put(data))) == [('a', 'b'), ('b', 'b')]


def test_very_long_keys_are_refused(msgpack, put):
  refused(msgpack, put(under(GOOD, 'x' * 5000)), 'a key of 5000 bytes')


def test_deep_maps_are_followed_to_a_limit(msgpack, put):
  path = ['x'] * walk.MAX_DEPTH
  assert [tuple(path)] == list(msgpack.open(put(under(GOOD, *path))))


@pytest.mark.parametrize('depth', [101, 1023, 100_000])
def test_maps_that_are_nested_too_deep_are_refused(msgpack, put, depth):
  data = b'\x81\xa1x' * depth + b'\xc0'
  error = refused(msgpack, put(data), 'maps nested more than 100 deep')
  assert error.offset == 3 * walk.MAX_DEPTH
  assert len(str(error)) < 1000


def test_too_many_entries_are_refused(msgpack, put, monkeypatch):
  monkeypatch.setattr(walk, 'MAX_NODES', 3)
  data = pack({'a': 1, 'b': {'c': 2}, 'd': 3})
  refused(msgpack, put(data), 'more than 3 entries')


def test_too_long_paths_in_all_are_refused(msgpack, put, monkeypatch):
  monkeypatch.setattr(walk, 'MAX_PATHS', 100)
  data = pack({'x' * 30: {'a': 1, 'b': 2}})
  refused(msgpack, put(data), 'paths of more than 100 bytes')


@pytest.mark.parametrize('value', ['\x80', '\xc0', '\x81\xa0' * 90 + '\x80'])
def test_a_small_file_cannot_take_much_memory(tmp_path, value):
  """0.5 MB that would be 100,000 entries, or paths of hundreds of MB."""
  count = 500_000 // (4 + len(value))
  keys = (
    bytes((0xA3, 32 + i % 90, 32 + i // 90 % 90, 32 + i // 8100))
    for i in range(count)
  )
  data = b'\xdf' + struct.pack('>I', count)
  data += b''.join(key + value.encode('latin-1') for key in keys)
  path = tmp_path / 'm.msgpack'
  path.write_bytes(data)
  code = """
import resource, sys
from surgery import errors
from surgery.files import msgpack
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
  msgpack.open_file(sys.argv[1])
except errors.FormatError:
  pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
  run = subprocess.run(
    [sys.executable, '-c', code, path],
    capture_output=True,
    check=True,
    timeout=120,
  )
  assert int(run.stdout) < 125_000  # Kilobytes.


# Arrays in chunks.


def chunk(data, dtype='int8', code=1, shape=None):
  return library.ExtType(code, pack([shape or [len(data)], dtype, data]))


def chunked(**changes):
  tree = {
    MARK: True,
    'shape': {'0': 1, '1': 3},
    'chunks': {'0': chunk(b'ab'), '1': chunk(b'c')},
    **changes,
  }
  return pack({'a': {'b': {k: v for k, v in tree.items() if v is not ...}}})


def test_the_chunks_that_are_changed_below_are_good(msgpack, put):
  leaf = msgpack.open(put(chunked()))['a', 'b']
  assert leaf.shape == (1, 3)
  assert leaf.load().tobytes() == b'abc'


CHUNKS: dict[str, dict[str, Any]] = {
  'a mark that is not true': {MARK: False},
  'a mark that is a number': {MARK: 1},
  'no shape': {'shape': ...},
  'a shape that is text': {'shape': 'abc'},
  'a shape that is a number': {'shape': 3},
  'a shape without the first axis': {'shape': {'1': 3}},
  'a shape with a gap': {'shape': {'0': 1, '2': 3}},
  'a shape with another key': {'shape': {'0': 3, 'x': 1}},
  'a negative size': {'shape': {'0': -3}},
  'a size that is text': {'shape': {'0': '3'}},
  'a size that is an array': {'shape': {'0': chunk(b'a')}},
  'a size that is a map': {'shape': {'0': {'0': 3}}},
  'a shape of other size': {'shape': {'0': 4}},
  'a shape without axes': {'shape': {}},
  'a shape that overflows': {'shape': {'0': 2**63, '1': 2**63}},
  'no chunks': {'chunks': ...},
  'empty chunks': {'chunks': {}},
  'chunks that are an array': {'chunks': chunk(b'abc')},
  'chunks with a gap': {'chunks': {'0': chunk(b'ab'), '2': chunk(b'c')}},
  'a chunk that is a number': {'chunks': {'0': 7, '1': chunk(b'abc')}},
  'chunks of two dtypes': {
    'chunks': {'0': chunk(b'ab'), '1': chunk(b'c', 'uint8')}
  },
  'a chunk of two axes': {'chunks': {'0': chunk(b'abc', shape=[3, 1])}},
  'a chunk that is a scalar': {
    'shape': {'0': 1},
    'chunks': {'0': chunk(b'a', code=3, shape=[])},
  },
  'something else': {'more': 1},
}


@pytest.mark.parametrize('name', CHUNKS)
def test_malformed_chunks_are_refused_with_their_path(msgpack, put, name):
  refused(msgpack, put(chunked(**CHUNKS[name])), ', a/b')


def test_chunks_without_axes_need_one_element(msgpack, put):
  data = chunked(shape={}, chunks={'0': chunk(b'a')})
  assert msgpack.open(put(data))['a', 'b'].shape == ()


def test_a_lone_array_in_chunks_is_no_model(msgpack, put):
  data = pack(library.unpackb(chunked())['a']['b'])
  refused(msgpack, put(data), 'expected a map (a dict of parameters)')


# The manifest.


def with_manifest(text, tree=None):
  data = np.frombuffer(text, np.uint8)
  value = library.ExtType(1, pack([data.shape, 'uint8', data.tobytes()]))
  return pack({**(tree or {'a': 1}), manifest.KEY: value})


SAID = b'{"version":1,"kind":"model","locked":true,"tensors":{%s}}'


def test_the_manifest_that_is_changed_below_is_good(msgpack, put):
  leaf = msgpack.open(put(with_manifest(SAID % b'"a":{"trainable":false}')))
  assert not leaf['a',].trainable


@pytest.mark.parametrize(
  ('value', 'found'),
  [
    (7, 'a value of type int'),
    ('text', 'a value of type str'),
    ({}, 'a value of type dict'),
    (chunk(b'{}', 'int8'), 'int8[2]'),
    (chunk(b'{}', 'uint8', shape=[2, 1]), 'uint8[2,1]'),
  ],
)
def test_something_else_in_its_place_is_refused(msgpack, put, value, found):
  data = pack({'a': 1, manifest.KEY: value})
  error = refused(
    msgpack, put(data), manifest.KEY, f'found {found}', 'name is reserved'
  )
  assert error.offset is not None


def test_a_map_in_its_place_is_refused(msgpack, put):
  data = pack({'a': 1, manifest.KEY: {'version': 1}})
  refused(msgpack, put(data), manifest.KEY, 'name is reserved')


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    (b'', 'not JSON'),
    (b'{', 'not JSON'),
    (b'\xff\xfe', 'not JSON'),
    (b'[]', 'expected an object'),
    (b'{}', 'expected a version'),
    (b'{"version":99,"kind":"model"}', 'version 99 is newer'),
    (b'{"version":1,"kind":"x"}', "kind 'x'"),
    (b'[' * 100_000, 'not JSON'),
    (
      # How deep is too deep, and for whom, depends on the release of Python.
      SAID % (b'"a":{"metadata":{"x":' + b'[' * 20_000 + b']' * 20_000 + b'}}'),
      'manifest (__surgery__): n',
    ),
    (SAID % b'"a":7', 'malformed entry'),
    (SAID % b'"a":{"metadata":[1]}', 'a: expected metadata to be a dict'),
    (SAID % b'"a":{"key":1}', 'a: expected key to be a str, found 1'),
    (SAID % b'"a":{"digest":1}', 'a: expected digest to be a str, found 1'),
    (SAID % b'"b/c":{"trainable":false}', "found 'b/c', which is not in it"),
  ],
)
def test_a_bad_manifest_is_refused(msgpack, put, text, said):
  error = refused(msgpack, put(with_manifest(text)), manifest.KEY, said)
  assert error.offset is not None


def test_no_dtype_is_made_from_a_name_in_a_file():
  assert {name.encode() for name in arrays.DTYPES} == set(values._NAMES)
