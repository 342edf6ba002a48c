"""Layers that have LoRA designed in."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import blox as bx
import jax

from surgery import errors
from surgery.adapting import compute, drawing
from surgery.builtin.lora import LoRA
from surgery.contract.site import ParamSpec, Site
from surgery.live import adoption, described
from surgery.live import params as live
from surgery.naming import paths


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
      if not params.is_locked and adoption.TAG not in params[a].metadata:
        raise errors.AdapterError(
          f'{paths.show(self.graph.path)}: the layer makes an adapter '
          f'{owner!r} of its own, and one of that name was attached to it. '
          'Attach under another name=.'
        )
      if not self.use_lora:
        value = params._answered(path, params[path].value, without=owner)
      return value, params
    if not self.use_lora or (params.is_locked and a not in params):
      return value, params
    site = self._site(params, value)
    params = self._with_weights(params, site)
    return (
      compute.step(
        # As the weights say: what is merged is what was answered.
        adoption.site_record(adoption.adapter_of(params[a]), site),
        {},
        'kernel',
        lambda _: value,
        lambda p: params[p].value,
        value.dtype,
      ),
      params,
    )

  def _site(self, params: bx.Params, kernel: Any) -> Site:
    sharding = tuple(params[self.param_path('kernel')].sharding)
    spec = ParamSpec(
      'kernel',
      tuple(kernel.shape[-2:]),
      described.dtype_name(kernel.dtype),
      'io',
      sharding[-2:] if len(sharding) == len(kernel.shape) else (),
    )
    return Site(self.graph.path, (spec,))

  def _with_weights(self, params: bx.Params, site: Site) -> bx.Params:
    """Returns params that have the weights, made at the first call."""
    for name in ('lora_a', 'lora_b'):
      if self.param_path(name) not in params:
        params = self._with_missing(params, site)
      if adoption.TAG not in params[self.param_path(name)].metadata:
        params = self._with_tag(params, site, name)
    return params

  def _with_tag(self, params: bx.Params, site: Site, name: str) -> bx.Params:
    """Returns params in which a weight that was loaded says what it is.

    Raises:
      AdapterError: if params are locked.
    """
    if params.is_locked:
      raise errors.AdapterError(
        f'{paths.show(self.param_path(name))}: it does not say which adapter '
        'it belongs to. Call the model once before params.locked().'
      )
    metadata = adoption.tag(self.adapter, site, name)
    return self.set_param(params, name, None, metadata=metadata)

  def _with_missing(self, params: bx.Params, site: Site) -> bx.Params:
    """Returns params in which no weight is missing."""
    if self.rng is None:
      raise errors.SurgeryError(
        f'{paths.show(self.graph.path)}: LoraLinear needs an Rng to draw its '
        'weights from.'
      )
    rank, side = self.adapter.rank, min(site.in_size, site.out_size)
    if rank > side:
      warnings.warn(
        f'{paths.show(self.graph.path)}: rank {rank} exceeds the smaller side '
        f'of {site.in_size}×{site.out_size}, of which rank {side} makes any '
        'update.',
        errors.SiteWarning,
        stacklevel=2,
      )
    # Folding the path in, not counting up: the base's weights, and all that
    # come after them, are those of a model without LoRA.
    place = hashlib.blake2b(
      paths.show(self.graph.path).encode(), digest_size=4
    ).digest()
    key = jax.random.fold_in(
      self.rng.get_seed(params), int.from_bytes(place, 'little')
    )
    # Two words, whatever generator the model uses.
    words = jax.random.bits(key, (1, 2), 'uint32')
    (weights,) = drawing.draw(self.adapter, [site], (), words)
    for name, value in weights.items():
      _, params = super().get_param(
        params,
        name,
        value.shape,
        lambda k, s, d, v=value: v,
        metadata=adoption.tag(self.adapter, site, name),
      )
    return params
