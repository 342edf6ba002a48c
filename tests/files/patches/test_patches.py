"""Patches give back the very file."""

import pathlib
import sys

import ml_dtypes
import numpy as np
import pytest
from flax import serialization
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import surgery
from surgery.files import atomic
from surgery.files.patches import description
from surgery.model.checkpoint import Checkpoint, Leaf

BLOCK = description.BLOCK


def written(file, values, **options):
  """Writes arrays and plain values by path."""
  leaves: dict[tuple[str, ...], Leaf] = {}
  for path, value in values.items():
    array = isinstance(value, np.ndarray)
    leaves[tuple(path.split('/'))] = Leaf(
      lambda value=value: value,
      value.shape if array else None,
      value.dtype.name if array else None,
    )
  Checkpoint(leaves).write(file, overwrite=True, **options)
  return file


def given_back(base, tuned, folder, suffix='.safetensors', **options):
  """Returns a patch's report, having seen that it gives back the file."""
  patch = folder / f'patch{suffix}'
  report = surgery.make_patch(base, tuned, patch, overwrite=True, **options)
  out = folder / f'again{tuned.suffix}'
  surgery.apply_patch(base, patch, out, overwrite=True)
  assert tuned.read_bytes() == out.read_bytes()
  return report


def array(seed, size=BLOCK, dtype='float32'):
  return np.random.default_rng(seed).normal(size=size).astype(dtype)


@pytest.fixture
def base(tmp_path):
  return written(
    tmp_path / 'base.safetensors',
    {'a/kernel': array(0), 'a/bias': array(1, 7), 'b/kernel': array(2)},
  )


DTYPES = ('float32', 'bfloat16', 'float8_e4m3fn', 'int8', 'bool', 'complex64')
VALUES = st.builds(
  lambda seed, shape, dtype: (
    np.random.default_rng(seed).integers(0, 2, shape).astype(np.dtype(dtype))
  ),
  st.integers(0, 2),
  st.sampled_from([(), (0, 3), (5,), (3, 4)]),
  st.sampled_from(DTYPES),
)
MODELS = st.dictionaries(
  st.sampled_from(['a/x', 'a/y', 'b/x', 'b.c/x', 'd']),
  VALUES | st.sampled_from([3, 'text', float('nan'), None]),
  min_size=1,
)


@settings(deadline=None, max_examples=40)
@given(
  MODELS, MODELS, st.sampled_from(['msgpack', 'safetensors']), st.booleans()
)
def test_any_model_comes_back_from_any_base(one, other, suffix, compress):
  import tempfile

  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    base = written(folder / 'base.safetensors', one)
    tuned = written(folder / f'tuned.{suffix}', other)
    report = given_back(base, tuned, folder, compress=compress)
    arrays = [v for v in other.values() if getattr(v, 'size', 0)]
    kinds = ('same', 'blocks', 'whole', 'new')
    assert len(arrays) == sum(report[k] for k in kinds)


def test_only_what_differs_is_kept(base, tmp_path):
  changed = array(0)
  changed[3] += 1
  tuned = written(
    tmp_path / 'tuned.safetensors',
    {'a/kernel': changed, 'b/kernel': array(9), 'c/kernel': array(2)},
  )
  report = given_back(base, tuned, tmp_path, compress=False)
  assert {
    'same': 0, 'blocks': 1, 'whole': 1, 'new': 1, 'removed': 1,
    'bytes': tuned.stat().st_size,
  } == {k: v for k, v in report.items() if k != 'patch'}  # fmt: skip
  # A block, and two tensors; the rest are headers.
  assert 0 < report['patch'] - 9 * BLOCK < 8192


def test_an_equal_model_takes_its_header_alone(base, tmp_path):
  tuned = written(tmp_path / 'tuned.msgpack', {'a/bias': array(1, 7)})
  assert 1 == given_back(base, tuned, tmp_path)['same']
  report = given_back(base, base, tmp_path)
  assert (3, 0) == (report['same'], report['blocks'])
  assert report['patch'] < 8192


