"""Drop: a model without some of its tensors."""

from __future__ import annotations

from surgery.adapting import removal
from surgery.adapting.beneath import handles_adapters
from surgery.editing import following
from surgery.host.manager import Host
from surgery.model.checkpoint import Checkpoint
from surgery.model.layers import LayerTypes
from surgery.naming import selectors
from surgery.naming.selection import Selection


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
  following.check_model(checkpoint)
  gone = removal.chosen(checkpoint, select, layer_types, host)
  if not isinstance(select, Selection):
    items = selectors.parse(select).positive
    left = removal.detached(checkpoint, gone, items, host)
    gone = {p for p in gone if p in left or p not in checkpoint}
    if not gone:
      return left
    checkpoint = left
  return removal.without(checkpoint, gone, host)
