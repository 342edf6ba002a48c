"""The laws of adapter types."""

from surgery_vera import VeRA

from surgery.testing import AdapterConformance


class TestVeRA(AdapterConformance):
  adapter = VeRA(rank=2)
