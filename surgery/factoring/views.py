"""Views: arrays that are not computed yet, as sums of products of factors.

A view is what `surgery.factored` has in the place of an adapted parameter. Its
terms are the base (one factor) and products of two factors over a rank; each
factor owns some of the view's axes and is constant along the others. So
turning, cutting and casting a view are done to its factors, and are cheap.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias, Union

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from surgery.adapting import compute
from surgery.aliases import Array
from surgery.contract import lowrank
from surgery.contract.lowrank import RANK, ROW

Shape = tuple[int, ...]
Axes = tuple[int, ...]
Labels = tuple[Hashable, ...]
DType: TypeAlias = DTypeLike
# What a rule is given, and what it makes.
Operand: TypeAlias = Union['View', Array]


class Decline(Exception):  # noqa: N818 - not an error: the dense way is taken.
  """A rule does not know this case: the view is made dense."""


class Misrouted(Exception):  # noqa: N818 - becomes an error with advice.
  """A use in which it is not known which row has which adapter.

  Attributes:
    origin: paths of the parameters, where known.
    reason: what was found.
  """

  def __init__(self, view: View, reason: str) -> None:
    super().__init__(reason)
    self.origin = view.origin
    self.reason = reason


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
  """An array that owns some axes of a view.

  Attributes:
    value: the array.
    axes: for each of its axes that of the view, `RANK`, or `ROW`: there is
      one for each row of what it is multiplied with.
  """

  value: Array
  axes: Axes

  def owns(self, axis: int) -> bool:
    """Whether it varies along an axis of the view."""
    return axis in self.axes

  def along(self, axis: int, change: Callable[[Array, int], Array]) -> Factor:
    """Returns it with its array changed along an axis of the view."""
    return Factor(change(self.value, self.axes.index(axis)), self.axes)

  def renamed(self, names: Mapping[int, int]) -> Factor:
    """Returns it with other names for axes."""
    return Factor(self.value, tuple(names.get(x, x) for x in self.axes))


@dataclasses.dataclass(frozen=True, eq=False)
class Dropout:
  """What is done to the input of a product, in training.

  Attributes:
    rate: probability with which elements are dropped.
    key: typed PRNG keys: one, or one for each element along axes of the view,
      as the layers of a stack and the members of an ensemble have them.
  """

  rate: float
  key: Factor

  def mapped(self, change: Callable[[Factor], Factor]) -> Dropout:
    """Returns it for a view that was changed along axes."""
    return dataclasses.replace(self, key=change(self.key))

  def __call__(
    self, x: Array, labels: Labels, names: Mapping[int, Hashable]
  ) -> Array:
    """Returns an array with elements dropped, the others made larger.

    Args:
      x: the array.
      labels: labels of its axes, those of all the axes that keys own.
      names: labels of the view's axes.
    """
    keep = 1.0 - self.rate
    own = [labels.index(names[i]) for i in self.key.axes]
    front = [x.shape[i] for i in own]
    shape = [n for i, n in enumerate(x.shape) if i not in own]
    draw = lambda key: jax.random.bernoulli(key, keep, shape)
    for _ in own:
      draw = jax.vmap(draw)
    # Each key draws what it would for its part of the input alone.
    mask = jnp.moveaxis(draw(self.key.value), range(len(front)), own)
    return jnp.where(
      mask, x / jnp.asarray(keep, x.dtype), jnp.zeros((), x.dtype)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Term:
  """A summand of a view.

  Attributes:
    factors: the base alone, or two factors with a common rank.
    scale: factor of it, a number or an array of shape `()`.
    spreads: arrays by which it is multiplied, each owning some axes.
    dropout: what is done to the input of the product.
  """

  factors: tuple[Factor, ...]
  scale: float | Array = 1.0
  spreads: tuple[Factor, ...] = ()
  dropout: Dropout | None = None

  def parts(self) -> tuple[Factor, ...]:
    """Returns all that owns axes, in the order of `mapped`."""
    keys = () if self.dropout is None else (self.dropout.key,)
    return (*self.factors, *self.spreads, *keys)

  def mapped(self, change: Callable[[Factor], Factor]) -> Term:
    """Returns it with each factor changed; keys of dropout go along."""
    return dataclasses.replace(
      self,
      factors=tuple(map(change, self.factors)),
      spreads=tuple(map(change, self.spreads)),
      dropout=None if self.dropout is None else self.dropout.mapped(change),
    )

  def scaled(self, by: float | Array) -> Term:
    """Returns it multiplied by a number."""
    return dataclasses.replace(self, scale=self.scale * by)

  def spread(self, by: Factor) -> Term:
    """Returns it multiplied by an array that owns some axes."""
    return dataclasses.replace(self, spreads=(*self.spreads, by))


class View:
  """An array that is not computed yet.

  Attributes:
    shape: its shape.
    dtype: its dtype; factors may be stored in another, and are cast when used,
      see `arithmetic`.
    terms: its summands.
    origin: paths of the parameters that it was made from, where known.
    dropped: whether a term has dropout, which no dense array can do.
  """

  def __init__(
    self,
    shape: Sequence[int],
    dtype: DType,
    terms: Sequence[Term],
    origin: tuple[Any, ...] = (),
  ) -> None:
    self.shape: Shape = tuple(shape)
    self.dtype = jnp.dtype(dtype)
    self.terms = tuple(terms)
    self.origin = origin
    # Made once: the walk may need it for several uses.
    self._dense: Array | None = None

  @property
  def ndim(self) -> int:
    """Number of axes."""
    return len(self.shape)

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.shape)

  @property
  def arithmetic(self) -> np.dtype[Any]:
    """The dtype in which factors are used.

    That of the view. In 8 bits a small update would be nothing at all, so there
    it is float32.
    """
    wide = self.dtype.itemsize == 1
    return np.dtype(compute.wide(self.dtype)) if wide else self.dtype

  @property
  def dropped(self) -> bool:
    """Whether a term has dropout, which no dense array can do."""
    return any(t.dropout is not None for t in self.terms)

  @property
  def rows(self) -> int | None:
    """For how many rows it has factors of their own; None if all share them."""
    for term in self.terms:
      for factor in term.factors:
        if factor.owns(ROW):
          return int(factor.value.shape[factor.axes.index(ROW)])
    return None

  def like(
    self,
    terms: Sequence[Term],
    shape: Sequence[int] | None = None,
    dtype: DType | None = None,
  ) -> View:
    """Returns another view of the same origin."""
    return View(
      self.shape if shape is None else shape,
      self.dtype if dtype is None else dtype,
      terms,
      self.origin,
    )

  def named(self, origin: tuple[Any, ...]) -> View:
    """Returns it as made of other parameters."""
    return View(self.shape, self.dtype, self.terms, origin)

  def mapped(
    self, change: Callable[[Factor], Factor], shape: Sequence[int] | None = None
  ) -> View:
    """Returns a view with each factor changed."""
    return self.like([t.mapped(change) for t in self.terms], shape)

  def along(
    self,
    axis: int,
    change: Callable[[Array, int], Array],
    shape: Sequence[int],
  ) -> View:
    """Returns a view changed along one axis, in the factors that own it."""
    return self.mapped(
      lambda f: f.along(axis, change) if f.owns(axis) else f, shape
    )

  def dense(self) -> Array:
    """Returns the array."""
    if self._dense is None:
      self._dense = _dense(self)
    return self._dense

  def leaves(self) -> list[Array]:
    """Returns the arrays that it is made of."""
    return jax.tree.leaves(self)


class Derived(View):
  """What was made of a view by something that terms cannot say.

  Rules for views do not know it; it has rules of its own.

  Attributes:
    view: the view.
  """

  def __init__(self, view: View, shape: Sequence[int]) -> None:
    super().__init__(shape, view.dtype, (), view.origin)
    self.view = view

  def of(self, view: View) -> Derived:
    """Returns the same of another view."""
    raise NotImplementedError

  def named(self, origin: tuple[Any, ...]) -> View:
    """Returns it as made of other parameters."""
    return self.of(self.view.named(origin))

  @property
  def dropped(self) -> bool:
    """Whether a term of the view has dropout."""
    return self.view.dropped

  @property
  def rows(self) -> int | None:
    """For how many rows the view has factors of their own, if it has."""
    return self.view.rows


def _flatten(view: View) -> tuple[list[Array], tuple[Any, ...]]:
  """Returns the arrays, each once, and the static data."""
  # An array that two terms share is one leaf, so that JAX keeps it one.
  found: dict[int, int] = {}
  leaves: list[Array] = []

  def number(value: Array) -> int:
    if id(value) not in found:
      found[id(value)] = len(leaves)
      leaves.append(value)
    return found[id(value)]

  def factor(one: Factor) -> tuple[int, tuple[int, ...]]:
    return number(one.value), one.axes

  terms = tuple(
    (
      tuple(map(factor, t.factors)),
      t.scale if isinstance(t.scale, float) else None,
      None if isinstance(t.scale, float) else number(t.scale),
      tuple(map(factor, t.spreads)),
      t.dropout and (t.dropout.rate, factor(t.dropout.key)),
    )
    for t in view.terms
  )
  return leaves, (view.shape, view.dtype, terms, view.origin)


def _unflatten(aux: tuple[Any, ...], leaves: Sequence[Array]) -> View:
  shape, dtype, terms, origin = aux

  def factors(pairs: Sequence[tuple[int, Axes]]) -> tuple[Factor, ...]:
    return tuple(Factor(leaves[at], axes) for at, axes in pairs)

  return View(
    shape,
    dtype,
    [
      Term(
        factors(pairs),
        leaves[at] if scale is None else scale,
        factors(spreads),
        drop and Dropout(drop[0], factors(drop[1:])[0]),
      )
      for pairs, scale, at, spreads, drop in terms
    ],
    origin,
  )


jax.tree_util.register_pytree_node(View, _flatten, _unflatten)


class Squared(Derived):
  """The square of a view: a sum over it is cheaper than the dense array."""

  def __init__(self, view: View) -> None:
    super().__init__(view, view.shape)

  def of(self, view: View) -> Squared:
    """Returns the square of another view."""
    return Squared(view)

  def dense(self) -> Array:
    """Returns the array."""
    value = self.view.dense()
    return value * value


class Folded(Derived):
  """A view after a reshape that joined axes which different factors own.

  Kronecker products and blocks along a diagonal are made in this way.

  Attributes:
    groups: for each axis the axes of the view that it was joined from.
  """

  def __init__(self, view: View, groups: tuple[tuple[int, ...], ...]) -> None:
    sizes = [math.prod(view.shape[i] for i in group) for group in groups]
    super().__init__(view, sizes)
    self.groups = groups

  def of(self, view: View) -> Folded:
    """Returns another view with the same axes joined."""
    return Folded(view, self.groups)

  def dense(self) -> Array:
    """Returns the array."""
    return jax.lax.reshape(self.view.dense(), self.shape)


class Looked(Derived):
  """Rows that were looked up in a view, until an operation uses them.

  If that is a cast to a wider dtype, they are summed in it: an embedding's
  update is not rounded to the dtype in which the table is stored.

  Attributes:
    computed: computes the array of a view, in its arithmetic.
  """

  def __init__(self, view: View, computed: Callable[[View], Array]) -> None:
    super().__init__(view, view.shape)
    self.computed = computed

  def of(self, view: View) -> Looked:
    """Returns the rows of another view."""
    return Looked(view, self.computed)

  def dense(self) -> Array:
    """Returns the array."""
    return cast(self.computed(self.view), self.dtype)


jax.tree_util.register_pytree_node(
  Looked,
  lambda one: ((one.view,), one.computed),
  lambda computed, views: Looked(*views, computed),
)
jax.tree_util.register_pytree_node(
  Squared, lambda one: ((one.view,), None), lambda _, views: Squared(*views)
)
jax.tree_util.register_pytree_node(
  Folded,
  lambda one: ((one.view,), one.groups),
  lambda groups, views: Folded(*views, groups),
)


def plain(value: Array, dtype: DType | None = None) -> View:
  """Returns an array as a view of one term, cast to a dtype when it is used."""
  axes = tuple(range(value.ndim))
  return View(
    value.shape,
    value.dtype if dtype is None else dtype,
    [Term((Factor(value, axes),))],
  )


def cast(value: Array, dtype: DType) -> Array:
  """Returns an array in a dtype; the very array if it has it."""
  if value.dtype == dtype:
    return value
  return jax.lax.convert_element_type(value, dtype)


def widens(old: DType, new: DType) -> bool:
  """Whether each number of a floating dtype is one of another."""
  floating = (jnp.issubdtype(dtype, jnp.floating) for dtype in (old, new))
  if not all(floating):
    return False
  had, has = jnp.finfo(old), jnp.finfo(new)
  return bool(
    has.nmant >= had.nmant
    and has.maxexp >= had.maxexp
    and has.minexp <= had.minexp
  )


def times(value: Array, scale: float | Array) -> Array:
  """Returns an array times a number, in the array's dtype."""
  if isinstance(scale, jax.Array):
    return jax.lax.mul(value, cast(scale, value.dtype))
  if scale == 1.0:
    return value
  return jax.lax.mul(value, np.asarray(scale, value.dtype))


