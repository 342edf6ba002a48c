import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery import errors
from surgery.model import manifest
from surgery.model.layers import LayerType

values = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.text(max_size=5)
  | st.floats(allow_nan=False),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text(max_size=12), inner, max_size=3)
    | st.dictionaries(
      st.sampled_from(['__tuple__', '__dict__', '__float__']),
      inner,
      max_size=2,
    )
  ),
  max_leaves=8,
)
names = st.text(min_size=1, max_size=4)
some_paths = st.lists(names, min_size=1, max_size=3).map(tuple)


@given(st.dictionaries(some_paths, st.dictionaries(names, values, max_size=2)))
def test_metadata_comes_back_as_it_was(metadata):
  notes = {
    path: manifest.LeafNote(False, one) for path, one in metadata.items()
  }
  _, read = manifest.loads(manifest.dumps(manifest.Manifest(), notes))
  assert notes == read


def test_all_of_a_manifest_comes_back():
  whole = manifest.Manifest(
    kind=manifest.ADAPTER,
    locked=False,
    layer_types={('net', 'a/b'): LayerType(('Linear',), {'kernel': 'io'})},
    trees={('net', 'p'): {'value': {'dict': {'a': 'leaf'}}}},
    adapters=({'name': 'default'},),
    history=({'pass': 'attach'},),
    extra={'theirs': [1, 2]},
  )
  note = manifest.LeafNote(True, {}, 'threefry2x32', 'xxh3:00')
  read = manifest.loads(manifest.dumps(whole, {('k',): note}))
  assert (whole, {('k',): note}) == read


def test_what_needs_no_word_is_not_written():
  text = manifest.dumps(manifest.Manifest(), {('a',): manifest.LeafNote()})
  assert {} == json.loads(text)['tensors']


@pytest.mark.parametrize(
  ('metadata', 'message'),
  [
    ({'a': object}, "net/x: metadata of type type (<class 'object'>)"),
    (
      {'a': {1: 2}},
      'net/x: metadata keys must be strings to be saved, found 1',
    ),
    ({'a': b'x'}, 'net/x: metadata of type bytes'),
  ],
)
def test_metadata_that_json_cannot_hold_is_refused_by_name(metadata, message):
  path: tuple[str, ...] = ('net', 'x')
  notes = {path: manifest.LeafNote(True, metadata)}
  with pytest.raises(errors.FormatError, match=re.escape(message)):
    manifest.dumps(manifest.Manifest(), notes)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (b'{', 'not JSON'),
    (b'\xff', 'not JSON'),
    (b'[]', 'expected an object'),
    (b'{}', 'expected a version, found None'),
    (b'{"version":99,"kind":"model"}', 'version 99 is newer'),
    (b'{"version":1}', 'kind None'),
    (
      b'{"version":1,"kind":"model","tensors":[]}',
      "'tensors' should be an obj",
    ),
    (b'{"version":1,"kind":"model","adapters":{}}', "'adapters' should be a l"),
    (b'{"version":1,"kind":"model","tensors":{"a":3}}', 'malformed entry'),
    (b'{"version":1,"kind":"model","layers":{"a":{}}}', 'malformed entry'),
    (b'[' * 100000, 'not JSON'),
  ],
)
def test_a_manifest_that_is_none_is_a_format_error(text, message):
  with pytest.raises(errors.FormatError, match=re.escape(message)):
    manifest.loads(text)
