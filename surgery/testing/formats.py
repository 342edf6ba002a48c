"""The laws of file formats."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import numpy as np

from surgery import errors
from surgery.builtin.lora import LoRA
from surgery.files import arrays
from surgery.host.manager import Host
from surgery.live import verbs
from surgery.model.checkpoint import Checkpoint, Leaf, open_checkpoint
from surgery.naming.paths import Path
from surgery.testing import suites
from surgery.testing.suites import Fault, law

# How many places of a file are damaged.
_CUTS, _FLIPS = 60, 200


def _leaf(value: Any, **said: Any) -> Leaf:
  if value is None:
    return Leaf(lambda: None, **said)
  return Leaf(lambda: value, value.shape, value.dtype.name, **said)


def _drawn(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
  """Returns numbers that a dtype holds; other bits than of a round number."""
  numbers = np.random.default_rng(seed)
  kind = arrays.DTYPES[dtype]
  if dtype == 'bool':
    return numbers.integers(0, 2, shape).astype(bool)
  if dtype in ('float16', 'float32', 'float64'):
    # All patterns there are, NaN with payloads and subnormal numbers too.
    count = int(np.prod(shape)) * kind.itemsize
    return np.frombuffer(numbers.bytes(count), kind).reshape(shape)
  if np.dtype(kind).kind in 'iu' and kind.itemsize > 1:
    count = int(np.prod(shape)) * kind.itemsize
    return np.frombuffer(numbers.bytes(count), kind).reshape(shape)
  return numbers.integers(0, 2, shape).astype(np.float32).astype(kind)


def _of_dtype(dtype: str) -> Callable[[], Checkpoint]:
  def tree() -> Checkpoint:
    shapes: tuple[tuple[int, ...], ...] = ((3,), (2, 3), (2, 1, 4))
    return Checkpoint(
      {
        ('net', f'of{len(shape)}', 'kernel'): _leaf(_drawn(dtype, shape, n))
        for n, shape in enumerate(shapes)
      }
    )

  return tree


def _float(*shape: int) -> np.ndarray:
  return _drawn('float32', shape)


def _shapes() -> Checkpoint:
  return Checkpoint(
    {
      ('net', 'scalar'): _leaf(_float()),
      ('net', 'empty'): _leaf(_float(0, 3)),
      ('net', 'one'): _leaf(_float(1, 1)),
    }
  )


def _frozen() -> Checkpoint:
  return Checkpoint(
    {
      ('net', 'kernel'): _leaf(_float(2), trainable=False),
      ('net', 'bias'): _leaf(_float(2)),
    }
  )


def _metadata() -> Checkpoint:
  said = {'note': ('a', 1, 0.5, None), 'inner': {'x': [True]}}
  return Checkpoint({('net', 'kernel'): _leaf(_float(2), metadata=said)})


def _key() -> Checkpoint:
  words = np.array([1, 2], np.uint32)
  return Checkpoint({('rng', 'key'): _leaf(words, key='threefry2x32')})


def _names() -> Checkpoint:
  named: tuple[Path, ...] = (
    ('net', 'a/b'), ('net', 'a', 'b'), ('net', 'ü x.y'), ('net', '0'),
    ('net', 'a\\b'), ('file',), ('net', 'kernel.npy'),
  )  # fmt: skip
  return Checkpoint(
    {p: _leaf(_drawn('float32', (2,), n)) for n, p in enumerate(named)}
  )


def _texts() -> Checkpoint:
  tree = Checkpoint({('net', 'kernel'): _leaf(_float(2))})
  said = tree.manifest.replace(metadata={'format': 'pt'})
  return tree.replace(manifest=said)


def _adapter() -> Checkpoint:
  kernel = np.ones((3, 2), np.float32)
  tree = Checkpoint({('net', 'layer', 'kernel'): _leaf(kernel)})
  return verbs.attach(tree, LoRA(rank=1), to='**')


# What a model may have, and a tree that has it and nothing else.
FEATURES: dict[str, Callable[[], Checkpoint]] = {
  **{dtype: _of_dtype(dtype) for dtype in arrays.DTYPES},
  'shapes': _shapes,
  'names': _names,
  'frozen': _frozen,
  'metadata': _metadata,
  'key': _key,
  'value': lambda: Checkpoint({('net', 'nothing'): _leaf(None)}),
  'texts': _texts,
  'adapter': _adapter,
}


class FormatConformance(suites.Suite):
  """The laws of file formats; derive from it and set `plugin` and `name`.

  Attributes:
    plugin: the plugin: a module, a class or an object.
    name: name of the format.
    refused: what it has no place for, and so has to refuse with a
      `FormatError`: dtypes by name, `shapes` (scalars and empty arrays),
      `names` (with `/`, backslash, dots, spaces), `frozen`, `metadata`, `key`
      (of PRNGs), `value` (what is no array), `texts` (what files say to other
      programs), `adapter`.

  Example:
    class TestNpz(FormatConformance):
      plugin = my_package
      name = 'npz'
      refused = ('bfloat16', 'adapter')
  """

  refused: ClassVar[Iterable[str]] = ()

  def _refused(self) -> tuple[str, ...]:
    """Returns what is declared to be refused.

    Raises:
      ConfigError: for something that no tree has.
    """
    for one in self.refused:
      if one not in FEATURES:
        raise errors.ConfigError(
          f'refused: nothing is called {one!r}.{errors.suggest(one, FEATURES)}'
        )
    return tuple(self.refused)

  def _file(self, folder: pathlib.Path, host: Host, stem: str = 'm') -> Any:
    return folder / f'{stem}{host.formats[self.name].suffixes[0]}'

  def _mixed(self, seed: int) -> Checkpoint:
    """Returns a tree that has a bit of all that is not refused."""
    refused, numbers = self._refused(), np.random.default_rng(seed)
    dtypes = [name for name in arrays.DTYPES if name not in refused]
    leaves: dict[Path, Leaf] = {}
    for number in range(int(numbers.integers(3, 9))):
      dtype = dtypes[int(numbers.integers(len(dtypes)))]
      shape = tuple(
        numbers.integers(1, 5, int(numbers.integers(1, 4))).tolist()
      )
      said: dict[str, Any] = {}
      if 'frozen' not in refused and number % 3 == 1:
        said['trainable'] = False
      if 'metadata' not in refused and number % 4 == 2:
        said['metadata'] = {'note': number}
      depth = int(numbers.integers(1, 4))
      path = (*(f'at{k}' for k in range(depth)), f'w{number}')
      leaves[path] = _leaf(_drawn(dtype, shape, seed + number), **said)
    return Checkpoint(leaves)

  def _back(self, tree: Checkpoint, what: str) -> None:
    """Raises unless a tree that is written comes back."""
    host = self.host()
    with suites.folder() as folder:
      file = self._file(folder, host)
      tree.write(file, host=host)
      found = open_checkpoint(file, host=host)
      suites.same_leaves(tree, found, what)
      adapters = tree.resolved(host).adapters
      if len(adapters) != len(found.manifest.adapters):
        raise Fault(f'{what}: the adapter was lost.')
      a, b = tree.manifest.metadata, found.manifest.metadata
      if any(b.get(key) != text for key, text in a.items()):
        raise Fault(f'{what}: expected the texts {a}, found {b}.')

  @law
  def test_what_is_written_comes_back(self) -> None:
    """What is written comes back to the bit, or is refused before it is lost.

    Each dtype and each thing that a model may have by itself: what is declared
    in `refused` has to be refused with a `FormatError`, all else comes back.
    """
    refused, host = self._refused(), self.host()
    for feature, tree in FEATURES.items():
      if feature not in refused:
        try:
          self._back(tree(), feature)
        except errors.FormatError as error:
          raise Fault(
            f'{feature}: {error} If the format has no place for it, say so: '
            f'refused = ({feature!r},).'
          ) from error
        continue
      with suites.folder() as folder:
        file = self._file(folder, host)
        try:
          tree().write(file, host=host)
        except errors.FormatError:
          if any(folder.iterdir()):
            raise Fault(
              f'{feature}: it is refused, and files are left.'
            ) from None
        else:
          raise Fault(
            f'{feature}: it is declared to be refused, and was written.'
          )

  @law
  def test_trees_come_back(self) -> None:
    """Models of many tensors come back: paths, dtypes, flags, metadata."""
    for seed in range(20):
      self._back(self._mixed(seed), f'tree {seed}')

  @law
  def test_the_same_bytes_again(self) -> None:
    """A model that is written again is the same file, byte by byte."""
    host, tree = self.host(), self._mixed(0)
    with suites.folder() as folder:
      written = []
      for stem in ('a', 'b'):
        file = self._file(folder, host, stem)
        tree.write(file, host=host)
        written.append(file.read_bytes())
    if written[0] != written[1]:
      raise Fault('two files of one model differ.')

  @law
  def test_a_file_is_not_replaced_unasked(self) -> None:
    """Without `overwrite` a file that exists stays as it is, with an error."""
    host = self.host()
    with suites.folder() as folder:
      file = self._file(folder, host)
      self._mixed(0).write(file, host=host)
      before = _listed(folder)
      try:
        self._mixed(1).write(file, host=host)
      except FileExistsError:
        pass
      else:
        raise Fault('expected FileExistsError, and there was none.')
      _check_same(before, folder, 'an error')
      self._mixed(1).write(file, host=host, overwrite=True)
      found = open_checkpoint(file, host=host)
      suites.same_leaves(self._mixed(1), found, 'written over')

  @law
  def test_a_file_may_be_written_over_itself(self) -> None:
    """What is read from a file may be written to the same file."""
    host, tree = self.host(), self._mixed(2)
    with suites.folder() as folder:
      file = self._file(folder, host)
      tree.write(file, host=host)
      opened = open_checkpoint(file, host=host)
      opened.write(file, host=host, overwrite=True)
      found = open_checkpoint(file, host=host)
      suites.same_leaves(tree, found, 'written over itself')

  @law
  def test_a_write_that_fails_leaves_the_old_file(self) -> None:
    """A file is written whole or not at all, and nothing is left beside it.

    The writer is interrupted in a tensor, a tensor cannot be computed, and
    (where the system allows it) the disk is full.
    """
    host = self.host()
    for stop in (KeyboardInterrupt(), OSError(errno.EIO, 'broken')):
      for there in (True, False):
        with suites.folder() as folder:
          file = self._file(folder, host)
          if there:
            self._mixed(0).write(file, host=host)
          before = _listed(folder)
          with contextlib.suppress(KeyboardInterrupt, OSError):
            _failing(self._mixed(1), stop).write(
              file, host=host, overwrite=True
            )
            raise Fault(f'{type(stop).__name__} of a tensor was lost.')
          _check_same(before, folder, type(stop).__name__)
    with suites.folder() as folder:
      file = self._file(folder, host)
      self._mixed(0).write(file, host=host)
      before = _listed(folder)
      # Bits that no compression makes smaller.
      large = Checkpoint({('net', 'w'): _leaf(_drawn('float32', (1 << 16,)))})
      try:
        with _full(1 << 16):
          large.write(file, host=host, overwrite=True)
      except OSError:
        _check_same(before, folder, 'a full disk')
      else:
        if hasattr(os, 'fork'):
          raise Fault('the disk was full, and there was no error.')

  @law
  def test_a_damaged_file_is_refused(self) -> None:
    """A file that was cut off is a FormatError, and so is what makes no sense.

    A bit that is flipped may go unnoticed where a format has no checksums, but
    nothing else than a `FormatError` is raised, at opening or at reading.
    """
    host = self.host()
    with suites.folder() as folder:
      file = self._file(folder, host)
      self._mixed(3).write(file, host=host)
      whole = file.read_bytes()
      for what, damaged, must in _damaged(whole):
        file.write_bytes(damaged)
        try:
          for leaf in open_checkpoint(file, host=host).values():
            leaf.load()
        except errors.FormatError:
          continue
        except Exception as error:
          raise Fault(
            f'{what}: expected a FormatError, found {type(error).__name__}: '
            f'{error}'
          ) from error
        if must:
          raise Fault(f'{what}: expected a FormatError, and it was read.')


def _damaged(whole: bytes) -> Iterator[tuple[str, bytes, bool]]:
  """Yields what was done to a file, its bytes, and whether that must show."""
  numbers = np.random.default_rng(0)
  size = len(whole)
  cuts = {0, 1, size - 1, *np.linspace(0, size - 1, _CUTS).astype(int).tolist()}
  for cut in sorted(cuts):
    yield f'cut off after {cut} of {size} bytes', whole[:cut], True
  for _ in range(_FLIPS):
    at, bit = int(numbers.integers(size)), int(numbers.integers(8))
    flipped = bytearray(whole)
    flipped[at] ^= 1 << bit
    yield f'bit {bit} of byte {at} flipped', bytes(flipped), False
  yield 'other bytes', numbers.bytes(size), True


def _failing(tree: Checkpoint, stop: BaseException) -> Checkpoint:
  """Returns a tree whose last tensor cannot be computed."""

  def load() -> Any:
    raise stop

  leaves = dict(tree)
  last = list(leaves)[-1]
  leaves[last] = leaves[last].replace(load=load)
  return tree.replace(leaves=leaves)


@contextlib.contextmanager
def _full(most: int) -> Iterator[None]:
  """Within it no file can grow beyond some bytes, as on a full disk."""
  try:
    import resource
  except ImportError:  # Not every system has it.
    yield
    return
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _listed(folder: pathlib.Path) -> dict[str, bytes]:
  return {file.name: file.read_bytes() for file in folder.iterdir()}


def _check_same(
  before: dict[str, bytes], folder: pathlib.Path, after: str
) -> None:
  """Raises a fault unless a folder is as it was."""
  now = _listed(folder)
  for name in sorted(before.keys() | now.keys()):
    if name not in now:
      raise Fault(f'after {after} the old file is gone.')
    if name not in before:
      raise Fault(f'after {after} a file is left: {name}.')
    if before[name] != now[name]:
      raise Fault(f'after {after} the old file is another one.')
