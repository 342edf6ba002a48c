"""Drop: a model without some of its tensors."""

from __future__ import annotations

from surgery.core import selectors
from surgery.core.checkpoint import Checkpoint
from surgery.core.host import Host
from surgery.core.layers import LayerTypes
from surgery.core.selection import Selection
from surgery.passes import dropping, following
from surgery.passes.beneath import handles_adapters


@handles_adapters
def drop(
  checkpoint: Checkpoint,
  select: selectors.Text | Selection,
  *,
  layer_types: LayerTypes | None = None,
  host: Host,
) -> Checkpoint:
  """Leaves out tensors; a layer means everything beneath it.

  A parameter that an adapter rewrites takes the adapter's weights for it along;
  an adapter that has no site any more goes. `adapter:NAME` detaches an adapter.

  Args:
    checkpoint: the model.
    select: what to leave out.
    layer_types: types of layers; by default those of the checkpoint.
    host: whose hooks are asked.

  Raises:
    SelectorError: for a selector that matches nothing.
    AdapterError: if half of what an adapter needs would be left.
    SurgeryError: if half a parameter would be left, or nothing at all.

  Example:
    drop: '**/mask'
  """
  following.check_model(checkpoint, 'drop')
  gone = dropping.chosen(checkpoint, select, layer_types, 'drop', host)
  if not isinstance(select, Selection):
    items = selectors.parse(select).positive
    left = dropping.detached(checkpoint, gone, items, host)
    gone = {p for p in gone if p in left or p not in checkpoint}
    if not gone:
      return left
    checkpoint = left
  return dropping.without(checkpoint, gone, 'drop', host)
