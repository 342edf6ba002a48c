"""Assert: what has to hold before anything is written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from surgery import errors
from surgery.adapting import beneath
from surgery.adapting.beneath import handles_adapters
from surgery.editing import choosing, regions, rounding, tensors
from surgery.host.manager import Host
from surgery.model import quantised
from surgery.model.checkpoint import Check, Checkpoint, Leaf
from surgery.naming import paths, selectors
from surgery.naming.paths import Path

_SHOWN = 5


# Returns why something does not hold, or None. It is given whether tensors may
# be read; if they may not, None also means that it cannot be known yet.
_Reason = Callable[[bool], str | None]


@dataclasses.dataclass(frozen=True)
class _Test:
  """Something that holds or does not.

  Attributes:
    text: what has to hold.
    reason: returns why it does not hold.
    values: whether tensors have to be read to know that it holds.
    opposite: returns why its opposite does not hold, where that is more than
      that it does.
  """

  text: str
  reason: _Reason
  values: bool = False
  opposite: _Reason | None = None


@dataclasses.dataclass(frozen=True)
class _Asked:
  """What conditions are about.

  Attributes:
    model: the checkpoint, with parameters as layers get them.
    stored: the checkpoint as it is stored.
    inputs: others by alias, with parameters as layers get them.
    original: the checkpoint before the first step.
    host: whose hooks are asked.
  """

  model: Checkpoint
  stored: Checkpoint
  inputs: tensors.Inputs
  original: Checkpoint | None
  host: Host

  def chosen(self, select: Any, missing: str = 'error') -> tuple[Path, ...]:
    """Returns the tensors that a selector means."""
    types = self.model.manifest.layer_types
    return choosing.chosen(
      self.model, select, types, self.host, missing=missing
    )


@handles_adapters
def assert_(
  checkpoint: Checkpoint,
  condition: Mapping[str, Any],
  *,
  inputs: tensors.Inputs | None = None,
  original: Checkpoint | None = None,
  host: Host,
) -> Checkpoint:
  """Raises unless something holds; nothing is changed.

  What names, shapes and dtypes tell is seen to when a recipe is planned; what
  needs values, before the first byte is written. Values are those that layers
  get, adapters and all; `unchanged-except` is about what is stored.

  | condition | holds if |
  | --- | --- |
  | `exists: SELECTOR` | it, and each alternative of it, matches something; \
under `not`, if none does |
  | `count: {of: SELECTOR, is: N}` | it, and each alternative of it, matches, \
N tensors in all |
  | `shape: {of: SELECTOR, is: [8, '*']}` | all have that shape |
  | `dtype: {of: SELECTOR, is: DTYPE}` | all have that dtype |
  | `finite: SELECTOR` | all are without NaN and infinity |
  | `zero: SELECTOR`, `zero: {of: SELECTOR, eps: E}` | no number exceeds E |
  | `equal: {of: SELECTOR, to: ALIAS, eps: E}` | those of other inputs are as \
large, but for E |
  | `equal: {of: 'OLD -> NEW', eps: E}` | two tensors of the model are |
  | `unchanged-except: SELECTOR` | all others are what the input has, bit for \
