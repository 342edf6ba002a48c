"""Arithmetic that keeps what a view is: sums, scales, casts."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from surgery.aliases import Array
from surgery.contract.lowrank import NONE, RANK, shape_of
from surgery.factoring.rules.table import Table, is_number, one_view, only
from surgery.factoring.views import (
  Axes,
  Decline,
  Dropout,
  DType,
  Factor,
  Operand,
  Squared,
  Term,
  View,
  cast,
  plain,
  widens,
)

RULES = Table()
rule = RULES.rule


@rule('low_rank')
def low_rank(
  base: Operand,
  a: Operand,
  b: Operand,
  *key: Array,
  axes: tuple[Axes, ...],
  scale: float,
  dropout: float,
  training: bool = False,
) -> View:
  """Returns the base's terms and one more, for the product."""
  if isinstance(a, View) or isinstance(b, View):
    raise Decline
  if axes[0] == NONE:
    view = View((), jnp.result_type(a, b), ())
  else:
    view = base if isinstance(base, View) else plain(base)
    if axes[0] != tuple(range(view.ndim)):
      names = dict(enumerate(axes[0]))
      view = view.mapped(lambda f: f.renamed(names))
  drop = None
  if dropout and training:
    drop = Dropout(dropout, Factor(key[0], axes[3]))
  terms = [*view.terms]
  if a.shape[axes[1].index(RANK)]:
    product = (Factor(a, axes[1]), Factor(b, axes[2]))
    terms.append(Term(product, scale, (), drop))
  if not terms:
    raise Decline
  return view.like(terms, shape_of((base, a, b), axes))


@rule('convert_element_type')
def convert(view: View, *, new_dtype: Any, **_: Any) -> View:
  """Rounds the base where the cast does; factors stay as they are stored.

  They are cast when they are used, to the dtype of that arithmetic. Rounding
  them here would round them to the dtype in which the base is stored, since the
  answer to a layer ends with that cast, and a small update would be lost.
  """
  new = jnp.dtype(new_dtype)
  if not jnp.issubdtype(new, jnp.floating):
    raise Decline
  return view.like([_rounded(t, new) for t in view.terms], dtype=new)


def _rounded(term: Term, dtype: DType) -> Term:
  """Returns a base that was rounded, and a product as it is."""
  if len(term.factors) > 1:
    return term
  (base,) = term.factors
  if widens(base.value.dtype, dtype):
    return term
  base = Factor(cast(base.value, dtype), base.axes)
  return dataclasses.replace(term, factors=(base,))


@rule('neg')
def neg(view: View, **_: Any) -> View:
  """Changes the sign of scales."""
  return view.like([t.scaled(-1.0) for t in view.terms])


@rule('mul')
def mul(x: Operand, y: Operand, **_: Any) -> View:
  """Scales by a number, or by an array that is constant along some axes."""
  if not (isinstance(x, View) and isinstance(y, View)):
    view, other, _left = one_view(x, y)
    return _multiplied(view, other)
  if x is y:
    return Squared(x)
  # One of them has to be an array that is repeated: the other is scaled by it.
  if _spread(x) is not None and _spread(y) is None:
    x, y = y, x
  return _multiplied(x, y)


@rule('div')
def div(x: Operand, y: Operand, **_: Any) -> View:
  """Divides by a number, or by an array that is constant along some axes."""
  if not isinstance(x, View):
    raise Decline
  if isinstance(y, View):
    known = _spread(y)
    if known is None:
      raise Decline
    inverse = Factor(1 / cast(known.value, y.arithmetic), known.axes)
    return x.like([t.spread(inverse) for t in x.terms])
  return _multiplied(x, 1 / y)


def _spread(view: View) -> Factor | None:
  """Returns the one array that a view repeats; None if it is something else."""
  if len(view.terms) != 1:
    return None
  (term,) = view.terms
  if len(term.factors) != 1 or term.spreads or not is_number(term.scale, 1.0):
    return None
  factor = term.factors[0]
  return factor if len(factor.axes) < view.ndim else None


def _multiplied(view: View, other: Operand) -> View:
  if not isinstance(other, (jax.Array, View)) and np.ndim(other) == 0:
    # A number that is known stays one: it may be a parameter of a primitive.
    return view.like([t.scaled(float(other)) for t in view.terms])
  factor = _as_factor(other, view.ndim)
  if not factor.axes:
    return view.like([t.scaled(factor.value) for t in view.terms])
  return view.like([t.spread(factor) for t in view.terms])


def _as_factor(other: Operand, ndim: int) -> Factor:
  """Returns what a view of `ndim` axes is multiplied by, as a factor of it.

  Raises:
    Decline: if it varies along all axes, or is a view of several arrays.
  """
  if isinstance(other, View):
    factor = _spread(other)
    if factor is None:
      raise Decline
    return Factor(cast(factor.value, other.arithmetic), factor.axes)
  axes = tuple(i for i in range(other.ndim) if other.shape[i] != 1)
  if len(axes) == ndim and ndim:
    raise Decline
  return Factor(other.reshape([other.shape[i] for i in axes]), axes)


@rule('add', 'add_any')
def add(x: Operand, y: Operand, **_: Any) -> View:
  """Adds views up: their terms together; an array is a term."""
  return _sum(x, y, 1.0)


@rule('sub')
def sub(x: Operand, y: Operand, **_: Any) -> View:
  """Adds the terms of the second view with the other sign."""
  return _sum(x, y, -1.0)


def _sum(x: Operand, y: Operand, sign: float) -> View:
  views = [v if isinstance(v, View) else plain(jnp.asarray(v)) for v in (x, y)]
  if views[0].shape != views[1].shape:
    raise Decline  # One of them is repeated: rarely a kernel.
  second = [t.scaled(sign) if sign != 1.0 else t for t in views[1].terms]
  origin = tuple(dict.fromkeys((*views[0].origin, *views[1].origin)))
  dtype = jnp.promote_types(views[0].dtype, views[1].dtype)
  return View(views[0].shape, dtype, (*views[0].terms, *second), origin)


@rule('square')
def square(view: View, **_: Any) -> View:
  """Returns the square, for which `reduce_sum` has a rule."""
  return Squared(only([view]))


@rule('integer_pow')
def integer_pow(view: View, *, y: int, **_: Any) -> View:
  """Returns the square, for which `reduce_sum` has a rule."""
  if y != 2:
    raise Decline
  return Squared(only([view]))
