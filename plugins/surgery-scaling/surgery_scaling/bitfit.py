"""BitFit: biases are all that trains."""

from __future__ import annotations

import surgery
from surgery_scaling.shifts import Shift


class BitFit(Shift):
  """Trains biases alone (Ben Zaken et al. 2021, arXiv 2106.10199).

  `bias' = bias + d` with `d` of the shape of the bias, zero at the start; the
  kernel stays. A layer means its bias, of norms too, and one without has no
  site. The freeze policy `bitfit` trains the stored biases themselves; as an
  adapter they can be switched off, saved alone and kept beside others.
  """

  name = 'bitfit'
  rewrites = ('bias',)

  def unfit(self, site: surgery.Site) -> str | None:
    """Returns why a parameter is not meant: it is no bias."""
    if site.name == 'bias':
      return None
    return (
      f'{site.name!r} is no bias; BitFit trains parameters called bias alone'
    )
