"""JSON of others is read strictly, and a small file costs little memory."""

import subprocess
import sys

import pytest

from surgery import errors
from surgery.files import strict_json

# Two megabytes each, of what takes most memory for its size.
COUNT = 2_000_000
GREEDY = {
  'empty maps': '{"a":[' + ','.join(['{}'] * (COUNT // 3)) + ']}',
  'empty lists': '{"a":[' + ','.join(['[]'] * (COUNT // 3)) + ']}',
  'maps of one': '{"a":[' + ','.join(['{"":0}'] * (COUNT // 7)) + ']}',
  'numbers': '{"a":[' + ','.join(['1e9'] * (COUNT // 4)) + ']}',
  'names': '{' + ','.join(f'"{i:x}":0' for i in range(COUNT // 9)) + '}',
  'depth': '{"a":' + '[' * COUNT,
  'text beyond the basic plane': '{"a":"' + 'a' * COUNT + '\U0001f600"}',
}

PROGRAM = """
import resource, sys
from surgery import errors
from surgery.files import plugin, safetensors, sharding, msgpack
from surgery.files.msgpack import parts
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
  plugin.surgery_formats()[sys.argv[2]].open(sys.argv[1])
except errors.FormatError:
  print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize('what', GREEDY)
@pytest.mark.parametrize('kind', ['safetensors', 'msgpack.index.json'])
def test_a_small_file_cannot_take_much_memory(tmp_path, what, kind):
  data = GREEDY[what].encode()
  if kind == 'safetensors':
    data = len(data).to_bytes(8, 'little') + data
  path = tmp_path / f'm.{kind}'
  path.write_bytes(data)
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM, path, kind.partition('.')[0]],
    capture_output=True,
    text=True,
    check=True,
    timeout=120,
  )
  assert int(done.stdout) < 250_000  # Kilobytes.


@pytest.mark.parametrize(
  ('text', 'offset', 'said'),
  [
    (b'{"a": }', 6, 'Expecting value'),
    (b'{"\xc3\xa4": }', 7, 'Expecting value'),
    (b'{"a": 1} x', 9, 'Extra data'),
    (b'{"a": -Infinity}', 0, '-Infinity is no number'),
    (b'{"a": {"b": 1, "b": 2}}', 0, "the key 'b' occurs twice"),
    (b'"text"', 0, 'expected a JSON object, found str'),
    (b'{"a": "\\udc00"}', 0, 'surrogates not allowed'),
  ],
)
def test_errors_say_where_and_what(text, offset, said):
  with pytest.raises(errors.FormatError, match='^file: at byte') as info:
    strict_json.loads(text, 'file', 100)
  assert said in str(info.value)
  assert 100 + offset == info.value.offset
