"""What is no safetensors file is refused, and the error says why."""

import json

import pytest

from surgery import errors
from surgery.files import strict_json
from surgery.files.safetensors import open_file
from surgery.model.manifest import KEY

GOOD = {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}


def file(header, data=bytes(8), length=None):
  raw = header if isinstance(header, bytes) else json.dumps(header).encode()
  size = len(raw) if length is None else length
  return size.to_bytes(8, 'little') + raw + data


def entry(**changes):
  return file({'net.w': {**GOOD, **changes}})


def manifest(data):
  text = data if isinstance(data, str) else json.dumps(data)
  return file({'__metadata__': {KEY: text}, 'net.w': GOOD})


def extra(**data):
  kind = {'version': 1, 'kind': 'model', 'locked': True}
  return manifest({**kind, 'file': data})


DEEP = b'[' * 100_000
CASES = {
  'empty': (b'', 'found an empty file'),
  'too short': (b'\x01\0\0', 'at byte 0: expected a safetensors file'),
  'a header that is cut': (file(b'{}', b'', 3), 'expected a safetensors file'),
  'a length that lies': (
    file(b'{}', b'', 2**63),
    'expected a safetensors file',
  ),
  'no JSON': (file(b'{"a": tru}', b''), 'at byte 14: not valid JSON'),
  'no UTF-8': (file(b'{"\xff": 1}', b''), 'at byte 10: not valid JSON'),
  'no object': (file(b'[]', b''), 'expected a JSON object, found list'),
  'too deep': (file(b'{"a":' + DEEP, b''), 'not valid JSON'),
  'NaN': (file(b'{"a": NaN}', b''), 'NaN is no number'),
  'a name twice': (
    file(b'{"w": 1, "w": 2}', b''),
    "the key 'w' occurs twice",
  ),
  'half a character': (file(b'{"\\ud800": {}}', b''), 'not valid JSON'),
  'text that is no entry': (
    file({'net.w': 'F32'}),
    "net.w: expected dtype, shape and data_offsets, found 'F32'",
  ),
  'a key too many': (entry(more=1), 'expected dtype, shape and data_offsets'),
  'a dtype that is unknown': (entry(dtype='F31'), "F6_E3M2, found 'F31'"),
  'a dtype that is no text': (entry(dtype=['F32']), "found ['F32']"),
  'too many bytes of numbers that share them': (
    entry(dtype='F4'),
    'expected 1 bytes for F4[2], found 8',
  ),
  'a negative size': (entry(shape=[-2]), 'sizes of at most 64 axes'),
  'a size that is no integer': (entry(shape=[2.0]), 'found [2.0]'),
  'a size that is a boolean': (entry(shape=[True, 2]), 'found [True, 2]'),
  'a huge size': (entry(shape=[2**70]), 'found [1180591620717411303424]'),
  'too many axes': (entry(shape=[1] * 65), 'sizes of at most 64 axes'),
  'no end': (entry(data_offsets=[0]), 'where its bytes start and end'),
  'an end before the start': (
    entry(data_offsets=[8, 0]),
    'expected 8 bytes for F32[2], found -8',
  ),
  'too few bytes': (
    entry(data_offsets=[0, 4]),
    'expected 8 bytes for F32[2], found 4',
  ),
  'a gap before': (
    file({'net.w': {**GOOD, 'data_offsets': [4, 12]}}, bytes(12)),
    'expected its bytes to start at 0, where others end, found 4',
  ),
  'shared bytes': (
    file({'a': GOOD, 'net.w': GOOD}),
    'net.w: expected its bytes to start at 8, where others end, found 0',
  ),
  'fewer bytes than said': (
    file({'net.w': GOOD}, bytes(7)),
    'expected its bytes within the 7 after the header, found 0 to 8',
  ),
  'more bytes than said': (
    file({'net.w': GOOD}, bytes(9)),
    'expected the end of the file after the last tensor, found 1 more bytes',
  ),
  'metadata that is a list': (
    file({'__metadata__': ['a'], 'net.w': GOOD}),
    "__metadata__: expected text by text, found ['a']",
  ),
  'metadata that is no text': (
    file({'__metadata__': {'a': 1}, 'net.w': GOOD}),
    "expected text by text, found {'a': 1}",
  ),
  'a manifest that is no JSON': (manifest('{'), 'not JSON'),
  'a manifest that is a list': (manifest('[]'), 'expected an object'),
  'a newer manifest': (manifest({'version': 2}), 'Update blox-surgery'),
  'notes of another tensor': (
    manifest({'version': 1, 'kind': 'model', 'tensors': {'x': {'key': 'a'}}}),
    "found 'x', which is not in it",
  ),
  'another name': (extra(paths={'x': 'y'}), "found 'x', which is not in the"),
  'a list of names': (extra(paths=[1]), 'malformed entry: TypeError'),
  'an unknown dtype': (extra(dtypes={'net.w': 'V8'}), "unknown dtype 'V8'"),
  'a dtype of numbers': (
    extra(dtypes={'net.w': 'int4'}),
    'expected net.w to be int4, found F32[2]',
  ),
  'a scalar with axes': (
    extra(scalars=['net.w']),
    'expected a scalar, found net.w',
  ),
  'a value where a tensor is': (
    extra(values=[[0, 'net/w', 1]]),
    'expected other paths, found one twice',
  ),
  'a value without a path': (extra(values=[[0, '', 1]]), 'found one twice, or'),
  'a value that is a list': (
    extra(values=[[0, 'x', [1]]]),
    'expected a number, text or null, found [1]',
  ),
  'a value of an unknown kind': (
    extra(values=[[0, 'x', {'set': 1}]]),
    "unknown kind of value 'set'",
  ),
  'two names for a path': (
    file(
      {
        '__metadata__': {
          KEY: '{"version":1,"kind":"model","file":{"paths":{"b":"a"}}}'
        },
        'a': {**GOOD, 'shape': [1], 'data_offsets': [0, 4]},
        'b': {**GOOD, 'shape': [1], 'data_offsets': [4, 8]},
      }
    ),
    'expected other paths, found one twice',
  ),
}