bit |
  | `all: […]`, `any: […]`, `not: …` | all, one, or none of them hold |

  Args:
    checkpoint: the model.
    condition: the condition; several are all.
    inputs: other checkpoints by alias.
    original: the model before the first step.
    host: whose hooks are asked.

  Raises:
    CheckError: if it does not hold.
    ConfigError: for a condition that cannot be read.

  Example:
    assert: {count: {of: '**/kernel', is: 48}, finite: '**'}
    assert: {not: {exists: '**/lora_a'}}
  """
  asked = _Asked(
    beneath.seen(checkpoint, host),
    checkpoint,
    beneath.Inputs(inputs or {}, host),
    original,
    host,
  )
  test = _read(condition, asked)
  # A plan must not promise what names and shapes alone make impossible.
  _raise(test, read=False)
  if not test.values:
    return checkpoint

  def run() -> None:
    _raise(test, read=True)

  return checkpoint.replace(checks=(*checkpoint.checks, Check(test.text, run)))


def _raise(test: _Test, *, read: bool) -> None:
  why = test.reason(read)
  if why is not None:
    raise errors.CheckError(f'{test.text}: {why}')


def _read(condition: Any, asked: _Asked) -> _Test:
  """Reads a condition.

  Raises:
    ConfigError: if it cannot be read.
  """
  if not isinstance(condition, Mapping) or not condition:
    raise errors.ConfigError(
      f'expected a condition such as {{exists: SELECTOR}}, found {condition!r}.'
    )
  tests = []
  for name, given in condition.items():
    if name not in _CONDITIONS:
      raise errors.ConfigError(
        f'no condition is called {name!r}.'
        f'{errors.suggest(str(name), _CONDITIONS)}'
      )
    tests.append(_CONDITIONS[name](given, asked))
  return tests[0] if len(tests) == 1 else _all(tests)


def _all(tests: Sequence[_Test]) -> _Test:
  def reason(read: bool) -> str | None:
    found = ((one, one.reason(read)) for one in tests)
    wrong = [f'{one.text}: {why}' for one, why in found if why is not None]
    return '; '.join(wrong) or None

  def opposite(read: bool) -> str | None:
    return _any([_not(one) for one in tests]).reason(read)

  text = ' and '.join(one.text for one in tests)
  return _Test(text, reason, any(one.values for one in tests), opposite)


def _any(tests: Sequence[_Test]) -> _Test:
  def reason(read: bool) -> str | None:
    wrong = []
    for one in tests:
      why = one.reason(read)
      if why is None:
        return None
      wrong.append(f'{one.text}: {why}')
    return '; '.join(wrong)

  def opposite(read: bool) -> str | None:
    return _all([_not(one) for one in tests]).reason(read)

  text = ' or '.join(one.text for one in tests)
  return _Test(text, reason, any(one.values for one in tests), opposite)


def _not(test: _Test) -> _Test:
  def reason(read: bool) -> str | None:
    if test.opposite is not None:
      return test.opposite(read)
    if test.values and not read:
      return None
    return 'it holds.' if test.reason(read) is None else None

  return _Test(f'not ({test.text})', reason, test.values, test.reason)


def _several(given: Any, asked: _Asked) -> list[_Test]:
  if not isinstance(given, Sequence) or isinstance(given, str) or not given:
    raise errors.ConfigError(f'expected a list of conditions, found {given!r}.')
  return [_read(one, asked) for one in given]


def _options(
  name: str, given: Any, *required: str, **defaults: Any
) -> dict[str, Any]:
  """Reads the options of a condition; `of` may be given alone.

  Raises:
    ConfigError: for an unknown option, or one that is missing.
  """
  if not isinstance(given, Mapping):
    given = {'of': given}
  known = ('of', *required, *defaults)
  for key in given:
    if key not in known:
      raise errors.ConfigError(
        f'{name!r} has no option {key!r}.{errors.suggest(key, known)}'
      )
  for key in ('of', *required):
    if key not in given:
      raise errors.ConfigError(f'{name!r}: {key!r} must be given.')
  found = {**defaults, **given}
  _check_text(name, found['of'])
  if not isinstance(found.get('eps', 0), (int, float)):
    raise errors.ConfigError(
      f'{name!r}: eps: expected a number, found {found["eps"]!r}.'
    )
  return found


def _check_text(name: str, select: Any) -> None:
  items = [select] if isinstance(select, str) else select
  if not isinstance(items, (list, tuple)) or not all(
    isinstance(one, str) for one in items
  ):
    raise errors.ConfigError(
      f'{name!r}: expected a selector, found {select!r}.'
    )


def _shown(select: selectors.Text) -> str:
  return select if isinstance(select, str) else ', '.join(select)


def _listed(found: Sequence[str]) -> str:
  more = len(found) - _SHOWN
  text = '; '.join(found[:_SHOWN])
  return f'{text}; and {more} more.' if more > 0 else f'{text}.'


# What names, shapes and dtypes tell.


def _exists(given: Any, asked: _Asked) -> _Test:
  select = _options('exists', given)['of']

  def reason(read: bool) -> str | None:
    del read  # It needs no values.
    try:
      asked.chosen(select)
    except errors.SelectorError as error:
      return str(error)
    return None

  def opposite(read: bool) -> str | None:
    del read  # It needs no values.
    # Of several that must not be there, one is too many.
    found = asked.chosen(select, missing='pass')
    shown = [paths.show(p) for p in found]
    return f'it holds, found {_listed(shown)}' if found else None

  return _Test(f'{_shown(select)} exists', reason, opposite=opposite)


def _count(given: Any, asked: _Asked) -> _Test:
  said = _options('count', given, 'is')
  wanted = said['is']
  if not isinstance(wanted, int):
    raise errors.ConfigError(
      f"'count': is: expected a number, found {wanted!r}."
    )

  def reason(read: bool) -> str | None:
    del read  # It needs no values.
    found = len(asked.chosen(said['of'], missing='pass'))
    if found != wanted or not wanted:
      return None if found == wanted else f'found {found}.'
    try:
      asked.chosen(said['of'])
    except errors.SelectorError as error:
      return str(error)
    return None

  return _Test(f'{wanted} tensors are {_shown(said["of"])}', reason)


def _shape(given: Any, asked: _Asked) -> _Test:
  said = _options('shape', given, 'is')
  wanted = said['is']
  if not isinstance(wanted, (list, tuple)) or not all(
    n == '*' or (isinstance(n, int) and n >= 0) for n in wanted
  ):
    raise errors.ConfigError(
      "'shape': is: expected a list of numbers, or '*' for any, found "
      f'{wanted!r}.'
    )

  def fits(leaf: Leaf) -> bool:
    shape = leaf.shape
    return (
      shape is not None
      and len(shape) == len(wanted)
      and all(w in ('*', n) for n, w in zip(shape, wanted, strict=True))
    )

  def reason(read: bool) -> str | None:
    del read  # It needs no values.
    wrong = [
      f'{paths.show(p)} is {asked.model[p]}'
      for p in asked.chosen(said['of'])
      if not fits(asked.model[p])
    ]
    return _listed(wrong) if wrong else None

  shown = ', '.join(map(str, wanted))
  return _Test(f'{_shown(said["of"])} are [{shown}]', reason)


def _dtype(given: Any, asked: _Asked) -> _Test:
  said = _options('dtype', given, 'is')
  wanted = rounding.SHORT.get(said['is'], said['is'])

  def reason(read: bool) -> str | None:
    del read  # It needs no values.
    wrong = [
      f'{paths.show(p)} is {asked.model[p]}'
      for p in asked.chosen(said['of'])
      if asked.model[p].dtype != wanted
    ]
    return _listed(wrong) if wrong else None

  return _Test(f'{_shown(said["of"])} are {wanted}', reason)


# What values tell.


def _arrays(asked: _Asked, select: Any) -> list[Path]:
  found = asked.chosen(select)
  for path in found:
    quantised.refuse(asked.model[path], 'assert')
  return [
    p
    for p in found
    if asked.model[p].shape is not None and asked.model[p].key is None
  ]


def _finite(given: Any, asked: _Asked) -> _Test:
  select = _options('finite', given)['of']
  chosen = _arrays(asked, select)

  def reason(read: bool) -> str | None:
    wrong = []
    for path in chosen if read else ():
      leaf = asked.model[path]
      if not (rounding.is_float(leaf.dtype) or 'complex' in str(leaf.dtype)):
        continue
      if any(not np.isfinite(_wide(b)).all() for _, b in regions.blocks(leaf)):
        wrong.append(f'{paths.show(path)} has NaN or infinity')
    return _listed(wrong) if wrong else None

  return _Test(f'{_shown(select)} are finite', reason, values=True)


def _wide(block: np.ndarray) -> Any:
  if block.dtype.kind in 'fcbiu':
    return block
  return block.astype(np.float32)


def _difference(a: np.ndarray, b: np.ndarray | None) -> float:
  """Returns the largest absolute difference; NaN only where one is NaN."""
  if not a.size:
    return 0.0
  kind = np.complex128 if a.dtype.kind == 'c' else np.float64
  x = a.astype(kind)
  y = np.zeros((), kind) if b is None else b.astype(kind)
  with np.errstate(invalid='ignore'):
    apart = np.abs(x - y)
  # Equal infinities, and NaN beside NaN, are no difference.
  apart = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0, apart)
  return float(apart.max()) if not np.isnan(apart).any() else math.nan


def _zero(given: Any, asked: _Asked) -> _Test:
  said = _options('zero', given, eps=0)
  chosen = _arrays(asked, said['of'])

  def reason(read: bool) -> str | None:
    wrong = []
    for path in chosen if read else ():
      most = max(
        (_difference(b, None) for _, b in regions.blocks(asked.model[path])),
        key=lambda x: math.inf if math.isnan(x) else x,
        default=0.0,
      )
      if not most <= said['eps']:
        wrong.append(f'{paths.show(path)} has {most:g}')
    return _listed(wrong) if wrong else None

  text = f'{_shown(said["of"])} are zero'
  text += f' within {said["eps"]:g}' if said['eps'] else ''
  return _Test(text, reason, values=True)


def _equal(given: Any, asked: _Asked) -> _Test:
  said = _options('equal', given, to=None, eps=0)
  compared = _compared(said, asked)
  for _, a, _, b in compared:
    if said['eps'] and a.load is not b.load:
      quantised.refuse(a, 'assert')
      quantised.refuse(b, 'assert')

  def reason(read: bool) -> str | None:
    wrong = []
    for one, a, other, b in compared:
      what = f'{one} and {other}'
      if a.shape != b.shape:
        wrong.append(f'{what}: {a} against {b}')
        continue
      if not read:
        continue
      most = _apart(a, b)
      if not most <= said['eps']:
        wrong.append(f'{what} differ by {most:g}')
    return _listed(wrong) if wrong else None

  to = said['to']
  text = f'{_shown(said["of"])} equal'
  text += '' if to is None else f' those of {_shown(to)}'
  text += f' within {said["eps"]:g}' if said['eps'] else ''
  return _Test(text, reason, values=True)


def _compared(
  said: Mapping[str, Any], asked: _Asked
) -> list[tuple[str, Leaf, str, Leaf]]:
  found = []
  if said['to'] is None:
    rules = tensors.texts(said['of'])
    for old, leaf, new, rule in tensors.pairs(asked.model, rules, asked.inputs):
      if new not in asked.model or (
        new == old and tensors.split_alias(rule)[0] is None
      ):
        raise errors.ConfigError(
          f"assert: 'equal': {rule!r}: nothing to compare {paths.show(old)} "
          "with. Give to: ALIAS, or a rule 'OLD -> NEW'."
        )
      other = asked.model[new]
      found.append((paths.show(old), leaf, paths.show(new), other))
  else:
    aliases = [said['to']] if isinstance(said['to'], str) else said['to']
    for alias in aliases:
      others = tensors.aliased(asked.model, alias, asked.inputs)
      for path in asked.chosen(said['of']):
        name = paths.show(path)
        if path not in others:
          raise errors.CheckError(
            f"assert: 'equal': {alias} has no {name}. Select other tensors."
          )
        found.append((name, asked.model[path], f"{alias}'s", others[path]))
  return [row for row in found if row[1].shape is not None]


def _apart(a: Leaf, b: Leaf) -> float:
  if a.load is b.load:
    return 0.0
  most = 0.0
  for (_, x), (_, y) in zip(regions.blocks(a), regions.blocks(b), strict=True):
    apart = _difference(x, y)
    if not apart <= most:
      most = apart
    if math.isnan(most):
      return most
  return most


def _unchanged(given: Any, asked: _Asked) -> _Test:
  select = _options('unchanged-except', given)['of']
  original = asked.original
  if original is None:
    raise errors.ConfigError(
      "assert: 'unchanged-except': there is nothing to compare with; it stands "
      'in recipes, or give original=.'
    )
  types = asked.stored.manifest.layer_types
  both = {**original, **asked.stored}
  universe = asked.stored.replace(leaves=both)
  exempt = set(choosing.chosen(universe, select, types, asked.host))

  def reason(read: bool) -> str | None:
    wrong = []
    for path in both:
      if path in exempt:
        continue
      if path not in asked.stored:
        wrong.append(f'{paths.show(path)} is gone')
      elif path not in original:
        wrong.append(f'{paths.show(path)} is new')
      elif not _same(original[path], asked.stored[path], read):
        wrong.append(f'{paths.show(path)} has changed')
    return _listed(wrong) if wrong else None

  return _Test(f'only {_shown(select)} have changed', reason, values=True)


def _same(a: Leaf, b: Leaf, read: bool) -> bool:
  """Whether two tensors have the same bytes, or may have if none is read."""
  if a.load is b.load:
    return True
  if (a.shape, a.dtype, a.key) != (b.shape, b.dtype, b.key):
    return False
  if a.shape is None:
    return bool(a.load() == b.load())
  if a.digest is not None and a.digest == b.digest:
    return True
  return not read or regions.same_bytes(a, b)


_CONDITIONS: dict[str, Callable[[Any, _Asked], _Test]] = {
  'all': lambda given, asked: _all(_several(given, asked)),
  'any': lambda given, asked: _any(_several(given, asked)),
  'count': _count,
  'dtype': _dtype,
  'equal': _equal,
  'exists': _exists,
  'finite': _finite,
  'not': lambda given, asked: _not(_read(given, asked)),
  'shape': _shape,
  'unchanged-except': _unchanged,
  'zero': _zero,
}