def plus(total: Array | None, value: Array) -> Array:
  """Returns a sum that has one more summand; None is an empty one."""
  return value if total is None else jax.lax.add(total, value)


def _dense(view: View) -> Array:
  wide = compute.wide(view.dtype)
  total, rest = None, view.terms
  if _begins_low_rank(view):
    # The primitive computes it, so that it has the bits that the parameter has
    # where nothing keeps it factored.
    first, rest = view.terms[:2], view.terms[2:]
    factors = [f for t in first for f in t.factors]
    total = lowrank.primitive().bind(
      *(cast(f.value, wide) for f in factors),
      axes=tuple(f.axes for f in factors),
      scale=first[1].scale,
      dropout=0.0,
    )
  for term in rest:
    total = plus(total, _dense_term(term, view.shape, wide))
  assert total is not None  # A view has a term at least.
  return cast(total, view.dtype)


def _begins_low_rank(view: View) -> bool:
  """Whether the first terms of a view are what the primitive computes."""
  first = view.terms[:2]
  if [len(t.factors) for t in first] != [1, 2]:
    return False
  owned = {x for t in first for f in t.factors for x in f.axes}
  if owned != {RANK, *range(view.ndim)} or any(t.spreads for t in first):
    return False
  # A scale that is an array is no parameter of a primitive.
  base, product = (t.scale for t in first)
  return isinstance(product, float) and isinstance(base, float) and base == 1.0


def _dense_term(term: Term, shape: Shape, dtype: DType) -> Array:
  values = [cast(f.value, dtype) for f in term.factors]
  owned: Sequence[int]
  if len(values) == 1:
    value, owned = values[0], term.factors[0].axes
  else:
    a, b = term.factors
    value = lowrank.contracted(values[0], a.axes, values[1], b.axes, 'highest')
    owned = sorted({x for x in (*a.axes, *b.axes) if x != RANK})
  value = times(lowrank.spread(value, owned, shape), term.scale)
  for by in term.spreads:
    value = value * beside(cast(by.value, dtype), by.axes, len(shape))
  return value


# Products of arrays whose axes have labels.


# Parameters of a product that is as exact as the device can.
EXACT: Mapping[str, Any] = {
  'precision': (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST),
  'out_sharding': None,
}


def beside(value: Array, axes: Sequence[int], ndim: int) -> Array:
  """Returns an array with one axis for each of a view, some of size one."""
  order = sorted(range(len(axes)), key=axes.__getitem__)
  sizes = [1] * ndim
  for at in order:
    sizes[axes[at]] = value.shape[at]
  if order != list(range(len(axes))):
    value = jax.lax.transpose(value, order)
  return jax.lax.reshape(value, sizes)
