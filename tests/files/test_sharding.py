"""Sets of files: what is written, and what is refused."""

import json
import os
import pathlib

import numpy as np
import pytest
from flax import serialization, traverse_util
from safetensors.numpy import load_file, save_file

import surgery
from surgery import errors
from surgery.files import atomic, atomic_sets
from surgery.host import location
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.manifest import KEY
from tests.files.trees import bits, checkpoint_of

SUFFIXES = ('.msgpack', '.safetensors')


def model(**more):
  """Six tensors of 400 bytes, and more."""
  layers = {
    f'layer_{i}': {'kernel': np.full((10, 10), i, 'float32')} for i in range(6)
  }
  return checkpoint_of({'net': layers, **more})


def index_of(path):
  return path.with_name(path.name + location.INDEX)


def listed(path):
  return json.loads(index_of(path).read_text())


def names(folder):
  return sorted(p.name for p in folder.iterdir())


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
  assert list(a) == list(b)
  for path, leaf in a.items():
    assert bits(leaf.load()) == bits(b[path].load())


@pytest.fixture(params=SUFFIXES)
def target(tmp_path, request) -> pathlib.Path:
  return tmp_path / f'out{request.param}'


@pytest.fixture
def written(target):
  model().write(target, shard_size=1700)
  return target


# What is written.


def test_files_are_called_as_on_hubs(written):
  suffix = written.suffix
  count = len(names(written.parent)) - 1
  assert count > 1
  assert [
    *(f'out-{i:05}-of-{count:05}{suffix}' for i in range(1, count + 1)),
    f'out{suffix}.index.json',
  ] == names(written.parent)


@pytest.mark.filterwarnings('ignore::surgery.ShardWarning')
def test_the_index_tells_where_each_tensor_is(written):
  index = listed(written)
  sign = '/' if written.suffix == '.msgpack' else '.'
  assert [sign.join(('net', f'layer_{i}', 'kernel')) for i in range(6)] == list(
    index['weight_map']
  )
  assert 6 * 400 == index['metadata']['total_size']
  for file in set(index['weight_map'].values()):
    part = surgery.model.checkpoint.open_checkpoint(written.with_name(file))
    assert {sign.join(path) for path in part} == {
      name for name, where in index['weight_map'].items() if where == file
    }


def test_flax_reads_each_file(tmp_path):
  model().write(tmp_path / 'm.msgpack', shard_size=1000)
  found = {}
  for file in tmp_path.glob('*.msgpack'):
    tree = serialization.msgpack_restore(file.read_bytes())
    found.update(traverse_util.flatten_dict(tree))
  expected = {path: leaf.load() for path, leaf in model().items()}
  assert expected.keys() == found.keys()
  for path, value in expected.items():
    assert bits(value) == bits(found[path])


def test_safetensors_reads_each_file(tmp_path):
  model().write(tmp_path / 'm.safetensors', shard_size=1000)
  found = {}
  for file in tmp_path.glob('*.safetensors'):
    found.update(load_file(file))
  assert {'.'.join(path) for path in model()} == set(found)


def test_a_tensor_that_is_larger_has_a_file_of_its_own(target):
  large = np.zeros(10_000, 'int8')
  model(large=large).write(target, shard_size=2500)
  opened = surgery.open(index_of(target))
  sizes = {}
  for leaf in opened.values():
    sizes.setdefault(leaf.source.file.name, []).append(leaf.nbytes)
  assert [10_000] in sizes.values()


def test_the_manifest_is_in_the_index(target):
  checkpoint = model(n=3)
  path = ('net', 'layer_2', 'kernel')
  leaves = {
    p: leaf.replace(trainable=False, metadata={'a': (1,)})
    if p == path
    else leaf
    for p, leaf in checkpoint.items()
  }
  Checkpoint(leaves).write(target, shard_size=1000)
  opened = surgery.open(target.parent)
  assert not opened[path].trainable
  assert {'a': (1,)} == opened[path].metadata
  assert 3 == opened['n',].load()
  said = listed(target)['metadata'][KEY]['tensors']['net/layer_2/kernel']
  assert opened[path].digest == said['digest']
  assert said['digest'].startswith('xxh3:')


def test_without_a_manifest_there_is_none(target):
  model().write(target, shard_size=1000, manifest=False)
  assert ['total_size'] == list(listed(target)['metadata'])
  assert_same(model(), surgery.open(index_of(target)))


