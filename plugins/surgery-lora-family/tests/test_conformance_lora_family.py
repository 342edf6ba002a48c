"""The laws of adapter types."""

from surgery_lora_family import DoRA, OLoRA, PiSSA

from surgery.testing import AdapterConformance


class TestDoRA(AdapterConformance):
  adapter = DoRA(rank=2)


class TestPiSSA(AdapterConformance):
  adapter = PiSSA(rank=2)


class TestOLoRA(AdapterConformance):
  adapter = OLoRA(rank=2)
  kinds = ('linear', 'conv')  # All else it shares with PiSSA.
