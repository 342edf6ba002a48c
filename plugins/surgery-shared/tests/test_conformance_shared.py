"""The laws of adapter types."""

from surgery_shared import BAT, MiSS, VBLoRA, VeRA

from surgery.testing import AdapterConformance


class TestVeRA(AdapterConformance):
  adapter = VeRA(rank=2)
  too_large = {}  # Random features may be more than there are inputs.


class TestVBLoRA(AdapterConformance):
  # Wide at the start, for its beginning to be seen in bfloat16 too.
  adapter = VBLoRA(rank=2, num_vectors=5, vector_length=2, bank_bound=1.0)
  identity = False
  kinds = ('einsum',)


class TestMiSS(AdapterConformance):
  # One that does not divide the inputs of all layers.
  adapter = MiSS(rank=3)
  kinds = ('linear', 'conv', 'stacked')


class TestMiSSOfSmallBlocks(AdapterConformance):
  adapter = MiSS(rank=2, columns=2)
  kinds = ('linear',)
  multiple_of = 2
  too_large = {'columns': 10_000}


class TestBAT(AdapterConformance):
  adapter = BAT(rank=2)
  kinds = ('linear', 'einsum')
  multiple_of = 2
