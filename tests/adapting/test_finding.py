"""From a selector to sites: roles of axes, stacked axes, and refusals."""

import numpy as np
import pytest

import surgery
from surgery.host.manager import default_host
from tests.adapting.saved import model, numbers, values
from tests.live.models import Scale

LORA = surgery.LoRA(rank=2)


def net():
  return model(
    a__kernel=numbers(4, 6),
    a__bias=numbers(6),
    b__kernel=numbers(6, 3),
    b__bias=numbers(3),
    norm__scale=numbers(6),
  )


def sites(checkpoint, adapter=LORA, **options):
  attached = surgery.attach(checkpoint, adapter, **options)
  [record] = attached.records(default_host()).adapters
  return record.sites


def shapes(checkpoint, **options):
  found = sites(checkpoint, **options)
  return {
    '/'.join(path): {n: w.shape for n, w in one.weights.items()}
    for path, one in found.items()
  }


@pytest.mark.parametrize(
  ('to', 'found'),
  [
    ('a', ['a/kernel']),
    ('**', ['a/kernel', 'b/kernel']),
    ('all', ['a/kernel', 'b/kernel']),
    (['a', 'b/kernel'], ['a/kernel', 'b/kernel']),
    (['**', '!b'], ['a/kernel']),
    ('{a,b}', ['a/kernel', 'b/kernel']),
    ('re:[ab]', ['a/kernel', 'b/kernel']),
  ],
)
@pytest.mark.filterwarnings('ignore::surgery.SiteWarning')
def test_layers_mean_their_kernels(to, found):
  assert found == sorted(shapes(net(), to=to))


def test_a_selection_means_the_default_sites_in_it():
  chosen = surgery.select(net(), '**')
  assert ['a/kernel', 'b/kernel'] == sorted(shapes(net(), to=chosen))
  with pytest.raises(surgery.SelectorError, match='none of the 1 selected'):
    shapes(net(), to=surgery.select(net(), 'norm/scale'))


@pytest.mark.parametrize(
  ('layout', 'inputs', 'outputs'),
  [
    (None, (5, 4), (6,)),
    ('oio', (4,), (5, 6)),
    ({'a/kernel': 'ioo'}, (5,), (4, 6)),
  ],
)
def test_a_layout_decides_what_is_input_and_output(layout, inputs, outputs):
  found = shapes(model(a__kernel=numbers(5, 4, 6)), to='a', layout=layout)
  expected = {'lora_a': (*inputs, 2), 'lora_b': (2, *outputs)}
  assert expected == found['a/kernel']


def test_stacked_axes_stand_in_front_of_weights():
  stacked = model(a__kernel=numbers(3, 4, 6), a__bias=numbers(3, 6))
  for options in ({'stacked': 1}, {'layout': 'sio'}, {'stacked': {'a': 1}}):
    attached = surgery.attach(stacked, LORA, to='a', **options)
    assert (3, 4, 2) == attached['a', 'lora_a'].shape
    assert (3, 2, 6) == attached['a', 'lora_b'].shape


def test_a_bias_has_the_roles_of_the_outputs():
  stacked = model(a__kernel=numbers(3, 4, 6), a__bias=numbers(3, 6))
  attached = surgery.attach(stacked, Scale(), to='a', layout='sio')
  assert (3, 6) == attached['a', 'scale'].shape
  before, after = values(stacked), values(surgery.merge(attached))
  np.testing.assert_array_equal(before['a/bias'], after['a/bias'])


@pytest.mark.parametrize(
  ('options', 'error', 'message'),
  [
    (
      {'layout': 'x'},
      surgery.ConfigError,
      "s \\(stacked, in front\\).*found 'x'",
    ),
    ({'layout': 's'}, surgery.ConfigError, 'expected a letter an axis'),
    ({'stacked': -1}, surgery.ConfigError, 'a number of axes >= 0, found -1'),
    ({'stacked': {'a': True}}, surgery.ConfigError, "'a': expected a number"),
    (
      {'layout': 'iiio'},
      surgery.SiteError,
      'a/kernel: shape .4, 6. does not fit',
    ),
    ({'stacked': 3}, surgery.SiteError, 'does not fit the layout'),
    ({'layout': {'q': 'io'}}, surgery.SelectorError, "layout: selector 'q'"),
    (
      {'layout': {'a': 'io', 'a/kernel': 'oi'}},
      surgery.SelectorError,
      "'a/kernel' has no effect: the earlier selector 'a'",
    ),
    ({'to': 'norm'}, surgery.SelectorError, 'none of which is a default site'),
    ({'to': 'norm/scale'}, surgery.SiteError, 'has no input and output axis'),
    ({'to': '{a,norm}'}, surgery.SelectorError, "its alternative 'norm'"),
    ({'to': ['a', '!a']}, surgery.SelectorError, "a '!' item takes out all"),
    ({'to': '{a,c}'}, surgery.SelectorError, "alternative 'c' matches nothing"),
  ],
)
def test_what_cannot_be_is_refused(options, error, message):
  with pytest.raises(error, match=message):
    surgery.attach(net(), LORA, **{'to': 'a', **options})


def test_both_parameters_of_a_site_have_the_same_stacked_axes():
  odd = model(a__kernel=numbers(3, 4, 6), a__bias=numbers(2, 5))
  with pytest.raises(
    surgery.SiteError, match=r"stacked axes are .*'kernel' are"
  ):
    surgery.attach(odd, Scale(), to='a', stacked={'a/kernel': 1, 'a/bias': 1})