@pytest.mark.parametrize('case', CASES)
def test_it_is_refused_and_the_message_says_why(tmp_path, case):
  data, said = CASES[case]
  path = tmp_path / 'm.safetensors'
  path.write_bytes(data)
  with pytest.raises(errors.FormatError) as info:
    open_file(path)
  assert str(info.value).startswith(str(path))
  assert said in str(info.value)
  assert info.value.offset is not None
  assert 0 <= info.value.offset <= len(data)


def test_the_offset_is_that_of_the_name(tmp_path):
  path = tmp_path / 'm.safetensors'
  data = entry(dtype='F31')
  path.write_bytes(data)
  with pytest.raises(errors.FormatError) as info:
    open_file(path)
  assert data.index(b'"net.w"') == info.value.offset


def test_a_boolean_that_is_neither_is_refused_when_it_is_read(tmp_path):
  path = tmp_path / 'm.safetensors'
  path.write_bytes(
    file(
      {'b': {'dtype': 'BOOL', 'shape': [2], 'data_offsets': [0, 2]}}, b'\1\2'
    )
  )
  leaf = open_file(path)['b',]
  with pytest.raises(errors.FormatError, match='expected booleans, found the'):
    leaf.load()


def test_headers_have_a_limit(tmp_path, monkeypatch):
  path = tmp_path / 'm.safetensors'
  path.write_bytes(file({'net.w': GOOD}))
  for name in ('MAX_SIZE', '_MAX_ITEMS'):
    with monkeypatch.context() as patch:
      patch.setattr(strict_json, name, 0)
      with pytest.raises(errors.FormatError, match=r'at most 0|more than any'):
        open_file(path)
