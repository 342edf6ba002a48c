"""Through how many modules three calls go, and how often they switch.

    python benchmarks/calls.py

A call of a function of surgery in another module than the call before it is a
switch. The model has one layer; each call is made once before it is counted, so
that imports do not count. These are counts, not times: the machine does not
matter.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import blox as bx
import numpy as np

import surgery
from surgery.cli import main as shell


class Net(bx.Module):
  """One linear layer."""

  def __init__(self, graph, rng):
    super().__init__(graph)
    self.layer = bx.Linear(graph.child('layer'), 8, rng=rng)

  def __call__(self, params, x):  # noqa: D102 - it is the layer's.
    return self.layer(params, x)


def counted(call: Callable[[], object]) -> tuple[int, int]:
  """Returns the number of modules that a call goes through, and of switches."""
  met: list[str] = []

  def profile(frame, event, argument):
    name = frame.f_globals.get('__name__', '')
    if event == 'call' and name.startswith('surgery.'):
      met.append(name)

  call()
  sys.setprofile(profile)
  try:
    call()
  finally:
    sys.setprofile(None)
  switches = sum(a != b for a, b in itertools.pairwise(met))
  return len(set(met)), switches


def main() -> None:
  graph = bx.Graph('model')
  rng = bx.Rng(graph.child('rng'))
  net = Net(graph.child('net'), rng)
  x = np.ones((2, 6), np.float32)
  _, params = net(rng.seed(bx.Params(), seed=1), x)
  lora = surgery.LoRA(rank=2)
  attach = lambda: surgery.attach(params.locked(), lora, to='**/layer')
  adapted = attach()
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / 'a.msgpack'
    surgery.save(file, adapted)
    merge = ['merge', str(file), '-o', str(file) + '.msgpack', '--force', '-q']
    rows = {
      'surgery.attach(params, …)': attach,
      'surgery merge a -o b': lambda: shell.run(merge),
      'factored(model)(params, x)': lambda: surgery.factored(net)(adapted, x),
    }
    for name, call in rows.items():
      modules, switches = counted(call)
      print(f'{name:<28} {modules:3} modules {switches:5} switches')


if __name__ == '__main__':
  main()
