"""Params as a checkpoint, and back.

In memory a leaf is a parameter, whatever its value. In a file a leaf is a
tensor: a parameter whose value is a pytree becomes several, and its structure
goes to the manifest; a PRNG key becomes the array of its data.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np

from surgery import errors, jaxcompat
from surgery.host.manager import Host
from surgery.live import described, placing, sharded
from surgery.live import params as live
from surgery.model import quantised
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.manifest import Manifest
from surgery.naming import paths
from surgery.naming.paths import Path

_SCALARS = (bool, int, float, complex, str, bytes)


def _value(value: Any) -> Any:
  return value


def leaf_of(param: bx.Param, base: bool = False) -> Leaf:
  """Returns a parameter in memory as a leaf.

  Args:
    param: the parameter.
    base: whether it is known that training has not changed it.
  """
  value = param.value
  load = functools.partial(_value, value)
  flags: dict[str, Any] = {
    'trainable': param.trainable,
    'metadata': param.metadata,
    'base': base,
  }
  if described.is_key(value):
    return Leaf(load, key=_impl(value), **flags)
  shape, dtype = getattr(value, 'shape', None), getattr(value, 'dtype', None)
  if shape is None or dtype is None:
    return Leaf(load, **flags)
  scalar = isinstance(value, np.generic)
  return Leaf(
    load, tuple(shape), described.dtype_name(dtype), scalar=scalar, **flags
  )


def _impl(key: Any) -> str:
  if isinstance(key, jax.ShapeDtypeStruct):
    return str(key.dtype)  # There is nothing to save; only that it is a key.
  return str(jax.random.key_impl(key))


def to_checkpoint(params: bx.Params) -> Checkpoint:
  """Returns params as a checkpoint whose leaves are parameters."""
  notes = live.notes_of(params)
  manifest = notes.get('manifest', Manifest())
  return quantised.marked(
    Checkpoint(
      {
        path: leaf_of(param, live.is_base(params, path))
        for path, param in params.items()
      },
      manifest.replace(locked=params.is_locked, adapters=()),
      live.records_of(params),
      'params',
    )
  )


def to_params(
  checkpoint: Checkpoint, host: Host, like: bx.Params | None = None
) -> bx.Params:
  """Returns a checkpoint, whose leaves are parameters, as params.

  Args:
    checkpoint: the checkpoint.
    host: knows the adapters' types.
    like: the params that it came from, of which unchanged parameters are kept.

  Raises:
    PluginError: if a value has another shape or dtype than its leaf.
  """
  values = {path: leaf.load() for path, leaf in checkpoint.items()}
  records = checkpoint.records(host)
  fresh = {path for path, leaf in checkpoint.items() if leaf.fresh}
  values.update(placing.weights(values, records, fresh))
  data = {
    path: _param(path, leaf, values[path], like)
    for path, leaf in checkpoint.items()
  }
  _warn(checkpoint)
  notes = {} if like is None else _noted(checkpoint, like)
  if records.adapters:
    base = {p: data[p].value for p, leaf in checkpoint.items() if leaf.base}
    notes = {**notes, 'base': described.remembered(base)}
  return live.make(data, checkpoint.manifest.locked, records, notes)


def _param(
  path: Path, leaf: Leaf, value: Any, like: bx.Params | None
) -> bx.Param:
  """Returns a leaf as a parameter: the very one that it was, if unchanged."""
  old = like[path] if like is not None and path in like else None
  if old is not None and _unchanged(old, leaf, value):
    return old
  # The leaf of a key describes its data, the value is the key itself.
  wrong = None if leaf.key is not None else leaf.mismatch(value)
  if wrong is not None:
    # As when a file is written: a pass or a hook computed something else.
    raise errors.PluginError(f'{paths.show(path)}: {wrong}')
  return bx.Param(value, leaf.trainable, dict(leaf.metadata))


# Share of a model's numbers that may become zero without a warning.
_SILENT = 0.01


def _warn(checkpoint: Checkpoint) -> None:
  """Warns of findings that were made while values were computed."""
  for text in dict.fromkeys(one.text for one in checkpoint.findings):
    counts = [one.count() for one in checkpoint.findings if one.text == text]
    count, of = (sum(column) for column in zip(*counts, strict=True))
    if count > _SILENT * of:
      warnings.warn(
        f'{count / of:.2%} of the numbers that were not zero {text}.',
        RuntimeWarning,
        stacklevel=2,
      )


def _noted(checkpoint: Checkpoint, like: bx.Params) -> dict[str, Any]:
  """Returns the notes of params, with the manifest as a pass left it."""
  notes = dict(live.notes_of(like))
  if 'manifest' in notes:
    notes['manifest'] = checkpoint.manifest.replace(adapters=(), trees={})
  return notes


def _unchanged(old: bx.Param, leaf: Leaf, value: Any) -> bool:
  return (
    old.value is value
    and old.trainable == leaf.trainable
    and old.metadata == leaf.metadata
  )


# To tensors, for a file.


def _structure(value: Any, where: Path, found: dict[Path, Any]) -> Any:
  """Returns the structure of a pytree as JSON data, and collects its leaves.

  Raises:
    FormatError: for a node that a file cannot hold.
  """
  if value is None:
    return None
  if type(value) is dict:
    for key in value:
      if not isinstance(key, str):
        raise errors.FormatError(
          f'{paths.show(where)}: a dict in a parameter has the key {key!r}; '
          'only strings can be saved.'
        )
    return {
      'dict': {k: _structure(v, (*where, k), found) for k, v in value.items()}
    }
  if type(value) in (list, tuple):
    kind = type(value).__name__
    return {
      kind: [
        _structure(v, (*where, str(i)), found) for i, v in enumerate(value)
      ]
    }
  is_array = hasattr(value, 'shape') and hasattr(value, 'dtype')
  if is_array or isinstance(value, _SCALARS):
    found[where] = value
    return 'leaf'
  raise errors.FormatError(
    f'{paths.show(where)}: a value of type {type(value).__name__} cannot be '
    'saved. Use arrays, numbers, text, None, and dicts, lists and tuples of '
    'these.'
  )


def _numpy(value: Any) -> Any:
  """Returns an array, a key's data or a scalar as a file holds it."""
  if described.is_key(value):
    return np.asarray(jax.random.key_data(value))
  return np.asarray(value) if isinstance(value, jax.Array) else value


