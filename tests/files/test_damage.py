"""A tensor that contradicts its digest is never computed with."""

import itertools
import pathlib

import numpy as np
import pytest

import surgery
from surgery.files import checking
from surgery.looking import verify
from surgery.model.checkpoint import (
  Checkpoint,
  Leaf,
)
from surgery.model.grid import (
  BLOCK,
  grid,
)
from surgery.recipes.recipe import Recipe

SUFFIXES = ('.msgpack', '.safetensors')
# More than a block, so that it is read in several.
SHAPE = (5, BLOCK // 2)


def values(scale=1.0):
  array = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
  return array * np.float32(scale)


def written(path, **options):
  """A file with a large tensor and a small one, both with digests."""
  large, small = values(), np.arange(4, dtype=np.float32)
  leaves: dict[tuple[str, ...], Leaf] = {
    ('l', 'kernel'): Leaf(lambda: large, SHAPE, 'float32'),
    ('l', 'bias'): Leaf(lambda: small, (4,), 'float32'),
  }
  Checkpoint(leaves).write(path, **options)
  return path


def damage(path, name, at=-1):
  """Changes a byte of a tensor where it lies."""
  found = surgery.open(path)['l', name].source
  begin, end = found.spans[0]
  with pathlib.Path(found.file.name).open('r+b') as file:
    file.seek(end + at if at < 0 else begin + at)
    byte = file.read(1)
    file.seek(-1, 1)
    file.write(bytes([byte[0] ^ 1]))


@pytest.fixture(params=SUFFIXES)
def file(request, tmp_path):
  return written(tmp_path / f'model{request.param}')


STEPS = (
  {'cast': 'bf16'},
  {'scale': {'select': 'l/*', 'by': 0.5}},
  {'slice': {'select': 'l/kernel', 'keep': 0}},
  {'slice': {'select': 'l/kernel', 'axis': 1, 'keep': '0:3'}},
  {'transpose': 'l/kernel'},
  {'split': {'rules': 'l/kernel -> l/{a,b,c,d,e}', 'axis': 0}},
  {'permute': {'select': 'l/kernel', 'order': [4, 3, 2, 1, 0]}},
  {'reshape': {'select': 'l/kernel', 'shape': [-1]}},
  [{'cast': 'f64'}, {'slice': {'select': 'l/kernel', 'keep': 0}}],
  [{'cast': 'f64'}, {'slice': {'select': 'l/kernel', 'axis': 1, 'keep': 5}}],
)


@pytest.mark.parametrize('at', [0, -1])
@pytest.mark.parametrize('step', STEPS, ids=str)
def test_no_step_computes_from_a_damaged_tensor(step, at, file, tmp_path):
  damage(file, 'kernel', at)
  out = tmp_path / f'out{file.suffix}'
  steps = step if isinstance(step, list) else [step]

  with pytest.raises(
    surgery.SurgeryError, match='l/kernel: expected the digest on record'
  ):
    Recipe(steps).run(model=file, out=out)
  assert not out.exists()


@pytest.mark.parametrize('step', STEPS, ids=str)
def test_a_sound_tensor_goes_through(step, file, tmp_path):
  out = tmp_path / f'out{file.suffix}'
  steps = step if isinstance(step, list) else [step]

  Recipe(steps).run(model=file, out=out)

  states = [one.state for one in verify.verify(surgery.open(out))]
  assert {'ok'} == set(states)


def test_what_is_copied_keeps_its_digest_and_is_found(file, tmp_path):
  damage(file, 'kernel')
  out = tmp_path / f'out{file.suffix}'

  surgery.rename(surgery.open(file), 'l -> m').write(out)

  states = {one.path: one.state for one in verify.verify(surgery.open(out))}
  assert {('m', 'kernel'): 'differs', ('m', 'bias'): 'ok'} == states


def test_verify_names_the_digest_that_it_found(file):
  damage(file, 'bias')

  found = {one.path[-1]: one for one in verify.verify(surgery.open(file))}

  assert 'differs' == found['bias'].state
  assert found['bias'].found not in (None, found['bias'].expected)


def test_a_damaged_file_is_not_loaded(file):
  damage(file, 'bias')

  with pytest.raises(surgery.FormatError, match='l/bias: expected the digest'):
    surgery.load(file)


def test_a_set_is_checked_too(tmp_path):
  written(tmp_path / 'model.msgpack', shard_size=20_000_000)
  index = tmp_path / 'model.msgpack.index.json'
  damage(index, 'kernel')

  with pytest.raises(
    surgery.FormatError, match='l/kernel: expected the digest'
  ):
    surgery.cast(surgery.open(index), 'bf16').write(tmp_path / 'out.msgpack')


def test_an_adapter_is_not_merged_into_a_damaged_base(file, tmp_path):
  adapted = tmp_path / f'adapted{file.suffix}'
  model = surgery.open(file)
  surgery.attach(model, surgery.LoRA(rank=1), to='l').write(adapted)
  damage(adapted, 'kernel')

  with pytest.raises(
    surgery.FormatError, match='l/kernel: expected the digest'
  ):
    surgery.merge(surgery.open(adapted)).write(tmp_path / f'o{file.suffix}')


def test_a_copy_without_digests_is_taken_as_it_is(file, tmp_path):
  damage(file, 'kernel')
  plain = tmp_path / f'plain{file.suffix}'
  surgery.open(file).write(plain, manifest=False)

  surgery.cast(surgery.open(plain), 'bf16').write(
    tmp_path / f'out{file.suffix}'
  )


def test_bytes_are_hashed_once_where_blocks_come_in_order(file, monkeypatch):
  hashed: list[int] = []
  leaf = surgery.open(file)['l', 'kernel']
  monkeypatch.setattr(
    checking.Digester, 'update', lambda self, data: hashed.append(len(data))
  )
  monkeypatch.setattr(checking.Digester, 'digest', lambda self: leaf.digest)

  for _ in range(2):
    for _ in leaf.parts():
      pass
    leaf.load()

  assert leaf.nbytes == sum(hashed)


@pytest.mark.parametrize('order', list(itertools.permutations(range(3), 2)))
def test_blocks_in_any_order_are_checked_before_the_end(order, file):
  damage(file, 'kernel')
  leaf = surgery.open(file)['l', 'kernel']
  cells = list(grid(SHAPE))
  start = checking.mark()

  with pytest.raises(surgery.FormatError, match='expected the digest'):
    for k in order:
      leaf.part(cells[k])
    checking.settle(start)


def test_what_others_read_before_is_not_settled(file):
  damage(file, 'kernel')
  leaf = surgery.open(file)['l', 'kernel']
  leaf.part(next(grid(SHAPE)))

  checking.settle(checking.mark())


def test_a_digest_of_another_kind_is_not_compared(file):
  found = surgery.open(file)['l', 'bias'].source
  found.digest = 'sha256:00'

  assert np.array_equal(np.arange(4), found())
