"""The low-rank value that `Adapter.apply` may return in place of an array.

Wherever such a value is asked for as an array, the primitive `low_rank` is
bound. By itself it computes the dense array, so it is right in any program and
under any transformation; `surgery.factored` finds it in a model's jaxpr and
keeps its factors apart.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from surgery import errors
from surgery.once import once

# For each axis of a factor the axis of the result that it owns, or one of
# these: RANK is summed over; along ROW there is a factor for each row of an
# input, for which there is no dense array.
Axes = tuple[int, ...]
RANK = -1
ROW = -2
# Axes of a base that is missing.
NONE: Axes = (-3,)


@dataclasses.dataclass(frozen=True)
class LowRank:
  """`base + scale · a·b`, kept as its factors.

  Without a base it is the product alone, from which larger ones can be put
  together: `a` and `b` of each member of a batch by `jax.vmap`, a Kronecker
  product by turning axes and joining them.

  Without `a` and `b` it is the base alone, to be scaled along rows or columns:
  of `LowRank(base).dense() * scale`, `surgery.factored` keeps scale and base
  apart, so that no gradient as large as the base is made for a scale.

  It means the same as the dense array, which `dense()` returns. Returning it
  from `apply`, or an array made from its `dense()`, lets `surgery.factored`
  keep the factors apart where that is cheaper.

  Attributes:
    base: array of shape `in_shape + out_shape`, another `LowRank`, or none.
    a: array of shape `in_shape + (rank,)`; or none, as `b`.
    b: array of shape `(rank,) + out_shape`.
    scale: factor of the product.
    dropout: probability with which `surgery.factored` drops elements of what
      goes into `a`, in training (and divides the others by `1 - dropout`). The
      dense array does not depend on it: it is the expected value.
    key: typed PRNG key of shape `()` for that; needed if `dropout` is not zero.
  """

  base: Any
  a: Any = None
  b: Any = None
  scale: float | Any = 1.0
  dropout: float = 0.0
  key: Any = None

  def dense(self) -> Any:
    """Returns the array, of shape `in_shape + out_shape`.

    Raises:
      SiteError: if the shapes of the factors do not fit together.
    """
    import jax.numpy as jnp

    base: Any = self.base
    if base is not None:
      base = base.dense() if isinstance(base, LowRank) else jnp.asarray(base)
    a, b = self._factors(base)
    shape = _product_shape(jnp.shape(a), jnp.shape(b))
    if base is not None and shape != base.shape:
      raise errors.SiteError(
        f'LowRank: a·b has shape {shape}, the base {base.shape}.'
      )
    scale = self.scale
    if not isinstance(scale, (int, float)):
      # The primitive's scale is a constant; one that is traced goes into b.
      b, scale = scale * b, 1.0
    if self.dropout and self.key is None:
      raise errors.SiteError('LowRank: dropout needs a key.')
    keys = [self.key] if self.dropout else []
    whole, *factors = _standard(jnp.ndim(a) - 1, len(shape))
    return primitive().bind(
      # A primitive takes arrays only, so a missing base is a scalar that its
      # axes, `NONE`, mark as missing.
      jnp.zeros((), jnp.result_type(a, b)) if base is None else base,
      a,
      b,
      *keys,
      axes=(NONE if base is None else whole, *factors, *((),) * len(keys)),
      scale=float(scale),
      dropout=float(self.dropout),
    )

  def _factors(self, base: Any) -> tuple[Any, Any]:
    """Returns `a` and `b`; for a base alone, factors of rank zero."""
    import jax.numpy as jnp

    if (self.a is None) != (self.b is None) or (
      self.a is None and base is None
    ):
      raise errors.SiteError(
        'LowRank: expected a base, or a and b, or all three.'
      )
    if self.a is not None:
      return self.a, self.b
    zeros = jnp.zeros((0, *base.shape), base.dtype)
    return jnp.zeros((0,), base.dtype), zeros


def _product_shape(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the shape of a product.

  Args:
    a: shape of the factor whose last axis is the rank.
    b: shape of the factor whose first axis is the rank.

  Raises:
    SiteError: if they have no common rank.
  """
  if not a or not b or a[-1] != b[0]:
    raise errors.SiteError(
      f'LowRank: a of shape {a} and b of shape {b} have no common rank: '
      'expected in_shape + (rank,) and (rank,) + out_shape.'
    )
  return a[:-1] + b[1:]


@functools.cache
def _standard(outer: int, ndim: int) -> tuple[Axes, Axes, Axes]:
  axes = tuple(range(ndim))
  return axes, (*axes[:outer], RANK), (RANK, *axes[outer:])


def contracted(
  a: Any,
  a_axes: Sequence[int],
  b: Any,
  b_axes: Sequence[int],
  precision: Any = None,
) -> Any:
  """Returns the product of two factors, with axes in ascending order.

  Args:
    a: the first factor.
    a_axes: for each of its axes that of the result, or `RANK`; axes that both
      factors own are multiplied element by element.
    b: the second factor.
    b_axes: the same of its axes.
    precision: precision of the product, as `jax.lax.dot_general` takes it.
  """
  import jax

  both = [x for x in a_axes if x in b_axes and x != RANK]
  alone = lambda axes: [x for x in axes if x not in both and x != RANK]
  product = jax.lax.dot_general(
    a,
    b,
    (
      ((a_axes.index(RANK),), (b_axes.index(RANK),)),
      ([a_axes.index(x) for x in both], [b_axes.index(x) for x in both]),
    ),
    precision=precision,
  )
  # dot_general puts shared axes first, then those of a, then those of b.
  found = [*both, *alone(a_axes), *alone(b_axes)]
  order = sorted(range(len(found)), key=found.__getitem__)
  return product if order == sorted(order) else product.transpose(order)


