import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery import errors
from surgery.naming.selection import Selection

UNIVERSE: dict[tuple[str, ...], str] = {
  ('net', str(i)): f'float32[{i}]' for i in range(6)
}
selections = st.sets(st.sampled_from(sorted(UNIVERSE))).map(
  lambda chosen: Selection(UNIVERSE, chosen)
)


@given(selections, selections)
def test_operators_are_those_of_sets(a, b):
  x, y = set(a), set(b)
  assert x | y == set(a | b)
  assert x & y == set(a & b)
  assert x - y == set(a - b)
  assert set(UNIVERSE) - x == set(~a)
  assert len(x) == len(a)


@given(selections, selections)
def test_de_morgan(a, b):
  assert ~(a | b) == ~a & ~b


def test_paths_keep_the_order_of_the_model():
  chosen = Selection(UNIVERSE, [('net', '4'), ('net', '1')])
  assert (('net', '1'), ('net', '4')) == chosen.paths


def test_repr_shows_what_would_be_touched():
  chosen = Selection(UNIVERSE, [('net', '4'), ('net', '1')])
  assert 'Selection(2 of 6):\n  net/1  float32[1]\n  net/4  float32[4]' == repr(
    chosen
  )


def test_repr_of_many_is_cut():
  universe: dict[tuple[str, ...], str] = {
    ('net', str(i)): '' for i in range(100)
  }
  lines = repr(Selection(universe, universe)).splitlines()
  assert 22 == len(lines)
  assert '  … and 80 more' == lines[-1]


def test_selections_of_different_models_are_not_combined():
  a = Selection(UNIVERSE, [])
  b = Selection({('other',): ''}, [])
  with pytest.raises(errors.SelectorError, match='6 against 1 paths'):
    a | b
