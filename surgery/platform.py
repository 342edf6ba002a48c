"""Where passes over files compute: what the environment says of it."""

from __future__ import annotations

import os

# The platform, by JAX's name for it, on which passes over files compute.
VARIABLE = 'SURGERY_PLATFORM'
CPU = 'cpu'
# Wherever JAX computes what lies nowhere yet.
DEFAULT = 'default'


def of_files() -> str:
  """Returns the platform on which passes over files compute."""
  return os.environ.get(VARIABLE) or CPU
