"""The laws of adapter types."""

from surgery_decompositions import OLoRA, PiSSA

from surgery.testing import AdapterConformance


class TestPiSSA(AdapterConformance):
  adapter = PiSSA(rank=2)


class TestOLoRA(AdapterConformance):
  adapter = OLoRA(rank=2)
  kinds = ('linear', 'conv')  # All else it shares with PiSSA.
