"""An adapter's file is held against its record and its base when it is loaded."""

import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from tests.live import models

A = ('net', 'mlp', 'hidden0', 'lora_a')
B = ('net', 'mlp', 'hidden0', 'lora_b')


@pytest.fixture(scope='module')
def net():
  return models.mlp()


@pytest.fixture
def file(tmp_path, net):
  """A LoRA of rank 2 on two layers, alone."""
  params = surgery.attach(
    net[1], surgery.LoRA(rank=2), to=['**/hidden0', '**/output']
  )
  surgery.save_adapter(tmp_path / 'a.msgpack', models.stirred(params))
  return tmp_path / 'a.msgpack'


def array(*shape, dtype='float32'):
  value = np.ones(shape, dtype)
  return surgery.Leaf(lambda: value, shape, dtype)


def changed(file, leaves=None, without=(), edit=None):
  """Rewrites a file with other tensors, or another entry of its adapter."""
  opened = surgery.open(file)
  kept = {p: leaf for p, leaf in opened.items() if p not in without}
  said = opened.manifest
  if edit is not None:
    [entry] = said.adapters
    said = said.replace(adapters=(edit(entry),))
  opened.replace(leaves={**kept, **(leaves or {})}, manifest=said).write(
    file, overwrite=True
  )


def refused(file, params, error, *texts, **options):
  with pytest.raises(error) as info:
    surgery.load_adapter(file, params, **options)
  for text in texts:
    assert text in str(info.value)


def test_missing_and_superfluous_tensors_are_all_listed(file, net):
  extra = {('net', 'x'): array(2), ('y',): array(1)}
  changed(file, extra, without=[A, B])
  refused(
    file,
    net[1],
    surgery.FormatError,
    'missing: net/mlp/hidden0/lora_a, net/mlp/hidden0/lora_b; ',
    'belonging to nothing: net/x, y.',
    "adapter 'default', LoRA(rank=2, ",
  )


def test_it_is_refused_where_the_base_is_not_checked_either(file, net):
  changed(file, {('y',): array(1)})
  refused(file, net[1], surgery.FormatError, 'nothing: y', check_base=False)


@pytest.mark.parametrize(
  'shape', [(2, 2), (4, 3), (2, 4), (4,), (1, 4, 2), (0, 2), ()]
)
def test_another_shape_is_refused_at_load(file, net, shape):
  changed(file, {A: array(*shape)})
  refused(
    file,
    net[1],
    surgery.FormatError,
    'net/mlp/hidden0/lora_a: ',
    f'expected shape (4, 2), found {shape}',
  )


def test_a_rank_that_is_not_that_of_the_tensors_is_refused_with_both(file, net):
  def edit(entry):
    return {**entry, 'config': {**entry['config'], 'rank': 3}}

  changed(file, edit=edit)
  refused(
    file,
    net[1],
    surgery.FormatError,
    'net/mlp/hidden0/lora_a: rank 3 is configured, the tensor has rank 2',
    'net/mlp/output/lora_b: rank 3 is configured, the tensor has rank 2',
  )


def test_a_rank_that_no_layer_needs_is_refused_with_both(file, net):
  def edit(entry):
    return {**entry, 'config': {**entry['config'], 'rank': 400}}

  changed(file, edit=edit)
  refused(
    file,
    net[1],
    surgery.FormatError,
    'net/mlp/hidden0/lora_a: rank 400 is configured, the tensor has rank 2',
  )


def test_a_rank_for_some_sites_only_is_held_against_these(file, net):
  def edit(entry):
    patterns = {'**/output': {'rank': 3}}
    return {**entry, 'config': {**entry['config'], 'patterns': patterns}}

  changed(file, edit=edit)
  refused(
    file, net[1], surgery.FormatError, 'output/lora_a: rank 3 is configured'
  )
  with pytest.raises(surgery.FormatError) as info:
    surgery.load_adapter(file, net[1])
  assert 'hidden0' not in str(info.value)


def test_a_record_that_lies_along_with_its_tensors_is_refused(file, net):
  def edit(entry):
    sites = [
      {
        **site,
        'weights': {
          name: {
            **weight,
            'shape': [1 if n == 2 else n for n in weight['shape']],
          }
          for name, weight in site['weights'].items()
        },
      }
      for site in entry['sites']
    ]
    return {**entry, 'sites': sites}

  opened = surgery.open(file)
  cut = {
    path: array(*(1 if n == 2 else n for n in leaf.shape or ()))
    for path, leaf in opened.items()
  }
  changed(file, cut, edit=edit)
  refused(
    file,
    net[1],
    surgery.FormatError,
    'rank 2 is configured, the tensor has rank 1',
    'recorded shape (4, 1), the configuration makes (4, 2)',
  )