def _tensor(value: Any, leaf: Leaf) -> Leaf:
  """Returns one array of a parameter as a leaf that a file can hold."""
  load: Callable[[], Any] = functools.partial(_numpy, value)
  if isinstance(value, _SCALARS):
    return leaf.replace(load=load, shape=None, dtype=None, key=None, codes=None)
  key = _impl(value) if described.is_key(value) else None
  if key is not None:
    # Only its shape is needed here; the data are read when they are written.
    struct = jax.eval_shape(jax.random.key_data, value)
    shape, dtype = struct.shape, struct.dtype
  else:
    shape, dtype = value.shape, value.dtype
  if jaxcompat.is_traced(value):
    raise errors.SurgeryError(
      'params with traced values cannot be saved. Save outside of jit.'
    )
  if isinstance(value, jax.ShapeDtypeStruct):
    raise errors.SurgeryError(
      'params with shapes instead of values cannot be saved.'
    )
  if isinstance(value, jax.Array) and not (
    value.is_fully_addressable or value.is_fully_replicated
  ):
    raise errors.SurgeryError(
      'params that lie in part on devices of other processes cannot be saved '
      'by one of them. Save them with Orbax, to which each process writes its '
      'part, and open the folder with surgery (pip install surgery-orbax); or '
      'bring them here first: '
      'jax.experimental.multihost_utils.process_allgather(params, tiled=True).'
    )
  return leaf.replace(
    load=load,
    shape=tuple(shape),
    dtype=str(dtype),
    key=key,
    scalar=isinstance(value, np.generic),
    codes=leaf.codes,
  )


