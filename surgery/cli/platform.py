"""Which of JAX's platforms the shell computes on: the CPU, unless asked.

A pass over a file is bound by reading and writing. An accelerator gains
nothing, costs seconds and gigabytes to start, and may be training something.
JAX starts every platform that it finds unless it is told before, so this is
decided before anything imports it.
"""

from __future__ import annotations

import os
import sys

from surgery.platform import CPU, DEFAULT, VARIABLE

# JAX's name for all kinds of GPU; it cannot be told to start just these.
_GPU = 'gpu'


def claim(name: str | None = None) -> None:
  """Chooses the platform of this process, before JAX looks for any.

  What is said more specifically wins: `name`, `SURGERY_PLATFORM`, then what
  JAX itself reads, `JAX_PLATFORMS` and `JAX_PLATFORM_NAME`.

  Args:
    name: a platform of JAX, e.g. `cuda` or `tpu`, or `default` for JAX's own
      choice; None for what the environment says, and the CPU if it says
      nothing.
  """
  chosen = name or os.environ.get(VARIABLE)
  if not chosen:
    said = os.environ.get('JAX_PLATFORM_NAME', '').lower()
    told = os.environ.get('JAX_PLATFORMS') or said not in ('', CPU)
    chosen = DEFAULT if told else CPU
  os.environ[VARIABLE] = chosen
  if chosen == CPU:
    _allow(CPU)
  elif chosen not in (DEFAULT, _GPU):
    # The CPU stays at hand: first weights are drawn there.
    _allow(f'{chosen},{CPU}')


def _allow(platforms: str) -> None:
  """Tells JAX which platforms there are; it starts no others."""
  os.environ['JAX_PLATFORMS'] = platforms
  # A plugin of the interpreter may have imported it before us.
  if 'jax' in sys.modules:
    sys.modules['jax'].config.update('jax_platforms', platforms)