def test_files_of_other_programs_come_back(base, tmp_path):
  values = {'a.kernel': array(0), 'a.bias': array(5, 7), 'half': array(6, 9)}
  values['half'] = values['half'].astype(ml_dtypes.bfloat16)
  theirs = tmp_path / 'theirs.safetensors'
  save_file(values, theirs, metadata={'format': 'pt', 'é': '😀'})
  assert 1 == given_back(base, theirs, tmp_path)['same']
  flax = tmp_path / 'flax.msgpack'
  tree = {'a': {'kernel': values['a.kernel'], 'n': 3, 't': (1, 'x')}}
  flax.write_bytes(serialization.to_bytes(tree))
  assert 1 == given_back(base, flax, tmp_path, '.msgpack')['same']


def test_tensors_that_lie_in_chunks_come_back(tmp_path, monkeypatch):
  monkeypatch.setattr(serialization, 'MAX_CHUNK_SIZE', 3 * BLOCK + 4)
  value = array(0, 3 * BLOCK)
  base = written(tmp_path / 'base.safetensors', {'x': value})
  value = value.copy()
  value[2 * BLOCK] += 1
  tuned = tmp_path / 'tuned.msgpack'
  tuned.write_bytes(serialization.to_bytes({'x': value}))
  assert 1 == given_back(base, tuned, tmp_path)['blocks']


def test_small_changes_everywhere_are_compressed(tmp_path):
  pytest.importorskip('zstandard')
  value = array(0, 4 * BLOCK, ml_dtypes.bfloat16)
  base = written(tmp_path / 'base.safetensors', {'x': value})
  near = (value.astype('float32') * 1.01).astype(ml_dtypes.bfloat16)
  tuned = written(tmp_path / 'tuned.safetensors', {'x': near})
  report = given_back(base, tuned, tmp_path)
  assert 1 == report['whole']
  assert report['patch'] < 0.4 * report['bytes']
  # Noise becomes no smaller, and is kept as it is.
  noise = np.random.default_rng(3).integers(0, 256, 8 * BLOCK).astype('uint8')
  tuned = written(tmp_path / 'tuned.safetensors', {'y': noise})
  report = given_back(base, tuned, tmp_path)
  assert abs(report['patch'] - report['bytes']) < 8192


def test_a_patch_that_is_compressed_says_what_is_needed(
  base, tmp_path, monkeypatch
):
  pytest.importorskip('zstandard')
  tuned = written(tmp_path / 'tuned.safetensors', {'x': np.zeros(BLOCK)})
  patch = tmp_path / 'patch.safetensors'
  surgery.make_patch(base, tuned, patch)
  monkeypatch.setitem(sys.modules, 'zstandard', None)
  with pytest.raises(surgery.DependencyError, match=r'blox-surgery\[zstd\]'):
    surgery.apply_patch(base, patch, tmp_path / 'out.safetensors')
  # Without the package nothing is compressed.
  report = given_back(base, tuned, tmp_path)
  assert report['patch'] > report['bytes']


def test_the_base_may_have_another_format(base, tmp_path):
  tuned = written(tmp_path / 'tuned.safetensors', {'a/kernel': array(0)})
  patch = tmp_path / 'patch.msgpack'
  surgery.make_patch(base, tuned, patch)
  other = tmp_path / 'base.msgpack'
  surgery.open(base).write(other)
  surgery.apply_patch(other, patch, tmp_path / 'out.safetensors')
  assert tuned.read_bytes() == (tmp_path / 'out.safetensors').read_bytes()


@pytest.fixture
def patched(base, tmp_path):
  """A base, a patch of it with a tensor in each way, and where to write."""
  changed = array(0)
  changed[3] += 1
  tuned = written(
    tmp_path / 'tuned.safetensors',
    {'a/kernel': changed, 'a/bias': array(1, 7), 'b/kernel': array(9)},
  )
  patch = tmp_path / 'patch.safetensors'
  surgery.make_patch(base, tuned, patch)
  return base, patch, tmp_path / 'out.safetensors'


