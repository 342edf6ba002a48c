"""Enable and disable: whether an adapter takes part in what layers get."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from surgery.adapting.beneath import handles_adapters
from surgery.host.manager import Host
from surgery.model.checkpoint import Checkpoint
from surgery.model.records import Records


def switched(
  records: Records, names: str | Sequence[str] | None, enabled: bool
) -> Records:
  """Returns records in which adapters are on or off.

  Raises:
    AdapterError: for an unknown name, or if two that are on would replace the
      same parameter.
  """
  for name in records.chosen(names):
    record = records.get(name)
    if record.enabled != enabled:
      records = records.replace(dataclasses.replace(record, enabled=enabled))
  records.check_standing()
  return records


@handles_adapters
def enable(
  checkpoint: Checkpoint,
  names: str | Sequence[str] | None = None,
  *,
  host: Host,
) -> Checkpoint:
  """Switches adapters on; all by default.

  Args:
    checkpoint: the model.
    names: an adapter, several, or None for all.
    host: knows the adapters' types.

  Raises:
    AdapterError: for an unknown name.

  Example:
    enable: default
  """
  records = checkpoint.records(host)
  return checkpoint.replace(records=switched(records, names, True))


@handles_adapters
def disable(
  checkpoint: Checkpoint,
  names: str | Sequence[str] | None = None,
  *,
  host: Host,
) -> Checkpoint:
  """Switches adapters off; layers get the base as it is stored.

  Their weights do not train as long as they are off; their flags stay.

  Args:
    checkpoint: the model.
    names: an adapter, several, or None for all.
    host: knows the adapters' types.

  Raises:
    AdapterError: for an unknown name.

  Example:
    disable: default
  """
  records = checkpoint.records(host)
  return checkpoint.replace(records=switched(records, names, False))
