"""Parameters that are saved along with an adapter, and put back."""

import numpy as np
import pytest

import surgery
from surgery.host.manager import default_host
from surgery.passes.attach import attach
from surgery.passes.extract import extract
from tests.adapting.saved import model, numbers, values, with_values


def net(head=0):
  return model(a__kernel=numbers(4, 6), head__kernel=numbers(6, 3, seed=head))


def tuned():
  """Returns a model whose head was trained beside a LoRA."""
  one = surgery.attach(net(), surgery.LoRA(rank=2), to='a')
  return with_values(one, head__kernel=numbers(6, 3, seed=9))


def saved(tmp_path, select):
  """Returns the file of the adapter alone, opened."""
  alone = extract(tuned(), modules_to_save=select, host=default_host())
  alone.write(tmp_path / 'a.msgpack')
  return surgery.open(tmp_path / 'a.msgpack')


def loaded(tmp_path, head):
  return attach(net(head), from_=saved(tmp_path, 'head'), host=default_host())


def test_a_chosen_parameter_is_answered_in_place_of_the_base(tmp_path):
  again = loaded(tmp_path, head=0)
  [record] = again.records(default_host()).adapters
  [(path, spec)] = record.saved.items()
  assert ('head', 'kernel') == path
  got = values(again)
  np.testing.assert_array_equal(numbers(6, 3, seed=0), got['head/kernel'])
  np.testing.assert_array_equal(numbers(6, 3, seed=9), got['/'.join(spec.path)])
  merged = values(surgery.merge(again))
  np.testing.assert_array_equal(numbers(6, 3, seed=9), merged['head/kernel'])
  bare = values(surgery.detach(again))
  np.testing.assert_array_equal(numbers(6, 3, seed=0), bare['head/kernel'])


def test_nothing_is_saved_along_where_nothing_is_chosen(tmp_path):
  [entry] = saved(tmp_path, []).manifest.adapters
  assert not entry.get('saved')


def test_a_value_that_the_base_has_already_is_not_kept_twice(tmp_path):
  again = loaded(tmp_path, head=9)
  [record] = again.records(default_host()).adapters
  assert {} == dict(record.saved)


@pytest.mark.parametrize(
  ('select', 'error', 'message'),
  [
    ('tail', surgery.SelectorError, "'tail' matches nothing"),
    ('a/lora_a', surgery.AdapterError, 'saved with its adapter anyway'),
  ],
)
def test_what_cannot_be_saved_along_is_refused(
  tmp_path, select, error, message
):
  with pytest.raises(error, match=message):
    saved(tmp_path, select)
