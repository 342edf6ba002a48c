"""Concat, split, stack and unstack: several tensors in one, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from surgery import errors
from surgery.editing import following, regions, tensors
from surgery.editing.regions import Reader, Region
from surgery.host.manager import Host
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.naming import joining, paths
from surgery.naming.paths import Path
from surgery.passes.slicing import taken


def gathered(
  checkpoint: Checkpoint, rule: str, host: Host
) -> dict[Path, list[Path]]:
  """Returns the tensors that a rule joins, in order, by the new path.

  Raises:
    RenameError: if it is not such a rule, or matches nothing.
  """
  read = joining.parse(rule)
  if not isinstance(read, joining.Gather):
    raise errors.RenameError(
      f'rule {rule!r} makes several of one. Expected a rule that makes '
      "one of several, as '{a,b} -> ab'."
    )
  universe = _free(checkpoint, host)
  found = joining.gathered(read, universe)
  return {target: list(parts.values()) for target, parts in found.items()}


def spread(rule: str) -> joining.Spread:
  """Reads a rule that makes several of one.

  Raises:
    RenameError: if it is not such a rule.
  """
  read = joining.parse(rule)
  if not isinstance(read, joining.Spread):
    raise errors.RenameError(
      f'rule {rule!r} makes one of several. Expected a rule that makes '
      "several of one, as 'ab -> {a,b}'."
    )
  return read


def one_to_many(
  checkpoint: Checkpoint, rule: joining.Spread, host: Host
) -> list[Path]:
  """Returns the paths that a rule spreads.

  Raises:
    RenameError: if there are none.
  """
  return joining.one_to_many(rule, _free(checkpoint, host))


def _free(checkpoint: Checkpoint, host: Host) -> list[Path]:
  """Returns all paths except those of adapters' weights."""
  owned = following.settled(checkpoint, host).owned
  return [p for p in checkpoint if p not in owned]


def joined(
  checkpoint: Checkpoint,
  rules: str | Sequence[str],
  verb: str,
  make: Callable[[Path, list[Path], list[Leaf]], Leaf],
  keep: bool,
  host: Host,
) -> Checkpoint:
  """Replaces several tensors by one, wherever rules match.

  Args:
    checkpoint: the model.
    rules: the rules.
    verb: the pass.
    make: returns the new tensor from its path, the old paths and tensors.
    keep: whether the old tensors stay.
    host: knows the adapters' types.
  """
  fresh: dict[Path, Leaf] = {}
  gone: set[Path] = set()
  behind: dict[Path, Path] = {}
  for rule in tensors.texts(rules):
    for target, parts in gathered(checkpoint, rule, host).items():
      if target in fresh:
        raise errors.RenameError(
          f'rule {rule!r}: {paths.show(target)} is made by an earlier '
          'rule. Change the rules.'
        )
      leaves = [checkpoint[p] for p in parts]
      for path, leaf in zip(parts, leaves, strict=True):
        regions.array(leaf, path, verb)
      # numpy would promote to the wider dtype without a word.
      _check_dtypes(parts, leaves)
      fresh[target] = make(target, parts, leaves)
      gone |= set(parts)
      behind[target] = parts[0]  # It takes the place of its first part.
  return tensors.edited(
    checkpoint,
    verb,
    fresh=fresh,
    gone=() if keep else gone,
    behind=behind,
    host=host,
  )


def _check_dtypes(parts: Sequence[Path], leaves: Sequence[Leaf]) -> None:
  for path, leaf in zip(parts, leaves, strict=True):
    if leaf.dtype != leaves[0].dtype:
      raise errors.SurgeryError(
        f'{paths.show(path)} is {leaf.dtype} and '
        f'{paths.show(parts[0])} is {leaves[0].dtype}. Cast one of them first.'
      )


def concat(
  checkpoint: Checkpoint,
  rules: str | Sequence[str],
  axis: int = 0,
  *,
  keep: bool = False,
  host: Host,
) -> Checkpoint:
  """Joins tensors along an axis that they have.

  Args:
    checkpoint: the model.
    rules: `MANY -> ONE`: one pair of braces, or one number, stands on the left
      only, and gives the order.
    axis: the axis; negative ones count from the end.
    keep: whether the parts stay, too.
    host: knows the adapters' types.

  Raises:
    RenameError: for a rule that matches nothing, or a name that is taken.
    SurgeryError: if shapes or dtypes do not fit.
    AdapterError: for a tensor with an adapter.

  Example:
    concat: {rules: '**/{q,k,v}_proj/kernel -> **/qkv/kernel', axis: -1}
  """

  def make(target: Path, parts: list[Path], leaves: list[Leaf]) -> Leaf:
    del target
    return _concatenated(parts, leaves, axis)

  return joined(checkpoint, rules, 'concat', make, keep, host)


