"""Programs that run once, compiled in a hurry: compiling takes most of a test.

They differ from others by rounding alone, so they are for laws that allow it;
what is equal to the bit is compiled as users compile it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from surgery.once import once

_OPTIONS = {
  'xla_backend_optimization_level': 0,
  'xla_cpu_parallel_codegen_split_count': 1,
  'xla_cpu_use_fusion_emitters': False,
  'xla_llvm_disable_expensive_passes': True,
}


@once
def options() -> dict[str, Any]:
  """Returns options of the compiler, as far as this one knows them."""
  return {k: v for k, v in _OPTIONS.items() if _is_known(k, v)}


def _is_known(name: str, value: Any) -> bool:
  try:
    jax.jit(lambda: 0, compiler_options={name: value})()
  except Exception:  # They are of all types.
    return False
  return True


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns a function that is compiled as a whole, in a hurry."""
  return jax.jit(function, compiler_options=options())
