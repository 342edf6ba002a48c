"""Where an error was is added on its way up, and nothing of it is lost."""

import pickle

import pytest

import surgery
from surgery import errors


class Custom(surgery.SurgeryError):
  """A plugin's own, which takes more than a message."""

  def __init__(self, message, code):
    super().__init__(message)
    self.code = code


def raised(error, *places):
  with pytest.raises(type(error)) as caught:
    for_all(error, places)
  return caught.value


def for_all(error, places):
  if not places:
    raise error
  with errors.within(places[0]):
    for_all(error, places[1:])


def test_places_are_said_from_the_outside_in():
  error = raised(surgery.SiteError('too small.'), 'r.yaml:3', 'net/kernel')
  assert 'r.yaml:3: net/kernel: too small.' == str(error)
  assert ('r.yaml:3', 'net/kernel') == error.context


def test_the_class_and_attributes_of_a_plugins_error_stay():
  given = Custom('no.', 7)
  error = raised(given, 'net/kernel')
  assert error is given and 7 == error.code
  assert 'net/kernel: no.' == str(pickle.loads(pickle.dumps(error)))


def test_what_was_said_already_is_not_said_again():
  assert 'a/b: no.' == str(raised(surgery.SiteError('a/b: no.'), 'a/b'))
  assert 'a/b: a/bc: no.' == str(raised(surgery.SiteError('a/bc: no.'), 'a/b'))


def test_other_errors_get_a_note():
  error = raised(ValueError('no.'), 'net/kernel')
  assert 'no.' == str(error)
  assert ['This was in net/kernel.'] == error.__notes__


def test_an_unknown_type_is_said_as_text():
  error = raised(surgery.UnknownAdapterType('no type x.'), 'attach')
  assert 'attach: no type x.' == str(error)


def test_a_long_list_is_cut():
  assert 'a, b' == errors.listed(['a', 'b'])
  assert 'a, b, c, d, e' == errors.listed('abcde')
  assert 'a, b, c, d, e and 2 more' == errors.listed(iter('abcdefg'))
  assert 'a; b; and 1 more' == errors.listed('abc', 2, '; ')
  assert '' == errors.listed([])