def _concatenated(
  parts: Sequence[Path], leaves: Sequence[Leaf], axis: int
) -> Leaf:
  shapes = [leaf.shape or () for leaf in leaves]
  at = regions.axis_of(axis, shapes[0], parts[0])
  rest = lambda shape: (*shape[:at], *shape[at + 1 :])
  for path, shape in zip(parts, shapes, strict=True):
    if len(shape) != len(shapes[0]) or rest(shape) != rest(shapes[0]):
      raise errors.SurgeryError(
        f'{paths.show(path)} is {shape} and {paths.show(parts[0])} is '
        f'{shapes[0]}; they have to be alike but for axis {axis}.'
      )
  readers = [Reader(leaf) for leaf in leaves]
  ends = [0]
  for shape in shapes:
    ends.append(ends[-1] + shape[at])
  shape = (*shapes[0][:at], ends[-1], *shapes[0][at + 1 :])

  def block(region: Region) -> Any:
    cut = region[at]
    pieces: list[Any] = []
    for reader, start, stop in zip(readers, ends, ends[1:], strict=False):
      low, high = max(cut.start, start), min(cut.stop, stop)
      if low < high or (stop == ends[-1] and not pieces):
        inner = slice(low - start, max(high, low) - start)
        pieces.append(reader((*region[:at], inner, *region[at + 1 :])))
    if len(pieces) == 1:
      return pieces[0]
    return regions.namespace(*pieces).concatenate(pieces, axis=at)

  return regions.computed(tensors.together(leaves), shape, block, leaves)


