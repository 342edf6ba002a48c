"""The laws of adapter types."""

from surgery_lora_family import BiasLoRA, DoRA, OLoRA, OrthogonalLoRA, PiSSA

from surgery.testing import AdapterConformance


class TestDoRA(AdapterConformance):
  adapter = DoRA(rank=2)


class TestPiSSA(AdapterConformance):
  adapter = PiSSA(rank=2)


class TestOLoRA(AdapterConformance):
  adapter = OLoRA(rank=2)
  kinds = ('linear', 'conv')  # All else it shares with PiSSA.


class TestOrthogonalLoRA(AdapterConformance):
  adapter = OrthogonalLoRA(rank=2)
  kinds = ('linear',)  # All but its beginning it shares with LoRA.


class TestBiasLoRA(AdapterConformance):
  adapter = BiasLoRA(rank=2)
  kinds = ('linear', 'no_bias', 'einsum')
  unsupported = ('no_bias',)