def test_another_base_is_refused(patched):
  base, patch, out = patched
  for change, said in (
    ({'a/bias': array(8, 7)}, r'a/bias: expected the digest'),
    ({'a/kernel': array(8)}, r'a/kernel: expected the digest'),
    ({'a/bias': array(1, 8)}, r'a/bias: expected 28 bytes, found float32\[8\]'),
    ({'more': array(1, 8)}, 'has other tensors'),
  ):
    values = {'a/kernel': array(0), 'a/bias': array(1, 7), 'b/kernel': array(2)}
    written(base, {**values, **change})
    for manifest in (True, False):
      other = base.with_name('other.safetensors')
      surgery.open(base).write(other, overwrite=True, manifest=manifest)
      with pytest.raises(surgery.BaseMismatchError, match=said):
        surgery.apply_patch(other, patch, out)
      assert not out.exists()
  assert not list(out.parent.glob('.*'))


def test_a_damaged_base_is_found_while_writing(patched):
  base, patch, out = patched
  data = bytearray(base.read_bytes())
  data[-5] ^= 1
  base.write_bytes(data)
  with pytest.raises(surgery.BaseMismatchError, match='or this one is damaged'):
    surgery.apply_patch(base, patch, out)
  assert ['base', 'patch', 'tuned'] == sorted(
    p.stem for p in out.parent.iterdir()
  )


def test_a_damaged_patch_gives_nothing(patched):
  base, patch, out = patched
  whole = patch.read_bytes()
  start = int.from_bytes(whole[:8], 'little')
  for at in (start + 8, len(whole) // 2, len(whole) - 1):
    data = bytearray(whole)
    data[at] ^= 64
    patch.write_bytes(data)
    with pytest.raises(surgery.FormatError):
      surgery.apply_patch(base, patch, out)
    assert not out.exists()


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    ({'version': 2}, 'expected a patch of version 1, found version 2'),
    ({'files': []}, 'expected files, found 0'),
    ({'files': [{'name': '../x', 'size': 0}]}, 'expected the name of a file'),
    ({'tensors': [{}]}, 'malformed: KeyError'),
  ],
)
def test_a_malformed_patch_is_refused(patched, change, said):
  import json

  base, patch, out = patched
  opened = surgery.open(patch)
  text = opened.manifest.metadata[description.KEY]
  data = json.dumps({**json.loads(text), **change})
  manifest = opened.manifest.replace(metadata={description.KEY: data})
  other = patch.with_name('other.safetensors')
  opened.replace(manifest=manifest).write(other)
  with pytest.raises(surgery.FormatError, match=said):
    surgery.apply_patch(base, other, out)


def test_a_patch_is_no_model(patched):
  _, patch, out = patched
  with pytest.raises(surgery.FormatError, match='a patch, not a model'):
    surgery.load(patch)
  with pytest.raises(surgery.FormatError, match='a patch, not a model'):
    surgery.Recipe(
      [{'scale': {'select': '**', 'by': 2}}],
      inputs={'model': patch},
      outputs={'out': out},
    ).run()
  with pytest.raises(surgery.FormatError, match='a patch, not a model'):
    surgery.make_patch(patch, patch, out)


def test_a_model_is_no_patch(base, tmp_path):
  with pytest.raises(
    surgery.FormatError, match='expected a patch, found a mod'
  ):
    surgery.apply_patch(base, base, tmp_path / 'out.safetensors')


def test_a_file_is_not_given_another_format_s_suffix(patched):
  base, patch, out = patched
  with pytest.raises(
    surgery.FormatError, match=r'\.msgpack is that of msgpack'
  ):
    surgery.apply_patch(base, patch, out.with_suffix('.msgpack'))