def split(
  checkpoint: Checkpoint,
  rules: str | Sequence[str],
  axis: int = 0,
  *,
  sizes: Sequence[int] | None = None,
  keep: bool = False,
  host: Host,
) -> Checkpoint:
  """Cuts tensors along an axis into several.

  Args:
    checkpoint: the model.
    rules: `ONE -> MANY`: one pair of braces stands on the right only.
    axis: the axis; negative ones count from the end.
    sizes: how many places each part gets; as many each by default.
    keep: whether the whole stays, too.
    host: knows the adapters' types.

  Raises:
    RenameError: for a rule that matches nothing, or a name that is taken.
    SurgeryError: if the sizes do not add up.
    AdapterError: for a tensor with an adapter.

  Example:
    split: {rules: '**/qkv/kernel -> **/{q,k,v}/kernel', axis: -1}
  """

  def cut(path: Path, leaf: Leaf, count: int | None) -> list[Leaf]:
    assert leaf.shape is not None
    at = regions.axis_of(axis, leaf.shape, path)
    whole = leaf.shape[at]
    if sizes is not None:
      each = list(sizes)
    elif count is None:
      raise errors.SurgeryError(
        'parts that are numbered need sizes: sizes: [128, 128].'
      )
    else:
      each = [whole // count] * count
    if sum(each) != whole or (count is not None and len(each) != count):
      wanted = f'{count} parts' if sizes is None else f'the sizes {each}'
      raise errors.SurgeryError(
        f'{paths.show(path)}: axis {axis} has {whole} places and cannot '
        f'be cut into {wanted}.'
      )
    found, start = [], 0
    for size in each:
      found.append(taken(leaf, at, range(start, start + size)))
      start += size
    return found

  return parted(checkpoint, rules, 'split', cut, keep, host)


def parted(
  checkpoint: Checkpoint,
  rules: str | Sequence[str],
  verb: str,
  cut: Callable[[Path, Leaf, int | None], list[Leaf]],
  keep: bool,
  host: Host,
) -> Checkpoint:
  """Replaces tensors by several each, as rules name them.

  Args:
    checkpoint: the model.
    rules: the rules.
    verb: the pass.
    cut: returns the parts from the path, the tensor, and the number of parts,
      if the rule determines it.
    keep: whether the old tensor stays.
    host: knows the adapters' types.
  """
  fresh: dict[Path, Leaf] = {}
  gone: set[Path] = set()
  behind: dict[Path, Path] = {}
  for text in tensors.texts(rules):
    rule = spread(text)
    count = None if rule.words is None else len(rule.words)
    for path in one_to_many(checkpoint, rule, host):
      if path in gone:
        continue  # The first rule that matches decides.
      leaf = checkpoint[path]
      regions.array(leaf, path, verb)
      parts = cut(path, leaf, count)
      targets = rule.apply(path, len(parts))
      assert targets is not None
      for target, part in zip(targets, parts, strict=True):
        if target in fresh:
          raise errors.RenameError(
            f'rule {text!r}: two parts would be {paths.show(target)}. '
            'Change the rule.'
          )
        # A part is not the parameter that an adapter rewrote.
        fresh[target] = tensors.as_new(part)
        behind[target] = path
      gone.add(path)
  return tensors.edited(
    checkpoint,
    verb,
    fresh=fresh,
    gone=() if keep else gone,
    behind=behind,
    host=host,
  )


def stack(
  checkpoint: Checkpoint,
  rules: str | Sequence[str],
  axis: int = 0,
  *,
  keep: bool = False,
  host: Host,
) -> Checkpoint:
  """Puts tensors of one shape into one with a further axis, as for scan.

  Args:
    checkpoint: the model.
    rules: `MANY -> ONE`: one number, or one pair of braces, stands on the left
      only, and gives the order. Numbers start with 0 and have no gaps.
    axis: where the new axis is; negative ones count from the end.
    keep: whether the parts stay, too.
    host: knows the adapters' types.

  Raises:
    RenameError: for a rule that matches nothing, a name that is taken, or a
      number that is missing.
    SurgeryError: if shapes or dtypes differ.
    AdapterError: for a tensor with an adapter.

  Example:
    stack: 'blocks/<i>/** -> blocks/**'
  """

  def make(target: Path, parts: list[Path], leaves: list[Leaf]) -> Leaf:
    del target
    return _stacked(parts, leaves, axis)

  return joined(checkpoint, rules, 'stack', make, keep, host)


def _stacked(parts: Sequence[Path], leaves: Sequence[Leaf], axis: int) -> Leaf:
  inner = leaves[0].shape or ()
  for path, leaf in zip(parts, leaves, strict=True):
    if leaf.shape != inner:
      raise errors.SurgeryError(
        f'{paths.show(path)} is {leaf.shape} and '
        f'{paths.show(parts[0])} is {inner}; their shapes must be equal.'
      )
  at = regions.axis_of(axis, (*inner, 0), parts[0])
  shape = (*inner[:at], len(leaves), *inner[at:])
  readers = [Reader(leaf) for leaf in leaves]

  def block(region: Region) -> Any:
    rest = (*region[:at], *region[at + 1 :])
    # A block reads only the tensors whose places along the new axis it has.
    pieces = [reader(rest) for reader in readers[region[at]]]
    return regions.namespace(*pieces).stack(pieces, axis=at)

  return regions.computed(tensors.together(leaves), shape, block, leaves)


def unstack(
  checkpoint: Checkpoint,
  rules: str | Sequence[str],
  axis: int = 0,
  *,
  keep: bool = False,
  host: Host,
) -> Checkpoint:
  """Makes a tensor of each place along an axis, which goes away.

  Args:
    checkpoint: the model.
    rules: `ONE -> MANY`: one number, or one pair of braces, stands on the right
      only.
    axis: the axis; negative ones count from the end.
    keep: whether the whole stays, too.
    host: knows the adapters' types.

  Raises:
    RenameError: for a rule that matches nothing, or a name that is taken.
    SurgeryError: if there are not as many places as names.
    AdapterError: for a tensor with an adapter.

  Example:
    unstack: 'blocks/** -> blocks/<i>/**'
  """

  def cut(path: Path, leaf: Leaf, count: int | None) -> list[Leaf]:
    assert leaf.shape is not None
    at = regions.axis_of(axis, leaf.shape, path)
    if count not in (None, leaf.shape[at]):
      raise errors.SurgeryError(
        f'{paths.show(path)}: axis {axis} has {leaf.shape[at]} places, but the '
        f'rule has {count} names.'
      )
    return [_place(leaf, at, k) for k in range(leaf.shape[at])]

  return parted(checkpoint, rules, 'unstack', cut, keep, host)


def _place(leaf: Leaf, axis: int, place: int) -> Leaf:
  assert leaf.shape is not None
  reader = Reader(leaf)
  shape = (*leaf.shape[:axis], *leaf.shape[axis + 1 :])

  def block(region: Region) -> Any:
    cut = (*region[:axis], slice(place, place + 1), *region[axis:])
    found = reader(cut)
    return found.reshape(regions.sizes(region))

  return regions.computed(leaf, shape, block, [leaf])
