"""Warnings of `factored` about parameters whose factors were lost."""

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

# Why a parameter is dense, by the kind of loss.
_REASONS = {
  Kind.USE: '{what!r} needs the dense array: `factored` has no rule for this '
  'primitive of JAX, or not for this use of it.',
  Kind.APPLY: "the adapter type's `apply` made a low-rank value dense by "
  '{what!r}: `factored` has no rule for it, or not for this use of it.',
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
    seen: parameters and reasons of earlier warnings; new ones are added.

  Raises:
    AdapterError: if it is strict and something was lost.
  """
  by_reason = _by_reason(losses)
  if strict and by_reason:
    raise errors.AdapterError(' '.join(map(_message, by_reason.items())))
  for note, where in by_reason.items():
    new = [path for path in where if (path, note) not in seen]
    if new:
      text = _message((note, new))
      warnings.warn(text, errors.DenseFallbackWarning, stacklevel=_outside())
      seen.update((path, note) for path in new)


def _by_reason(losses: Losses) -> dict[Note, list[Path]]:
  """Returns the parameters for each reason."""
  found: dict[Note, list[Path]] = {}
  for path, notes in losses.items():
    for note in notes:
      found.setdefault(note, []).append(path)
  return found


def _message(loss: tuple[Note, Sequence[Path]]) -> str:
  """Returns the message for a reason and the parameters that it is for."""
  note, where = loss
  shown = ', '.join(map(paths.show, where[:_NAMED]))
  more = f' and {len(where) - _NAMED} more' if len(where) > _NAMED else ''
  is_dense = 'is dense' if len(where) == 1 else 'are dense'
  return (
    f'factored: {shown}{more} {is_dense}: '
    f'{_REASONS[note.kind].format(what=note.what)} Results are correct, at the '
    'cost of a call without factored. surgery.explain(model, params, …) shows '
    'every parameter.'
  )


# Folders of code that is not the user's.
_LIBRARIES = tuple(
  str(folder)
  for folder in (
    pathlib.Path(__file__).parents[1],
    pathlib.Path(jax.__file__).parent,
  )
)


def _outside() -> int:
  """Returns the `stacklevel` of the code that called the factored model.

  There may be any number of frames of JAX in between.
  """
  level, frame = 1, sys._getframe(1)
  while frame.f_back and frame.f_code.co_filename.startswith(_LIBRARIES):
    level, frame = level + 1, frame.f_back
  return level
