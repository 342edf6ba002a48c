from hypothesis import given
from hypothesis import strategies as st

from surgery.naming import paths, selectors

names = st.text(min_size=1, max_size=6)
some_paths = st.lists(names, min_size=1, max_size=4).map(tuple)


@given(some_paths)
def test_parse_reads_what_show_wrote(path):
  assert path == paths.parse(paths.show(path))


def test_slashes_and_backslashes_inside_of_names_are_escaped():
  assert 'net/a\\/b/c\\\\d' == paths.show(('net', 'a/b', 'c\\d'))


@given(some_paths, some_paths)
def test_a_literal_selector_matches_its_own_path_alone(path, other):
  if any('\0' in s for s in (*path, *other)):
    return
  read = selectors.parse(paths.literal(path))
  assert read.positive[0].param(path)
  assert (path == other) == read.positive[0].param(other)
