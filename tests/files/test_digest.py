import ml_dtypes
import numpy as np
import pytest
import xxhash

from surgery import errors
from surgery.files.digest import Digester, digest


def test_digest_is_xxh3_of_the_bytes():
  value = np.arange(5, dtype=np.float32)
  expected = 'xxh3:' + xxhash.xxh3_128(value.tobytes()).hexdigest()
  assert expected == digest(value)


def test_digest_of_more_than_one_block_is_that_of_the_whole():
  value = np.arange(600_000, dtype=np.float32)
  expected = 'xxh3:' + xxhash.xxh3_128(value.tobytes()).hexdigest()
  assert expected == digest(value)


def test_digest_does_not_depend_on_memory_layout():
  value = np.arange(6, dtype=np.int16).reshape(2, 3)
  assert digest(value) == digest(np.asfortranarray(value))
  assert digest(value) == digest(value.astype('>i2'))


def test_digest_does_not_depend_on_how_bytes_came():
  digester = Digester()
  digester.update(b'ab')
  digester.update(memoryview(b'c'))
  assert digest(np.frombuffer(b'abc', np.uint8)) == digester.digest()


def test_digest_takes_small_floats():
  value = np.ones(3, ml_dtypes.bfloat16)
  assert digest(value.view(np.uint16)) == digest(value)


def test_digest_refuses_objects():
  with pytest.raises(errors.FormatError, match='object'):
    digest(np.array([None]))
