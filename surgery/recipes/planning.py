"""Plans: how each tensor is written, and how much memory that takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery.model import manifest
from surgery.model.grid import BLOCK
from surgery.model.sizes import itemsize
from surgery.naming import paths

if TYPE_CHECKING:
  from surgery.model.checkpoint import Checkpoint, Leaf
  from surgery.naming.paths import Path

# Arrays at once: a tensor, its result in float32, and intermediate values.
_COPIES = 4


def _read(leaf: Leaf) -> bool:
  """Whether a leaf is unchanged since it was opened: its bytes are copied."""
  return leaf.source is not None and leaf.load is leaf.source


def memory(leaf: Leaf) -> int:
  """Returns about how many bytes of memory it takes to compute a leaf."""
  if leaf.dtype is None or _read(leaf):
    return 0
  if leaf.memory is not None:
    return leaf.memory
  elements = leaf.size if leaf.part is None else min(leaf.size, BLOCK)
  return _COPIES * elements * max(4, itemsize(leaf.dtype))


def time(leaf: Leaf) -> str:
  """Returns the class of time that writing a leaf takes.

  Returns:
    `copy` for copied bytes; `compute` for about the time of reading and
    writing; `heavy` for far more, as a decomposition takes.
  """
  if _read(leaf):
    return 'copy'
  return 'heavy' if leaf.heavy else 'compute'


def plan(
  sources: Mapping[str, Checkpoint], main: str, after: Checkpoint
) -> list[dict[str, Any]]:
  """Returns a row for each tensor.

  Args:
    sources: the inputs, by alias.
    main: alias of the input that is changed.
    after: the checkpoint that is written.

  Returns:
    For each tensor its `path`; `what` happens (`copied`, `renamed`, `computed`,
    `new`, `gone`); where its bytes come `from`, if not from the same name;
    `shape`, `dtype` and `bytes`; the class of `time` that it takes; `blocks`,
    whether a computed or new one is computed in blocks; and `trainable`, if
    that changes.
  """
  old, new = dict(sources[main]), dict(after)
  comparison = _Comparison(sources, main, old, new)
  kept = {id(leaf.load) for leaf in new.values()}
  # The file of an adapter is not a model that lost its base.
  alone = after.manifest.kind == manifest.ADAPTER
  return [
    comparison.row(path, new[path])
    if path in new
    else {**_described(path, old[path]), 'what': 'gone'}
    for path in {**old, **new}
    if path in new or not (alone or id(old[path].load) in kept)
  ]


def _described(path: Path, leaf: Leaf) -> dict[str, Any]:
  """Returns the columns that every row has."""
  return {
    'path': paths.show(path),
    'what': '',
    'shape': None if leaf.shape is None else list(leaf.shape),
    'dtype': leaf.dtype,
    'bytes': leaf.nbytes,
  }


class _Comparison:
  """The tensors of inputs, which those that are written are compared with.

  A tensor that no pass changed keeps its function `load`, by which it is
  recognised under any name.
  """

  def __init__(
    self,
    sources: Mapping[str, Checkpoint],
    main: str,
    before: Mapping[Path, Leaf],
    after: Mapping[Path, Leaf],
  ) -> None:
    self._main = main
    self._before = before
    # Where a tensor was read; the model that is changed comes first.
    self._origins: dict[int, tuple[str, Path]] = {}
    for alias in (main, *(a for a in sources if a != main)):
      for path, leaf in sources[alias].items():
        self._origins.setdefault(id(leaf.load), (alias, path))
    # Tensors that also keep their names: further ones are copies.
    self._same = {
      id(leaf.load)
      for path, leaf in after.items()
      if path in before and before[path].load is leaf.load
    }

  def row(self, path: Path, leaf: Leaf) -> dict[str, Any]:
    """Returns the row of a tensor that is written."""
    origin = self._origins.get(id(leaf.load))
    row = _described(path, leaf)
    was = self._before.get(path)
    if origin is None:
      row['what'] = 'computed' if path in self._before else 'new'
      if not _read(leaf) and leaf.shape is not None:
        row['blocks'] = leaf.part is not None
    elif origin == (self._main, path):
      row['what'] = 'copied'
    else:
      moved = origin[0] == self._main and id(leaf.load) not in self._same
      stays = 'copied' if path in self._before else 'new'
      row['what'] = 'renamed' if moved else stays
      row['from'] = self._shown(*origin)
      was = self._before.get(origin[1]) if moved else was
    row['time'] = time(leaf)
    if was is not None and was.trainable != leaf.trainable:
      row['trainable'] = leaf.trainable
    return row

  def _shown(self, alias: str, path: Path) -> str:
    name = paths.show(path)
    return name if alias == self._main else f'{alias}::{name}'


def needed(after: Checkpoint) -> int:
  """Returns about how many bytes of memory writing takes, besides Python's."""
  return max(map(memory, after.values()), default=0)


def report(
  rows: list[dict[str, Any]],
  name: str | None,
  memory: int,
  checks: Sequence[str],
  left_out: Sequence[Mapping[str, str]] = (),
  remarks: Sequence[str] = (),
) -> dict[str, Any]:
  """Returns a plan as JSON data."""
  order = ('copy', 'compute', 'heavy')
  times = (row.get('time', 'copy') for row in rows)
  slowest = max(times, key=order.index, default='copy')
  return {
    'output': name,
    'memory': memory,
    'time': slowest,
    'checks': list(checks),
    'tensors': rows,
    # Layers that a selector matched and an adapter leaves as they are.
    **({'left_out': list(left_out)} if left_out else {}),
    # Assumptions that passes made.
    **({'remarks': list(remarks)} if remarks else {}),
  }


def extracted(after: Checkpoint) -> dict[str, Any] | None:
  """Returns the error of an adapter that `extract-lora` made; else None."""
  if after.manifest.kind != manifest.ADAPTER:
    return None
  notes = (one.get(manifest.EXTRACTED) for one in after.manifest.adapters)
  return next((dict(one) for one in notes if one), None)


def found(after: Checkpoint) -> list[dict[str, Any]]:
  """Returns the findings of writing, as JSON data.

  Returns:
    For each finding the `path` of the tensor, `what` was counted, its `count`,
    the total (`of`), their `share`, and its `text`; largest share first.
  """
  rows = []
  for one in after.findings:
    count, of = one.count()
    if count:
      rows.append(
        {
          'path': paths.show(one.path),
          'what': one.what,
          'count': count,
          'of': of,
          'share': count / of,
          'text': one.text,
        }
      )
  return sorted(rows, key=lambda row: -row['share'])