def test_an_output_that_exists_is_not_replaced_unless_told(patched):
  base, patch, out = patched
  out.write_text('mine')
  with pytest.raises(FileExistsError):
    surgery.apply_patch(base, patch, out)
  assert 'mine' == out.read_text()
  with pytest.raises(FileExistsError):
    surgery.make_patch(base, base, out)
  surgery.apply_patch(base, patch, out, overwrite=True)
  with pytest.raises(FileNotFoundError, match='nowhere'):
    surgery.make_patch(base, base, out.parent / 'nowhere' / 'p.safetensors')


def test_whatever_goes_wrong_leaves_nothing(patched, monkeypatch):
  base, patch, out = patched

  def full(*args):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(atomic, 'publish', full)
  before = sorted(out.parent.iterdir())
  with pytest.raises(OSError, match='No space'):
    surgery.apply_patch(base, patch, out)
  with pytest.raises(OSError, match='No space'):
    surgery.make_patch(base, base, out)
  assert before == sorted(out.parent.iterdir())


def test_a_dry_run_writes_nothing_and_finds_another_base(patched):
  base, patch, out = patched
  report = surgery.apply_patch(base, patch, out, dry_run=True)
  assert (1, 1, 1) == (report['same'], report['blocks'], report['whole'])
  written(base, {'a/kernel': array(4)})
  with pytest.raises(surgery.BaseMismatchError):
    surgery.apply_patch(base, patch, out, dry_run=True)
  assert not out.exists()


@pytest.fixture
def folders(tmp_path):
  """Two model folders of several files; one tensor and a text differ."""
  made = []
  for name, seed in (('base', 2), ('tuned', 3)):
    folder = tmp_path / name
    folder.mkdir()
    values = {'a/kernel': array(0), 'b/kernel': array(seed)}
    written(folder / 'model.safetensors', values, shard_size=5 * BLOCK)
    (folder / 'config.json').write_text(f'{{"name": "{name}"}}')
    (folder / 'tokenizer.json').write_text('{}' * 50_000)
    (folder / 'empty.txt').write_text('')
    (folder / '.cache').mkdir()
    made.append(folder)
  return made


def contents(folder):
  return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_a_folder_comes_back_with_all_its_files(folders, tmp_path):
  base, tuned = folders
  patch = tmp_path / 'patch.safetensors'
  report = surgery.make_patch(base, tuned, patch, compress=False)
  assert (1, 1) == (report['same'], report['whole'])
  # What the base's folder has is not kept again.
  assert report['patch'] < 4 * BLOCK + 20_000
  surgery.apply_patch(base, patch, tmp_path / 'again')
  assert contents(tuned) == contents(tmp_path / 'again')
  with pytest.raises(FileExistsError):
    surgery.apply_patch(base, patch, tmp_path / 'again', overwrite=True)


def test_what_a_folder_s_files_are_taken_from_is_compared(folders, tmp_path):
  base, tuned = folders
  patch = tmp_path / 'patch.safetensors'
  surgery.make_patch(base, tuned, patch)
  (base / 'tokenizer.json').write_text('[]' * 50_000)
  with pytest.raises(
    surgery.BaseMismatchError, match=r'tokenizer\.json: has ch'
  ):
    surgery.apply_patch(base, patch, tmp_path / 'again')
  (base / 'tokenizer.json').unlink()
  with pytest.raises(
    surgery.BaseMismatchError, match='expected the file of 100'
  ):
    surgery.apply_patch(base, patch, tmp_path / 'again')
  assert not (tmp_path / 'again').exists()


def test_what_a_patch_cannot_say_is_refused(folders, tmp_path):
  base, tuned = folders
  patch = tmp_path / 'patch.safetensors'
  index = next(tuned.glob('*.index.json'))
  with pytest.raises(surgery.FormatError, match='Give the folder'):
    surgery.make_patch(base, index, patch)
  (tuned / 'original').mkdir()
  with pytest.raises(surgery.FormatError, match='a folder inside of a model'):
    surgery.make_patch(base, tuned, patch)
  assert not patch.exists()
