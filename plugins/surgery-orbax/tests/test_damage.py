"""Nothing wrong is read or written without a word."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import orbax.checkpoint as ocp
import pytest

import surgery
from surgery import Checkpoint, Leaf


def checkpoint(**values):
  return Checkpoint(
    {
      tuple(name.split('/')): Leaf(
        lambda v=value: v, value.shape, value.dtype.name
      )
      for name, value in values.items()
    }
  )


def random(*shape):
  return np.random.default_rng(0).integers(0, 255, shape, np.uint8)


def standard(path, value):
  with ocp.StandardCheckpointer() as saver:
    saver.save(path, value)
  return path


@pytest.fixture
def saved(tmp_path):
  return standard(tmp_path / 'a', {'w': random(400, 30), 'b': np.ones(3)})


def edit(folder, change, name='_METADATA'):
  file = folder / name
  said = json.loads(file.read_text())
  change(said)
  file.write_text(json.dumps(said))


def test_flipped_bits_are_found(tmp_path):
  out = tmp_path / 'a.orbax'
  value = random(400, 3000)
  checkpoint(w=value, b=np.ones(3)).write(out)
  data = max(out.rglob('d/*'), key=lambda f: f.stat().st_size)
  whole = data.read_bytes()
  places = np.random.default_rng(0).integers(0, len(whole), 20)
  silent = wrong = 0
  for place in places:
    flipped = bytearray(whole)
    flipped[place] ^= 1
    data.write_bytes(flipped)
    try:
      opened = surgery.open(out)
      same = opened[('w',)].load().tobytes() == value.tobytes()
      # A bit of what is not read, e.g. of an older index, changes nothing.
      wrong += not same
      silent += same
    except surgery.FormatError as error:
      assert str(out) in str(error)
  assert 0 == wrong
  assert silent < len(places)
  # Orbax itself restores most of them without a word.
  flipped = bytearray(whole)
  flipped[len(whole) // 2] ^= 1
  data.write_bytes(flipped)
  done = subprocess.run(
    [sys.executable, '-m', 'surgery', 'verify', str(out)],
    capture_output=True,
    text=True,
  )
  assert 1 == done.returncode
  assert 'w: ' in done.stdout + done.stderr


@pytest.mark.parametrize('ocdbt', [True, False])
def test_missing_chunks_are_no_zeros(tmp_path, ocdbt):
  if ocdbt:
    out = tmp_path / 'a.orbax'
    checkpoint(w=random(4000, 3000), b=np.ones(3)).write(out)
    import tensorstore as ts

    base = {'driver': 'file', 'path': f'{out}/'}
    store = ts.KvStore.open({'driver': 'ocdbt', 'base': base}).result()
    store.write('w/0.0', None).result()
  else:
    out = tmp_path / 'a'
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    with ocp.Checkpointer(handler) as saver:
      saver.save(out, args=ocp.args.PyTreeSave({'w': random(4, 3)}))
    (out / 'w' / '0.0').unlink()
  with pytest.raises(
    surgery.FormatError, match=r'w: expected \d chunks, found'
  ):
    surgery.open(out)


def test_a_missing_tensor_is_named(saved):
  def add(said):
    tree = said['tree_metadata']
    tree["('gone',)"] = json.loads(
      json.dumps(tree["('w',)"]).replace('"w"', '"gone"')
    )

  edit(saved, add)
  with pytest.raises(surgery.FormatError, match='not there: gone'):
    surgery.open(saved)


def test_names_that_orbax_overwrites_are_refused(tmp_path):
  standard(tmp_path / 'a', {'a': {'b': np.zeros(2)}, 'a.b': np.ones(2)})
  with pytest.raises(surgery.FormatError, match=r'both.* stored as a\.b'):
    surgery.open(tmp_path / 'a')
  both = Checkpoint(
    {
      ('a', 'b'): Leaf(lambda: np.zeros(2), (2,), 'float64'),
      ('a.b',): Leaf(lambda: np.ones(2), (2,), 'float64'),
    }
  )
  with pytest.raises(
    surgery.FormatError, match=r'would both be stored as a\.b'
  ):
    both.write(tmp_path / 'b.orbax')
  assert not (tmp_path / 'b.orbax').exists()


@pytest.mark.parametrize('name', ['..', 'a/../../b', '', 'a//b', '.'])
def test_names_that_lead_out_are_refused(saved, tmp_path, name):
  def rename(said):
    tree = said['tree_metadata']
    tree['x'] = json.loads(json.dumps(tree.pop("('w',)")))
    tree['x']['key_metadata'][0]['key'] = name

  edit(saved, rename)
  with pytest.raises(surgery.FormatError, match='leads out of the checkpoint'):
    surgery.open(saved)
  one = Checkpoint({(name,): Leaf(lambda: np.ones(2), (2,), 'float64')})
  with pytest.raises(surgery.FormatError, match='no name of an array'):
    one.write(tmp_path / 'b.orbax')


def test_several_items_and_steps_are_listed(tmp_path):
  with ocp.CheckpointManager(tmp_path / 'm') as saver:
    for step in (9, 10):
      saver.save(
        step,
        args=ocp.args.Composite(
          params=ocp.args.StandardSave({'w': np.ones(2)}),
          opt=ocp.args.StandardSave({'w': np.ones(2)}),
        ),
      )
  with pytest.raises(surgery.FormatError, match=r'one step.* 9, 10') as one:
    surgery.open(tmp_path / 'm')
  assert str(tmp_path / 'm' / '10') in str(one.value)
  with pytest.raises(surgery.FormatError, match=r'one item.* opt, params'):
    surgery.open(tmp_path / 'm' / '10')
  assert [('w',)] == list(surgery.open(tmp_path / 'm' / '10' / 'params'))


def test_unfinished_folders_are_refused(saved, tmp_path):
  for name in ('b.orbax-checkpoint-tmp', 'b.orbax-checkpoint-tmp-1234'):
    shutil.copytree(saved, tmp_path / name)
    with pytest.raises(surgery.FormatError, match='unfinished'):
      surgery.open(tmp_path / name)
  (saved / '_METADATA').unlink()
  with pytest.raises(surgery.FormatError, match='expected _METADATA'):
    surgery.open(saved)


@pytest.mark.parametrize('text', ['', '[]', '{}', '[' * 100_000, '{"a":'])
def test_metadata_that_makes_no_sense_is_refused(saved, text):
  (saved / '_METADATA').write_text(text)
  with pytest.raises(surgery.FormatError, match='_METADATA'):
    surgery.open(saved)


def test_damaged_indexes_are_refused(saved):
  index = saved / 'manifest.ocdbt'
  whole = index.read_bytes()
  for damaged in (b'', whole[: len(whole) // 2], b'x' * len(whole)):
    index.write_bytes(damaged)
    with pytest.raises(surgery.FormatError, match=r'index.* cannot be read'):
      surgery.open(saved)
  index.write_bytes(whole)
  for file in saved.glob('d/*'):
    file.unlink()
  with pytest.raises(surgery.FormatError, match='cannot be read'):
    surgery.open(saved)


def test_a_manifest_of_other_tensors_is_refused(tmp_path):
  checkpoint(w=np.ones(2)).write(tmp_path / 'a.orbax')
  edit(
    tmp_path / 'a.orbax',
    lambda said: said['tensors'].update(other={'trainable': False}),
    '_SURGERY',
  )
  with pytest.raises(surgery.FormatError, match="'other', which is not in it"):
    surgery.open(tmp_path / 'a.orbax')


@pytest.mark.parametrize(
  'value, match',
  [
    (np.zeros((0, 2)), 'without elements'),
    (b'bytes', 'a value of type bytes'),
    (1 << 70, 'whole numbers of 64 bits'),
    (1j, 'a value of type complex'),
  ],
)
def test_what_orbax_cannot_hold_is_refused(tmp_path, value, match):
  one = Checkpoint({('net', 'x'): Leaf(lambda: value)})
  with pytest.raises(surgery.FormatError, match=f'net/x.*{match}'):
    one.write(tmp_path / 'a.orbax')
  assert [] == list(tmp_path.iterdir())


def test_folders_are_never_replaced(tmp_path):
  one = checkpoint(w=np.ones(2))
  one.write(tmp_path / 'a.orbax')
  before = sorted(p.name for p in (tmp_path / 'a.orbax').iterdir())
  for overwrite in (False, True):
    with pytest.raises(FileExistsError, match='never replaced'):
      one.write(tmp_path / 'a.orbax', overwrite=overwrite)
  assert before == sorted(p.name for p in (tmp_path / 'a.orbax').iterdir())


KILLED = """
import os, signal, sys
import numpy as np
import surgery
from surgery import Checkpoint, Leaf
from surgery_orbax import writing

