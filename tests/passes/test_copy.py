"""Copy and move against plain numpy; live, in files, in blocks."""

import surgery
from tests.passes.structure import NET, array
from tests.passes.structure import elements as elements
from tests.recipes.models import (
  applied,
  same,
  saved,
  values,
)


def test_copy():
  after = applied(NET, {'copy': ['h/1 -> h/2', 'out -> other']})
  same(
    {
      **{k: NET[k] for k in ('h/0/a', 'h/0/b', 'h/1/a', 'h/1/b')},
      'h/2/a': NET['h/1/a'],
      'h/2/b': NET['h/1/b'],
      'other': NET['out'],
      'out': NET['out'],
    },
    {k: after[k] for k in sorted(after)},
  )


def test_copy_from_another_model(tmp_path):
  other = saved({'x/a': array(2), 'y': array(3)}, tmp_path, 'other')
  file, out = saved(NET, tmp_path), tmp_path / 'out.msgpack'
  recipe = surgery.Recipe(
    [{'copy': ['other::x/* -> x/*', 'other::y']}],
    inputs={'model': file, 'other': other},
    outputs={'out': out},
  )
  recipe.run()
  same({**NET, 'x/a': array(2), 'y': array(3)}, values(surgery.open(out)))


def test_copy_over_what_is_there():
  step = {'copy': {'rules': 'h/0 -> h/1', 'overwrite': True}}
  after = applied(NET, step)
  same({**NET, 'h/1/a': NET['h/0/a'], 'h/1/b': NET['h/0/b']}, after)


def test_move():
  after = applied(NET, {'move': {'rules': 'h/0 -> h/1', 'overwrite': True}})
  same({'h/1/a': NET['h/0/a'], 'h/1/b': NET['h/0/b'], 'out': NET['out']}, after)
