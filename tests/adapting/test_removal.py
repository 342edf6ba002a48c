"""Detaching and dropping: what goes along, and what must not be halved."""

import numpy as np
import pytest

import surgery
from surgery.host.manager import default_host
from tests.adapting.saved import model, numbers, values


def net():
  return model(
    a__kernel=numbers(4, 6), a__bias=numbers(6), b__kernel=numbers(6, 3)
  )


def attached(*to, name='default', on=None):
  return surgery.attach(
    net() if on is None else on, surgery.LoRA(rank=2), to=list(to), name=name
  )


def names(checkpoint):
  return {'/'.join(path) for path in checkpoint}


def test_detaching_gives_the_base_back():
  both = attached('b', name='more', on=attached('a'))
  left = surgery.detach(both, 'default')
  assert names(net()) | {'b/lora_a.more', 'b/lora_b.more'} == names(left)
  assert ('more',) == left.records(default_host()).names
  bare = surgery.detach(both)
  assert names(net()) == names(bare)
  for path, value in values(net()).items():
    np.testing.assert_array_equal(value, values(bare)[path])


def test_a_dropped_layer_takes_its_weights_along():
  left = surgery.drop(attached('a', 'b'), 'a')
  assert {'b/kernel', 'b/lora_a', 'b/lora_b'} == names(left)
  [record] = left.records(default_host()).adapters
  assert [('b', 'kernel')] == list(record.sites)


def test_an_adapter_without_sites_goes():
  left = surgery.drop(attached('a'), 'a')
  assert {'b/kernel'} == names(left)
  assert () == left.records(default_host()).names


def test_weights_by_the_name_of_their_adapter_detach_it():
  both = attached('b', name='more', on=attached('a'))
  left = surgery.drop(both, 'adapter:more')
  assert names(attached('a')) == names(left)


@pytest.mark.parametrize('half', ['a/lora_a', 'a/kernel'])
def test_half_a_site_is_refused(half):
  if half == 'a/kernel':
    left = surgery.drop(attached('a'), half)
    assert {'a/bias', 'b/kernel'} == names(left)
    return
  with pytest.raises(
    surgery.AdapterError, match='a/lora_a would go and a/kern'
  ):
    surgery.drop(attached('a'), half)


def test_something_must_be_left():
  with pytest.raises(surgery.SurgeryError, match='nothing would be left of 3'):
    surgery.drop(net(), '**')


def test_unknown_adapters_are_named():
  with pytest.raises(surgery.AdapterError, match="no adapter 'x'.*default"):
    surgery.detach(attached('a'), 'x')
  with pytest.raises(surgery.AdapterError, match='no adapter is attached'):
    surgery.detach(net())
