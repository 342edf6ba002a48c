"""What an adapter was trained on: its base, and the adapters beneath it.

An adapter answers what is right for the parameters that it was given in
training. These are what is stored and what the enabled adapters inside of it
made of that. A file of an adapter records both, and is held against the model
that it is attached to.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from surgery import errors
from surgery.adapting import merged
from surgery.editing import following
from surgery.files import arrays
from surgery.files.digest import Digester
from surgery.host.manager import Host
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.records import AdapterRecord, Records, WeightSpec
from surgery.naming import paths
from surgery.naming.paths import Path

# What the entry of an adapter in its own file says of what it was trained on.
BASE = 'base'  # Digests of the stored parameters that it rewrites, by path.
BENEATH = 'beneath'  # The adapters inside of it that were enabled, in order.
GIVEN = 'given'  # Digests of what these made of parameters, by path.
KEYS = (BASE, BENEATH, GIVEN)

_UNLESS = 'or say check_base=False.'


def digest(leaf: Leaf) -> str:
  """Returns the digest of a tensor, as recorded or computed block by block."""
  if leaf.digest is not None:
    return leaf.digest
  digester = Digester()
  for block in leaf.parts():
    for data in arrays.blocks(arrays.payload(arrays.little(np.asarray(block)))):
      digester.update(data)
  return digester.digest()


def rewritten(record: AdapterRecord) -> list[Path]:
  """Returns the parameters that an adapter rewrites."""
  return [p for one in record.sites.values() for p in following.base_of(one)]


# Recording.


def said_of(
  checkpoint: Checkpoint,
  record: AdapterRecord,
  along: Collection[Path],
  host: Host,
) -> dict[str, Any]:
  """Returns what the file of an adapter says of what it was trained on.

  Args:
    checkpoint: the model.
    record: the adapter, which is attached to it.
    along: parameters that the file holds itself, as they were trained along.
    host: whose hooks are asked.
  """
  records = checkpoint.records(host)
  inner = _beneath(records, record.name)
  return {
    BASE: {
      paths.show(path): digest(checkpoint[path])
      for path in rewritten(record)
      if path not in along
    },
    BENEATH: [_described(checkpoint, one) for one in inner],
    GIVEN: _given(checkpoint, inner, _changed(inner), host) if inner else {},
  }


def _beneath(records: Records, name: str) -> list[AdapterRecord]:
  """Returns the enabled adapters inside of one, in order."""
  before = records.adapters[: records.names.index(name)]
  return [one for one in before if one.enabled]


def _described(checkpoint: Checkpoint, record: AdapterRecord) -> dict[str, Any]:
  """Returns all that decides what an adapter does, and its name, as JSON data.

  Weights are named by their sites, since where they are stored depends on the
  adapter's name, and a file may be attached under another.
  """
  weights = {
    f'{paths.show(path)}:{name}': digest(checkpoint[spec.path])
    for path, one in record.sites.items()
    for name, spec in one.weights.items()
    if spec.path in checkpoint
  }
  for name, spec in record.shared.items():
    if spec.path in checkpoint:
      weights[f':{name}'] = digest(checkpoint[spec.path])
  for path, spec in record.saved.items():
    if spec.path in checkpoint:
      weights[paths.show(path)] = digest(checkpoint[spec.path])
  return {
    'name': record.name,
    'type': record.adapter.name,
    'config': record.adapter.config(),
    'weights': weights,
  }


def _changed(inner: Iterable[AdapterRecord]) -> list[Path]:
  """Returns the parameters that some adapters rewrite or replace."""
  return sorted({p for one in inner for p in (*rewritten(one), *one.saved)})


def _given(
  checkpoint: Checkpoint,
  inner: Sequence[AdapterRecord],
  where: Iterable[Path],
  host: Host,
) -> dict[str, str]:
  """Returns digests of parameters as some adapters answer them.

  These are the digests of the base that merging the adapters makes, so an
  adapter is known to fit that base, too. Empty where they cannot be merged.
  """
  records = checkpoint.records(host)
  names = [one.name for one in inner]
  only = records.remove(n for n in records.names if n not in names)
  alone = checkpoint.replace(records=only)
  try:
    if names:
      alone = merged.fold(alone, names, check_finite=False, host=host)
    return {paths.show(p): digest(alone[p]) for p in where if p in alone}
  except errors.SurgeryError:
    return {}


# Checking.


def is_unknown(said: Mapping[str, Any]) -> bool:
  """Whether another program wrote an adapter's file, without its base."""
  return said.get(BASE, {}) is None


