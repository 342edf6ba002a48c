"""Checks of values that are known only when a compiled program runs.

Under `jit` a verb cannot look at values, so it cannot raise. Such a check
becomes one of `jax.experimental.checkify`: the caller transforms the function
by `checkify.checkify` and gets an error beside its result.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import blox as bx
import jax
import jax.numpy as jnp
from jax.experimental import checkify

from surgery import errors, jaxcompat
from surgery.naming import paths
from surgery.naming.paths import Path


def refuse_nothing_to_check(verb: str, wanted: bool, option: str) -> None:
  """Raises if a verb is asked for checks that another option switches off.

  Raises:
    ConfigError: naming both options.
  """
  if not wanted:
    raise errors.ConfigError(
      f'{verb}: checkify=True asks for a check that {option} switches off. '
      'Leave one of them out.'
    )


def check_merged(after: bx.Params, merged: Iterable[Path]) -> None:
  """Checks that merged parameters are finite, where they are traced.

  Args:
    after: the params.
    merged: what adapters were folded into.
  """
  for path in merged:
    value = after[path].value
    if jaxcompat.is_traced(value):
      _check(
        path,
        ~jnp.isfinite(value),
        'the merged parameter has NaN or infinity',
      )


def check_cast(before: bx.Params, after: bx.Params) -> None:
  """Checks that what was finite is finite after a cast, where it is traced.

  Args:
    before: the params as they were.
    after: the same params in another dtype.
  """
  for path, param in after.items():
    olds = jax.tree.leaves(before[path].value)
    for old, new in zip(olds, jax.tree.leaves(param.value), strict=True):
      if new is not old and jaxcompat.is_traced(new):
        lost = jnp.isfinite(old) & ~jnp.isfinite(new)
        _check(
          path,
          lost,
          f'a finite value of {old.dtype} is none in {new.dtype}',
        )


def _check(path: Path, wrong: Any, what: str) -> None:
  # Messages are formatted when the error is thrown: braces are doubled.
  text = f'{paths.show(path)}: {what}'.replace('{', '{{').replace('}', '}}')
  first = jnp.argmax(wrong.reshape(-1)) if wrong.size else jnp.array(0)
  checkify.check(
    ~wrong.any(),
    text + ', first at index {at} of ' + f'{tuple(wrong.shape)} flattened.',
    at=first,
  )
