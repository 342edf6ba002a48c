"""Laws that hold for any tree of values."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
from flax import serialization

from surgery.files.msgpack import open_file, write_file
from surgery.model.checkpoint import Checkpoint
from surgery.model.manifest import KEY, Manifest
from tests.files.trees import (
  bits,
  checkpoint_of,
  chunks_of,
  copied,
  flat,
  folder,
  laws,
  metadata,
  trees,
)

sizes = st.sampled_from([1, 7, 16, 64, 2**30])


@laws
@hypothesis.given(trees, sizes)
def test_bytes_are_those_of_flax(tree, size):
  with folder() as path, chunks_of(size):
    write_file(checkpoint_of(tree), path / 'm', manifest=False)
    assert serialization.to_bytes(copied(tree)) == (path / 'm').read_bytes()


@laws
@hypothesis.given(trees, sizes)
def test_the_manifest_is_one_more_array_at_the_end(tree, size):
  checkpoint = checkpoint_of(tree).replace(manifest=Manifest(locked=False))
  with folder() as path, chunks_of(size):
    write_file(checkpoint, path / 'm')
    data = (path / 'm').read_bytes()
    restored = serialization.msgpack_restore(data)
    assert list(restored)[-1] == KEY
    text = restored[KEY]
    assert (np.uint8, 1) == (text.dtype, text.ndim)
    assert serialization.to_bytes({**copied(tree), KEY: text}) == data


@laws
@hypothesis.given(trees, sizes)
def test_what_flax_wrote_is_read_as_flax_reads_it(tree, size):
  with folder() as path, chunks_of(size):
    data = serialization.to_bytes(copied(tree))
    (path / 'm').write_bytes(data)
    found = {p: leaf.load() for p, leaf in open_file(path / 'm').items()}
    expected = flat(serialization.msgpack_restore(data))
    assert list(expected) == list(found)
    assert [*map(bits, expected.values())] == [*map(bits, found.values())]


@laws
@hypothesis.given(trees, sizes, st.data())
def test_reading_gives_back_what_was_written(tree, size, data):
  leaves = {
    path: leaf.replace(
      trainable=data.draw(st.booleans()),
      metadata=data.draw(metadata),
      key=data.draw(st.sampled_from([None, 'threefry2x32'])),
    )
    for path, leaf in checkpoint_of(tree).items()
  }
  manifest = Manifest(locked=data.draw(st.booleans()))
  with folder() as path, chunks_of(size):
    write_file(Checkpoint(leaves, manifest), path / 'm')
    found = open_file(path / 'm')
    assert manifest == found.manifest
    assert list(leaves) == list(found)
    for where, leaf in leaves.items():
      other = found[where]
      assert bits(leaf.load()) == bits(other.load())
      for name in ('shape', 'dtype', 'trainable', 'metadata', 'key', 'scalar'):
        assert getattr(leaf, name) == getattr(other, name)


@laws
@hypothesis.given(trees, sizes, sizes)
def test_copying_unread_gives_the_same_as_computing(tree, size, other):
  checkpoint = checkpoint_of(tree)
  with folder() as path:
    with chunks_of(size):
      write_file(checkpoint, path / 'a')
    with chunks_of(other):
      write_file(open_file(path / 'a'), path / 'copied')
      write_file(checkpoint, path / 'computed')
    assert (path / 'computed').read_bytes() == (path / 'copied').read_bytes()


@laws
@hypothesis.given(trees)
def test_the_same_checkpoint_gives_the_same_bytes(tree):
  with folder() as path:
    write_file(checkpoint_of(tree), path / 'a')
    write_file(checkpoint_of(tree), path / 'b')
    assert (path / 'a').read_bytes() == (path / 'b').read_bytes()
