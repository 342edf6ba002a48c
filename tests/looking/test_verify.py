"""Digests: recomputed block by block."""

import numpy as np
import pytest

import surgery
from surgery.files.digest import digest
from surgery.looking import verify
from surgery.model.checkpoint import (
  Checkpoint,
  Leaf,
)
from surgery.model.grid import (
  BLOCK,
)


def leaf(value, **options):
  return Leaf(
    lambda: value,
    value.shape,
    value.dtype.name,
    part=lambda index: value[index],
    **options,
  )


@pytest.mark.parametrize(
  'value',
  [
    np.arange(7, dtype='float32'),
    np.ones((3, BLOCK // 2 + 1), 'float16'),
    np.zeros((0, 2)),
    np.array(3),
    np.arange(6).reshape(2, 3).T,
    np.array([1, 2], '>i4'),
  ],
)
def test_a_digest_by_blocks_is_that_of_the_whole(value):
  assert digest(value) == verify.computed(leaf(value))


def test_each_tensor_is_ok_or_differs_or_has_no_digest():
  one = np.arange(3)
  ckpt = Checkpoint(
    {
      ('ok',): leaf(one, digest=digest(one)),
      ('bad',): leaf(one, digest=digest(one + 1)),
      ('new',): leaf(one),
      ('plain',): Leaf(lambda: 3),
    }
  )
  found = list(verify.verify(ckpt))
  assert [
    (('ok',), 'ok', digest(one)),
    (('bad',), 'differs', digest(one + 1)),
    (('new',), 'missing', None),
  ] == [(f.path, f.state, f.expected) for f in found]
  assert {digest(one)} == {f.found for f in found}


def test_bytes_that_no_boolean_has_differ(tmp_path):
  file = tmp_path / 'm.msgpack'
  Checkpoint({('x',): leaf(np.array([True] * 9))}).write(file)
  data = file.read_bytes()
  file.write_bytes(data.replace(b'\x01' * 9, b'\x01' * 8 + b'\x07'))
  [one] = verify.verify(surgery.open(file))
  assert ('differs', None) == (one.state, one.found)
  assert 'expected booleans, found the byte 7' in one.reason


def test_damage_is_an_error_where_there_is_no_digest(tmp_path):
  file = tmp_path / 'm.msgpack'
  Checkpoint({('x',): leaf(np.array([True] * 9))}).write(file)
  data = file.read_bytes()
  file.write_bytes(data.replace(b'\x01' * 9, b'\x01' * 8 + b'\x07'))
  opened = surgery.open(file)
  bare = {p: x.replace(digest=None) for p, x in opened.items()}
  with pytest.raises(surgery.FormatError, match='x: expected booleans'):
    list(verify.verify(opened.replace(leaves=bare)))


def test_missing_digests_are_completed_and_others_kept(tmp_path):
  one = np.arange(3)
  ckpt = Checkpoint({('a',): leaf(one, digest='xxh3:0'), ('b',): leaf(one)})
  found: dict[tuple[str, ...], str] = {('a',): 'xxh3:1', ('b',): 'xxh3:2'}
  done = verify.complete(ckpt, found)
  assert ['xxh3:0', 'xxh3:2'] == [x.digest for x in done.values()]
  assert ckpt[('b',)].load is done[('b',)].load