def test_integers_for_weights_are_refused(file, net):
  changed(file, {A: array(4, 2, dtype='int32')})
  refused(
    file, net[1], surgery.FormatError, 'expected float32, the tensor is int32'
  )


def test_weights_that_were_cast_are_taken(file, net):
  changed(file, {A: array(4, 2, dtype='float16')})
  assert surgery.load_adapter(file, net[1])


def test_all_that_a_base_lacks_is_listed(file, net):
  params = net[1].unlocked()
  del params._data[('net', 'mlp', 'output', 'kernel')]
  path = ('net', 'mlp', 'hidden0', 'kernel')
  params[path] = params[path].replace(value=jnp.ones((3, 2)))
  refused(
    file,
    params.locked(),
    surgery.BaseMismatchError,
    'net/mlp/hidden0/kernel: expected shape (4, 6), found (3, 2)',
    'net/mlp/output/kernel: there is no such parameter',
    check_base=False,
  )


def test_stacked_layers_have_stacked_weights(tmp_path, net):
  stacked = net[1].unlocked()
  path = ('net', 'mlp', 'hidden0', 'kernel')
  stacked[path] = stacked[path].replace(value=jnp.ones((3, 4, 6)))
  params = surgery.attach(
    stacked.locked(), surgery.LoRA(rank=2), to=['**/hidden0'], stacked=1
  )
  file = tmp_path / 'a.msgpack'
  surgery.save_adapter(file, params)
  assert surgery.load_adapter(file, stacked.locked())
  changed(file, {A: array(2, 4, 2)})
  refused(
    file,
    stacked.locked(),
    surgery.FormatError,
    'lora_a: expected shape (3, 4, 2), found (2, 4, 2)',
  )


def test_adapters_that_were_stacked_come_back(tmp_path, net):
  one = surgery.attach(net[1], surgery.LoRA(rank=2), to=['**/hidden0'])
  many = surgery.stack_adapters([models.stirred(one, s) for s in range(3)])
  file = tmp_path / 'a.msgpack'
  surgery.save_adapter(file, many)
  loaded = surgery.load_adapter(file, net[1])
  routed = surgery.route(loaded, jnp.asarray([0, 2, 1, 1, 0, -1, 2]))
  expected = surgery.route(many, jnp.asarray([0, 2, 1, 1, 0, -1, 2]))
  call = surgery.factored(net[0])
  assert jnp.array_equal(call(expected, net[2])[0], call(routed, net[2])[0])


class Shared(surgery.Adapter):
  """A basis that all sites share, and a scale of each."""

  name = 'shared-basis'
  rewrites = ('kernel',)
  size: int = 3

  def init_shared(self, sites, key):
    del sites, key
    return {'basis': jnp.zeros((self.size,))}

  def init(self, site, key):
    del site, key
    return {'scale': jnp.ones(())}

  def apply(self, site, name, base, weights):
    del site, name
    return base * weights['scale'] + weights['basis'].sum()


def test_what_sites_share_is_held_against_the_configuration(tmp_path, net):
  host = surgery.Host(plugins=[Shared])
  params = surgery.attach(net[1], Shared(size=3), to='**', host=host)
  file = tmp_path / 'a.msgpack'
  surgery.save_adapter(file, params, host=host)
  assert surgery.load_adapter(file, net[1], host=host)
  path = ('surgery.default', 'basis')
  changed(file, {path: array(2)})
  refused(
    file,
    net[1],
    surgery.FormatError,
    'surgery.default/basis: expected shape (3,), found (2,)',
    host=host,
  )


def test_a_file_of_two_adapters_is_refused(file, net):
  opened = surgery.open(file)
  said = opened.manifest.replace(adapters=opened.manifest.adapters * 2)
  opened.replace(manifest=said).write(file, overwrite=True)
  refused(file, net[1], surgery.FormatError, 'expected one adapter, found 2')


@pytest.mark.parametrize('verb', ['attach', 'merge', 'combine'])
def test_the_shell_refuses_it_before_anything_is_written(
  tmp_path, file, net, verb, surgery_cli
):
  base, out = tmp_path / 'base.msgpack', tmp_path / 'out.msgpack'
  surgery.save(base, net[1])
  changed(file, {('y',): array(1)})
  arguments = {
    'attach': ('attach', base, '--from', file),
    'merge': ('merge', base, '--with', file),
    'combine': ('combine', base, '--with', f'a={file}', '--weight', 'a=1'),
  }[verb]
  result = surgery_cli(*arguments, '-o', out, '--dry-run')
  assert 3 == result.code
  assert 'belonging to nothing: y' in result.err
