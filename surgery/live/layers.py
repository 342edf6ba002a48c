"""Layers that have LoRA designed in."""

from __future__ import annotations

import hashlib
from typing import Any

import blox as bx
import jax

from surgery.builtin.lora import LoRA
from surgery.core import errors, paths
from surgery.core.records import SiteRecord, WeightSpec
from surgery.core.site import ParamSpec, Site
from surgery.live import designed
from surgery.live import params as live
from surgery.passes import compute


class LoraLinear(bx.Linear):
  """A `bx.Linear` whose kernel is `W + s·A·B` from the start.

  Parameters `kernel` `(in, out)`, `bias` `(out,)`, `lora_a` `(in, rank)` and
  `lora_b` `(rank, out)`. Kernel and bias initialise bit-identically to those of
  a `bx.Linear` at the same place. `freeze`, `merge`, `disable`, `save` and the
  other verbs treat the LoRA weights as an adapter called `default`. After
  `merge` or `detach` the layer is a plain linear layer, as long as params are
  locked.

  `use_lora` is read when a call is traced, as every attribute of a module: a
  compiled function does not see it change. `surgery.disable(params)` cannot go
  stale.
  """

  def __init__(
    self,
    graph: bx.Graph,
    output_size: int,
    rng: bx.Rng,
    rank: int = 4,
    alpha: float | None = None,
    use_lora: bool = True,
    **linear: Any,
  ) -> None:
    """Initializes the layer.

    Args:
      graph: the graph node of this module.
      output_size: number of output features.
      rng: from whose seed the weights are drawn.
      rank: rank of the update.
      alpha: scale times rank; twice the rank by default.
      use_lora: whether the update takes part.
      **linear: further arguments of `bx.Linear`.

    Raises:
      ConfigError: for a rank or alpha out of range.
    """
    super().__init__(graph, output_size, rng, **linear)
    self.adapter = LoRA(rank=rank, alpha=alpha)
    self.use_lora = use_lora

  def get_param(
    self,
    params: bx.Params,
    name: str,
    *args: Any,
    **kwargs: Any,
  ) -> tuple[Any, bx.Params]:
    """Returns a parameter; the kernel with its update."""
    value, params = super().get_param(params, name, *args, **kwargs)
    if name != 'kernel':
      return value, params
    path, a = self.param_path('kernel'), self.param_path('lora_a')
    owner = live.records_of(params).owned.get(a)
    if owner is not None:
      # On record: `value` has the update in it already.
      assert isinstance(params, live.AdaptedParams)
      if not self.use_lora:
        value = params._answered(path, params[path].value, without=owner)
      return value, params
    if not self.use_lora or (params.is_locked and a not in params):
      return value, params
    params = self._with_weights(params, value)
    record = self._record(params, value)
    return (
      compute.step(
        record,
        {},
        'kernel',
        lambda _: value,
        lambda p: params[p].value,
        value.dtype,
      ),
      params,
    )

  def _site(self, kernel: Any) -> Site:
    core = tuple(kernel.shape[-2:])
    spec = ParamSpec('kernel', core, str(kernel.dtype), 'io')
    return Site(self.graph.path, (spec,))

  def _record(self, params: bx.Params, kernel: Any) -> SiteRecord:
    specs = {}
    for weight in ('lora_a', 'lora_b'):
      value = params[self.param_path(weight)].value
      specs[weight] = WeightSpec(
        self.param_path(weight), tuple(value.shape[-2:]), str(value.dtype)
      )
    return SiteRecord(self._site(kernel), specs, self.adapter)

  def _with_weights(self, params: bx.Params, kernel: Any) -> bx.Params:
    """Returns params that have the weights, made at the first call."""
    if self.param_path('lora_a') in params:
      return params
    if self.rng is None:
      raise errors.SurgeryError(
        f'{paths.show(self.graph.path)}: LoraLinear needs an Rng to draw its '
        'weights from.'
      )
    # Folding the path in, not counting up: the base's weights, and all that
    # come after them, are those of a model without LoRA.
    words = hashlib.blake2b(
      paths.show(self.graph.path).encode(), digest_size=4
    ).digest()
    key = jax.random.fold_in(
      self.rng.get_seed(params), int.from_bytes(words, 'little')
    )
    weights = self.adapter.init(self._site(kernel), key)
    for name, value in weights.items():
      _, params = super().get_param(
        params,
        name,
        value.shape,
        lambda k, s, d, v=value: v,
        metadata=designed.tag(self.adapter, 'kernel', 'io', name),
      )
    return params
