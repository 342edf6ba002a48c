"""The same tensor of several models, gone over block by block.

Nothing here depends on how the result is cut: sums are added up over pieces
that begin at the same elements each time, random numbers are a function of the
element's place, and the rest is element by element, or row by row. So a file,
params, one thread and four get the same bits.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from surgery import errors
from surgery.contract.method import Block, Cut, Method
from surgery.editing import nonfinite, rounding
from surgery.editing.nonfinite import NonFinite
from surgery.files.arrays import DTYPES
from surgery.files.digest import Digester
from surgery.host import foreign
from surgery.naming import paths
from surgery.naming.paths import Path

# So many elements are added up at a time; how sums round depends on it.
PIECE = 1 << 13
# So many pieces are computed at a time: few enough for a processor's cache to
# hold some arrays of them as float64, and for memory not to be asked for anew;
# many enough for threads not to wait for each other between two operations.
_TOGETHER = 4
# So many pieces are one thread's share, and so many shares are read at a time.
_SHARE = 64
_SHARES = 4
_WORD = 16  # Bits that are looked at in one pass of a selection.
# If no more numbers than that are left to choose from, they are kept.
_FEW = 1 << 20
# What a selection guesses by: so many samples of so many numbers, and of these
# the hundredth part on either side of where the threshold seems to be.
_SAMPLES = 64
_SAMPLED = 1 << 10
_MARGIN = 100

Flat = Callable[[int, int], np.ndarray]
Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Source:
  """One model's tensor.

  Attributes:
    model: the model, for messages.
    flat: returns elements `start` to `stop` in C order.
    wide: whether it is float64, so that float32 does not tell its values apart.
  """

  model: str
  flat: Flat
  wide: bool


class Uniform:
  """Random numbers by seed, path, model and place.

  Philox is a function of a key and a counter, so that any piece can be had
  without those before it (Salmon et al. 2011, "Parallel random numbers: as easy
  as 1, 2, 3").

  Args:
    seed: the seed.
    path: the tensor's path.
  """

  def __init__(self, seed: int, path: Path) -> None:
    self._seed, self._path = int(seed), path

  @functools.cache  # noqa: B019 - it lives as long as one tensor's work.
  def _key(self, model: int) -> int:
    digester = Digester()
    digester.update(repr((self._seed, self._path, model)).encode())
    return int(digester.digest().partition(':')[2], 16)

  def __call__(self, model: int, start: int, count: int) -> np.ndarray:
    """Returns `count` numbers of a model, from place `start` on."""
    # A counter gives four words of 64 bits, so eight numbers of 32 bits.
    first, offset = divmod(start, 8)
    stream = np.random.Philox(key=self._key(model), counter=first)
    words = stream.random_raw((offset + count + 1) // 2)
    halves = words.astype('<u8', copy=False).view('<u4')
    return halves[offset : offset + count] * 2.0**-32


class Tensor:
  """The same tensor of several models; see `surgery.contract.method.Whole`.

  Args:
    path: its path, for messages.
    shape: its shape.
    sources: the models' tensors.
    base: the base's, or None.
    rows: whether blocks are matrices of whole rows.
    uniform: random numbers, by model, start and count.
    finite: whether NaN and infinity are refused.
  """

  def __init__(
    self,
    path: Path,
    shape: tuple[int, ...],
    sources: Sequence[Source],
    base: Source | None,
    *,
    rows: bool,
    uniform: Callable[[int, int, int], np.ndarray],
    finite: bool,
  ) -> None:
    self.path = path
    self.shape = shape
    self.size = math.prod(shape)
    self.count = len(sources)
    self._row = (shape[-1] if shape else 1) if rows else None
    self._base = base
    # The models' tensors, and at last the base's, if there is one.
    self._every = (*sources, *([base] if base else []))
    self._uniform = uniform
    self._finite = finite
    self._kind = np.float64 if any(s.wide for s in self._every) else np.float32

  def __repr__(self) -> str:
    return f'<{paths.show(self.path)} {self.shape} of {self.count} models>'

  # Reading.

  @property
  def _piece(self) -> int:
    """Elements of a piece: a number of rows, where rows have to be whole."""
    if self._row is None:
      return PIECE
    return max(1, self._row) * max(1, PIECE // max(1, self._row))

  @property
  def _step(self) -> int:
    """Elements that are computed at a time."""
    return self._piece * _TOGETHER

  def _read(self, start: int, stop: int) -> list[np.ndarray]:
    """Returns elements of the models, and at last of the base, if there is."""
    return [source.flat(start, stop) for source in self._every]

  def _block(
    self, read: Sequence[np.ndarray], at: int, cut: slice, finite: bool
  ) -> Block:
    """Returns a piece of what was read.

    Args:
      read: what `_read` returned.
      at: how many elements lie before these.
      cut: the piece.
      finite: whether NaN and infinity are refused.
    """
    start = at + cut.start
    count = cut.stop - cut.start
    form = (count,) if self._row is None else (-1, max(1, self._row))
    wide = []
    for one, source in zip(read, self._every, strict=True):
      piece = one[cut]
      if finite and not _is_finite(piece):
        self._check(piece, source, start)
      # Of dtypes narrower than float32 numpy knows only this way.
      value = np.asarray(piece, np.float32) if piece.itemsize < 4 else piece
      wide.append(value.astype(np.float64).reshape(form))
    base = wide.pop() if self._base else None
    return self._of(tuple(wide), base, start)

  def _of(
    self,
    tensors: tuple[np.ndarray, ...],
    base: np.ndarray | None,
    start: int,
  ) -> Block:
    form, count = tensors[0].shape, tensors[0].size

    def uniform(model: int) -> np.ndarray:
      return self._uniform(model, start, count).reshape(form)

    return Block(tensors, base, start, uniform)

  def _pieces(self, block: Block) -> Iterator[Block]:
    """Yields the pieces of what was computed together."""
    row = 1 if self._row is None else max(1, self._row)
    rows = self._piece // row
    for first in range(0, len(block.tensors[0]), rows):
      cut = slice(first, first + rows)
      base = None if block.base is None else block.base[cut]
      tensors = tuple(one[cut] for one in block.tensors)
      yield self._of(tensors, base, block.start + first * row)

  def _check(self, value: np.ndarray, source: Source, start: int) -> None:
    """Raises for NaN and infinity.

    Raises:
      CastError: naming the model and the first such number.
    """
    value = np.asarray(value, np.float64)
    bad = ~np.isfinite(value)
    first = int(np.argmax(bad))
    index = np.unravel_index(start + first, self.shape)
    shown = [int(i) for i in index]
    raise errors.CastError(
      f'{paths.show(self.path)}: {source.model} has {value[first]} at index '
      f'{shown}, which would be mixed into the result. To combine it all the '
      'same, give nonfinite: allow.'
    )

  def each(
    self,
    function: Callable[[Block], Any],
    span: Span | None = None,
  ) -> Iterator[Any]:
    """Yields what a function returns for blocks, in their order.

    Args:
      function: is called by several threads.
      span: the first element and that behind the last; all by default.
    """

    def share(blocks: Iterator[Block]) -> list[Any]:
      return [function(one) for one in blocks]

    for found in self._shares(share, span):
      yield from found

  def _shares(
    self,
    function: Callable[[Iterator[Block]], Any],
    span: Span | None = None,
  ) -> Iterator[Any]:
    """Yields what a function returns for the pieces of each thread's share.

    Args:
      function: is given blocks in their order.
      span: as for `each`.
    """
    start, stop = (0, self.size) if span is None else span
    step = self._step
    share = step * _SHARE
    with concurrent.futures.ThreadPoolExecutor(workers()) as pool:
      for at in range(start, stop, share * _SHARES):
        end = min(at + share * _SHARES, stop)
        read = self._read(at, end)

        def one(first: int, read: Any = read, at: int = at) -> Any:
          last = min(first + share, len(read[0]))
          cuts = (
            slice(k, min(k + step, last)) for k in range(first, last, step)
          )
          with np.errstate(all='ignore'):
            return function(
              self._block(read, at, cut, self._finite) for cut in cuts
            )

        starts = range(0, end - at, share)
        if len(starts) == 1:
          yield one(0)
        else:
          yield from pool.map(one, starts)
    if span is None:
      # All has been looked at, so the next pass need not.
      self._finite = False

  # What methods ask for.

  def total(self, measure: Callable[[Block], Any]) -> Any:
    """See `Whole.total`."""

    def share(blocks: Iterator[Block]) -> list[Any]:
      return [measure(one) for block in blocks for one in self._pieces(block)]

    result: Any = None
    for parts in self._shares(share):
      for part in parts:
        result = np.asarray(part) if result is None else result + part
    return result

  def largest(
    self,
    values: Callable[[Block], Sequence[np.ndarray]],
    counts: Sequence[Sequence[int]],
  ) -> list[list[Cut]]:
    """See `Whole.largest`: a radix selection over the bits of the numbers.

    Numbers that are 0 or larger have the order of their bits. A pass counts how
    often each value of the next 16 bits occurs among the numbers that begin
    with the bits found so far. Once these are few the next pass keeps them.

    Before, a sample tells between which numbers a threshold most likely lies.
    Those in between are few, too; a pass that keeps them and counts what is
    larger sees whether it is so. Then it was the only one.
    """
    kind = self._kind
    search = [[_Search(n, self.size, kind) for n in some] for some in counts]
    every = [one for some in search for one in some]
    if sum(one.left for one in every) > _FEW:
      self._kept(values, self._guessed(values, search))
    while any(one.is_open for one in every):
      if sum(one.left for one in every) <= _FEW:
        self._kept(
          values,
          [
            _Range(k, one, *one.ends, guessed=False)
            for k, some in enumerate(search)
            for one in some
            if one.is_open
          ],
        )
        break
      found = self._counted(values, search)
      for some, tables in zip(search, found, strict=True):
        for one in some:
          if one.is_open:
            one.narrow(tables[one.prefix])
    if any(one.is_shared for one in every):
      self._place(values, search)
    return [[one.cut() for one in some] for some in search]

  def _counted(
    self,
    values: Callable[[Block], Sequence[np.ndarray]],
    search: Sequence[Sequence[_Search]],
  ) -> list[dict[int, np.ndarray]]:
    """Returns for each array how often words follow each open prefix."""
    wanted = [{s.prefix: s.shift for s in some if s.is_open} for some in search]

    def measure(blocks: Iterator[Block]) -> list[dict[int, np.ndarray]]:
      words: list[dict[int, list[np.ndarray]]]
      words = [{p: [] for p in some} for some in wanted]
      for block in blocks:
        for array, some, own in zip(values(block), wanted, words, strict=True):
          bits = _bits(array, self._kind) if some else None
          for prefix, shift in some.items():
            own[prefix].append(_words(bits, prefix, shift))
      # A table is longer than a piece, so it is made for many of them.
      return [{p: _table(found) for p, found in own.items()} for own in words]

    total: list[dict[int, np.ndarray]] = [{} for _ in search]
    for part in self._shares(measure):
      for sums, tables in zip(total, part, strict=True):
        for prefix, table in tables.items():
          if prefix in sums:
            sums[prefix] += table
          else:
            sums[prefix] = table
    return total

  def _guessed(
    self,
    values: Callable[[Block], Sequence[np.ndarray]],
    search: Sequence[Sequence[_Search]],
  ) -> list[_Range]:
    """Returns between which numbers the thresholds lie by a sample.

    Empty, where that would be too many numbers to keep.
    """
    row = self._row or 1
    length = min(-(-_SAMPLED // row) * row, self.size)
    if length > 2 * _SAMPLED:
      return []  # Of long rows a sample would be most of the tensor.
    parts: list[list[np.ndarray]] = [[] for _ in search]
    last = (self.size - length) // row
    for k in range(_SAMPLES):
      start = last * k // (_SAMPLES - 1) * row
      read = self._read(start, start + length)
      with np.errstate(all='ignore'):
        # The pass itself says what is not finite, and where first.
        block = self._block(read, start, slice(0, length), finite=False)
        for own, array in zip(parts, values(block), strict=True):
          own.append(_bits(array, self._kind))
    ranges, few = [], 0.0
    for number, some in enumerate(search):
      sample = np.sort(np.concatenate(parts[number]))
      for one in some:
        if one.is_open:
          low, high, share = one.between(sample)
          ranges.append(_Range(number, one, low, high, guessed=True))
          few += share * self.size
    return ranges if few <= _FEW else []

  def _kept(
    self,
    values: Callable[[Block], Sequence[np.ndarray]],
    ranges: Sequence[_Range],
  ) -> None:
    """Ends searches among the numbers in a range, where they end there."""
    if not ranges:
      return

    def look(block: Block) -> list[tuple[np.ndarray, np.ndarray, int]]:
      arrays = values(block)
      found = []
      for one in ranges:
        bits = _bits(arrays[one.number], self._kind)
        kind = bits.dtype.type
        above = 0
        if one.guessed:
          above = int(np.count_nonzero(bits > kind(one.high)))
        meant = (bits >= kind(one.low)) & (bits <= kind(one.high))
        places = np.flatnonzero(meant)
        found.append((bits[places], places + block.start, above))
      return found

    parts, count = [], 0
    for part in self.each(look):
      count += sum(len(bits) for bits, _, _ in part)
      if count > 4 * _FEW:
        return  # The sample was none of the whole.
      parts.append(part)
    for number, one in enumerate(ranges):
      bits, places, above = zip(*(p[number] for p in parts), strict=True)
      one.search.choose(
        np.concatenate(bits), np.concatenate(places), sum(above)
      )

  def _place(
    self,
    values: Callable[[Block], Sequence[np.ndarray]],
    search: Sequence[Sequence[_Search]],
  ) -> None:
    """Finds up to which place numbers that equal the smallest are taken."""
    flat = [(k, s) for k, some in enumerate(search) for s in some]

    def equal(block: Block, number: int, one: _Search) -> np.ndarray:
      array = values(block)[number]
      found = _bits(array, self._kind) == one.prefix
      return np.flatnonzero(found)

    def count(block: Block) -> tuple[int, list[int]]:
      arrays = [_bits(a, self._kind) for a in values(block)]
      return block.start, [
        int(np.count_nonzero(arrays[k] == s.prefix)) if s.is_shared else 0
        for k, s in flat
      ]

    left = [s.wanted for _, s in flat]
    where: dict[int, int] = {}  # In which piece the last one lies.
    for start, found in self.each(count):
      for number, n in enumerate(found):
        if flat[number][1].is_shared and number not in where:
          if n >= left[number]:
            where[number] = start
          else:
            left[number] -= n
    for number, start in where.items():
      k, one = flat[number]
      span = (start, min(start + self._step, self.size))
      look = functools.partial(equal, number=k, one=one)
      [places] = self.each(look, span)
      one.last = start + int(places[left[number] - 1])


def _is_finite(array: np.ndarray) -> bool:
  """Whether all numbers of an array are finite."""
  return math.isfinite(rounding.magnitude(array))


def workers() -> int:
  """Returns how many threads compute: one a core, and no more than eight."""
  known = getattr(os, 'sched_getaffinity', None)
  cores = len(known(0)) if known else os.cpu_count() or 1
  return max(1, min(8, cores))


def _bits(array: np.ndarray, kind: Any) -> np.ndarray:
  """Returns numbers that are 0 or larger as integers of the same order."""
  wide = np.ascontiguousarray(array, kind).reshape(-1)
  # A negative zero would be the largest.
  bits: np.ndarray = wide.view(f'u{wide.itemsize}')
  return bits & bits.dtype.type((1 << (8 * wide.itemsize - 1)) - 1)


def _words(bits: Any, prefix: int, shift: int) -> np.ndarray:
  """Returns the words that follow a prefix.

  Args:
    bits: the numbers' bits.
    prefix: the bits in front of the word.
    shift: number of bits behind the word.
  """
  whole = 8 * bits.itemsize
  if shift + _WORD < whole:
    bits = bits[(bits >> bits.dtype.type(shift + _WORD)) == prefix]
  # What is cut off in front is the prefix.
  found: np.ndarray = (bits >> bits.dtype.type(shift)).astype(np.uint16)
  return found


def _table(words: Sequence[np.ndarray]) -> np.ndarray:
  """Returns how often each word occurs."""
  every = np.concatenate(words)
  return np.bincount(every.astype(np.intp), minlength=1 << _WORD)


class _Search:
  """The search for the smallest of so many largest numbers.

  Args:
    wanted: how many.
    size: of how many.
    kind: dtype as which they are compared.
  """

  def __init__(self, wanted: int, size: int, kind: Any) -> None:
    self.kind = np.dtype(kind)
    self.prefix = 0
    self.shift = 8 * self.kind.itemsize - _WORD
    self.every = wanted >= size
    self.wanted = max(0, wanted)
    self.last: int | None = None
    # How many numbers begin with the bits that were found.
    self._equal = size

  @property
  def is_open(self) -> bool:
    """Whether bits are still to be found."""
    return self.shift >= 0 and not self.every and self.wanted > 0

  @property
  def left(self) -> int:
    """Among how many numbers it still has to choose."""
    return self._equal if self.is_open else 0

  @property
  def is_shared(self) -> bool:
    """Whether only some of the numbers that equal the smallest are meant.

    Which these are is not known yet.
    """
    some = not self.every and 0 < self.wanted < self._equal
    return some and self.last is None

  @property
  def ends(self) -> Span:
    """The least and the greatest bits that begin with those found."""
    free = self.shift + _WORD
    return self.prefix << free, (self.prefix + 1 << free) - 1

  def between(self, sample: np.ndarray) -> tuple[int, int, float]:
    """Returns between which bits the threshold should lie, of which share.

    Args:
      sample: bits of some numbers, sorted.
    """
    count = len(sample)
    at = count - self.wanted * count // self._equal
    margin = count // _MARGIN + 1
    low, high = self.ends
    if at >= margin:
      low = int(sample[at - margin])
    if at + margin < count:
      high = int(sample[at + margin])
    first = np.searchsorted(sample, sample.dtype.type(low), 'left')
    last = np.searchsorted(sample, sample.dtype.type(high), 'right')
    return low, high, float(last - first) / count

  def choose(self, bits: np.ndarray, places: np.ndarray, above: int) -> None:
    """Ends the search, given the numbers in a range, unless it ends elsewhere.

    Args:
      bits: their bits.
      places: their places, in order.
      above: how many numbers are larger.
    """
    wanted = self.wanted - above
    if not 0 < wanted <= len(bits):
      return
    at = len(bits) - wanted
    smallest = np.partition(bits, at)[at]
    self.wanted = wanted - int(np.count_nonzero(bits > smallest))
    equal = places[bits == smallest]
    self.prefix, self.shift = int(smallest), -1
    self._equal = len(equal)
    if self.wanted < len(equal):
      self.last = int(equal[self.wanted - 1])

  def narrow(self, table: np.ndarray) -> None:
    """Takes the next word, given how often each occurs."""
    # How many there are of a word and of all larger ones.
    above = np.cumsum(table[::-1])
    place = int(np.searchsorted(above, self.wanted))
    word = len(table) - 1 - place
    self.wanted -= int(above[place] - table[word])
    self._equal = int(table[word])
    self.prefix = (self.prefix << _WORD) | word
    self.shift -= _WORD

  def cut(self) -> Cut:
    """Returns what was found."""
    if self.every:
      return _Cut(0.0, None, self.kind, True)
    if not self.wanted:
      return _Cut(math.inf, None, self.kind, False)
    code = np.array(self.prefix, f'u{self.kind.itemsize}')
    return _Cut(float(code.view(self.kind)), self.last, self.kind, None)


@dataclasses.dataclass(frozen=True)
class _Range:
  """Where a search looks for its end.

  Attributes:
    number: of the array.
    search: the search.
    low: the least bits of a number that is looked at.
    high: the greatest.
    guessed: whether numbers above it are still to be counted, and the end may
      lie elsewhere.
  """

  number: int
  search: _Search
  low: int
  high: int
  guessed: bool


@dataclasses.dataclass(frozen=True)
class _Cut:
  """See `surgery.contract.method.Cut`.

  Attributes:
    value: the smallest number that is meant.
    last: the place of the last that equals it and is meant; None for all.
    kind: dtype as which numbers are compared.
    all_or_none: whether all numbers are meant, or none; else None.
  """

  value: float
  last: int | None
  kind: np.dtype[Any]
  all_or_none: bool | None

  def mask(self, values: np.ndarray, start: int) -> np.ndarray:
    """See `Cut.mask`."""
    if self.all_or_none is not None:
      return np.full(values.shape, self.all_or_none)
    near = values.astype(self.kind, copy=False)
    found: np.ndarray = near >= self.kind.type(self.value)
    if self.last is None:
      return found
    behind = self.last + 1 - start
    if behind < values.size:
      tail = slice(max(0, behind), None)
      flat = found.reshape(-1)
      flat[tail] = near.reshape(-1)[tail] > self.kind.type(self.value)
    return found


class Combined:
  """What a method makes of a tensor, block by block.

  Args:
    method: the method, with the options that hold for the tensor.
    tensor: the tensor.
    dtype: full name of the dtype of the result.
    nonfinite: whether NaN and infinity may be in it.
    owner: whose method it is, for messages.
  """

  def __init__(
    self,
    method: Method,
    tensor: Tensor,
    dtype: str,
    nonfinite: NonFinite = 'refuse',
    owner: str = '',
  ) -> None:
    self.method, self.tensor = method, tensor
    self._dtype, self._nonfinite, self._owner = dtype, nonfinite, owner
    self._prepared: list[Any] = []
    self._held: tuple[Span, np.ndarray] | None = None

  def _whole(self) -> Any:
    """Returns what the method knows of the whole tensor."""
    if not self._prepared:
      with np.errstate(all='ignore'), self._called():
        self._prepared.append(self.method.prepare(self.tensor))
    return self._prepared[0]

  def _called(self) -> contextlib.AbstractContextManager[Any]:
    """Says of a failure of a plugin's method whose it is."""
    if not self._owner:
      return contextlib.nullcontext()
    where = paths.show(self.tensor.path)
    return foreign.code(f'{where}: method {self.method.name!r}{self._owner}')

  def span(self, start: int, stop: int) -> np.ndarray:
    """Returns elements of the result in C order, rounded once."""
    first, last = self._rows(start, stop)
    if self._held is not None and self._held[0] == (first, last):
      values = self._held[1]
    else:
      values = self._computed(first, last)
      longer = last - first > stop - start
      # A row that is longer than a block is asked for several times.
      self._held = ((first, last), values) if longer else None
    return values[start - first : stop - first]

  def _rows(self, start: int, stop: int) -> Span:
    if not self.method.rows or not self.tensor.shape:
      return start, stop
    row = max(1, self.tensor.shape[-1])
    return start // row * row, -(-stop // row) * row

  def _computed(self, start: int, stop: int) -> np.ndarray:
    prepared = self._whole()
    result = np.empty(stop - start, DTYPES[self._dtype])

    def one(block: Block) -> None:
      with self._called():
        value = self.method.combine(block, prepared)
      flat = self._checked(value, block)
      at = block.start - start
      result[at : at + flat.size] = self._rounded(flat, block.start)

    for _ in self.tensor.each(one, (start, stop)):
      pass
    return result

  def _checked(self, value: Any, block: Block) -> np.ndarray:
    """Returns what a method made, in C order.

    Raises:
      PluginError: if it is not what the contract says.
    """
    shape = block.tensors[0].shape
    found = np.asarray(value)
    if found.shape != shape or found.dtype.name not in ('float32', 'float64'):
      raise errors.PluginError(
        f'{paths.show(self.tensor.path)}: method {self.method.name!r}'
        f'{self._owner}: combine returned {found.dtype}{list(found.shape)} for '
        f'a block of {list(shape)}; expected float32 or float64 of that shape.'
      )
    return found.reshape(-1)

  def _rounded(self, flat: np.ndarray, start: int) -> np.ndarray:
    """Returns numbers in the dtype of the result.

    Raises:
      CastError: for what is not finite in it.
    """
    after = rounding.rounded(flat, self._dtype)
    if self._nonfinite == 'refuse' and not _is_finite(after):
      shape = self.tensor.shape
      bad = ~np.isfinite(np.asarray(after, np.float64))
      if bad.any():
        first = int(np.argmax(bad))
        index = np.unravel_index(start + first, shape)
        one = (1,) * len(shape)
        nonfinite.checked(
          flat[first].reshape(one),
          after[first].reshape(one),
          self.tensor.path,
          'combine',
          start=[int(i) for i in index],
        )
    return after
