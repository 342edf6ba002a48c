"""The laws of adapter types."""

from surgery_products import LoHa, LoKr

from surgery.testing import AdapterConformance


class TestLoHa(AdapterConformance):
  adapter = LoHa(rank=2)
  too_large = {}  # The update has a rank of up to rank² anyway.


class TestLoKr(AdapterConformance):
  adapter = LoKr(rank=1)
  too_large = {}  # A large factor is then stored as a whole.
  kinds = ('linear', 'conv')


class TestLoKrOnEinsumLayers(AdapterConformance):
  adapter = LoKr(rank=1)
  too_large = {}
  kinds = ('einsum',)
  factored = False  # Its factors divide the axes in another way.


class TestLoKrOfTaps(AdapterConformance):
  adapter = LoKr(rank=1, both=True, taps=True)
  too_large = {}
  kinds = ('conv',)
