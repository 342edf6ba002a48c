"""LN tuning: scales and biases of norms are all that trains."""

from __future__ import annotations

import surgery
from surgery_scaling.peft import PeftLNTuning
from surgery_scaling.shifts import Shift


class LNTuning(Shift):
  """Trains scale and bias of norms (Zhao et al. 2023, arXiv 2312.11420).

  `scale' = scale + d` and `bias' = bias + e`, with `d` and `e` of their shapes,
  zero at the start. A layer means its `scale`, and the `bias` beside it if
  there is one: LayerNorm, RMSNorm, BatchNorm and layers like them. In files of
  other programs, where a norm keeps its scale as a vector called `weight`, name
  that parameter; its bias is then what `bitfit` trains.
  """

  name = 'ln-tuning'
  peft = PeftLNTuning()
  rewrites = ('scale', 'bias')

  def unfit(self, site: surgery.Site) -> str | None:
    """Returns why a parameter is not meant: it is no scale of a norm."""
    if site.name == 'scale':
      return None
    if site.name == 'weight' and not site.in_shape:
      return None
    return (
      f'{site.name!r} of shape {site.primary.shape} is no scale of a norm; LN '
      'tuning serves parameters called scale, and vectors called weight'
    )
