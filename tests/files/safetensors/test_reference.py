"""What safetensors writes is read, and what is written safetensors reads."""

import json
import pathlib
from typing import Any

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import surgery
from surgery import errors
from surgery.files import arrays
from surgery.files.digest import digest
from surgery.files.safetensors import dtypes, open_file, write_file
from surgery.model.checkpoint import Checkpoint
from surgery.model.manifest import KEY, Manifest
from tests.files.trees import bits, checkpoint_of, flat, folder, laws, trees

# What its numpy interface has.
KNOWN = (
  *('bool', 'int8', 'int16', 'int32', 'int64'),
  *('uint8', 'uint16', 'uint32', 'uint64'),
  *('float16', 'float32', 'float64', 'complex64'),
)


@pytest.fixture
def target(tmp_path) -> pathlib.Path:
  return tmp_path / 'm.safetensors'


def header(path):
  """The header as the reference has it, and where it ends."""
  raw = path.read_bytes()
  length = int.from_bytes(raw[:8], 'little')
  return json.loads(raw[8 : 8 + length]), 8 + length


@pytest.mark.parametrize('dtype', KNOWN)
def test_what_the_reference_wrote_is_read(target, dtype):
  expected = {
    'a.weight': np.arange(6).reshape(2, 3).astype(dtype),
    'a.empty': np.zeros((0, 2), dtype),
    'scale': np.ones((), dtype),
  }
  save_file(expected, target, metadata={'format': 'pt', 'made by': 'others'})
  opened = surgery.open(target)
  found = {'.'.join(path): leaf.load() for path, leaf in opened.items()}
  assert sorted(expected) == sorted(found)
  for name, value in expected.items():
    assert bits(value) == bits(found[name])
  assert {'format': 'pt', 'made by': 'others'} == opened.manifest.metadata


@pytest.mark.parametrize('dtype', KNOWN)
def test_the_reference_reads_what_was_written(target, dtype):
  values = {
    ('net', 'odd'): np.ones(3, 'int8'),
    ('net', 'x'): np.arange(6).reshape(2, 3).astype(dtype),
    ('net', 'empty'): np.zeros((2, 0), dtype),
    ('scale',): np.ones((), dtype),
  }
  checkpoint_of(
    {'net': {k[-1]: v for k, v in values.items() if len(k) > 1}}
    | {'scale': values['scale',]}
  ).write(target)
  found = load_file(target)
  assert {'.'.join(path) for path in values} == set(found)
  for path, value in values.items():
    assert bits(value) == bits(found['.'.join(path)])


@laws
@hypothesis.given(trees)
def test_the_reference_takes_every_header(tree):
  with folder() as path:
    checkpoint_of(tree).write(path / 'm.safetensors')
    arrays = {p: v for p, v in flat(tree).items() if hasattr(v, 'dtype')}
    with safe_open(path / 'm.safetensors', 'numpy') as file:
      names = list(file.keys())
      assert len(arrays) == len(names)
      for name in names:
        # Numpy has no names for some, but all are described.
        assert file.get_slice(name).get_dtype() in dtypes.NAMES


@pytest.mark.parametrize('dtype', dtypes.TAGS)
def test_dtypes_are_called_as_the_reference_calls_them(target, dtype):
  value = np.zeros((2, 3), arrays.DTYPES[dtype])
  checkpoint_of({'x': value}).write(target)
  with safe_open(target, 'numpy') as file:
    part = file.get_slice('x')
    assert dtypes.TAGS[dtype] == part.get_dtype()
    assert [2, 3] == part.get_shape()


@pytest.mark.parametrize(
  'dtype', sorted(arrays.DTYPES.keys() - dtypes.TAGS.keys())
)
def test_other_dtypes_are_bytes_to_others(target, dtype):
  value = np.zeros((2, 3), arrays.DTYPES[dtype])
  checkpoint_of({'x': value}).write(target)
  found = load_file(target)['x']
  assert (np.uint8, value.nbytes) == (found.dtype, found.nbytes)
  assert bits(value) == bits(surgery.open(target)['x',].load())


def test_metadata_of_others_is_kept_and_read_by_them(target, tmp_path):
  save_file({'a': np.ones(2)}, target, metadata={'format': 'pt'})
  surgery.open(target).write(tmp_path / 'b.safetensors')
  with safe_open(tmp_path / 'b.safetensors', 'numpy') as file:
    assert 'pt' == file.metadata()['format']


def test_a_copy_of_a_file_says_nothing_of_us(target, tmp_path):
  save_file({'b': np.ones(2), 'a': np.ones(3)}, target)
  surgery.open(target).write(tmp_path / 'b.safetensors')
  assert load_file(tmp_path / 'b.safetensors').keys() == {'a', 'b'}
  assert '__metadata__' not in header(tmp_path / 'b.safetensors')[0]


