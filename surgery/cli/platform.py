"""The platform of JAX on which the shell computes: the CPU by default.

A pass over a file is bound by reading and writing. An accelerator gains
nothing, costs seconds and gigabytes to start, and may be in use for training.
JAX starts every platform that it finds unless it is configured before, so this
is decided before anything imports it.
"""

from __future__ import annotations

import os
import sys

from surgery.platform import CPU, DEFAULT, VARIABLE

# JAX's name for all kinds of GPU; it has no setting that starts just these.
_GPU = 'gpu'


def claim(name: str | None = None) -> None:
  """Chooses the platform of this process, before JAX looks for any.

  The most specific setting wins: `name`, `SURGERY_PLATFORM`, then JAX's own
  `JAX_PLATFORMS` and `JAX_PLATFORM_NAME`.

  Args:
    name: a platform of JAX, e.g. `cuda` or `tpu`, or `default` for JAX's own
      choice; None for that of the environment, by default the CPU.
  """
  chosen = name or os.environ.get(VARIABLE)
  if not chosen:
    preferred = os.environ.get('JAX_PLATFORM_NAME', '').lower()
    is_set = os.environ.get('JAX_PLATFORMS') or preferred not in ('', CPU)
    chosen = DEFAULT if is_set else CPU
  os.environ[VARIABLE] = chosen
  if chosen == CPU:
    _allow(CPU)
  elif chosen not in (DEFAULT, _GPU):
    # The CPU stays available, since weights are drawn there.
    _allow(f'{chosen},{CPU}')


def _allow(platforms: str) -> None:
  """Restricts JAX to some platforms."""
  os.environ['JAX_PLATFORMS'] = platforms
  # A plugin of the interpreter may have imported it before us.
  if 'jax' in sys.modules:
    sys.modules['jax'].config.update('jax_platforms', platforms)
