"""A checkpoint: an ordered mapping from path to a lazy leaf, and a manifest.

A file is a checkpoint that has not been read yet, `bx.Params` one that is in
memory. Passes are functions from a checkpoint to a checkpoint; they compose
leaves lazily, and a writer asks for one leaf at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import inspect
import math
import os
import pathlib
import warnings
from collections.abc import (
  Callable,
  ItemsView,
  Iterator,
  Mapping,
  ValuesView,
)
from typing import Any

from surgery import errors, expect
from surgery.host import foreign, location
from surgery.host.manager import Host, default_host
from surgery.model import manifest, quantised, sizes
from surgery.model.grid import Index, grid
from surgery.model.records import Records
from surgery.model.vocabulary import Vocabulary
from surgery.naming import paths
from surgery.naming.paths import Path


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One parameter or tensor, which may not have been read yet.

  Attributes:
    load: returns the value: an array (numpy from a file, JAX in memory), or
      the data of a PRNG key (uint32) where `key` is set.
    shape: its shape; None if the value is not an array (a Python scalar, None,
      an empty dict, or in memory any pytree).
    dtype: name of its dtype, or None.
    trainable: whether it trains.
    metadata: the parameter's metadata.
    key: PRNG implementation, if the value is a key's data.
    digest: digest of the bytes, where it is known.
    scalar: whether a file holds it as a numpy scalar, not a 0-d array.
    source: what a format keeps to copy the bytes unread; None if computed.
    part: returns a part, `part(index)` being `load()[index]` without the rest;
      the index is one of `grid(shape)`. None if it comes in one piece only.
    region: returns any region, for each axis a slice whose bounds are numbers,
      computed from no more of other tensors than it needs; None if only the
      blocks of `part` can be.
    scattered: whether a block of it is made of elements that lie far apart in
      what it is computed from, as of a transposed matrix.
    memory: bytes of memory that computing it takes, where its blocks do not
      determine it.
    heavy: whether computing it takes far longer than reading it, as products
      and decompositions do.
    codes: the quantised weight that it is a part of, if it is one; its values
      are not numbers then.
    fresh: whether it is made anew, as first weights are, so that params put it
      on the device of the parameter that it belongs to.
    beneath: what is stored, where `load` returns what the layer gets instead;
      see `surgery.adapting.beneath`.
    base: whether it is known that training has not changed it since an adapter
      was attached. What passes compute from it is the base then.
    was: the path under which it was read, where the configuration that is
      written needs it. What is computed from this tensor alone keeps it.
  """

  load: Callable[[], Any]
  shape: tuple[int, ...] | None = None
  dtype: str | None = None
  trainable: bool = True
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  key: str | None = None
  digest: str | None = None
  scalar: bool = False
  source: Any = dataclasses.field(default=None, compare=False, repr=False)
  part: Callable[[Index], Any] | None = dataclasses.field(
    default=None, compare=False, repr=False
  )
  region: Callable[[Index], Any] | None = dataclasses.field(
    default=None, compare=False, repr=False
  )
  scattered: bool = dataclasses.field(default=False, compare=False)
  memory: int | None = dataclasses.field(default=None, compare=False)
  heavy: bool = dataclasses.field(default=False, compare=False)
  codes: quantised.Codes | None = dataclasses.field(default=None, compare=False)
  fresh: bool = dataclasses.field(default=False, compare=False)
  beneath: Beneath | None = dataclasses.field(
    default=None, compare=False, repr=False
  )
  base: bool = dataclasses.field(default=False, compare=False)
  was: Path | None = dataclasses.field(default=None, compare=False, repr=False)

  def replace(self, **changes: Any) -> Leaf:
    """Returns a leaf with some attributes changed.

    A new `load` resets what described the old value (`part`, `region`,
    `source`, `digest`, `beneath` and `scattered`) unless it is given, too.

    Raises:
      QuantisedError: if another `load` is given for a part of a quantised
        weight, and `codes` is not: numbers cannot be computed from codes.
    """
    if 'load' in changes:
      if 'codes' not in changes:
        quantised.refuse(self)
      gone = ('part', 'region', 'source', 'digest', 'beneath')
      changes = {**dict.fromkeys(gone), 'scattered': False, **changes}
    return self.with_fields(**changes)

  def with_fields(self, **changes: Any) -> Leaf:
    """Returns a leaf with fields changed, without the checks of `replace`.

    Raises:
      TypeError: for an unknown field.
    """
    if unknown := changes.keys() - self.__dict__.keys():
      raise TypeError(f'Leaf has no field {min(unknown)!r}.')
    # `dataclasses.replace` takes ten times as long, and models have many.
    made = object.__new__(type(self))
    made.__dict__.update(self.__dict__, **changes)
    return made

  def __copy__(self) -> Leaf:
    return self

  def __deepcopy__(self, memo: Any) -> Leaf:
    return self

  def __reduce__(self) -> Any:
    raise TypeError(_UNPICKLED.format('Leaf'))

  def mismatch(self, value: Any, index: Index = ()) -> str | None:
    """Returns how a value differs from what this leaf declares, or None.

    Plans and headers are made from what leaves declare, so it must hold for
    files and for params.

    Args:
      value: what `load`, or `part` for the index, returned.
      index: the block; the whole by default.
    """
    if self.shape is None:
      return None
    shape, dtype = getattr(value, 'shape', None), getattr(value, 'dtype', None)
    cuts = tuple(cut.stop - cut.start for cut in index)
    expected = (*cuts, *self.shape[len(index) :])
    if shape is None or dtype is None:
      wanted = self.with_fields(shape=expected)
      return f'expected {wanted}, found a value of type {type(value).__name__}.'
    names = sizes.names_of(dtype)
    if tuple(shape) != expected or self.dtype not in names:
      wanted = self.with_fields(shape=expected)
      found = Leaf(self.load, tuple(shape), names[0])
      return f'expected {wanted}, found {found}.'
    return None

  def parts(self) -> Iterator[Any]:
    """Yields an array's values in the blocks of `grid`, or as a whole."""
    if self.shape is None or self.part is None:
      yield self.load()
      return
    for index in grid(self.shape):
      yield self.part(index)

  @property
  def size(self) -> int:
    """Number of elements; 0 if it is not an array."""
    return 0 if self.shape is None else math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """Number of bytes as stored; 0 if it is not an array."""
    return 0 if self.dtype is None else sizes.nbytes(self.dtype, self.size)

  def __str__(self) -> str:
    if self.shape is None:
      return 'value'
    return f'{self.dtype}[{",".join(map(str, self.shape))}]'


