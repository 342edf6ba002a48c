"""Cast: floating-point tensors in another dtype, rounded once."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from surgery import errors
from surgery.adapting.beneath import handles_adapters
from surgery.editing import choosing, following, rounding
from surgery.files import arrays
from surgery.host.manager import Host
from surgery.model.checkpoint import (
  Checkpoint,
  Finding,
  Leaf,
)
from surgery.model.grid import (
  Index,
  grid,
)
from surgery.model.layers import LayerTypes
from surgery.model.records import Records
from surgery.naming import paths, selectors
from surgery.naming.paths import Path
from surgery.naming.selection import Selection

# Share of a tensor's numbers that may become zero unless it is allowed. Of
# weights with a standard deviation of 0.02, 4 % do in float8_e4m3fn.
_MOST = 0.5
# Dtypes between which compiled code rounds once.
_TRACED = ('bfloat16', 'float16', 'float32')


def names() -> tuple[str, ...]:
  """Returns what tensors can be cast to, by short and by full names."""
  return (*rounding.SHORT, *rounding.SHORT.values())


@handles_adapters
def cast(
  checkpoint: Checkpoint,
  to: Any,
  *,
  keep: selectors.Text | Selection | None = None,
  overflow: bool = False,
  underflow: bool = False,
  layer_types: LayerTypes | None = None,
  host: Host,
) -> Checkpoint:
  """Casts floating-point tensors to another dtype; others stay as they are.

  Each value is rounded once, to the nearest, and to even if two are as near. It
  is counted and told how many become zero that were not.
  Adapters' weights are cast too; adapters go on computing in float32.

  Args:
    checkpoint: the model, or an adapter without its base.
    to: the dtype: `bf16`, `f16`, `f32`, `f64`, `f8_e4m3fn`, `f8_e5m2` and so
      on, a full name, or what numpy takes for a dtype.
    keep: what stays as it is; or, as `SELECTOR=DTYPE`, what is cast to that
      dtype instead. The first selector that matches a tensor decides, and what
      a `!` selector matches is cast like the rest.
    overflow: whether finite values may become infinite, or NaN in dtypes
      without infinity.
    underflow: whether more than half of a tensor's numbers may become zero.
    layer_types: types of layers; by default those of the checkpoint.
    host: whose hooks are asked.

  Returns:
    The checkpoint, whose tensors are cast when they are asked for.

  Raises:
    ConfigError: for a dtype that is unknown, or no floating-point one.
    SelectorError: for a selector that matches nothing.
    SurgeryError: if there is nothing to cast.
    CastError: for a finite value that a dtype cannot hold, or if most of a
      tensor's numbers would become zero, when the tensor is asked for.

  Example:
    cast: bf16
    cast: {to: bf16, keep: '**/norm=f32'}
  """
  name = rounding.name_of(to)
  types = layer_types
  if types is None:
    types = checkpoint.manifest.layer_types
  others = _kept(checkpoint, keep, types, host)
  leaves: dict[Path, Leaf] = {}
  dtypes: dict[Path, str] = {}
  found = False
  casts: list[_Cast] = []
  for path, leaf in checkpoint.items():
    wanted = others.get(path, name)
    leaves[path] = leaf
    if leaf.shape is None and wanted is not None:
      one = _Cast(leaf, wanted, path, overflow, underflow)
      leaves[path] = _tree(leaf, one)
      found = found or leaves[path] is not leaf
    elif wanted is not None and _is_float(leaf):
      found = True
      if leaf.dtype != wanted:
        one = _Cast(leaf, wanted, path, overflow, underflow)
        casts.append(one)
        leaves[path] = _leaf(leaf, one)
        dtypes[path] = wanted
  if not found:
    raise errors.SurgeryError(
      f'none of the {len(checkpoint)} tensors is to be cast: those that '
      'are not kept are not of a floating-point dtype.'
    )
  if not dtypes:
    return checkpoint.replace(leaves=leaves)
  records = following.recast(checkpoint.records(host), dtypes, host)
  findings = tuple(
    Finding(c.path, 'underflow', c.underflows, f'became zero in {c.dtype}')
    for c in casts
  )
  return checkpoint.replace(
    leaves=_retagged(leaves, dtypes),
    records=records,
    findings=(*checkpoint.findings, *findings),
    remarks=(*checkpoint.remarks, *_beneath(records, dtypes)),
  )


def _beneath(records: Records, dtypes: Mapping[Path, str]) -> Iterator[str]:
  """Yields what is rounded beneath adapters, for plans.

  A merge before the cast rounds once, and a cast before the merge each part.
  """
  found = [paths.show(path) for path in dtypes if path in records.chains]
  if found:
    yield (
      f'rounded beneath adapters, whose weights are rounded apart: '
      f'{errors.listed(found)}'
    )


def _is_float(leaf: Leaf) -> bool:
  return leaf.key is None and rounding.is_float(leaf.dtype)


def _retagged(
  leaves: dict[Path, Leaf], dtypes: dict[Path, str]
) -> dict[Path, Leaf]:
  """Returns leaves whose metadata says of which dtype their parameter is."""

  def one(path: Path, leaf: Leaf) -> Leaf:
    def change(said: Mapping[str, Any]) -> Mapping[str, Any]:
      dtype = dtypes.get((*path[:-1], said['name']), said['dtype'])
      return {**said, 'dtype': dtype}

    metadata = following.retagged(leaf.metadata, change)
    same = metadata is leaf.metadata
    return leaf if same else leaf.replace(metadata=metadata)

  return {path: one(path, leaf) for path, leaf in leaves.items()}


# What is kept.


def _split(text: str) -> tuple[str, str | None]:
  r"""Splits `SELECTOR=DTYPE`; a name with `=` is written with `\=`."""
  selector, sign, dtype = text.rpartition('=')
  if not sign or selector.endswith('\\') or text.startswith('!'):
    return text, None
  if not selector:
    raise errors.SelectorError(
      f'keep {text!r}: expected SELECTOR or SELECTOR=DTYPE.'
    )
  try:
    return selector, rounding.name_of(dtype)
  except errors.ConfigError as error:
    raise errors.ConfigError(
      f"keep {text!r}: {error} For a name that has a '=' write '\\='."
    ) from None


def _kept(
  checkpoint: Checkpoint,
  keep: selectors.Text | Selection | None,
  types: LayerTypes,
  host: Host,
) -> dict[Path, str | None]:
  """Returns the dtypes that tensors are cast to instead; None for no cast.

  Raises:
    SelectorError: for a selector that matches nothing, or has no effect.
    ConfigError: for an unknown dtype.
  """
  if keep is None:
    return {}
  if isinstance(keep, Selection):
    chosen = choosing.chosen(checkpoint, keep, types, host)
    return dict.fromkeys(chosen, None)
  items: Iterable[str] = [keep] if isinstance(keep, str) else keep
  wanted = [_split(text) for text in items]
  rest = [text for text, _ in wanted if text.startswith('!')]
  if len(rest) == len(wanted):
    # As elsewhere, a list of `!` items alone takes them out of everything.
    return dict.fromkeys(choosing.chosen(checkpoint, rest, types, host), None)
  decided: dict[Path, tuple[str | None, str]] = {}
  for selector, dtype in wanted:
    if selector not in rest:
      found = choosing.chosen(checkpoint, [selector, *rest], types, host)
      _check_decides(selector, dtype, found, decided)
      # The first selector that matches decides.
      decided = {**dict.fromkeys(found, (dtype, selector)), **decided}
  return {path: dtype for path, (dtype, _) in decided.items()}


def _check_decides(
  selector: str,
  dtype: str | None,
  found: Collection[Path],
  decided: Mapping[Path, tuple[str | None, str]],
) -> None:
  """Raises if earlier selectors give other dtypes to all that one matches.

  Args:
    selector: the selector.
    dtype: its dtype.
    found: the tensors that it matches.
    decided: the dtypes and selectors that are decided already.

  Raises:
    SelectorError: naming the selector that decides.
  """
  # One that repeats an earlier one is superfluous, but not wrong.
  others = [p for p in found if p in decided and decided[p][0] != dtype]
  if others and all(path in decided for path in found):
    raise selectors.shadowed(selector, others[0], decided[others[0]][1], 'keep')


# Casting.


@dataclasses.dataclass(frozen=True)
class _Cast:
  """Casts a tensor.

  Attributes:
    leaf: the tensor.
    dtype: full name of the new dtype.
    path: its path, for messages.
    overflow: whether finite values may become infinite or NaN.
    underflow: whether most of the numbers may become zero.
    counts: by the place of each block that was cast the number of its elements,
      of those that were not zero, and of those of them that became zero.
  """

  leaf: Leaf
  dtype: str
  path: Path
  overflow: bool
  underflow: bool
  counts: dict[Any, tuple[int, int, int]] = dataclasses.field(
    default_factory=dict, compare=False
  )

  def load(self) -> Any:
    """Returns the whole tensor: of JAX if it was, otherwise of numpy."""
    return self.value(self.leaf.load())

  def part(self, index: Index) -> Any:
    """Returns a block; see `Leaf.part`."""
    assert self.leaf.part is not None
    block = np.asarray(self.leaf.part(index))
    return self._rounded(block, tuple(s.start for s in index))

  def value(self, value: Any, part: Any = None) -> Any:
    """Returns a value in the new dtype.

    Args:
      value: the value, or one of a parameter's.
      part: which of them.

    Raises:
      CastError: for a finite value that the dtype cannot hold.
    """
    if isinstance(value, np.generic):
      return self._rounded(np.asarray(value), (), part)[()]
    if isinstance(value, np.ndarray):
      return self._array(value, part)
    return self._of_jax(value, part)

  def underflows(self) -> tuple[int, int]:
    """Returns the counts of numbers that became zero, and of non-zero ones."""
    _, before, lost = map(
      sum, zip((0, 0, 0), *self.counts.values(), strict=True)
    )
    return lost, before

  def _counted(
    self, block: np.ndarray, after: np.ndarray, where: Any
  ) -> np.ndarray:
    """Counts the numbers that became zero; returns the block.

    Raises:
      CastError: with the last block, if that is most of the tensor.
    """
    before, lost = rounding.nonzero(block), 0
    if rounding.may_vanish(block.dtype.name, self.dtype):
      lost = before - rounding.nonzero(after)
    # By place, since a block may be computed more than once.
    self.counts[where] = (block.size, before, lost)
    if self.underflow or lost == 0:
      return after
    # A few zeros are usual in 8 bits, most of a tensor is not; which of them it
    # is can be said only when all blocks have been cast.
    lost, before = self.underflows()
    done = sum(count for count, _, _ in self.counts.values())
    whole = self.leaf.shape is not None and done >= self.leaf.size
    if whole and lost > _MOST * before:
      literal = paths.literal(self.path)
      raise errors.CastError(
        f'{paths.show(self.path)}: {lost:,} of its {before:,} numbers that are '
        f'not zero would become zero in {self.dtype}, whose smallest number is '
        f"{rounding.smallest(self.dtype):g}. Keep this tensor as it is (keep='"
        f"{literal}', --keep '{literal}'), cast it to a dtype with a wider "
        'range (bf16), or allow it (underflow=True, --allow-underflow).'
      )
    return after

  def _array(self, value: np.ndarray, part: Any = None) -> np.ndarray:
    result = np.empty(value.shape, np.dtype(arrays.DTYPES[self.dtype]))
    for index in grid(value.shape):
      starts = tuple(s.start for s in index)
      result[index] = self._rounded(value[index], starts, part)
    return result

  def _rounded(
    self, block: np.ndarray, starts: tuple[int, ...], part: Any = None
  ) -> np.ndarray:
    """Returns a block in the new dtype.

    Args:
      block: the block.
      starts: where it begins on the leading axes.
      part: of which part of a value it is, where that has several.

    Raises:
      CastError: for a finite value that the dtype cannot hold.
    """
    after = rounding.rounded(block, self.dtype)
    lost = None if self.overflow else rounding.lost(block, after)
    if lost is None:
      return self._counted(block, after, (part, starts))
    # The first such number is named by its place in the whole tensor.
    first = np.unravel_index(int(np.argmax(lost)), lost.shape)
    starts = (*starts, *[0] * (lost.ndim - len(starts)))
    where = tuple(int(a) + b for a, b in zip(first, starts, strict=True))
    raise self._error(block[first], after[first], where)

  def _error(
    self, value: Any, after: Any, where: tuple[int, ...]
  ) -> errors.CastError:
    became = 'NaN' if np.isnan(after) else 'infinite'
    at = f' at index {list(where)}' if where else ''
    literal = paths.literal(self.path)
    largest = rounding.largest(self.dtype)
    return errors.CastError(
      f'{paths.show(self.path)}: {float(value):g}{at} would become {became} in '
      f'{self.dtype}, whose largest number is {largest:g}. '
      f"Keep this tensor as it is (keep='{literal}', --keep '{literal}'), cast "
      'it to a wider dtype, or allow it (overflow=True, --allow-overflow).'
    )

  def _of_jax(self, value: Any, part: Any = None) -> Any:
    """Returns an array of JAX in the new dtype, where it was.

    It is rounded by numpy as well: on some devices JAX rounds twice, or flushes
    small numbers to zero, and a file would get other bits.
    """
    import jax

    from surgery import jaxcompat

    if jaxcompat.is_traced(value):
      return self._traced(value)
    if isinstance(value, jax.ShapeDtypeStruct):
      to = arrays.DTYPES[self.dtype]
      return jax.ShapeDtypeStruct(value.shape, to, sharding=value.sharding)
    if self.dtype == 'float64' and not jax.config.read('jax_enable_x64'):
      return self._array(np.asarray(value), part)  # JAX would narrow it.
    if not value.committed:
      return jax.device_put(self._array(np.asarray(value), part))
    # Each shard is cast by itself and goes back to its device, so that an array
    # that is spread over devices is never whole on one.
    parts = []
    for number, shard in enumerate(value.addressable_shards):
      cast = self._array(np.asarray(shard.data), (part, number))
      parts.append(jax.device_put(cast, shard.data.sharding))
    return jax.make_array_from_single_device_arrays(
      value.shape, value.sharding, parts
    )

  def _traced(self, value: Any) -> Any:
    if str(value.dtype) in _TRACED and self.dtype in _TRACED:
      return value.astype(self.dtype)  # Overflow cannot be known in a trace.
    raise errors.CastError(
      f'{paths.show(self.path)}: a traced value cannot be cast from '
      f'{value.dtype} to {self.dtype}: compiled code may round twice. Cast '
      'outside of jit.'
    )


def _leaf(leaf: Leaf, one: _Cast) -> Leaf:
  """Returns a tensor in another dtype, computed when it is asked for."""
  part = None if leaf.part is None else one.part
  return leaf.replace(load=one.load, part=part, dtype=one.dtype)


def _tree(leaf: Leaf, one: _Cast) -> Leaf:
  """Returns a parameter whose value is a pytree of arrays, with these cast.

  Only in memory are there such; it is returned as it is if it holds none.
  """
  value = None if leaf.key is not None else leaf.load()
  if not isinstance(value, (dict, list, tuple)) or not value:
    return leaf
  import jax

  met = []

  def change(array: Any) -> Any:
    found = str(getattr(array, 'dtype', ''))
    if not rounding.is_float(found):
      return array
    met.append(found)
    return array if found == one.dtype else one.value(array, len(met))

  tree = jax.tree.map(change, value)
  if not met:
    return leaf
  if set(met) == {one.dtype}:
    tree = value
  return leaf.replace(load=lambda: tree)
