"""What `factored` says where a parameter's factors were lost."""

from __future__ import annotations

import pathlib
import sys
import warnings
from collections.abc import Mapping, Sequence

import jax

from surgery import errors
from surgery.factoring.walking import Kind, Note
from surgery.naming import paths
from surgery.naming.paths import Path

# What is said of each kind of loss, after the parameters.
_REASONS = {
  Kind.USE: '{what!r} needs the dense array: `factored` has no rule for this '
  'primitive of JAX, or not for this use of it.',
  Kind.APPLY: "the adapter type's `apply` made a low-rank value dense, by "
  '{what!r}, for which `factored` has no rule, or not for this use.',
  Kind.CALL: '{what}, so the call was not followed.',
  Kind.FAILURE: 'surgery itself failed: {what}. Nothing is wrong with the '
  'model. See docs/compatibility.md if JAX is newer than surgery; please '
  'report it otherwise.',
}
# How many parameters a message names.
_NAMED = 10

Losses = Mapping[Path, Sequence[Note]]
Seen = set[tuple[Path, Note]]


def report(losses: Losses, *, strict: bool, seen: Seen) -> None:
  """Warns of parameters that lost their factors, once for each reason.

  Args:
    losses: for each parameter the reasons.
    strict: whether it is an error.
    seen: what was warned of before; what is new is added.

  Raises:
    AdapterError: if it is strict and something was lost.
  """
  by_reason: dict[Note, list[Path]] = {}
  for path, notes in losses.items():
    for note in notes:
      by_reason.setdefault(note, []).append(path)
  if strict and by_reason:
    said = ' '.join(_message(note, some) for note, some in by_reason.items())
    raise errors.AdapterError(said)
  for note, some in by_reason.items():
    new = [path for path in some if (path, note) not in seen]
    if new:
      text = _message(note, new)
      warnings.warn(text, errors.DenseFallbackWarning, stacklevel=_outside())
      seen.update((path, note) for path in new)


def _message(note: Note, where: Sequence[Path]) -> str:
  shown = ', '.join(map(paths.show, where[:_NAMED]))
  more = f' and {len(where) - _NAMED} more' if len(where) > _NAMED else ''
  is_dense = 'is dense' if len(where) == 1 else 'are dense'
  return (
    f'factored: {shown}{more} {is_dense}: '
    f'{_REASONS[note.kind].format(what=note.what)} Results are right, and cost '
    'as much as without factored; surgery.explain(model, params, …) shows '
    'every parameter.'
  )


# Where no user's code lies.
_LIBRARIES = tuple(
  str(folder)
  for folder in (
    pathlib.Path(__file__).parents[1],
    pathlib.Path(jax.__file__).parent,
  )
)


def _outside() -> int:
  """Returns the `stacklevel` of the code that called the factored model.

  Between it and us there may be any number of frames of JAX.
  """
  level, frame = 1, sys._getframe(1)
  while frame.f_back and frame.f_code.co_filename.startswith(_LIBRARIES):
    level, frame = level + 1, frame.f_back
  return level
