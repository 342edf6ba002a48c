"""Tie and untie: one tensor for two names, and back."""

from __future__ import annotations

from collections.abc import Sequence

from surgery import errors
from surgery.editing import regions, tensors
from surgery.host.manager import Host
from surgery.model.checkpoint import Check, Checkpoint, Leaf
from surgery.naming import paths
from surgery.naming.paths import Path
from surgery.passes.reshape import transposed


def tie(
  checkpoint: Checkpoint,
  rules: str | Sequence[str],
  *,
  transpose: bool = False,
  check: bool = True,
  host: Host,
) -> Checkpoint:
  """Leaves out tensors that are equal to others, for models that share them.

  Args:
    checkpoint: the model.
    rules: `KEPT -> LEFT_OUT`.
    transpose: whether the one that is left out is the other transposed.
    check: whether they have to be equal, which is seen to before anything is
      written.
    host: knows the adapters' types.

  Raises:
    RenameError: for a rule that matches nothing, or names what is not there.
    CheckError: when it is written, if two are not equal.

  Example:
    tie: {rules: 'embed/embedding -> head/kernel', transpose: true}
  """
  gone: set[Path] = set()
  checks: list[Check] = []
  written = tensors.texts(rules)
  for old, leaf, new, text in tensors.pairs(checkpoint, written, None):
    if new not in checkpoint or new == old:
      raise errors.RenameError(
        f'rule {text!r}: there is no other tensor {paths.show(new)}.'
      )
    regions.array(leaf, old, 'tie')
    other = checkpoint[new]
    kept = _turned(leaf, old) if transpose else leaf
    if (kept.shape, kept.dtype) != (other.shape, other.dtype):
      raise errors.SurgeryError(
        f'{paths.show(old)} is {leaf} and {paths.show(new)} is {other}; '
        'they cannot be one.'
      )
    if check:
      checks.append(_equal(kept, other, old, new))
    gone.add(new)
  result = tensors.edited(checkpoint, 'tie', gone=gone, host=host)
  return result.replace(checks=(*result.checks, *checks))


def _turned(leaf: Leaf, path: Path) -> Leaf:
  """Returns a matrix transposed."""
  if len(leaf.shape or ()) != 2:
    raise errors.SurgeryError(
      f'{paths.show(path)}: expected a matrix to transpose, found {leaf.shape}.'
    )
  return transposed(leaf, [1, 0])


def _equal(a: Leaf, b: Leaf, one: Path, other: Path) -> Check:
  text = f'{paths.show(one)} equals {paths.show(other)}'

  def run() -> None:
    if not regions.same_bytes(a, b):
      raise errors.CheckError(
        f'tie: {paths.show(one)} and {paths.show(other)} are not equal, so one '
        'cannot stand for both. Give check=false to leave out the second all '
        'the same.'
      )

  return Check(text, run)


def untie(
  checkpoint: Checkpoint,
  rules: str | Sequence[str],
  *,
  transpose: bool = False,
  host: Host,
) -> Checkpoint:
  """Copies tensors that a model shares to a second name of their own.

  Args:
    checkpoint: the model.
    rules: `OLD -> NEW`.
    transpose: whether the copy is transposed.
    host: knows the adapters' types.

  Raises:
    RenameError: for a rule that matches nothing, or a name that is taken.

  Example:
    untie: {rules: 'embed/embedding -> head/kernel', transpose: true}
  """
  fresh: dict[Path, Leaf] = {}
  behind: dict[Path, Path] = {}
  written = tensors.texts(rules)
  for old, leaf, new, text in tensors.pairs(checkpoint, written, None):
    if new in fresh:
      raise errors.RenameError(
        f'rule {text!r}: two tensors would be {paths.show(new)}.'
      )
    regions.array(leaf, old, 'untie')
    made = _turned(leaf, old) if transpose else leaf
    fresh[new] = tensors.as_new(made)
    behind[new] = old
  return tensors.edited(
    checkpoint, 'untie', fresh=fresh, behind=behind, host=host
  )
