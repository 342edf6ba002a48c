"""Merge: what adapters answer, written down as the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from surgery import errors
from surgery.adapting import merged
from surgery.adapting.beneath import handles_adapters
from surgery.host.manager import Host
from surgery.model.checkpoint import Checkpoint


@handles_adapters
def merge(
  checkpoint: Checkpoint,
  names: str | Sequence[str] | None = None,
  *,
  with_: Checkpoint | None = None,
  check_base: bool = True,
  check_same: bool = True,
  with_names: str | Sequence[str] | Mapping[str, str] | None = None,
  check_finite: bool = True,
  host: Host,
) -> Checkpoint:
  """Folds adapters into the base; their weights are gone.

  What is stored is what layers got: arithmetic in float32 or wider, rounded
  once to the dtype of the parameter.

  Args:
    checkpoint: the model.
    names: an adapter, several, or None for all.
    with_: an adapter without its base, to merge instead of what is attached.
    check_base: whether its base must have the values and the adapters beneath
      that it was trained over.
    check_same: whether it is an error that the very same adapter is attached
      and enabled.
    with_names: for one of another program: what its modules are called in this
      model, by name, as rules of `rename`, or by a map.
    check_finite: whether a result with NaN or infinity is an error.
    host: whose hooks are asked.

  Returns:
    The checkpoint without these adapters, computed when leaves are asked for.

  Raises:
    AdapterError: for an unknown name, one that is disabled, or one of which
      something is missing; or if the one from elsewhere is attached already.
    OrderError: if an adapter inside does not commute.
    SiteError: if a result is not finite.

  Example:
    merge: default
    merge: {with: tuned}
  """
  if with_ is not None:
    from surgery.passes import extract

    if names is not None:
      raise errors.AdapterError(
        'names do not go with an adapter from elsewhere, which is one.'
      )
    checkpoint = extract.insert(
      checkpoint,
      with_,
      check_base=check_base,
      check_same=check_same,
      names=with_names,
      host=host,
    )
    names = checkpoint.records(host).names[-1]
  elif with_names is not None:
    raise errors.AdapterError('merge: with-names goes with `with`.')
  return merged.fold(checkpoint, names, check_finite=check_finite, host=host)
