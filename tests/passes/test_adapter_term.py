"""`adapter:NAME` names the weights of one adapter, wherever selectors go."""

import json

import jax.numpy as jnp
import pytest

import surgery
from surgery.editing import choosing
from surgery.looking import diff
from surgery.model.checkpoint import open_checkpoint
from tests.live import models


class Shared(surgery.Adapter):
  """Scales outputs by a vector that all sites share, and one of their own."""

  name = 'shared'
  rewrites = ('kernel',)

  def init(self, site, key):
    return {'own': jnp.ones(site.out_shape)}

  def init_shared(self, sites, key):
    return {'all': jnp.ones(())}

  def apply(self, site, name, base, weights):
    return base * weights['own'] * weights['all']


HOST = surgery.Host(plugins=[Shared])


@pytest.fixture(scope='module')
def params():
  """Params with three adapters, one of which has weights at other names."""
  _, params, _ = models.mlp()
  for name in ('default', 'second'):
    params = surgery.attach(
      params, surgery.LoRA(rank=2), to='all', name=name, host=HOST
    )
  return surgery.attach(params, Shared(), to='**', name='third', host=HOST)


def weights(params, *names):
  return {p for p, q in params.items() if q.metadata.get('adapter') in names}


@pytest.fixture
def file(params, tmp_path):
  surgery.save(tmp_path / 'a.msgpack', params, host=HOST)
  return tmp_path / 'a.msgpack'


@pytest.mark.parametrize(
  ('text', 'names'),
  [
    ('adapter:default', ['default']),
    ('adapter:second', ['second']),
    ('adapter:third', ['third']),
    ('adapter:{default,third}', ['default', 'third']),
    ('adapter:[ds]e*', ['default', 'second']),
    ('adapter:*', ['default', 'second', 'third']),
    (['adapter:*', '!adapter:third'], ['default', 'second']),
  ],
)
def test_it_means_all_weights_of_an_adapter_and_nothing_else(
  params, file, text, names
):
  expected = weights(params, *names)
  assert expected
  items = [text] if isinstance(text, str) else text
  assert expected == set(surgery.select(params, *items))
  assert expected == set(surgery.select(surgery.open(file), *items))
  rest = surgery.select(params, *[f'!{i}' for i in items if i[0] != '!'])
  assert params.keys() - set(rest) >= expected


def test_it_is_what_records_say(params):
  for record in params.records.adapters:
    selected = surgery.select(params, f'adapter:{record.name}')
    assert set(record.weight_paths()) == set(selected)


def test_it_freezes_and_thaws_one_adapter(params):
  frozen = surgery.freeze(params, 'adapter:second', host=HOST)
  assert weights(params, 'second') == {
    p for p, q in frozen.items() if params[p].trainable and not q.trainable
  }
  both = surgery.freeze(params, 'adapter:*', host=HOST)
  back = surgery.unfreeze(both, 'adapter:second', host=HOST)
  assert weights(params, 'second') == {
    p for p, q in back.items() if q.trainable and not both[p].trainable
  }


@pytest.mark.parametrize('name', ['default', 'second', 'third'])
def test_dropping_it_detaches(params, name):
  expected = surgery.detach(params, name, host=HOST)
  dropped = surgery.drop(params, f'adapter:{name}', host=HOST)
  models.assert_equal_params(expected, dropped)
  assert expected.records == dropped.records
  kept = surgery.keep(params, ['**', f'!adapter:{name}'], host=HOST)
  models.assert_equal_params(expected, kept)
  assert expected.records == kept.records


def test_dropping_all_of_them_leaves_the_base(params):
  _, base, _ = models.mlp()
  models.assert_equal_params(base, surgery.drop(params, 'adapter:*', host=HOST))


def test_it_is_dropped_with_other_tensors(params):
  dropped = surgery.drop(
    params, ['adapter:second', 'net/mlp/output'], host=HOST
  )
  assert ('default', 'third') == dropped.records.names
  assert not [p for p in dropped.keys() if 'output' in p]


def test_weights_that_are_named_otherwise_are_half_of_an_adapter(params):
  with pytest.raises(surgery.AdapterError, match="'second' needs both"):
    surgery.drop(params, '**/lora_?.second*', host=HOST)


def test_it_keeps_a_dtype(params):
  half = surgery.cast(params, 'bf16', keep='adapter:second=f32', host=HOST)
  assert weights(params, 'second') == {
    p for p, q in half.items() if str(q.value.dtype) == 'float32'
  }


def test_it_is_compared_alone(params, file, tmp_path):
  other = surgery.detach(params, 'second', host=HOST)
  surgery.save(tmp_path / 'b.msgpack', other, host=HOST)
  a, b = (open_checkpoint(tmp_path / n) for n in ('a.msgpack', 'b.msgpack'))
  found = [one.path for one in diff.diff(a, b, 'adapter:second', host=HOST)]
  assert weights(params, 'second') == set(found)


def test_the_shell_knows_it(tmp_path, surgery_cli):
  _, params, _ = models.mlp()
  for name in ('a', 'b'):
    params = surgery.attach(
      params, surgery.LoRA(rank=2), to='**/hidden*', name=name
    )
  file = tmp_path / 'm.msgpack'
  surgery.save(file, surgery.disable(params, 'b'))
  found = surgery_cli('select', file, 'adapter:a', '--json')
  assert {'/'.join(p) for p in weights(params, 'a')} == set(
    json.loads(found.out)
  )
  shown = surgery_cli('inspect', file, 'adapter:*')
  size = sum(params[p].value.size for p in weights(params, 'a'))
  assert f'8 tensors, {2 * size} elements ({size} trainable)' in shown.out


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('adapter:secnod', "a weight of such an adapter. Did you mean 'second'?"),
    ('adapter:nothing', 'no parameter is a weight of such an adapter'),
    ('adapter:{default,secnod}', "its alternative 'secnod' matches nothing "),
    ('!adapter:secnod', "selector '!adapter:secnod' matches nothing"),
    ('adapter:', 'matches nothing'),
  ],
)
def test_an_adapter_that_is_not_there_is_refused(params, text, message):
  for verb in (surgery.freeze, surgery.drop, surgery.keep):
    with pytest.raises(surgery.SelectorError) as raised:
      verb(params, text, host=HOST)
    assert message in str(raised.value)
  with pytest.raises(surgery.SelectorError):
    surgery.select(params, text)


def test_an_adapter_is_not_attached_to_another(params):
  lora = lambda **given: surgery.LoRA(rank=1, **given)
  with pytest.raises(
    surgery.SelectorError, match='no parameter is a weight of such'
  ):
    surgery.attach(params, lora(), to='adapter:second', name='x', host=HOST)
  with pytest.raises(
    surgery.SelectorError, match='no parameter is a weight of such'
  ):
    patterns = {'adapter:second': {'rank': 2}}
    surgery.attach(
      params, lora(patterns=patterns), to='**', name='x', host=HOST
    )
  with pytest.raises(
    surgery.SelectorError, match='no parameter is a weight of such'
  ):
    surgery.attach(
      params, lora(), to='**', layout={'adapter:second': 'io'}, name='x',
      host=HOST,
    )  # fmt: skip


def test_a_graph_has_no_adapters():
  model, *_ = models.mlp()
  with pytest.raises(
    surgery.SelectorError, match='no parameter is a weight of such'
  ):
    choosing.select(model.root, 'adapter:default')