def check(
  checkpoint: Checkpoint,
  record: AdapterRecord,
  said: Mapping[str, Any],
  host: Host,
) -> list[str]:
  """Raises unless a model is the one that an adapter was trained on.

  The adapters beneath must be attached and enabled, in their order. If they
  were merged since, the stored parameters have the digests of what these
  adapters answered, which is accepted as well. Further adapters are allowed if
  they and the new one only add to their base.

  Args:
    checkpoint: the model.
    record: the adapter.
    said: its entry in the manifest of its file.
    host: whose hooks are asked.

  Returns:
    The names of the attached adapters that it was trained over.

  Raises:
    BaseMismatchError: naming the parameters or adapters that differ.
  """
  _check_entry(record, said)
  given: Mapping[str, str] = {}
  found: list[AdapterRecord] | None = None
  if BENEATH in said:  # Files of older releases do not have it.
    expected = said[BENEATH]
    attached = [one for one in checkpoint.records(host).adapters if one.enabled]
    # Parameters that the new one saved itself do not depend on those beneath.
    own = {paths.show(path) for path in record.saved}
    found = _matched(checkpoint, expected, attached, own)
    if found is None:
      given = said.get(GIVEN, {})
      where = [paths.parse(shown) for shown in given]
      if not given or given != _given(checkpoint, attached, where, host):
        raise _beneath_differs(checkpoint, record, expected, own, host)
    else:
      _check_others(record, [one for one in attached if one not in found])
  _check_values(checkpoint, record, said.get(BASE, {}), given)
  return [one.name for one in found or ()]


def _check_entry(record: AdapterRecord, said: Mapping[str, Any]) -> None:
  """Raises unless what a file says can be compared.

  Raises:
    FormatError: naming what is malformed.
  """
  for key, kind in ((BASE, dict), (BENEATH, list), (GIVEN, dict)):
    if not isinstance(said.get(key, kind()), kind):
      raise errors.FormatError(
        f'manifest: adapter {record.name!r}: {key!r} should be a '
        f'{kind.__name__}, found {said[key]!r}.'
      )
  for one in said.get(BENEATH, ()):
    if not isinstance(one, dict) or not {'name', 'type'} <= set(one):
      raise errors.FormatError(
        f'manifest: adapter {record.name!r}: {BENEATH!r}: expected adapters '
        f'with name and type, found {one!r}.'
      )


def _check_values(
  checkpoint: Checkpoint,
  record: AdapterRecord,
  expected: Mapping[str, str],
  given: Mapping[str, str],
) -> None:
  """Raises unless the stored parameters have the values that they had.

  Args:
    checkpoint: the model.
    record: the adapter.
    expected: digests of what was stored, by path.
    given: what has been compared already, since it was merged and is stored
      otherwise now.

  Raises:
    BaseMismatchError: naming all that differ.
  """
  wrong = []
  for path in rewritten(record):
    shown = paths.show(path)
    if shown in given or (path in record.saved and shown not in expected):
      continue  # The file has the parameter itself.
    want, found = expected.get(shown), digest(checkpoint[path])
    if want != found:
      wrong.append((shown, want, found))
  if wrong:
    shown, want, found = wrong[0]
    more = ''
    if len(wrong) > 1:
      rest = errors.listed(shown for shown, _, _ in wrong[1:])
      more = f', and for other values of {len(wrong) - 1} more: {rest}'
    raise errors.BaseMismatchError(
      f'{shown}: adapter {record.name!r} was made for other values of this '
      f'parameter (digest {want}, found {found}){more}. Load it onto its own '
      f'base, {_UNLESS}'
    )


def _matched(
  checkpoint: Checkpoint,
  expected: Sequence[Mapping[str, Any]],
  attached: Sequence[AdapterRecord],
  own: Collection[str],
) -> list[AdapterRecord] | None:
  """Returns the attached adapters that were recorded; None if not all are.

  Args:
    checkpoint: the model.
    expected: what was recorded of the adapters, innermost first.
    attached: the adapters that take part, innermost first.
    own: weights that are not compared.
  """
  if not expected:
    return []
  found, rest = [], iter(attached)
  for one in expected:
    # Others may lie between, so each search goes on behind the last find.
    match = next(
      (
        a for a in rest if not _differences(one, _described(checkpoint, a), own)
      ),
      None,
    )
    if match is None:
      return None
    found.append(match)
  return found


# Whether it is there already.


def check_new(
  checkpoint: Checkpoint, alone: Checkpoint, record: AdapterRecord, host: Host
) -> None:
  """Raises if an adapter from a file is the very one that takes part already.

  A copy of a file is a slip, not a second adapter, and what it adds would
  count twice. Digests on record tell adapters apart; those that are missing
  are computed only where all else is equal.

  Args:
    checkpoint: the model.
    alone: the file of the adapter.
    record: the adapter.
    host: knows types of adapters.

  Raises:
    AdapterError: naming both.
  """
  for other in checkpoint.records(host).adapters:
    if not other.enabled or not _same(checkpoint, other, alone, record):
      continue
    spec = next(iter(_specs(other).values()))
    source = checkpoint[spec.path].source
    file = '' if source is None else f' (in {source.file.name})'
    raise errors.AdapterError(
      f'{alone.origin}: adapter {record.name!r} is the same as '
      f'{other.name!r}{file}, which is attached: same type, options, layers '
      'and weights, so its update would count twice. Leave one of them out; '
      'if twice is meant, give check-same: false (check_same=False).'
    )