at, folder = int(sys.argv[1]), sys.argv[2]
count = 0
def counted(run):
  def call(*given, **options):
    global count
    count += 1
    if count == at:
      os.kill(os.getpid(), signal.SIGKILL)
    return run(*given, **options)
  return call
for name in ('_commit', '_opened', '_chunks', '_link', 'finish'):
  setattr(writing._Writer, name, counted(getattr(writing._Writer, name)))
for name in ('_write_manifest', '_write_metadata', '_dump'):
  setattr(writing, name, counted(getattr(writing, name)))
os.rename = counted(os.rename)
leaves = {
  (f'w{i}',): Leaf(lambda i=i: np.full(4, i, 'float32'), (4,), 'float32')
  for i in range(2)
}
Checkpoint(leaves).write(folder + '/out.orbax')
print(count)
"""


def test_a_killed_writer_leaves_no_checkpoint(tmp_path):
  """Killed at each of its steps, it leaves nothing that looks finished."""

  def run(at):
    return subprocess.run(
      [sys.executable, '-c', KILLED, str(at), str(tmp_path)],
      capture_output=True,
      text=True,
    )

  at = 1
  while (done := run(at)).returncode == -signal.SIGKILL:
    assert not (tmp_path / 'out.orbax').exists(), at
    at += 3
  assert 0 == done.returncode, done.stderr
  assert at > 6
  found = surgery.open(tmp_path / 'out.orbax')
  np.testing.assert_array_equal(np.full(4, 1, 'float32'), found['w1',].load())
  # The next writer removed what those before it had left.
  assert ['out.orbax'] == [p.name for p in tmp_path.iterdir()]


def test_other_folders_are_not_taken_for_orbax_s(tmp_path):
  (tmp_path / 'model').mkdir()
  checkpoint(w=np.ones(2)).write(tmp_path / 'model' / 'm.safetensors')
  (tmp_path / 'model' / '1').mkdir()
  assert [('w',)] == list(surgery.open(tmp_path / 'model'))
  assert (
    not surgery.default_host()
    .formats['orbax']
    .recognises(pathlib.Path(tmp_path / 'model'))
  )
