"""Small primitives of ours: marks on values that change nothing of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.extend.core as jex
from jax.interpreters import ad, batching, mlir

from surgery.core.once import once

# The primitive that says which parameter a value is, for `explain`.
TAG = 'surgery_site'


@once
def tag_primitive() -> Any:
  """Returns the primitive that says which parameter a value is."""
  tag = jex.Primitive(TAG)
  tag.def_impl(lambda value, path: value)
  tag.def_abstract_eval(lambda value, path: value)
  mlir.register_lowering(tag, lambda ctx, value, path: [value])
  ad.deflinear2(tag, lambda cotangent, _, path: [cotangent])
  batching.defvectorized(tag)
  return tag


@once
def flat_primitive() -> Any:
  """Returns a primitive that keeps XLA from turning a matrix back.

  It is an optimization barrier, but not under `vmap`: behind one, XLA's
  compiler for CPU aborts at some small products that have a batch axis.
  """
  flat = jex.Primitive('surgery_flat')
  flat.def_impl(lambda value: value)
  flat.def_abstract_eval(lambda value: value)
  mlir.register_lowering(
    flat, mlir.lower_fun(jax.lax.optimization_barrier, multiple_results=False)
  )
  ad.deflinear2(flat, lambda cotangent, _: [flat.bind(cotangent)])
  batching.primitive_batchers[flat] = lambda values, axes: (*values, *axes)
  return flat