def spread(value: Any, axes: Sequence[int], shape: Sequence[int]) -> Any:
  """Returns an array broadcast along the axes that it does not own.

  Args:
    value: the array.
    axes: for each of its axes that of the result.
    shape: shape of the result.
  """
  import jax

  order = sorted(range(len(axes)), key=axes.__getitem__)
  if order != list(range(len(axes))):
    value = value.transpose(order)
  if len(axes) == len(shape):
    return value
  return jax.lax.broadcast_in_dim(value, tuple(shape), sorted(axes))


def shape_of(values: Sequence[Any], axes: tuple[Axes, ...]) -> tuple[int, ...]:
  """Returns the shape of a result from the arrays that own its axes."""
  sizes = {
    axis: size
    for value, owned in zip(values, axes, strict=False)  # Keys own none.
    if owned != NONE
    for axis, size in zip(owned, value.shape, strict=True)
  }
  return tuple(sizes[axis] for axis in sorted(sizes) if axis >= 0)


def dense(
  base: Any,
  a: Any,
  b: Any,
  *key: Any,
  axes: tuple[Axes, ...],
  scale: float,
  dropout: float = 0.0,
) -> Any:
  """Computes the dense array of the primitive.

  Args:
    base: array, broadcast along the axes that it does not own.
    a: array with a rank axis.
    b: array with a rank axis.
    *key: not used.
    axes: for each of the three, and a key, the axes of the result that it
      owns; `NONE` for a missing base.
    scale: factor of the product.
    dropout: not used.
  """
  del key, dropout
  if ROW in axes[1]:
    raise errors.AdapterError(
      'params are routed: each row of an input has its own adapter, so no '
      'dense parameter exists. Call surgery.factored(model), not the model.'
    )
  shape = shape_of((base, a, b), axes)
  # A rank of zero is a base alone: its bits stay, where adding zeros would
  # turn -0.0 into 0.0.
  if not a.shape[axes[1].index(RANK)] and axes[0] != NONE:
    return spread(base, axes[0], shape)
  product = contracted(a, axes[1], b, axes[2], 'highest')
  owned = sorted({x for x in (*axes[1], *axes[2]) if x != RANK})
  update = scale * spread(product, owned, shape)
  return update if axes[0] == NONE else spread(base, axes[0], shape) + update


@once
def primitive() -> Any:
  """Returns the primitive `low_rank`; JAX is imported when it is needed."""
  import jax

  from surgery import jaxcompat

  @functools.lru_cache(maxsize=4096)
  def abstract(avals: Any, axes: Any, scale: float) -> Any:
    # Traced from the dense code, so that shape, dtype, sharding and varying
    # mesh axes are what they would be without the primitive.
    closed = jax.make_jaxpr(functools.partial(dense, axes=axes, scale=scale))
    return closed(*avals).out_avals[0]

  def jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    axes, scale = params['axes'], params['scale']
    base, a, b, *_ = primals
    shape = shape_of((base, a, b), axes)
    owned = sorted({x for x in (*axes[1], *axes[2]) if x != RANK})

    def product(a: Any, b: Any) -> Any:
      made = contracted(a, axes[1], b, axes[2], 'highest')
      return scale * spread(made, owned, shape)

    # d(W + s·AB) = dW + s·(dA B + A dB). A tangent that is a symbolic zero
    # adds no term, so a frozen base costs nothing.
    moves = [not jaxcompat.is_zero(t) for t in tangents[:3]]
    moves[0] = moves[0] and axes[0] != NONE
    parts = []
    if moves[0]:
      parts.append(spread(tangents[0], axes[0], shape))
    if moves[1]:
      parts.append(product(tangents[1], b))
    if moves[2]:
      parts.append(product(a, tangents[2]))
    out = low_rank.bind(*primals, **params)
    # All tangents are zero where only the key was differentiated.
    none = jax.numpy.zeros_like(out)
    # The tangent of a narrow base is as narrow as the base, the sum may not be.
    parts = [jax.lax.convert_element_type(p, out.dtype) for p in parts]
    return out, functools.reduce(lambda x, y: x + y, parts) if parts else none

  def batch(operands: Any, dims: Any, **params: Any) -> Any:
    # The mapped axis becomes axis 0 of the result, so that the others move up
    # by one; each factor that is mapped owns it, the others are repeated.
    axes = params.pop('axes')
    moved, owned = [], []
    for value, dim, old in zip(operands, dims, axes, strict=True):
      new = [x + 1 if x >= 0 else x for x in old]
      if dim is not None and old != NONE:
        new.insert(dim, 0)
      moved.append(value)
      owned.append(tuple(new))
    if all(dim is None for dim in dims[:3]):
      # Only the keys are mapped, and keys own no axes of the result: a factor
      # is repeated to give the result its mapped axis.
      (count,) = {
        v.shape[d] for v, d in zip(operands[3:], dims[3:], strict=True)
      }
      moved[1] = jax.numpy.broadcast_to(moved[1], (count, *moved[1].shape))
      owned[1] = (0, *owned[1])
    return low_rank.bind(*moved, axes=tuple(owned), **params), 0

  low_rank = jaxcompat.primitive(
    'low_rank',
    jax.jit(dense, static_argnames=('axes', 'scale', 'dropout')),
    compute=dense,
    abstract=lambda base, a, b, *key, axes, scale, dropout: (
      base if ROW in axes[1] else abstract((base, a, b), axes, scale)
    ),
    batch=batch,
    jvp=jvp,
  )
  return low_rank
