"""Extracting adapters from whole models, for params and for saved ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery import errors
from surgery.adapting import finding
from surgery.aliases import Params
from surgery.editing import devices
from surgery.host.manager import Host, default_host
from surgery.live import checkpoints
from surgery.model import layers
from surgery.model.checkpoint import Checkpoint
from surgery.naming import selectors
from surgery.passes import extract_lora as passes


@devices.transfers()
def extract_lora(
  base: Params | Checkpoint,
  tuned: Params | Checkpoint,
  *,
  rank: int | Mapping[str, int] = 16,
  energy: float | Mapping[str, float] | None = None,
  max_rank: int = 64,
  to: selectors.Text = 'all',
  keep_whole: selectors.Text | None = None,
  exact: bool = False,
  seed: int = 0,
  stacked: finding.Stacked = None,
  layout: finding.Layouts = None,
  name: str = 'default',
  graph: Any = None,
  host: Host | None = None,
) -> Checkpoint:
  """Makes a LoRA of the difference of two models, nearest to it of a rank.

  What differs and is no factor, nor kept whole, is named by a warning. The
  error of each matrix, ‖Δ - A·B‖ / ‖Δ‖, is in the manifest of the result:
  `result.manifest.adapters[0]['extracted']`.

  Args:
    base: the base: params, or a `Checkpoint` as `surgery.open` gives it.
    tuned: the model that was trained from it, likewise.
    rank: rank of the update, or ranks by selector, of which the first that
      matches decides; at most the smaller side of a matrix.
    energy: instead of `rank` the share of the difference's squared norm that is
      kept at least, if `max_rank` allows it; or such shares by selector.
    max_rank: the largest rank that `energy` leads to.
    to: which layers or parameters become factors, as in `attach`.
    keep_whole: parameters whose tuned values are kept as they are; `'all'` for
      all that differ and are no factors.
    exact: whether decompositions are full ones, which takes far longer.
    seed: the seed of decompositions that are not.
    stacked: number of axes stacked in front of parameters, as in `attach`.
    layout: which axes are inputs and outputs, as in `attach`.
    name: the adapter's name.
    graph: the model's graph, for types of layers.
    host: knows the adapters' types.

  Returns:
    The adapter without its base, to be written and then attached by
    `surgery.load_adapter`.

  Raises:
    AdapterError: if a model has adapters, or has tensors that the other lacks,
      or no matrix differs.
    SiteError: for tensors of other shapes or dtypes.
    ConfigError: for a rank or an energy that cannot be.

  Example:
    alone = surgery.extract_lora(surgery.open('base'), surgery.open('tuned'))
    alone.write('adapter.safetensors')
  """
  return passes.extract_lora(
    _opened(base, 'base', graph),
    _opened(tuned, 'tuned', graph),
    rank=rank,
    energy=energy,
    max_rank=max_rank,
    to=to,
    keep_whole=keep_whole,
    exact=exact,
    seed=seed,
    stacked=stacked,
    layout=layout,
    name=name,
    host=host or default_host(),
  )


def _opened(model: Any, what: str, graph: Any) -> Checkpoint:
  """Returns a model as tensors.

  Raises:
    AdapterError: for anything else.
  """
  if not isinstance(model, Checkpoint):
    if not (hasattr(model, 'items') and hasattr(model, 'is_locked')):
      raise errors.AdapterError(
        f'{what}: expected bx.Params or a Checkpoint, found '
        f'{type(model).__name__}. Open a file with surgery.open.'
      )
    model = checkpoints.to_tensors(checkpoints.to_checkpoint(model))
  if graph is None:
    return model
  types = layers.of_graph(graph)
  return model.replace(manifest=model.manifest.replace(layer_types=types))
