import ml_dtypes
import numpy as np
import pytest

from surgery import errors
from surgery.files import arrays


@pytest.mark.parametrize('name', arrays.DTYPES)
def test_names_are_those_of_the_dtypes(name):
  assert name == arrays.DTYPES[name].name


def test_little_is_the_very_array_where_it_can_be():
  value = np.arange(6, dtype=np.float32).reshape(2, 3)
  assert np.shares_memory(value, arrays.little(value))


def test_little_turns_big_endian_elements_and_keeps_values():
  found = arrays.little(np.array([1, 2, 3], '>i4'))
  assert np.dtype('<i4') == found.dtype
  assert found.tolist() == [1, 2, 3]
  assert bytes([1, 0, 0, 0]) == bytes(arrays.payload(found)[:4])


def test_little_puts_transposed_arrays_into_c_order():
  value = np.arange(6, dtype=np.uint8).reshape(2, 3).T
  assert bytes([0, 3, 1, 4, 2, 5]) == bytes(
    arrays.payload(arrays.little(value))
  )


def test_little_keeps_zero_axes():
  assert arrays.little(np.float32(1)).shape == ()


def test_payload_of_an_empty_array_is_empty():
  assert bytes(arrays.payload(np.zeros((3, 0), ml_dtypes.bfloat16))) == b''


@pytest.mark.parametrize(
  'value',
  [
    np.array([{}], object),
    np.array(['a']),
    np.array([b'a']),
    np.zeros(2, 'f4,f4'),
    np.zeros(2, 'V8'),
    np.zeros(2, 'M8[s]'),
    np.zeros(2, np.longdouble),
    np.str_('a'),
  ],
  ids=lambda value: str(value.dtype),
)
def test_little_refuses_what_is_no_number(value):
  with pytest.raises(errors.FormatError, match='expected an array of numbers'):
    arrays.little(value)


@pytest.mark.parametrize(
  ('shape', 'expected'),
  [((), 1), ((2, 3), 6), ((0, 5), 0), ((2**61,), None), ((0, 2**63), None)],
)
def test_count_is_none_for_shapes_that_numpy_refuses(shape, expected):
  assert expected == arrays.count(shape, 4)


def test_count_is_none_for_too_many_axes():
  assert arrays.count((1,) * 65, 1) is None


def test_blocks_are_the_whole():
  data = memoryview(bytes(range(256)) * 10_000)
  found = list(arrays.blocks(data))
  assert len(found) > 1
  assert data == b''.join(found)
