"""The examples obey the laws of their kinds."""

import importlib.util
import pathlib
import sys

from surgery.testing import (
  FormatConformance,
  PassConformance,
  PolicyConformance,
  TermConformance,
)

HERE = pathlib.Path(__file__).parents[1]


def example(name):
  known = f'example_{name}'
  if known in sys.modules:
    return sys.modules[known]
  spec = importlib.util.spec_from_file_location(known, HERE / f'{name}.py')
  module = sys.modules[known] = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


class TestClip(PassConformance):
  plugin = example('clip')
  name = 'clip'
  options = {'select': '**/kernel', 'at': 0.5}
  refused = [
    ({'select': '**', 'at': 0}, 'expected a bound above 0'),
    ({'select': '**'}, "'at' must be given"),
    ({'select': 'net/steps', 'at': 1}, 'expected a floating-point tensor'),
    ({'select': '**/nothing', 'at': 1}, 'nothing'),
  ]
  adapters = 'refuse'


class TestNpz(FormatConformance):
  plugin = example('npz')
  name = 'npz'
  refused = (
    'bfloat16', 'float8_e3m4', 'float8_e4m3', 'float8_e4m3b11fnuz',
    'float8_e4m3fn', 'float8_e4m3fnuz', 'float8_e5m2', 'float8_e5m2fnuz',
    'float8_e8m0fnu', 'float6_e2m3fn', 'float6_e3m2fn', 'float4_e2m1fn',
    'int2', 'int4', 'uint2', 'uint4',
    'names', 'frozen', 'metadata', 'key', 'value', 'texts', 'adapter',
  )  # fmt: skip


class TestBitFit(PolicyConformance):
  plugin = example('freeze_policy')
  name = 'bitfit'
  trains = '**/bias'


class TestLarger(TermConformance):
  plugin = example('selector_term')
  name = 'larger:1000'
  matches = 'net/large/**'
  refused = [('larger:x', 'expected a number of elements')]
