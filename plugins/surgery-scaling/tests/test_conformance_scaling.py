"""The laws of adapter types."""

from surgery_scaling import IA3

from surgery.testing import AdapterConformance


class TestIA3(AdapterConformance):
  adapter = IA3()
