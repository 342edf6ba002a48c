"""The laws of adapter types."""

from surgery_orthogonal import BOFT, HRA, OFT

from surgery.testing import AdapterConformance


class TestOFT(AdapterConformance):
  adapter = OFT(block_size=3, patterns={'**/query2': {'block_size': 5}})
  kinds = ('linear', 'no_bias', 'conv')
  too_large = {'block_size': 10_000}


class TestOFTOnOtherLayers(AdapterConformance):
  adapter = OFT(block_size=3)
  kinds = ('einsum',)


class TestOFTOnStackedLayers(AdapterConformance):
  adapter = OFT(block_size=3)
  kinds = ('stacked',)
  factored = False  # A view of joined axes is made dense by scan.


class TestBOFT(AdapterConformance):
  adapter = BOFT(blocks=1, patterns={'**/query': {'blocks': 2}})
  kinds = ('linear', 'einsum')
  too_large = {'blocks': 10_000}


class TestHRA(AdapterConformance):
  adapter = HRA(rank=2)
  kinds = ('linear', 'conv', 'embed', 'stacked')
