"""The laws of adapter types."""

from surgery_scaling import IA3, BitFit, LNTuning, TrainableTokens

from surgery.testing import AdapterConformance


class TestIA3(AdapterConformance):
  adapter = IA3()


class TestBitFit(AdapterConformance):
  adapter = BitFit()
  kinds = ('linear', 'no_bias', 'embed', 'stacked')
  unsupported = ('no_bias', 'embed')


class TestLNTuning(AdapterConformance):
  adapter = LNTuning()
  kinds = ('linear', 'norm')
  unsupported = ('linear',)


class TestTrainableTokens(AdapterConformance):
  adapter = TrainableTokens(tokens=(2, 0))
  kinds = ('embed', 'conv')
  unsupported = ('conv',)
  too_large = {'tokens': (10_000,)}
