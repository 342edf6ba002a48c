"""What an adapter was trained on, in a folder of PEFT.

PEFT does not say it. What we write does, in the metadata of the tensors, which
PEFT does not read: digests of the parameters that are adapted, by module, with
the order of their axes, since the same model has another order in JAX than in
torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from surgery import errors
from surgery.adapting import bound
from surgery.contract.peft import CONV, PeftLayer
from surgery.contract.site import ParamSpec, Site
from surgery.editing import following
from surgery.files import digest as digests
from surgery.model.checkpoint import Checkpoint
from surgery.model.records import SiteRecord
from surgery.naming import paths
from surgery.naming.paths import Path

# Where it lies in the metadata of the tensors.
KEY = '__surgery_base__'
_MODULES = 'modules'


def written(
  entry: Mapping[str, Any], layers: Mapping[str, tuple[PeftLayer, SiteRecord]]
) -> str | None:
  """Returns what is known of an adapter's base, as the metadata has it.

  Args:
    entry: what the manifest says of the adapter.
    layers: modules and their sites.
  """
  if not isinstance(entry.get(bound.BASE), dict):
    return None
  modules: dict[str, list[dict[str, Any]]] = {}
  for layer, one in layers.values():
    params = []
    for path, spec in zip(following.base_of(one), one.site.params, strict=True):
      found = entry[bound.BASE].get(paths.show(path))
      if found is not None:
        params.append(
          {
            'name': spec.name,
            'digest': found,
            'dtype': spec.dtype,
            'shape': list(spec.shape),
            'layout': spec.layout,
          }
        )
    modules[layer.name] = params
  more = {k: entry[k] for k in bound.KEYS if k != bound.BASE and k in entry}
  return json.dumps({_MODULES: modules, **more}, sort_keys=True)


def read(metadata: Mapping[str, Any], origin: str) -> dict[str, Any] | None:
  """Returns what the metadata of a folder's tensors says of its base.

  Raises:
    FormatError: if it is not what `written` makes.
  """
  text = metadata.get(KEY)
  if text is None:
    return None
  wrong = errors.FormatError(
    f'{origin}: {KEY!r} of the metadata of its tensors says what base the '
    'adapter is for, and is not what blox-surgery writes. Save the adapter '
    'again.'
  )
  try:
    said = json.loads(text)
    for params in said[_MODULES].values():
      for one in params:
        _spec(one)
        if not isinstance(one['digest'], str):
          raise wrong
  except (ValueError, KeyError, TypeError, AttributeError):
    raise wrong from None
  found: dict[str, Any] = said
  return found


def expected(
  said: Mapping[str, Any] | None,
  base: Checkpoint,
  layers: Mapping[Path, PeftLayer],
) -> dict[str, Any]:
  """Returns what an entry says of the base, in the names of a base.

  Args:
    said: what `read` returned; None if nothing is known.
    base: the model.
    layers: modules by the path of their parameter.

  Returns:
    `base`, and what else `bound` compares; `base` is None if nothing is known.
  """
  if said is None:
    return {bound.BASE: None}
  digests = {}
  for layer in layers.values():
    params = said[_MODULES].get(layer.name, [])
    for at, spec in enumerate(layer.site.params):
      if at < len(params):
        path = (*layer.site.layer, spec.name)
        digests[paths.show(path)] = _digest(params[at], base, path, layer, spec)
  more = {k: said[k] for k in bound.KEYS if k != bound.BASE and k in said}
  return {bound.BASE: digests, **more}


def _spec(one: Mapping[str, Any]) -> ParamSpec:
  shape = tuple(int(size) for size in one['shape'])
  layout = str(one['layout'])
  if len(shape) != len(layout) or set(layout) - set('io'):
    raise ValueError(one)
  return ParamSpec(str(one['name']), shape, str(one['dtype']), layout)


def _digest(
  one: Mapping[str, Any],
  base: Checkpoint,
  path: Path,
  layer: PeftLayer,
  here: ParamSpec,
) -> str:
  """Returns the digest that a parameter of the base must have.

  Where the base has the axes in another order than the base had that is on
  record, its values are brought into that order; if they are those, the digest
  is that of the parameter as it is here.
  """
  there, digest = _spec(one), str(one['digest'])
  same = (there.shape, there.layout) == (here.shape, here.layout)
  # A vector has one order, however its layer cuts it.
  if same or here is not layer.site.primary:
    return digest
  sizes = Site(layer.site.layer, (there,))
  if (there.dtype, sizes.in_size, sizes.out_size) != (
    here.dtype,
    layer.site.in_size,
    layer.site.out_size,
  ):
    return digest
  turned = _turned(np.asarray(base[path].load()), layer, there)
  if digests.digest(turned) != digest:
    return digest
  return bound.digest(base[path])


def _turned(value: Any, layer: PeftLayer, there: ParamSpec) -> Any:
  """Returns a layer's primary parameter with the axes of another one.

  Args:
    value: the parameter as it is stored here.
    layer: the layer.
    there: the parameter as it was stored.
  """
  last = layer.kind == CONV and not there.layout.startswith('o')
  other = dataclasses.replace(
    layer, site=Site(layer.site.layer, (there,)), channels_last=last
  )
  stack = value.shape[: len(layer.stack)]
  turned = []
  for one in value.reshape(-1, *value.shape[len(stack) :]):
    # Torch's order of axes is what both can be brought to.
    plain = layer.torch_inputs(one.transpose(layer.site.primary.order))
    back = other.outputs(other.inputs(layer.torch_outputs(plain)))
    turned.append(back.transpose(np.argsort(there.order)))
  return np.ascontiguousarray(np.stack(turned)).reshape(*stack, *there.shape)
