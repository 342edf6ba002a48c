"""Primitives that mark values and leave them unchanged."""

from __future__ import annotations

from typing import Any

import jax

from surgery import jaxcompat
from surgery.once import once

# The primitive that marks an answer with the path of its parameter.
TAG = 'surgery_site'
# The primitive through which adapters read the base, for `check`.
READ = 'surgery_read'


@once
def tag_primitive() -> Any:
  """Returns the primitive that marks an answer with its path."""
  same = lambda value, path: value
  tag = jaxcompat.primitive(
    TAG,
    same,
    compute=same,
    abstract=same,
    batch=lambda values, axes, path: (tag.bind(*values, path=path), *axes),
    transpose=lambda cotangent, _, path: [cotangent],
  )
  return tag


@once
def read_primitive() -> Any:
  """Returns the primitive that marks a base that an adapter reads."""
  same = lambda value: value
  read = jaxcompat.primitive(
    READ,
    same,
    compute=same,
    abstract=same,
    batch=lambda values, axes: (read.bind(*values), *axes),
    transpose=lambda cotangent, _: [cotangent],
  )
  return read


@once
def flat_primitive() -> Any:
  """Returns a primitive that keeps XLA from undoing a transposition.

  It is an optimization barrier, but not under `vmap`: behind one, XLA's
  compiler for CPU aborts at some small products that have a batch axis.
  """
  same = lambda value: value
  flat = jaxcompat.primitive(
    'surgery_flat',
    same,
    compute=jax.lax.optimization_barrier,
    abstract=same,
    batch=lambda values, axes: (*values, *axes),
    transpose=lambda cotangent, _: [flat.bind(cotangent)],
  )
  return flat
