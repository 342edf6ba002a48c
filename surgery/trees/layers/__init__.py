"""Types of layers and roles of axes, framework by framework.

Each module has a function `layer_types(model, example, kwargs)`, which a `Tree`
calls; it imports its framework, which is there by then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from surgery.model.layers import LayerType

# The roles of the axes of a layer's parameters, by its class.
Roles = Mapping[str, Callable[[Any], Mapping[str, str]]]

# Classes that say nothing of a layer: they end the names of its type.
_ENDS = ('Module', 'Pytree', 'StatefulLayer', 'Generic', 'object')


def of_class(module: Any, package: str, roles: Roles) -> LayerType:
  """Returns the type of a layer, with the roles that its own package gives it.

  A layer is known by its class, not by the name of it: somebody else's `Linear`
  may have axes of any meaning.

  Args:
    module: the layer.
    package: the framework whose classes `roles` are of.
    roles: by name of the class.
  """
  names: list[str] = []
  layouts: dict[str, str] = {}
  for cls in type(module).__mro__:
    if cls.__name__ in _ENDS:
      break
    names.append(cls.__name__)
    if not layouts and cls.__module__.startswith(package):
      known = roles.get(cls.__name__)
      layouts = dict(known(module)) if known else {}
  return LayerType(tuple(names), layouts)


def general(inputs: int, outputs: int) -> Mapping[str, str]:
  """Returns the roles of a kernel of several axes: inputs first, then outputs.

  Args:
    inputs: number of axes that are summed over.
    outputs: number of axes of the result.
  """
  return {'kernel': 'i' * inputs + 'o' * outputs, 'bias': 'o' * outputs}


def einsum(equation: str | None) -> Mapping[str, str]:
  """Returns the roles of an einsum's kernel; nothing if they are not known.

  An axis of the kernel that the result has is an output, any other an input.
  One that the argument has as well is a map over axes, which no letter says.

  Args:
    equation: `argument,kernel->result`; None where the call gives it.
  """
  argument, comma, rest = (equation or '').replace(' ', '').partition(',')
  kernel, arrow, result = rest.partition('->')
  mapped = set(argument) & set(kernel) & set(result)
  if not (comma and arrow) or mapped or '...' in kernel:
    return {}
  roles = ''.join('o' if letter in result else 'i' for letter in kernel)
  return {'kernel': roles}


def transposed(spatial: int, turned: bool) -> Mapping[str, str]:
  """Returns the roles of a transposed convolution.

  Args:
    spatial: number of spatial axes.
    turned: whether the kernel has its outputs before its inputs.
  """
  return {'kernel': 'i' * spatial + ('oi' if turned else 'io'), 'bias': 'o'}


def fixed(**layouts: str) -> Callable[[Any], Mapping[str, str]]:
  """Returns roles that are the same for all layers of a class."""
  return lambda module: layouts


_NORM = fixed(scale='o', bias='o', mean='o', var='o')

# What linen and nnx call alike.
FLAX: Roles = {
  'Embed': fixed(embedding='io'),
  'Einsum': lambda module: einsum(module.einsum_str),
  'ConvTranspose': lambda module: transposed(
    len(module.kernel_size), module.transpose_kernel
  ),
  'LayerNorm': _NORM,
  'RMSNorm': _NORM,
  'BatchNorm': _NORM,
  'GroupNorm': _NORM,
  'InstanceNorm': _NORM,
}
