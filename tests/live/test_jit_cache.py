"""What is compiled again, and what must never be taken from a cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import surgery
from tests.live import models

LORA = surgery.LoRA(rank=2)


@pytest.fixture(scope='module')
def net():
  return models.mlp()


@pytest.fixture
def traced(net):
  """A compiled call of the model, and a count of its traces."""
  model, base, x = net
  count = []

  @jax.jit
  def call(params):
    count.append(1)
    return model(params, x)

  call.count = count
  return base, call


def _tenant(base, seed=0, **kwargs):
  kwargs = {'to': '**/hidden*', **kwargs}
  return surgery.attach(base, LORA, seed=seed, **kwargs)


def test_swapping_tenants_traces_once(net, traced):
  model, _, x = net
  base, call = traced
  for seed in range(4):
    params = models.stirred(_tenant(base, seed), seed)
    models.close(model(models.dense(params), x)[0], call(params)[0])
  assert 1 == len(call.count)


def test_a_tenant_from_a_file_traces_nothing_anew(traced, tmp_path):
  base, call = traced
  surgery.save(tmp_path / 'm.msgpack', _tenant(base, 1))
  surgery.save_adapter(tmp_path / 'a.msgpack', _tenant(base, 2))
  call(_tenant(base, 0))
  call(surgery.load(tmp_path / 'm.msgpack'))
  call(surgery.load_adapter(tmp_path / 'a.msgpack', base))
  assert 1 == len(call.count)


def test_toggling_traces_once_a_state(traced):
  base, call = traced
  params = _tenant(base)
  call(params)
  for _ in range(3):
    call(surgery.disable(params))
    call(surgery.enable(surgery.disable(params)))
  assert 2 == len(call.count)


def test_detached_and_merged_use_the_program_of_the_base(traced):
  base, call = traced
  params = _tenant(base)
  call(params)
  call(base)
  call(surgery.detach(params))
  call(surgery.merge(params))
  assert 2 == len(call.count)


@pytest.mark.parametrize(
  'change',
  [
    pytest.param(lambda p: surgery.disable(p), id='disable'),
    pytest.param(lambda p: surgery.detach(p), id='detach'),
    pytest.param(lambda p: surgery.merge(p), id='merge'),
    pytest.param(
      lambda p: models.stirred(_tenant(p, name='more', to='**/output')),
      id='attach',
    ),
  ],
)
def test_a_function_compiled_before_a_verb_is_not_stale(net, traced, change):
  model, _, x = net
  base, call = traced
  params = models.stirred(_tenant(base))
  call(params)
  changed = change(params)
  models.close(model(changed, x)[0], call(changed)[0])


@pytest.mark.parametrize(
  ('one', 'two'),
  [
    pytest.param({}, {'to': '**/hidden0'}, id='sites'),
    pytest.param({}, {'name': 'other'}, id='name'),
    pytest.param({}, {'adapter': surgery.LoRA(rank=2, alpha=3.0)}, id='config'),
    pytest.param(
      {}, {'adapter': surgery.LoRA(rank=2, rslora=True)}, id='rslora'
    ),
    pytest.param(
      {},
      {
        'adapter': surgery.LoRA(rank=2, patterns={'**/hidden0': {'alpha': 1.0}})
      },
      id='patterns',
    ),
  ],
)
def test_what_differs_is_traced_again(net, traced, one, two):
  model, _, x = net
  base, call = traced
  for kwargs in (one, two):
    kwargs = {'to': '**/hidden*', 'adapter': LORA, **kwargs}
    params = models.stirred(surgery.attach(base, **kwargs))
    assert models.bits(call(params)[0]) == models.bits(
      jax.jit(lambda p: model(p, x)[0])(params)
    )
  assert 2 == len(call.count)


def test_order_of_attaching_is_part_of_the_program(net):
  model, base, x = net
  host = models.host(models.Scale)

  def adapt(names):
    params = base
    for name in names:
      adapter = LORA if name == 'lora' else models.Scale()
      params = surgery.attach(
        params, adapter, to='**/hidden*', name=name, host=host
      )
    return params

  one, two = adapt(['lora', 'scale']), adapt(['scale', 'lora'])
  assert one.keys() == two.keys()
  assert jax.tree.structure(one) != jax.tree.structure(two)
  one = models.stirred(one)
  # The very same weights, in another order.
  two = jax.tree.unflatten(jax.tree.structure(two), jax.tree.leaves(one))
  call = jax.jit(lambda p: model(p, x)[0])
  call(one)
  models.close(model(two, x)[0], call(two))
  assert models.bits(call(one)) != models.bits(call(two))


def test_halves_are_told_apart_by_their_sites(net):
  model, base, x = net
  one = models.stirred(surgery.attach(base, LORA, to='**/hidden0'))
  two = models.stirred(surgery.attach(base, LORA, to='**/hidden1'))
  call = jax.jit(lambda rest, w: model(w.merge(rest), x)[0])
  for params in (one, two):
    weights, rest = params.split(models.is_weight)
    models.close(model(params, x)[0], call(rest, weights))


def test_a_compiled_call_never_returns_another_tenants_notes(traced):
  base, call = traced
  one, two = _tenant(base, seed=1), _tenant(base, seed=2)
  call(one)
  _, after = call(two)
  assert {} == after._notes
  assert [(None, None)] == [a.origin[:2] for a in after.records.adapters]
  assert [(2, '**/hidden*')] == [a.origin[:2] for a in two.records.adapters]
  assert one.records is not two.records and one.records == two.records


def test_types_of_layers_are_not_taken_from_another_model(net):
  model, base, _ = net
  typed = surgery.attach(base, LORA, to='**/hidden*', graph=model.root)
  plain = surgery.attach(base, LORA, to='**/hidden*')
  types = lambda p: {
    r.site.types for a in p.records.adapters for r in a.sites.values()
  }
  assert {('Linear',)} == types(typed)
  assert {()} == types(plain)


def test_sharding_is_not_taken_from_another_model():
  _, one, _ = models.mlp(kernel_metadata={'sharding': (None, 'model')})
  _, two, _ = models.mlp()
  one, two = _tenant(one), _tenant(two)
  sharding = lambda p: (
    p.records.adapters[0]
    .sites['net', 'mlp', 'hidden0', 'kernel']
    .site.primary.sharding
  )
  assert (None, 'model') == sharding(one)
  assert () == sharding(two)


def test_a_type_defined_anew_is_traced_again(net):
  """As happens in a notebook: one name, one module, other code."""
  model, base, x = net

  def define(factor):
    class Times(surgery.Adapter):
      name = 'times'

      def init(self, site, key):
        return {'one': jnp.ones(())}

      def apply(self, site, name, base, weights):
        return base * factor * weights['one']

    return Times

  call = jax.jit(lambda p: model(p, x)[0])
  for factor in (2.0, 3.0):
    kind = define(factor)
    params = surgery.attach(
      base, kind(), to='**/output', host=models.host(kind)
    )
    kernel, _ = model.layers[-1].get_param(params, 'kernel')
    models.close(factor * base['net', 'mlp', 'output', 'kernel'].value, kernel)
    models.close(model(params, x)[0], call(params))


def test_lowered_and_compiled_programs_take_other_tenants(net):
  model, base, x = net
  one, two = (models.stirred(_tenant(base, s), s) for s in (1, 2))
  compiled = jax.jit(lambda p: model(p, x)[0]).lower(one).compile()
  models.close(model(two, x)[0], compiled(two))
  with pytest.raises(TypeError):
    compiled(surgery.disable(two))


def test_where_an_adapter_came_from_survives_verbs_and_files(net, tmp_path):
  _, base, _ = net
  params = surgery.attach(base, LORA, to='**/hidden*', seed=7)
  origin = [(7, '**/hidden*')]
  found = lambda p: [a.origin[:2] for a in p.records.adapters]
  assert origin == found(params)
  assert origin == found(surgery.disable(surgery.freeze(params)))
  surgery.save(tmp_path / 'm.msgpack', params)
  assert origin == found(surgery.load(tmp_path / 'm.msgpack'))
  surgery.save_adapter(tmp_path / 'a.msgpack', params)
  assert origin == found(surgery.load_adapter(tmp_path / 'a.msgpack', base))
  # A transformation cannot say, and a half that went through one is put
  # together with one that did not.
  train, rest = params.split()
  train = jax.jit(lambda p: p)(train)
  assert [(None, None)] == found(train)
  assert origin == found(train.merge(rest))


def test_a_record_with_other_sites_is_another(net):
  """The sum of its sites' digests is that of its sites, however it is made."""
  _, base, _ = net
  records = surgery.attach(base, LORA, to='**/hidden*').records
  record = records.adapters[0]
  fewer = dict(list(record.sites.items())[:1])
  less = dataclasses.replace(record, sites=fewer)
  assert record.digest != less.digest
  again = less
  for one in list(record.sites.values())[1:]:
    again = again.with_site(one, ())
  assert record.digest == again.digest