def to_tensors(checkpoint: Checkpoint) -> Checkpoint:
  """Returns a checkpoint of parameters as one of tensors, in sorted order.

  Raises:
    FormatError: for a value that a file cannot hold.
  """
  leaves: dict[Path, Leaf] = {}
  trees: dict[Path, Any] = {}
  for path in sorted(checkpoint):
    leaf = checkpoint[path]
    value = leaf.load()
    if value is None:
      leaves[path] = leaf
      continue
    found: dict[Path, Any] = {}
    structure = _structure(value, path, found)
    if structure != 'leaf':
      trees[path] = {
        'value': structure,
        'trainable': leaf.trainable,
      }
      if not found:
        # A pytree without arrays has no leaf that could hold its flags.
        trees[path]['metadata'] = dict(leaf.metadata)
    for where, one in found.items():
      leaves[where] = _tensor(one, leaf)
  return checkpoint.replace(
    leaves=leaves, manifest=checkpoint.manifest.replace(trees=trees)
  )


# From tensors.


def _array(leaf: Leaf, where: Path, shardings: sharded.Shardings = None) -> Any:
  """Returns a tensor of a file as a parameter's value, bit for bit."""
  sharding = sharded.chosen(shardings, where, leaf)
  if sharding is not None and leaf.key is None:
    return sharded.array(leaf, where, sharding)
  value = leaf.load()
  if leaf.key is not None:
    try:
      return jax.random.wrap_key_data(jnp.asarray(value), impl=leaf.key)
    except (ValueError, TypeError) as error:
      raise errors.FormatError(
        f'{paths.show(where)}: not a PRNG key of implementation {leaf.key!r}: '
        f'{error}'
      ) from None
  if not isinstance(value, np.ndarray):
    return value
  # A copy, since the memory of a mapped file may change or become invalid.
  value = np.array(value)
  if jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
    return value  # JAX would narrow it (64 bits); numpy keeps its bits.
  return jax.device_put(value)


def _rebuilt(
  structure: Any,
  where: Path,
  leaves: Mapping[Path, Leaf],
  shardings: sharded.Shardings,
) -> Any:
  if structure is None:
    return None
  if structure == 'leaf':
    if where not in leaves:
      raise errors.FormatError(
        f'{paths.show(where)}: the manifest lists this tensor, but it is not '
        'in the file.'
      )
    return _array(leaves[where], where, shardings)
  (kind, inner), *rest = structure.items()
  if kind == 'dict' and not rest:
    return {
      k: _rebuilt(s, (*where, k), leaves, shardings) for k, s in inner.items()
    }
  if kind in ('list', 'tuple') and not rest:
    values = [
      _rebuilt(s, (*where, str(i)), leaves, shardings)
      for i, s in enumerate(inner)
    ]
    return tuple(values) if kind == 'tuple' else values
  raise errors.FormatError(
    f'{paths.show(where)}: unknown structure {kind!r} in the manifest.'
  )


def _beneath(path: Path, trees: Mapping[Path, Any]) -> bool:
  return any(path[:n] in trees for n in range(1, len(path) + 1))


def from_tensors(
  checkpoint: Checkpoint,
  *,
  placed: bool = True,
  shardings: sharded.Shardings = None,
) -> Checkpoint:
  """Returns a checkpoint of tensors as one of parameters, values loaded.

  Args:
    checkpoint: the checkpoint of tensors.
    placed: whether arrays are put on JAX's default device; otherwise they
      stay on the host, until they are placed beside their bases.
    shardings: how tensors are placed on devices, see `saving.load`.

  Raises:
    FormatError: if manifest and tensors do not fit together.
  """
  trees = checkpoint.manifest.trees
  leaves: dict[Path, Leaf] = {}
  for path, leaf in checkpoint.items():
    if not _beneath(path, trees):
      if placed or leaf.key is not None:
        value = _array(leaf, path, shardings)
      else:
        value = leaf.load()
        value = np.array(value) if isinstance(value, np.ndarray) else value
      load = functools.partial(_value, value)
      leaves[path] = leaf.replace(load=load, codes=leaf.codes, fresh=not placed)
  for path, tree in trees.items():
    value = _rebuilt(tree['value'], path, checkpoint, shardings)
    first = next(
      (leaf for p, leaf in checkpoint.items() if p[: len(path)] == path), None
    )
    metadata = first.metadata if first else tree.get('metadata', {})
    leaves[path] = Leaf(
      functools.partial(_value, value),
      trainable=tree['trainable'],
      metadata=metadata,
      base=first is not None and first.base,
    )
  return checkpoint.replace(
    leaves=leaves, manifest=checkpoint.manifest.replace(trees={})
  )
