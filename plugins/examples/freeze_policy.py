"""A freeze policy: `bitfit` lets biases train and nothing else.

Ben Zaken et al. 2021, arXiv 2106.10199.
"""

import surgery


@surgery.hookimpl
def surgery_freeze_param(site: surgery.Site, policy: str) -> bool | None:
  """Says whether a parameter trains; other policies are somebody else's."""
  if policy != 'bitfit':
    return None
  return site.name == 'bias'
