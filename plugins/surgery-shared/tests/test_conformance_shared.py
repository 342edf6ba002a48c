"""The laws of adapter types."""

from surgery_shared import VBLoRA, VeRA

from surgery.testing import AdapterConformance


class TestVeRA(AdapterConformance):
  adapter = VeRA(rank=2)
  too_large = {}  # Random features may be more than there are inputs.


class TestVBLoRA(AdapterConformance):
  # Wide at the start, for its beginning to be seen in bfloat16 too.
  adapter = VBLoRA(rank=2, num_vectors=5, vector_length=2, bank_bound=1.0)
  identity = False
  kinds = ('einsum',)
