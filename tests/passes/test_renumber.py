"""Renumber and repeat against plain numpy; live, in files, in blocks."""

from tests.passes.structure import array
from tests.passes.structure import elements as elements
from tests.recipes.models import (
  applied,
  same,
)


def test_renumber():
  net = {f'h/{i}/x': array(2, seed=i) for i in (0, 3, 11)}
  net |= {f'g/{i}/x': array(2, seed=i) for i in (1, 2)}
  after = applied(net, {'renumber': '*/<i>'})
  same(
    {
      'h/0/x': net['h/0/x'],
      'h/1/x': net['h/3/x'],
      'h/2/x': net['h/11/x'],
      'g/0/x': net['g/1/x'],
      'g/1/x': net['g/2/x'],
    },
    after,
  )


def test_renumber_keeps_the_width_and_starts_anywhere():
  net = {f'h{i:02}/x': array(2, seed=i) for i in (1, 9, 10)}
  after = applied(net, {'renumber': {'layers': 'h<i>', 'start': 8}})
  same(
    {'h08/x': net['h01/x'], 'h09/x': net['h09/x'], 'h10/x': net['h10/x']}, after
  )


def test_repeat():
  net = {'first': array(1), **{f'h/{i}/x': array(2, seed=i) for i in range(4)}}
  net['last'] = array(3)
  after = applied(net, {'repeat': {'layers': 'h/<i>', 'numbers': '1:3'}})
  order = [0, 1, 2, 1, 2, 3]
  same(
    {
      'first': net['first'],
      **{f'h/{n}/x': net[f'h/{o}/x'] for n, o in enumerate(order)},
      'last': net['last'],
    },
    after,
  )
  step = {'layers': 'h/<i>', 'numbers': [1, 2], 'times': 3, 'interleave': True}
  after = applied(net, {'repeat': step})
  order = [0, 1, 1, 1, 2, 2, 2, 3]
  same(
    {f'h/{n}/x': net[f'h/{o}/x'] for n, o in enumerate(order)},
    {k: v for k, v in after.items() if k.startswith('h/')},
  )