def test_progress_is_told(target):
  told = []
  model().write(target, shard_size=1000, progress=lambda *n: told.append(n))
  assert (6, 2400) == tuple(map(sum, zip(*told, strict=True)))


@pytest.mark.parametrize('size', [0, -1, 1.5, True, '5GB'])
def test_a_size_is_a_number_of_bytes(target, size):
  with pytest.raises(errors.FormatError, match='expected a number of bytes'):
    model().write(target, shard_size=size)
  assert [] == names(target.parent)


def test_nothing_cannot_be_several_files(target):
  with pytest.raises(
    errors.FormatError, match='a set of files needs at least one tensor'
  ):
    Checkpoint({}).write(target, shard_size=10)


# What is opened.


def test_sets_of_others_are_read(tmp_path):
  values = {f'h.{i}.w': np.full((3,), i, 'float16') for i in range(4)}
  for i, part in enumerate((('h.0.w', 'h.3.w'), ('h.1.w', 'h.2.w')), 1):
    save_file(
      {name: values[name] for name in part},
      tmp_path / f'model-0000{i}-of-00002.safetensors',
      metadata={'format': 'pt'},
    )
  # As hubs have it, in the order of names, and with a size of its own mind.
  where = {'h.0.w': 1, 'h.1.w': 2, 'h.2.w': 2, 'h.3.w': 1}
  index = {
    'metadata': {'total_size': 1e9, 'total_parameters': 4},
    'weight_map': {
      name: f'model-0000{i}-of-00002.safetensors' for name, i in where.items()
    },
  }
  (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
  opened = surgery.open(tmp_path)
  assert {tuple(name.split('.')) for name in values} == set(opened)
  assert 3.0 == opened['h', '3', 'w'].load()[0]
  assert {'format': 'pt'} == opened.manifest.metadata


def test_an_index_without_metadata_will_do(written):
  index = listed(written)
  del index['metadata']
  index_of(written).write_text(json.dumps(index))
  assert_same(model(), surgery.open(index_of(written)))


def broken(written, change):
  """Changes an index; returns the message that opening it gives."""
  index = listed(written)
  text = change(index)
  index_of(written).write_text(json.dumps(index) if text is None else text)
  with pytest.raises(errors.FormatError) as info:
    surgery.open(index_of(written))
  assert str(info.value).startswith(str(index_of(written)))
  return str(info.value)


def of_map(changes):
  return lambda index: index['weight_map'].update(changes)


BROKEN = {
  'no JSON': (lambda index: '{', 'not valid JSON'),
  'no object': (lambda index: '[]', 'expected a JSON object, found list'),
  'no map': (lambda index: '{}', "with 'weight_map', an object of tensors"),
  'an empty map': (lambda index: '{"weight_map":{}}', 'found {}'),
  'a number for a file': (of_map({'x': 1}), "'x': expected the name of a file"),
  'metadata that is none': (
    lambda index: index.update(metadata=[]),
    "expected 'metadata' to be an object, found []",
  ),
  'an absolute path': (of_map({'x': '/etc/passwd'}), "found '/etc/passwd'"),
  'a path upwards': (of_map({'x': '../x.msgpack'}), 'outside of the folder'),
  'a file that is missing': (
    of_map({'x': 'y.msgpack'}),
    'files beside it, found',
  ),
  'a tensor that is missing': (
    lambda index: index['weight_map'].update(
      x=next(iter(index['weight_map'].values()))
    ),
    ': x; not found there',
  ),
  'another size': (
    lambda index: index['metadata'].update(total_size=1),
    'expected tensors of 1 bytes (total_size), found 2400',
  ),
  'a manifest that is none': (
    lambda index: index['metadata'].update({KEY: []}),
    'manifest (__surgery__): expected an object',
  ),
}


@pytest.mark.parametrize('case', BROKEN)
def test_an_index_that_is_wrong_is_refused(written, case):
  change, said = BROKEN[case]
  assert said in broken(written, change)


def test_a_tensor_that_the_index_does_not_name_is_refused(written):
  last = list(listed(written)['weight_map'])[-1]

  def change(index):
    del index['weight_map'][last]

  said = broken(written, change)
  assert f'{last}, which it does not name' in said


def test_a_tensor_in_another_file_is_refused(written):
  def change(index):
    first, *_, last = index['weight_map']
    index['weight_map'][last] = index['weight_map'][first]

  assert 'not found there' in broken(written, change)


def test_a_file_that_is_missing_is_named_with_what_is_in_it(written):
  file, *_ = listed(written)['weight_map'].values()
  written.with_name(file).unlink()
  said = broken(written, lambda index: None)
  assert f'Missing: {file}; in it net' in said
  assert 'layer_0' in said


@pytest.mark.filterwarnings('ignore::surgery.ShardWarning')
def test_a_model_of_its_own_is_no_part(written):
  file, *_ = listed(written)['weight_map'].values()
  part = surgery.model.checkpoint.open_checkpoint(written.with_name(file))
  leaves = {p: leaf.replace(trainable=False) for p, leaf in part.items()}
  Checkpoint(leaves).write(written.with_name(file), overwrite=True)
  said = broken(written, lambda index: None)
  assert f'{file} has a manifest (__surgery__) of its own' in said


# Folders.


def test_a_folder_with_one_file_is_that_file(target):
  model().write(target)
  (target.parent / 'readme.txt').touch()
  assert_same(model(), surgery.open(target.parent))


def test_a_folder_with_two_models_is_refused(target):
  model().write(target)
  model().write(target.with_name(f'other{target.suffix}'))
  with pytest.raises(errors.FormatError, match='Name one of them') as info:
    surgery.open(target.parent)
  assert f'out{target.suffix}, ' in str(info.value) or 'other' in str(
    info.value
  )


def test_a_folder_without_a_model_is_refused(tmp_path):
  with pytest.raises(errors.FormatError, match='found none. Known suffixes: '):
    surgery.open(tmp_path)


def test_a_folder_with_parts_only_asks_for_their_index(written):
  index_of(written).unlink()
  with pytest.raises(errors.FormatError, match='but not their index') as info:
    surgery.open(written.parent)
  assert f'(out{written.suffix}.index.json)' in str(info.value)


# What is there already.


def test_a_set_is_replaced_only_if_allowed(written):
  before = {p: p.read_bytes() for p in written.parent.iterdir()}
  with pytest.raises(FileExistsError, match='overwrite=True'):
    model().write(written, shard_size=1000)
  assert before == {p: p.read_bytes() for p in written.parent.iterdir()}


def test_a_set_that_replaces_another_leaves_its_own_files_only(written):
  # With the same number of files three times: names are used in turn.
  size = len(names(written.parent))
  for _ in range(3):
    before = set(listed(written)['weight_map'].values())
    opened = surgery.open(index_of(written))
    opened.write(written, shard_size=500, overwrite=True)
    named = set(listed(written)['weight_map'].values())
    assert not before & named or len(before) != len(named)
    assert sorted({*named, index_of(written).name}) == names(written.parent)
    assert_same(model(), surgery.open(written.parent))
  assert size > 2


def test_the_old_set_is_whole_until_the_index_is_replaced(written, monkeypatch):
  whole = []
  publish = atomic.publish

  def watched(temporary, target, shown, overwrite):
    whole.append(surgery.open(index_of(written)))
    publish(temporary, target, shown, overwrite)

  monkeypatch.setattr(atomic, 'publish', watched)
  model().write(written, shard_size=500, overwrite=True)
  for opened in whole:
    assert_same(model(), opened)
  assert len(whole) > 2


def test_files_of_another_set_are_not_taken_for_old_ones(written):
  other = written.with_name(f'{written.stem}.2{written.suffix}')
  model().write(other, shard_size=500)
  for _ in range(3):
    model().write(written, shard_size=500, overwrite=True)
  for set_ in (written, other):
    assert_same(model(), surgery.open(index_of(set_)))


def test_a_set_that_somebody_else_replaced_meanwhile_stays(written):
  late = atomic_sets.writing(written, 1, overwrite=True)
  files = late.__enter__()
  with files.next() as fd:
    os.write(fd, b'late')
  model().write(written, shard_size=500, overwrite=True)
  os.write(files.fd, b'{}')
  with pytest.raises(FileExistsError, match='written there meanwhile'):
    late.__exit__(None, None, None)
  assert_same(model(), surgery.open(index_of(written)))
  named = set(listed(written)['weight_map'].values())
  assert sorted({*named, index_of(written).name}) == names(written.parent)


def test_files_of_a_set_without_an_index_are_replaced_if_allowed(written):
  index_of(written).unlink()
  with pytest.raises(FileExistsError, match='of a set without an index'):
    model().write(written, shard_size=500)
  model().write(written, shard_size=500, overwrite=True)
  assert_same(model(), surgery.open(written.parent))
  named = set(listed(written)['weight_map'].values())
  assert sorted({*named, index_of(written).name}) == names(written.parent)


def test_a_file_of_that_name_is_replaced_if_allowed(target):
  model().write(target)
  with pytest.raises(FileExistsError, match='overwrite=True'):
    model().write(target, shard_size=1000)
  model().write(target, shard_size=1000, overwrite=True)
  assert not target.exists()
  assert_same(model(), surgery.open(target.parent))


def test_an_index_is_not_written_alone(target):
  with pytest.raises(errors.FormatError, match='with a shard_size'):
    model().write(index_of(target))


def test_a_folder_is_not_written(target):
  with pytest.raises(IsADirectoryError):
    model().write(target.parent, format='msgpack')


def test_a_set_may_be_read_and_written_under_another_name(written):
  other = written.with_name(f'b{written.suffix}')
  surgery.open(index_of(written)).write(other, shard_size=900)
  assert_same(model(), surgery.open(index_of(other)))


def test_formats_that_know_no_sets_say_so(tmp_path):
  class Plain:
    suffixes = ('.plain',)

    def write(self, checkpoint, path, *, overwrite=False):
      raise AssertionError('was asked to write')

  class Plugin:
    @surgery.hookimpl
    def surgery_formats(self):
      return {'plain': Plain()}

  host = surgery.Host([Plugin()], entry_points=False)
  for options, said in (
    ({'shard_size': 10}, 'in several files'),
    ({'manifest': False}, 'without a manifest'),
  ):
    with pytest.raises(errors.FormatError, match=said):
      model().write(tmp_path / 'm.plain', host=host, **options)


def _set(tmp_path, suffix):
  """A set of three files, as other programs write them: without a manifest."""
  leaves: dict[tuple[str, ...], Leaf] = {
    ('l', name): Leaf(lambda: np.ones(8, np.float32), (8,), 'float32')
    for name in 'abc'
  }
  path = tmp_path / f'model{suffix}'
  Checkpoint(leaves).write(path, shard_size=300, manifest=False)
  index = tmp_path / f'model{suffix}.index.json'
  said = json.loads(index.read_text())
  assert 3 == len(set(said['weight_map'].values()))
  return index, said


@pytest.mark.parametrize('suffix', ['.msgpack', '.safetensors'])
@pytest.mark.parametrize('beside', [True, False])
@pytest.mark.parametrize('number', [1, 2, 3])
def test_an_index_that_forgets_a_file_is_refused(
  number, beside, suffix, tmp_path
):
  index, said = _set(tmp_path, suffix)
  lost = f'model-{number:05}-of-00003{suffix}'
  said['weight_map'] = {
    name: file for name, file in said['weight_map'].items() if file != lost
  }
  index.write_text(json.dumps(said))
  expected = f'does not name {lost}, which lies beside'
  if not beside:
    (tmp_path / lost).unlink()
    expected = f'does not name number {number}, which does not lie beside'

  for where in (index, tmp_path):
    with pytest.raises(surgery.FormatError, match=expected):
      surgery.open(where)


@pytest.mark.parametrize('suffix', ['.msgpack', '.safetensors'])
def test_files_of_other_sets_beside_are_no_error(suffix, tmp_path):
  index, _ = _set(tmp_path, suffix)
  first = (tmp_path / f'model-00001-of-00003{suffix}').read_bytes()
  for other in (
    f'other-00001-of-00003{suffix}',
    f'model-00001-of-00004{suffix}',
    f'model-00004-of-00003{suffix}.part',
    f'ema{suffix}',
  ):
    (tmp_path / other).write_bytes(first)

  assert 3 == len(surgery.open(index))


def test_files_that_are_counted_from_0_are_a_whole_set(tmp_path):
  index, said = _set(tmp_path, '.safetensors')
  for number in (1, 2, 3):
    name = 'model-{:05}-of-00003.safetensors'
    (tmp_path / name.format(number)).rename(tmp_path / name.format(number - 1))
    said['weight_map'] = {
      key: name.format(number - 1) if file == name.format(number) else file
      for key, file in said['weight_map'].items()
    }
  index.write_text(json.dumps(said))

  assert 3 == len(surgery.open(index))