def _specs(record: AdapterRecord) -> dict[Any, WeightSpec]:
  """Returns all weights of an adapter by what they are to it."""
  return {
    **{
      (path, weight): spec
      for path, one in record.sites.items()
      for weight, spec in one.weights.items()
    },
    **record.shared,
    **record.saved,
  }


def _same(
  checkpoint: Checkpoint,
  one: AdapterRecord,
  alone: Checkpoint,
  other: AdapterRecord,
) -> bool:
  """Whether an attached adapter is that of a file, whatever their names are."""
  mine, theirs = _specs(one), _specs(other)
  if not mine or _outline(one, mine) != _outline(other, theirs):
    return False
  pairs = [
    (checkpoint[spec.path], alone[theirs[key].path])
    for key, spec in mine.items()
    if spec.path in checkpoint
  ]
  # Shapes and recorded digests cost nothing; computing digests reads tensors,
  # so it comes last.
  if len(pairs) < len(mine) or any(_differ(a, b) for a, b in pairs):
    return False
  return all(digest(a) == digest(b) for a, b in pairs)


def _outline(record: AdapterRecord, specs: Collection[Any]) -> tuple[Any, ...]:
  """Returns what two records of one adapter have in common."""
  config = _plain(record.adapter.config())
  return record.adapter.name, config, set(record.sites), set(specs)


def _differ(a: Leaf, b: Leaf) -> bool:
  """Whether two tensors differ by what is known without reading them."""
  known = bool(a.digest and b.digest)
  return (a.shape, a.dtype) != (b.shape, b.dtype) or (
    known and a.digest != b.digest
  )


def _differences(
  expected: Mapping[str, Any], found: Mapping[str, Any], own: Collection[str]
) -> list[str]:
  """Returns what differs between an adapter on record and one that is there.

  Their names are not compared.

  Args:
    expected: the one on record.
    found: the one that is attached.
    own: weights that are not compared.
  """
  differ = [
    f'another {what} ({found[key]}, expected {expected.get(key)})'
    for key, what in (('type', 'type'), ('config', 'configuration'))
    if _plain(found[key]) != _plain(expected.get(key))
  ]
  want, has = expected.get('weights', {}), found['weights']
  names = [
    name
    for name in dict.fromkeys((*want, *has))
    if name not in own and want.get(name) != has.get(name)
  ]
  if names:
    differ.append(f'other weights ({errors.listed(names)})')
  return differ


def _plain(value: Any) -> str:
  # A configuration in memory may have tuples where one in a file has lists.
  return json.dumps(value, sort_keys=True)


def _beneath_differs(
  checkpoint: Checkpoint,
  record: AdapterRecord,
  expected: Sequence[Mapping[str, Any]],
  own: Collection[str],
  host: Host,
) -> errors.BaseMismatchError:
  """Returns the error for adapters beneath that are not as they were."""
  here = [
    (a, _described(checkpoint, a)) for a in checkpoint.records(host).adapters
  ]
  problems = [text for one in expected if (text := _problem(one, here, own))]
  shown = ', '.join(f'{o["name"]!r} ({o["type"]})' for o in expected)
  order = ', then '.join(repr(o['name']) for o in expected)
  return errors.BaseMismatchError(
    f'adapter {record.name!r} was trained over {shown}, and '
    f'{"; ".join(problems) or "they are attached in another order here"}. '
    f'Attach {order} first and enable what is disabled, or take the base that '
    f'they were merged into, {_UNLESS}'
  )


def _problem(
  one: Mapping[str, Any],
  here: Sequence[tuple[AdapterRecord, Mapping[str, Any]]],
  own: Collection[str],
) -> str | None:
  """Returns why an adapter on record is not beneath, if it is not.

  Args:
    one: the adapter on record.
    here: the attached adapters, each as a file would describe it.
    own: weights that are not compared.
  """
  match = next((a for a, s in here if not _differences(one, s, own)), None)
  if match is not None:
    return None if match.enabled else f'{match.name!r} is disabled here'
  # Another one of that name helps most: it may have been trained further.
  named = next((s for a, s in here if a.name == one['name']), None)
  if named is None:
    return f'{one["name"]!r} is not attached here'
  differ = ' and '.join(_differences(one, named, own))
  return f'{one["name"]!r} has {differ} here'


def _check_others(
  record: AdapterRecord, others: Sequence[AdapterRecord]
) -> None:
  """Raises if an adapter would lie beneath that was not there in training.

  Adapters that only add to their base may be combined: the update of each does
  not depend on the others.

  Raises:
    BaseMismatchError: naming the adapter and a parameter of both.
  """
  mine = set(rewritten(record))
  for other in others:
    both = mine.intersection(rewritten(other))
    if both and not (other.adapter.adds and record.adapter.adds):
      raise errors.BaseMismatchError(
        f'{paths.show(min(both))}: adapter {record.name!r} '
        f"('{record.adapter.name}') was not trained over {other.name!r} "
        f"('{other.adapter.name}'), which is enabled here, and they do not "
        f'only add to their base. Disable or merge {other.name!r}, {_UNLESS}'
      )
