"""Tensors on their way into a file: whole, in blocks, copied."""

import os

import numpy as np
import pytest

from surgery import errors
from surgery.files import payload
from surgery.files.digest import digest
from surgery.files.output import Output
from surgery.model.checkpoint import (
  Leaf,
)
from surgery.model.grid import (
  BLOCK,
  grid,
)

SHAPE = (3, BLOCK // 2)
VALUE = np.arange(np.prod(SHAPE), dtype='float32').reshape(SHAPE)


def unread():
  raise AssertionError('was computed whole')


@pytest.fixture
def written(tmp_path):
  """Writes what a payload has; returns its bytes and digest."""

  def write(tensor, *counts):
    path = tmp_path / 'out.bin'
    fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_TRUNC)
    try:
      output = Output(fd)
      for count in counts or (tensor.nbytes,):
        tensor.write(output, count)
      output.flush()
    finally:
      os.close(fd)
    return path.read_bytes(), tensor.digest(None)

  return write


def in_blocks(value=VALUE, seen=None, **changes):
  def part(index):
    if seen is not None:
      seen.append(index)
    return value[index]

  return Leaf(unread, value.shape, str(value.dtype), part=part, **changes)


def test_blocks_are_computed_in_order_and_never_all(written):
  seen: list[tuple[slice, ...]] = []
  tensor = payload.of(in_blocks(seen=seen), ('x',))
  assert (VALUE.tobytes(), digest(VALUE)) == written(tensor)
  assert list(grid(SHAPE)) == seen
  assert len(seen) > 1


@pytest.mark.parametrize('step', [1000, 1 << 20, 5 << 20])
def test_it_can_be_written_in_any_pieces(written, step):
  counts = [step] * (VALUE.nbytes // step)
  counts.append(VALUE.nbytes - sum(counts))
  tensor = payload.of(in_blocks(), ('x',))
  assert (VALUE.tobytes(), digest(VALUE)) == written(tensor, *counts)


def test_one_block_is_computed_whole(written):
  small = VALUE[:1, :100]
  leaf = Leaf(lambda: small, small.shape, 'float32', part=lambda i: unread())
  assert (small.tobytes(), digest(small)) == written(payload.of(leaf, ('x',)))


def test_other_byte_orders_and_layouts_become_those_of_a_file(written):
  for value in (VALUE.astype('>f4'), np.asfortranarray(VALUE)):
    leaf = Leaf(lambda value=value: value, SHAPE, 'float32')
    assert VALUE.tobytes() == written(payload.of(leaf, ('x',)))[0]


def test_a_value_that_is_no_array_is_returned_as_it_is():
  assert 'text' == payload.of(Leaf(lambda: 'text'), ('x',))


WRONG = {
  'a dtype': (Leaf(lambda: VALUE, SHAPE, 'float16'), 'expected float16[3,'),
  'a shape': (Leaf(lambda: VALUE, (2, 3), 'float32'), 'float32[2,3], found'),
  'no array': (Leaf(lambda: 'text', (2,), 'float32'), 'a value of type str'),
  'a scalar with axes': (
    Leaf(lambda: VALUE, SHAPE, 'float32', scalar=True),
    'expected a numpy scalar',
  ),
  'objects': (
    Leaf(lambda: np.array([None]), (1,), 'object'),
    'expected an array of numbers, found dtype object',
  ),
}


@pytest.mark.parametrize('case', WRONG)
def test_what_is_not_what_it_said_is_an_error(case):
  leaf, said = WRONG[case]
  with pytest.raises(errors.FormatError, match=r'^net/x: ') as info:
    payload.of(leaf, ('net', 'x'))
  assert said in str(info.value)


def test_a_block_that_is_not_what_it_said_is_an_error(written):
  leaf = in_blocks().replace(part=lambda index: VALUE[index].astype('float64'))
  leaf = Leaf(unread, SHAPE, 'float32', part=leaf.part)
  with pytest.raises(errors.FormatError, match='^net/x: expected float32'):
    written(payload.of(leaf, ('net', 'x')))


def test_an_error_in_a_block_is_raised(written):
  def part(index):
    if index[0].start:
      raise ValueError('of the second block')
    return VALUE[index]

  leaf = Leaf(unread, SHAPE, 'float32', part=part)
  with pytest.raises(ValueError, match='of the second block'):
    written(payload.of(leaf, ('x',)))
