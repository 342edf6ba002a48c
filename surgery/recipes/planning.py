"""What writing will do to each tensor, and what memory it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery.model import manifest
from surgery.model.grid import (
  BLOCK,
)
from surgery.model.sizes import (
  itemsize,
)
from surgery.naming import paths

if TYPE_CHECKING:
  from surgery.model.checkpoint import Checkpoint, Leaf
  from surgery.naming.paths import Path

# A tensor, its result in float32, and what lies between them.
_COPIES = 4


def _read(leaf: Leaf) -> bool:
  """Whether a leaf lies in a file as it is, so that its bytes are copied."""
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
  """Returns what writing a leaf takes.

  Returns:
    `copy`, a copy of bytes; `compute`, about as long as reading and writing;
    or `heavy`, far longer, as for a decomposition.
  """
  if _read(leaf):
    return 'copy'
  return 'heavy' if leaf.heavy else 'compute'


def plan(
  sources: Mapping[str, Checkpoint], main: str, after: Checkpoint
) -> list[dict[str, Any]]:
  """Returns what writing will do to each tensor.

  Args:
    sources: what is read, by alias.
    main: alias of the one that is changed.
    after: what is written.

  Returns:
    For each tensor its `path`; `what` happens (`copied`, `renamed`, `computed`,
    `new`, `gone`); where its bytes come `from`, if not from the same name;
    `shape`, `dtype` and `bytes`; what `time` it takes; `blocks`, whether a
    computed or new one is computed in blocks; and `trainable`, if that changes.
  """
  before = sources[main]
  origins: dict[int, tuple[str, Path]] = {}
  for alias in (main, *(a for a in sources if a != main)):
    for path, leaf in sources[alias].items():
      origins.setdefault(id(leaf.load), (alias, path))
  kept = {id(leaf.load) for leaf in after.values()}
  same = {
    id(leaf.load)
    for path, leaf in after.items()
    if path in before and before[path].load is leaf.load
  }
  # The file of an adapter is not a model that lost its base.
  alone = after.manifest.kind == manifest.ADAPTER
  rows = []
  for path in dict.fromkeys((*before, *after)):
    if path in after:
      origin = origins.get(id(after[path].load))
      rows.append(_row(path, after[path], origin, main, before, same))
    elif id(before[path].load) not in kept and not alone:
      rows.append({**_described(path, before[path]), 'what': 'gone'})
  return rows


def _described(path: Path, leaf: Leaf) -> dict[str, Any]:
  return {
    'path': paths.show(path),
    'what': '',
    'shape': None if leaf.shape is None else list(leaf.shape),
    'dtype': leaf.dtype,
    'bytes': leaf.nbytes,
  }


def _row(
  path: Path,
  leaf: Leaf,
  origin: tuple[str, Path] | None,
  main: str,
  before: Checkpoint,
  same: set[int],
) -> dict[str, Any]:
  """Returns the row of a tensor that is written.

  Args:
    path: its path.
    leaf: the tensor.
    origin: alias and path of the tensor that was read and is written as it is.
    main: alias of the model that is changed.
    before: that model.
    same: tensors that are there under their old names, too.
  """
  row = _described(path, leaf)
  was = before.get(path)
  if origin is None:
    row['what'] = 'computed' if path in before else 'new'
    if not _read(leaf) and leaf.shape is not None:
      row['blocks'] = leaf.part is not None
  elif origin == (main, path):
    row['what'] = 'copied'
  else:
    alias, old = origin
    moved = alias == main and id(leaf.load) not in same
    stays = 'copied' if path in before else 'new'
    row['what'] = 'renamed' if moved else stays
    name = paths.show(old)
    row['from'] = name if alias == main else f'{alias}::{name}'
    was = before.get(old) if moved else was
  row['time'] = time(leaf)
  if was is not None and was.trainable != leaf.trainable:
    row['trainable'] = leaf.trainable
  return row


def needed(after: Checkpoint) -> int:
  """Returns about how many bytes of memory writing takes, beside Python's."""
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
    # What was taken for granted.
    **({'remarks': list(remarks)} if remarks else {}),
  }


def extracted(after: Checkpoint) -> dict[str, Any] | None:
  """Returns how near an adapter is to what it was extracted from, if it was."""
  if after.manifest.kind != manifest.ADAPTER:
    return None
  said = (one.get(manifest.EXTRACTED) for one in after.manifest.adapters)
  return next((dict(one) for one in said if one), None)


def found(after: Checkpoint) -> list[dict[str, Any]]:
  """Returns what was found out while tensors were written, as JSON data.

  Returns:
    For each finding `path` of the tensor, `what` was counted, its `count`, of
    how many (`of`), their `share`, and its `text`; largest share first.
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
