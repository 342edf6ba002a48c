"""Detach: an adapter's weights gone, the base as it was."""

from __future__ import annotations

from collections.abc import Sequence

from surgery.adapting import removal
from surgery.adapting.beneath import handles_adapters
from surgery.host.manager import Host
from surgery.model.checkpoint import Checkpoint


@handles_adapters
def detach(
  checkpoint: Checkpoint,
  names: str | Sequence[str] | None = None,
  *,
  host: Host,
) -> Checkpoint:
  """Takes adapters off; the base is as it is stored.

  What an adapter was saved with, as a head that was trained along, goes too. A
  parameter of the base that was trained in place stays as it was trained.

  Args:
    checkpoint: the model.
    names: an adapter, several, or None for all.
    host: knows the adapters' types.

  Raises:
    AdapterError: for an unknown name.

  Example:
    detach: default
  """
  return removal.without_adapters(checkpoint, names, host)
