"""LoRA conforms, as everybody's types have to."""

import surgery
from surgery import testing


class TestLoRA(testing.AdapterConformance):
  adapter = surgery.LoRA(rank=2)


def test_patterns_and_scalings_conform_too():
  adapter = surgery.LoRA(
    rank=3, alpha=1.0, rslora=True, patterns={'**/query2': {'rank': 1}}
  )
  testing.check(adapter, kinds=['linear'], dtypes=['float32'])
