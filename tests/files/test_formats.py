"""Laws that hold for every format, in one file and in sets."""

import pathlib

import hypothesis
import hypothesis.strategies as st
import pytest

import surgery
from surgery.host import location
from surgery.model.checkpoint import Checkpoint
from surgery.model.layers import LayerType
from surgery.model.manifest import Manifest
from tests.files.trees import (
  bits,
  checkpoint_of,
  chunks_of,
  folder,
  laws,
  metadata,
  names,
  trees,
)

SUFFIXES = ('.msgpack', '.safetensors')
HOST = surgery.default_host()

suffixes = st.sampled_from(SUFFIXES)
shard_sizes = st.sampled_from([None, 1, 300, 1000, 10**9])


@st.composite
def checkpoints(draw: st.DrawFn) -> Checkpoint:
  leaves = {
    path: leaf.replace(
      trainable=draw(st.booleans()),
      metadata=draw(metadata),
      key=draw(st.sampled_from([None, 'threefry2x32'])),
    )
    for path, leaf in checkpoint_of(draw(trees)).items()
  }
  keys = names.filter(lambda name: not name.startswith('__'))
  about = draw(st.dictionaries(keys, names, max_size=2))
  return Checkpoint(
    leaves, Manifest(locked=draw(st.booleans()), metadata=about)
  )


def write(checkpoint, path, shard_size=None) -> pathlib.Path:
  """Writes a model, and returns what can be opened."""
  # Of values that are no arrays no index could tell.
  if all(leaf.shape is None for leaf in checkpoint.values()):
    shard_size = None
  checkpoint.write(path, shard_size=shard_size)
  if shard_size is None:
    return path
  return path.with_name(path.name + location.INDEX)


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
  assert a.manifest == b.manifest
  assert list(a) == list(b)
  for path, leaf in a.items():
    assert bits(leaf.load()) == bits(b[path].load())
    for name in ('shape', 'dtype', 'trainable', 'metadata', 'key', 'scalar'):
      assert getattr(leaf, name) == getattr(b[path], name), name


@laws
@hypothesis.given(checkpoints(), suffixes, shard_sizes)
def test_reading_gives_back_what_was_written(checkpoint, suffix, size):
  with folder() as path, chunks_of(64):
    assert_same(
      checkpoint, surgery.open(write(checkpoint, path / f'm{suffix}', size))
    )


@laws
@hypothesis.given(checkpoints(), suffixes, shard_sizes, shard_sizes)
def test_any_other_form_and_back_is_the_same_file(checkpoint, suffix, a, b):
  other = SUFFIXES[suffix == SUFFIXES[0]]
  with folder() as path:
    first = write(checkpoint, path / f'a{suffix}')
    second = write(surgery.open(first), path / f'b{other}', a)
    third = write(surgery.open(second), path / f'c{suffix}', b)
    fourth = write(surgery.open(third), path / f'd{suffix}')
    assert first.read_bytes() == fourth.read_bytes()


@laws
@hypothesis.given(checkpoints(), suffixes, shard_sizes)
def test_copying_unread_gives_the_same_as_computing(checkpoint, suffix, size):
  with folder() as path:
    (path / 'a').mkdir()
    (path / 'b').mkdir()
    write(checkpoint, path / 'a' / f'm{suffix}', size)
    opened = surgery.open(path / 'a')
    write(opened, path / 'b' / f'm{suffix}', size)
    files = {file.name: file.read_bytes() for file in (path / 'a').iterdir()}
    for file in (path / 'b').iterdir():
      assert files.pop(file.name) == file.read_bytes()
    assert not files


@laws
@hypothesis.given(checkpoints(), suffixes, st.sampled_from([300, 1000, 2000]))
def test_no_file_of_a_set_is_larger_than_was_asked(checkpoint, suffix, size):
  with folder() as path:
    index = write(checkpoint, path / f'm{suffix}', size)
    if not location.is_index(index):
      return
    for file in path.iterdir():
      if file.suffix == suffix and file.stat().st_size > size:
        opened = HOST.format_of(file).open(file)
        assert 1 == sum(leaf.shape is not None for leaf in opened.values())


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_all_that_is_known_of_a_model_is_kept(tmp_path, suffix):
  checkpoint = checkpoint_of({'net': {'x': 1.5}}).replace(
    manifest=Manifest(
      layer_types={('net',): LayerType(('blox.Linear',), {'kernel': 'io'})},
      history=({'pass': 'cast'},),
      metadata={'format': 'flax'},
      extra={'later': [1]},
    )
  )
  file = tmp_path / f'm{suffix}'
  checkpoint.write(file)
  assert_same(checkpoint, surgery.open(file))
