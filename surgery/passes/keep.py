"""Keep: a model with some of its tensors only."""

from __future__ import annotations

from surgery.adapting import removal
from surgery.adapting.beneath import handles_adapters
from surgery.editing import following
from surgery.host.manager import Host
from surgery.model import quantised
from surgery.model.checkpoint import Checkpoint
from surgery.model.layers import LayerTypes
from surgery.naming import selectors
from surgery.naming.selection import Selection


@handles_adapters
def keep(
  checkpoint: Checkpoint,
  select: selectors.Text | Selection,
  *,
  layer_types: LayerTypes | None = None,
  host: Host,
) -> Checkpoint:
  """Leaves out all other tensors; a layer means everything beneath it.

  What the sites of an adapter share is kept as long as one of them is, and a
  quantised weight with all of its parts.
  `!adapter:NAME` detaches an adapter.

  Args:
    checkpoint: the model.
    select: what to keep.
    layer_types: types of layers; by default those of the checkpoint.
    host: whose hooks are asked.

  Raises:
    SelectorError: for a selector that matches nothing.
    AdapterError: if half of what an adapter needs would be left.
    SurgeryError: if half a parameter would be left.

  Example:
    keep: ['encoder', '!**/mask']
  """
  following.check_model(checkpoint)
  kept = removal.chosen(checkpoint, select, layer_types, host)
  if not isinstance(select, Selection):
    items = selectors.parse(select).negative
    gone = checkpoint.keys() - kept
    checkpoint = removal.detached(checkpoint, gone, items, host)
  for record in following.settled(checkpoint, host).adapters:
    base = [
      p for site in record.sites.values() for p in following.base_of(site)
    ]
    if kept & set(base):
      kept |= {spec.path for spec in record.shared.values()}
  for of, parts in quantised.groups(checkpoint).items():
    group = {of, *parts} & checkpoint.keys()
    if kept & group:
      kept |= group
  gone = set(following.with_empty(checkpoint)) - kept
  return removal.without(checkpoint, gone, host)
