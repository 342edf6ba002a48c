"""A site: the parameters of one layer that one adapter rewrites.

A parameter's axes have roles. The layout writes one letter for each: `i` for
the input, `o` for the output; what an array has in front of them is stacked
(layers under a scan, members of an ensemble). An adapter sees neither the
layout nor the stack: it gets arrays of shape `in_shape + out_shape`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from surgery import errors
from surgery.naming import paths

Shape = tuple[int, ...]


def default_layout(rank: int) -> str:
  """Returns the layout where nothing says otherwise: last against the rest."""
  return 'i' * (rank - 1) + 'o' if rank else ''


@functools.lru_cache(maxsize=256)
def _axes_of(layout: str, role: str) -> tuple[int, ...]:
  # Kept, since models of many layers have few layouts.
  return tuple(i for i, c in enumerate(layout) if c == role)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
  """What a site knows of one parameter.

  Attributes:
    name: the parameter's name in its layer.
    shape: shape as stored, without stacked axes; of PRNG keys that of the
      keys, `()` for one, in params and in files alike.
    dtype: name of the dtype as stored; empty for what is no array of numbers,
      as PRNG keys.
    layout: a letter an axis of `shape`, `i` or `o`.
    sharding: mesh axis names of the axes of `shape`, or empty.
  """

  name: str
  shape: Shape
  dtype: str
  layout: str
  sharding: tuple[Any, ...] = ()

  def _axes(self, role: str) -> tuple[int, ...]:
    return _axes_of(self.layout, role)

  @property
  def order(self) -> tuple[int, ...]:
    """Axes of `shape` in the order inputs, outputs."""
    return self._axes('i') + self._axes('o')

  @property
  def in_shape(self) -> Shape:
    """Sizes of the input axes."""
    return tuple(self.shape[a] for a in self._axes('i'))

  @property
  def out_shape(self) -> Shape:
    """Sizes of the output axes."""
    return tuple(self.shape[a] for a in self._axes('o'))

  def roles_sharding(self, role: str) -> tuple[Any, ...]:
    """Mesh axis names of the axes with a role, `i` or `o`."""
    if len(self.sharding) != len(self.shape):
      return (None,) * len(self._axes(role))
    return tuple(self.sharding[a] for a in self._axes(role))


class PathNeeded(Exception):  # noqa: N818
  """An adapter read the path of a site that several layers share."""


class _Anywhere(tuple[str, ...]):
  """The layer of a site that several layers share: reading it raises."""

  __slots__ = ()

  def _refuse(self, *args: Any) -> Any:
    del args
    raise PathNeeded

  def __reduce__(self) -> str:
    return '_ANYWHERE'  # By name, since it is recognised by identity.

  __iter__ = __getitem__ = __len__ = __contains__ = __add__ = _refuse
  __str__ = __repr__ = __format__ = __hash__ = _refuse
  __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse


_ANYWHERE = _Anywhere()


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
  """One layer's parameters that one adapter rewrites.

  Attributes:
    layer: path of the layer.
    params: what is known of the parameters; the first is the primary one, from
      which the shapes below are taken.
    types: names of the layer's class and of its bases, where known.
    known: False for the site that a hook is shown before initialisation, when
      no layer has been seen yet.
  """

  layer: paths.Path
  params: tuple[ParamSpec, ...]
  types: tuple[str, ...] = ()
  known: bool = True

  @property
  def _identity(self) -> tuple[Any, ...]:
    # The layer of an anonymous site raises whatever is done with it, so it is
    # recognised by identity and left out of the comparison.
    layer = None if self.layer is _ANYWHERE else self.layer
    return layer, self.params, self.types, self.known

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, Site):
      return NotImplemented
    return self is other or self._identity == other._identity

  def __hash__(self) -> int:
    return hash(self._identity)

  @property
  def primary(self) -> ParamSpec:
    """The parameter that gives the site its name and shapes."""
    return self.params[0]

  @property
  def name(self) -> str:
    """Name of the primary parameter."""
    return self.primary.name

  @property
  def path(self) -> paths.Path:
    """Path of the primary parameter."""
    return (*self.layer, self.name)

  @property
  def in_shape(self) -> Shape:
    """Sizes of the input axes, e.g. `(in,)`, or `(kh, kw, in)`."""
    return self.primary.in_shape

  @property
  def out_shape(self) -> Shape:
    """Sizes of the output axes, e.g. `(out,)`."""
    return self.primary.out_shape

  @property
  def in_size(self) -> int:
    """Number of inputs: the product of `in_shape`."""
    return math.prod(self.in_shape)

  @property
  def out_size(self) -> int:
    """Number of outputs: the product of `out_shape`."""
    return math.prod(self.out_shape)

  @property
  def dtype(self) -> str:
    """Name of the dtype in which the primary parameter is stored."""
    return self.primary.dtype

  def param(self, name: str) -> ParamSpec:
    """Returns what is known of a parameter of this site.

    Raises:
      SiteError: if the site has no such parameter.
    """
    for spec in self.params:
      if spec.name == name:
        return spec
    raise errors.SiteError(
      f'{paths.show(self.layer)}: the site has no parameter {name!r}, only '
      f'{", ".join(s.name for s in self.params)}. A type gets the parameters '
      'that its `rewrites` names.'
    )

  def has(self, name: str) -> bool:
    """Whether the site has a parameter of that name."""
    return any(spec.name == name for spec in self.params)

  def base(self, name: str | None = None) -> Any:
    """Returns what the inner adapters answer for a parameter.

    Args:
      name: a parameter of this site; the primary one by default.

    Returns:
      Array of shape `in_shape + out_shape` of that parameter, float32 or wider.

    Raises:
      SiteError: where no values are at hand (outside of `init` and `apply`).
    """
    raise errors.SiteError(
      f'{paths.show(self.layer)}: base({name!r}) is available only inside of '
      'init and apply.'
    )

  @functools.cached_property
  def anonymous(self) -> Site:
    """A site that all sites with the same parameters share for computing.

    Reading its path raises `PathNeeded`, since what depends on the path cannot
    be shared.
    """
    return _anonymous(self.params, self.types)

  def bind(self, base: Callable[[str], Any]) -> Site:
    """Returns this site with values behind `base`."""
    return _BoundSite(self.layer, self.params, self.types, self.known, base)

  def to_json(self) -> dict[str, Any]:
    """Returns the site as JSON data."""
    return {
      'layer': paths.show(self.layer),
      'params': [
        {
          'name': p.name,
          'shape': list(p.shape),
          'dtype': p.dtype,
          'layout': p.layout,
          'sharding': list(p.sharding),
        }
        for p in self.params
      ],
      'types': list(self.types),
    }

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> Site:
    """Returns the site that `to_json` wrote."""
    params = tuple(
      ParamSpec(
        p['name'],
        tuple(p['shape']),
        p['dtype'],
        p['layout'],
        tuple(tuple(a) if isinstance(a, list) else a for a in p['sharding']),
      )
      for p in data['params']
    )
    return cls(paths.parse(data['layer']), params, tuple(data['types']))


@functools.lru_cache(maxsize=1024)
def _anonymous(params: tuple[ParamSpec, ...], types: tuple[str, ...]) -> Site:
  # Sites with the same parameters get one object, so that comparing two of
  # them is comparing pointers. Sharding decides no number, so it is left out.
  bare = tuple(
    dataclasses.replace(p, sharding=()) if p.sharding else p for p in params
  )
  return Site(_ANYWHERE, bare, types)


@dataclasses.dataclass(frozen=True, eq=False)
class _BoundSite(Site):
  """A site with values behind `base`."""

  values: Callable[[str], Any] = dataclasses.field(
    default=lambda name: None, compare=False
  )

  def base(self, name: str | None = None) -> Any:
    spec = self.primary if name is None else self.param(name)
    return self.values(spec.name)
