"""Readers that insist on `format` take what is written."""

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import surgery
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.layouts import framework
from surgery.model.manifest import Manifest


def ones(*shape):
  return np.ones(shape, np.float32)


TORCH = {'l.weight': ones(3, 4), 'l.bias': ones(3), 'n.weight': ones(4)}
FLAX = {'l.kernel': ones(4, 3), 'l.bias': ones(3), 'n.scale': ones(4)}
TURNED = {'l.weight': ones(4, 3), 'l.bias': ones(3)}
CONV1D = {'h.c_attn.weight': ones(4, 3), 'h.c_attn.bias': ones(3)}


def metadata(path):
  with safetensors.safe_open(path, 'numpy') as file:
    return file.metadata()


def read_by_accelerate(path):
  """What accelerate 1.15 decides before it reads (`load_state_dict`)."""
  found = metadata(path)
  if found is None:
    found = {'format': 'pt'}
  if found.get('format') not in ('pt', 'tf', 'flax'):
    raise OSError(f'{path} does not contain a valid metadata.')
  return found['format']


@pytest.mark.parametrize(
  ('tensors', 'expected'),
  [
    (TORCH, 'pt'),
    (FLAX, 'flax'),
    (TURNED, 'flax'),
    (CONV1D, 'pt'),
    ({}, 'flax'),
  ],
  ids=['torch', 'flax', 'turned', 'conv1d', 'none'],
)
def test_names_and_layout_tell_the_framework(tensors, expected):
  leaves = {
    tuple(name.split('.')): Leaf(lambda: None, value.shape, 'float32')
    for name, value in tensors.items()
  }

  assert expected == framework(leaves)


@pytest.fixture
def torch(tmp_path):
  path = tmp_path / 'torch.safetensors'
  safetensors.numpy.save_file(TORCH, path)
  return path


@pytest.mark.parametrize('manifest', [True, False])
@pytest.mark.parametrize('said', [None, {'x': 'y'}, {'format': 'pt'}])
def test_a_file_of_torch_stays_one(said, manifest, tmp_path):
  path, out = tmp_path / 'in.safetensors', tmp_path / 'out.safetensors'
  safetensors.numpy.save_file(TORCH, path, said)

  surgery.cast(surgery.open(path), 'bf16').write(out, manifest=manifest)

  assert 'pt' == read_by_accelerate(out)
  assert (said or {}).items() <= metadata(out).items()
  assert ('__surgery__' in metadata(out)) == manifest


def test_a_format_that_was_there_is_kept(tmp_path):
  path, out = tmp_path / 'in.safetensors', tmp_path / 'out.safetensors'
  safetensors.numpy.save_file(TORCH, path, {'format': 'mlx'})

  surgery.rename(surgery.open(path), 'l/weight -> l/kernel').write(out)

  assert 'mlx' == metadata(out)['format']


def test_what_became_flax_says_so(torch, tmp_path):
  middle, out = tmp_path / 'middle.safetensors', tmp_path / 'out.safetensors'
  surgery.cast(surgery.open(torch), 'f16').write(middle)
  assert 'pt' == metadata(middle)['format']

  rules = ['l/weight -> l/kernel', 'n/weight -> n/scale']
  surgery.rename(surgery.open(middle), rules).write(out)

  assert 'flax' == metadata(out)['format']


def test_an_unchanged_file_has_the_same_bytes(torch, tmp_path):
  out = tmp_path / 'out.safetensors'

  surgery.open(torch).write(out)

  assert torch.read_bytes() == out.read_bytes()


def test_our_format_is_nobodys_metadata(tmp_path):
  out = tmp_path / 'out.safetensors'
  array = ones(2)
  Checkpoint({('l', 'kernel'): Leaf(lambda: array, (2,), 'float32')}).write(out)

  assert 'flax' == metadata(out)['format']
  assert Manifest() == surgery.open(out).manifest


def test_metadata_can_be_given(torch, tmp_path):
  out = tmp_path / 'out.safetensors'

  surgery.open(torch).write(out, metadata={'format': 'tf', 'by': 'me'})

  assert {'format': 'tf', 'by': 'me'} == metadata(out)
  assert {'format': 'tf', 'by': 'me'} == surgery.open(out).manifest.metadata


def test_each_file_of_a_set_says_its_format(torch, tmp_path):
  surgery.open(torch).write(tmp_path / 'out.safetensors', shard_size=40)

  files = sorted(tmp_path.glob('out-*.safetensors'))
  assert len(files) > 1
  assert {'pt'} == {read_by_accelerate(file) for file in files}


def test_the_shell_sets_metadata_and_leaves_ours_out(
  torch, tmp_path, surgery_cli
):
  out = tmp_path / 'out.safetensors'
  args = ('cast', torch, '--to', 'bf16', '-o', out, '--no-manifest')

  result = surgery_cli(*args, '--metadata', 'by=me', '--metadata', 'x=a=b')

  assert 0 == result.code, result.err
  assert {'format': 'pt', 'by': 'me', 'x': 'a=b'} == metadata(out)
  assert '--no-manifest leaves out: 1 passes of the history.' in result.err


@pytest.mark.parametrize(
  ('given', 'said'),
  [
    (('--metadata', 'pt'), 'expected --metadata KEY=VALUE'),
    (('--metadata', 'a=b', '--metadata', 'a=c'), "'a' is given twice"),
  ],
)
def test_the_shell_refuses_what_is_no_metadata(
  given, said, torch, tmp_path, surgery_cli
):
  result = surgery_cli('convert', torch, tmp_path / 'o.safetensors', *given)

  assert 2 == result.code
  assert said in result.err


def test_msgpack_has_no_place_for_metadata_but_the_manifest(
  torch, tmp_path, surgery_cli
):
  out = tmp_path / 'out.msgpack'

  for plain in ('--no-manifest', '--strict-flax'):
    result = surgery_cli('convert', torch, out, '--metadata', 'a=b', plain)
    assert 'holds --metadata in the manifest' in result.err
    assert not out.exists()


def test_a_recipe_records_what_it_said_of_itself(torch, tmp_path):
  out = tmp_path / 'out.safetensors'
  target = {'path': out, 'metadata': {'format': 'tf'}}
  surgery.Recipe([{'cast': 'f16'}], outputs={'out': target}).run(model=torch)

  [entry] = surgery.open(out).manifest.history
  assert {'metadata': {'format': 'tf'}} == entry['recipe']['outputs']['out']


@pytest.mark.parametrize('wrong', ['pt', ['pt'], {'a': 1}])
def test_a_recipe_refuses_what_is_no_metadata(wrong):
  with pytest.raises(surgery.RecipeError, match='metadata: expected text'):
    surgery.Recipe([], outputs={'out': {'metadata': wrong}})
