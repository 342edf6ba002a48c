"""The laws of adapter types."""

from surgery_dora import DoRA

from surgery.testing import AdapterConformance


class TestDoRA(AdapterConformance):
  adapter = DoRA(rank=2)
