"""The freeze policy `bitfit`: biases train, and nothing else does."""

from __future__ import annotations

import surgery


@surgery.hookimpl
def surgery_freeze_param(site: surgery.Site, policy: str) -> bool | None:
  """Says whether a parameter trains (Ben Zaken et al. 2021, arXiv 2106.10199).

  Weights of adapters do not train under it: their own policy is `adapters`.
  """
  if policy != 'bitfit':
    return None
  return site.name == 'bias'