_UNPICKLED = (
  'a surgery.{} cannot be pickled: it reads or computes its tensors lazily. '
  'Pass the path of its file and open it there (surgery.open), or write it to '
  'a file first (Checkpoint.write).'
)


@dataclasses.dataclass(frozen=True)
class Beneath:
  """The stored value of a parameter that adapters rewrite.

  Attributes:
    path: the parameter.
    leaf: what is stored.
    model: an object that identifies the model, since another one may have the
      same path and the same adapter.
  """

  path: Path
  leaf: Leaf
  model: object


_NOTHING = manifest.Manifest()


@dataclasses.dataclass(frozen=True)
class Check:
  """An assertion about values, checked before anything is written.

  Attributes:
    text: the assertion, for plans.
    run: raises `CheckError` if it fails.
  """

  text: str
  run: Callable[[], None] = dataclasses.field(compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Finding:
  """A count that a pass makes while it computes a tensor.

  Attributes:
    path: the tensor's path in the pass.
    what: what is counted, e.g. `underflow`.
    count: returns the number of elements counted and the number of all, once
      the tensor was computed.
    text: what the count means, for people: `became zero in float8_e4m3fn`.
  """

  path: Path
  what: str
  count: Callable[[], tuple[int, int]] = dataclasses.field(
    compare=False, repr=False
  )
  text: str


@dataclasses.dataclass(frozen=True)
class LeftOut:
  """A layer that a selector matched and an adapter leaves as it is.

  Attributes:
    path: path of the layer.
    adapter: name of the adapter.
    reason: why its type cannot serve it, without a full stop.
    named: whether the selector names it by more than a wildcard.
  """

  path: Path
  adapter: str
  reason: str
  named: bool

  def to_json(self) -> dict[str, str]:
    """Returns the entry of a plan in JSON."""
    return {
      'path': paths.show(self.path),
      'adapter': self.adapter,
      'why': self.reason,
    }


class Checkpoint(Mapping[Path, Leaf]):
  """Leaves by path, in order, and what is known beside them.

  Args:
    leaves: leaves by path.
    manifest: what is known beside the leaves.
    records: adapters, where they have been resolved already.
    origin: where it came from, for error messages.
    checks: assertions that are checked before it is written.
    seen: the `Beneath.model` of its leaves, if they are as layers get them.
    findings: counts that are made while it is written.
    left_out: layers that a selector matched and no adapter serves.
    remarks: assumptions of passes, for plans, a sentence each.
    vocabulary: its tokens, where a pass gave its rows another order.

  Example:
    ckpt = surgery.open('m.msgpack')
    for path, leaf in ckpt.items():
      print(path, leaf.shape, leaf.dtype)
    ckpt.write('copy.msgpack')
  """

  def __init__(
    self,
    leaves: Mapping[Path, Leaf],
    manifest: manifest.Manifest = _NOTHING,
    records: Records | None = None,
    origin: str = '',
    checks: tuple[Check, ...] = (),
    seen: object | None = None,
    findings: tuple[Finding, ...] = (),
    left_out: tuple[LeftOut, ...] = (),
    remarks: tuple[str, ...] = (),
    vocabulary: Vocabulary | None = None,
  ) -> None:
    self._leaves = dict(leaves)
    self.manifest = manifest
    self._records = records
    self.origin = origin
    self.checks = checks
    self.seen = seen
    self.findings = findings
    self.left_out = left_out
    self.remarks = remarks
    self.vocabulary = vocabulary

  def __getitem__(self, path: Path) -> Leaf:
    try:
      return self._leaves[path]
    except KeyError:
      raise KeyError(
        f'{paths.show(path)} is not in {self.origin or "the checkpoint"}.'
      ) from None

  def __contains__(self, path: object) -> bool:
    return path in self._leaves

  def __iter__(self) -> Iterator[Path]:
    return iter(self._leaves)

  def __len__(self) -> int:
    return len(self._leaves)

  # The views of the dict itself, which look up no path again.

  def items(self) -> ItemsView[Path, Leaf]:
    """Returns paths and leaves."""
    return self._leaves.items()

  def values(self) -> ValuesView[Leaf]:
    """Returns the leaves."""
    return self._leaves.values()

  def __copy__(self) -> Checkpoint:
    return self

  def __deepcopy__(self, memo: Any) -> Checkpoint:
    return self

  def __reduce__(self) -> Any:
    raise TypeError(_UNPICKLED.format('Checkpoint'))

  def __repr__(self) -> str:
    size = sum(leaf.nbytes for leaf in self._leaves.values())
    name = f'{self.origin}: ' if self.origin else ''
    return f'Checkpoint({name}{len(self)} tensors, {size:,} bytes)'

  def replace(
    self,
    *,
    leaves: Mapping[Path, Leaf] | None = None,
    manifest: manifest.Manifest | None = None,
    records: Records | None = None,
    checks: tuple[Check, ...] | None = None,
    seen: object | None = None,
    findings: tuple[Finding, ...] | None = None,
    left_out: tuple[LeftOut, ...] | None = None,
    remarks: tuple[str, ...] | None = None,
    vocabulary: Vocabulary | None = None,
  ) -> Checkpoint:
    """Returns a checkpoint with some parts changed."""
    return Checkpoint(
      self._leaves if leaves is None else leaves,
      self.manifest if manifest is None else manifest,
      self._records if records is None else records,
      self.origin,
      self.checks if checks is None else checks,
      self.seen if seen is None else seen,
      self.findings if findings is None else findings,
      self.left_out if left_out is None else left_out,
      self.remarks if remarks is None else remarks,
      self.vocabulary if vocabulary is None else vocabulary,
    )

  def check(self) -> None:
    """Runs all assertions, which read the tensors that they are about.

    Raises:
      CheckError: for the first that fails.
    """
    for one in self.checks:
      one.run()

  def records(self, host: Host) -> Records:
    """Returns the adapters, with their types from `host`.

    Raises:
      UnknownAdapterType: if a type is not installed; the error names the
        distribution that it came from when the file was written.
    """
    from surgery.model import record_json

    if self._records is None:
      file = (
        errors.within(self.origin) if self.origin else contextlib.nullcontext()
      )
      with file:
        self._records = record_json.from_json(self.manifest.adapters, host)
    return self._records

  @property
  def known_records(self) -> Records | None:
    """The adapters, if their types have been looked up already."""
    return self._records

  def resolved(self, host: Host) -> manifest.Manifest:
    """Returns the manifest with the current adapters, for writing."""
    from surgery.model import record_json

    if self._records is None:
      return self.manifest
    return self.manifest.replace(
      adapters=record_json.to_json(self._records, host, self.manifest.adapters)
    )

  def stored(
    self, host: Host, verb: str, seen: object | None = None
  ) -> Checkpoint:
    """Returns the checkpoint with the values beneath adapters restored.

    Steps get parameters as layers get them. A parameter that a step did not
    touch is stored as it was; a copy is stored as the layer got it.

    Args:
      host: knows the adapters' types.
      verb: the step, for messages.
      seen: the `Beneath.model` of what the step was given; by default that of
        this checkpoint.

    Raises:
      AdapterError: if the step changed a parameter that an adapter rewrites,
        since the adapter would rewrite the result once more.
    """
    leaves = dict(self._leaves)
    answered = self.records(host).answered
    origin = self.seen if seen is None else seen
    for path, leaf in self._leaves.items():
      one = leaf.beneath
      # Untouched means: the same parameter, at its place, of this model.
      if path in answered and (
        one is None or one.path != path or one.model is not origin
      ):
        names = ' and '.join(map(repr, answered[path]))
        raise errors.AdapterError(
          f'{paths.show(path)} is rewritten by adapter {names}, which '
          f'cannot follow. Merge or detach {names} first, or select other '
          'tensors.'
        )
      if path in answered and one is not None:
        leaves[path] = one.leaf.replace(
          trainable=leaf.trainable, metadata=leaf.metadata
        )
      elif one is not None:
        leaves[path] = leaf.replace(beneath=None)
    return Checkpoint(
      leaves,
      self.manifest,
      self._records,
      self.origin,
      self.checks,
      vocabulary=self.vocabulary,
    )

  @property
  def shows_layers(self) -> bool:
    """Whether some leaves are as layers get them, not as they are stored."""
    return any(leaf.beneath is not None for leaf in self._leaves.values())

  def notes(self) -> dict[Path, manifest.LeafNote]:
    """Returns the manifest's note of each leaf."""
    named = quantised.found(self._leaves, self.manifest.metadata)
    # Without adapters no tensor is the base of one.
    known = self._records
    adapted = bool(self.manifest.adapters if known is None else known.adapters)
    return {
      path: manifest.LeafNote(
        leaf.trainable,
        leaf.metadata,
        leaf.key,
        leaf.digest,
        # Codes that follow from names are found again when it is opened, so
        # that an unchanged copy of a file has the same bytes.
        None if leaf.codes == named.get(path) else leaf.codes,
        leaf.base and adapted,
      )
      for path, leaf in self._leaves.items()
    }

  def write(
    self,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    format: str | None = None,
    host: Host | None = None,
    manifest: bool = True,
    shard_size: int | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
  ) -> None:
    """Writes the checkpoint to a file or a set of files, whole or not at all.

    Args:
      path: the file, whose suffix determines the format.
      overwrite: whether an existing file may be replaced. The index of a set
        never is.
      format: name of the format, where the suffix does not tell it.
      host: whose formats are known.
      manifest: whether flags, metadata, adapters and so on are written too.
      shard_size: most bytes a file. With it, `out.msgpack` becomes
        `out-00001-of-00003.msgpack` and so on, and `out.msgpack.index.json`.
        A larger tensor has a file of its own.
      metadata: metadata for other programs, text by text, e.g.
        `{'format': 'pt'}`; added to what the file had.
      progress: called with the numbers of tensors and bytes that were written
        since the last call.

    Raises:
      FormatError: if the checkpoint cannot be written in that format.
      CheckError: if an assertion of a pass fails.
      FileExistsError: if the file exists and `overwrite` is False.
      OSError: if it cannot be written: no such folder, a full disk, …
    """
    from surgery.host import location

    host = host or default_host()
    target = pathlib.Path(os.fsdecode(path))
    if target.is_dir() and not host.writes_folder(target, format):
      raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if location.is_index(target):
      raise errors.FormatError(
        f'{target}: an index is written with the files that it names. Write '
        f'to {target.name[: -len(location.INDEX)]} with a shard_size.'
      )
    form = host.format_of(target, format)
    # A format of a plugin's may take fewer options, so only those are passed
    # that ask for something.
    asked: dict[str, Any] = {
      'manifest': None if manifest else False,
      'shard_size': shard_size,
      'progress': progress,
    }
    options = {k: v for k, v in asked.items() if v is not None}
    if 'host' in inspect.signature(form.write).parameters:
      options['host'] = host  # It writes files that types of adapters define.
    whole = self.stored(host, 'write') if self.shows_layers else self
    known = whole.resolved(host)
    known = known.replace(metadata={**known.metadata, **(metadata or {})})
    whole = whole.replace(manifest=known)
    taken = _taken(form, path, options)
    # All that can be refused without computing has been refused by now.
    self.check()
    _of_format(form, host, 'write', whole, path, overwrite=overwrite, **taken)


def _taken(
  form: Any, path: str | os.PathLike[str], options: dict[str, Any]
) -> dict[str, Any]:
  """Returns the options that a format's `write` takes.

  Raises:
    FormatError: if it lacks an option that decides what is written.
  """
  parameters = inspect.signature(form.write).parameters
  if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
    return options
  for name, what in (
    ('shard_size', 'in several files (shard_size)'),
    ('manifest', 'without a manifest'),
  ):
    if name in options and name not in parameters:
      raise errors.FormatError(
        f'{os.fsdecode(path)}: the format {type(form).__name__!r} cannot be '
        f'written {what}. Leave that out, or write another format.'
      )
  # A format without progress still writes the same file.
  return {name: options[name] for name in options if name in parameters}


def _of_format(
  form: Any, host: Host, method: str, /, *args: Any, **options: Any
) -> Any:
  """Calls a method of a format; an error of a plugin's names the plugin."""
  called = host.format_called(form)
  run = getattr(form, method)
  if ' of ' not in called:
    return run(*args, **options)
  # Errors of the system are passed on: they name the file, and callers expect
  # them, as FileExistsError.
  with foreign.code(f'{method} of {called}', (OSError,)):
    return run(*args, **options)


def open_checkpoint(
  path: str | os.PathLike[str],
  *,
  format: str | None = None,
  host: Host | None = None,
) -> Checkpoint:
  """Opens a saved model without reading its tensors.

  Args:
    path: the file, whose suffix tells the format; or the index of a set of
      files; or a folder that holds exactly one of these.
    format: name of the format, where the suffix does not tell it.
    host: whose formats are known.

  Returns:
    A checkpoint whose leaves are read lazily. A file of a set that is opened
    alone makes a `ShardWarning`.

  Raises:
    FormatError: if it is malformed, with path and offset.
    FileNotFoundError: if there is no such file.
  """
  expect.path(path, open_checkpoint)
  host = host or default_host()
  where = pathlib.Path(os.fsdecode(path))
  if not where.exists():
    # Before the suffix is checked, since a misspelt name may have any.
    raise FileNotFoundError(
      errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(path)
    )
  form, found = host.located(path, format)
  opened = _of_format(form, host, 'open', found)
  if not isinstance(opened, Checkpoint):
    raise errors.PluginError(
      f'{found}: open of {host.format_called(form)} returned '
      f'{type(opened).__name__}, expected a surgery.Checkpoint.'
    )
  _warn_of_part(pathlib.Path(os.fsdecode(found)))
  config = quantised.config_of(pathlib.Path(os.fsdecode(found)))
  return quantised.marked(opened, config)


def _warn_of_part(path: pathlib.Path) -> None:
  """Warns if a file is only a part of a model, by its name or an index."""
  set_of = location.part_of(path)
  if set_of is not None:
    warnings.warn(
      f'{path}: opened alone, and {set_of}: the tensors of the other files are '
      'missing, and so is the manifest, which lies in the index.',
      errors.ShardWarning,
      stacklevel=3,
    )


def nested(leaves: Mapping[Path, Any]) -> dict[str, Any]:
  """Returns the leaves as nested dicts.

  Raises:
    FormatError: if a path is a leaf and a prefix of another, or is empty.
  """
  tree: dict[str, Any] = {}
  inner: set[Path] = set()
  for path in leaves:
    inner.update(path[:n] for n in range(1, len(path)))
  for path, value in leaves.items():
    if not path:
      raise errors.FormatError('a parameter has an empty path.')
    if path in inner:
      other = next(p for p in leaves if p[: len(path)] == path and p != path)
      raise errors.FormatError(
        f'{paths.show(path)} is a parameter and {paths.show(other)} lies '
        'beneath it: a file cannot hold both. Rename one of them.'
      )
    node = tree
    for segment in path[:-1]:
      node = node.setdefault(segment, {})
    node[path[-1]] = value
  return tree