@laws
@hypothesis.given(trees)
def test_tensors_are_aligned(tree):
  with folder() as path:
    file = path / 'm.safetensors'
    checkpoint_of(tree).write(file)
    entries, end = header(file)
    entries.pop('__metadata__', None)
    assert 0 == end % 8
    for name, leaf in open_file(file).items():
      if leaf.dtype is not None:
        start = leaf.source.spans[0][0]
        assert 0 == start % arrays.DTYPES[leaf.dtype].alignment, name


def test_the_digest_is_that_of_the_bytes(target):
  value = np.arange(6, dtype='float32')
  checkpoint_of({'x': value, 'n': 3}).write(target)
  opened = surgery.open(target)
  assert digest(value) == opened['x',].digest
  assert opened['n',].digest is None


@pytest.mark.parametrize(
  'path', [('a.b',), ('a', 'b'), ('a\\', 'b'), ('a\\.b',), ('',), ('', '')]
)
def test_names_with_dots_inside_are_told_apart(target, path):
  paths = [('a.b',), ('a', 'b'), ('a\\', 'b'), ('a\\.b',), ('',), ('', '')]
  values = {p: np.full(2, i, 'int8') for i, p in enumerate(paths)}
  leaf = checkpoint_of({'x': values[path]})['x',]
  others = {p: checkpoint_of({'x': value})['x',] for p, value in values.items()}
  Checkpoint({**others, path: leaf}).write(target)
  opened = surgery.open(target)
  assert paths == list(opened)
  assert values[path].tolist() == opened[path].load().tolist()


NEEDS: dict[str, dict[str, Any]] = {
  'values that are no arrays: n': {'n': 3},
  'names with dots inside: a.b': {'a.b': np.ones(2)},
  'dtypes that safetensors does not have: x': {'x': np.ones(2, 'complex128')},
}


@pytest.mark.parametrize('what', NEEDS)
def test_what_only_the_manifest_can_say_needs_it(target, what):
  checkpoint = checkpoint_of({'w': np.ones(2), **NEEDS[what]})
  for size in (None, 10**6):
    with pytest.raises(errors.FormatError, match='without a manifest') as info:
      checkpoint.write(target, manifest=False, shard_size=size)
    assert what in str(info.value)
  assert [] == list(target.parent.iterdir())


def test_without_a_manifest_there_is_none(target):
  leaf = checkpoint_of({'x': np.ones(2)})['x',].replace(trainable=False)
  about = Manifest(metadata={'format': 'pt'})
  Checkpoint({('x',): leaf}, about).write(target, manifest=False)
  assert {'format': 'pt'} == header(target)[0]['__metadata__']


REFUSED = {
  (): 'a path of one or more strings, found ()',
  ('__metadata__',): '__metadata__: the name is reserved',
  ('\ud800',): 'cannot be written as UTF-8',
}


@pytest.mark.parametrize('path', REFUSED)
def test_names_that_no_file_can_have_are_refused(target, path):
  leaf = checkpoint_of({'x': np.ones(2)})['x',]
  with pytest.raises(errors.FormatError) as info:
    write_file(Checkpoint({path: leaf}), target)
  assert REFUSED[path] in str(info.value)
  assert not target.exists()


def test_the_key_of_the_manifest_is_reserved(target):
  checkpoint = checkpoint_of({'x': np.ones(2)}).replace(
    manifest=Manifest(metadata={KEY: 'other'})
  )
  with pytest.raises(errors.FormatError, match=f"'{KEY}' is reserved"):
    checkpoint.write(target)


@pytest.mark.parametrize('value', ['text', (1, 2), object()])
def test_values_that_no_file_can_hold_are_named(target, value):
  checkpoint = checkpoint_of({'net': {'x': value}})
  if isinstance(value, str):
    checkpoint.write(target)
    assert value == surgery.open(target)['net', 'x'].load()
    return
  with pytest.raises(errors.FormatError, match='net/x: a value of type'):
    checkpoint.write(target)


@hypothesis.given(st.floats(), st.complex_numbers(), st.integers())
@hypothesis.settings(deadline=None, max_examples=50)
def test_numbers_are_kept_exactly(real, number, integer):
  tree = {'a': real, 'b': number, 'c': integer, 'd': True, 'e': None}
  with folder() as path:
    checkpoint_of(tree).write(path / 'm.safetensors')
    opened = surgery.open(path / 'm.safetensors')
    found = {p[0]: leaf.load() for p, leaf in opened.items()}
    assert {k: bits(v) for k, v in tree.items()} == {
      k: bits(v) for k, v in found.items()
    }


def test_bfloat16_is_read_as_such(target):
  raw = np.array([1.5, -2], ml_dtypes.bfloat16)
  entry = {'dtype': 'BF16', 'shape': [2], 'data_offsets': [0, 4]}
  text = json.dumps({'w': entry}).encode()
  target.write_bytes(len(text).to_bytes(8, 'little') + text + raw.tobytes())
  assert bits(raw) == bits(surgery.open(target)['w',].load())
