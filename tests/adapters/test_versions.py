"""Configurations of older versions of a type are upgraded, newer ones refused.

A class stands for a release of a plugin: two have the same name.
"""

import re

import jax.numpy as jnp
import pytest

import surgery
from tests.live import models


class First(surgery.Adapter):
  """The first release: a factor is called `scaling`."""

  name = 'released'
  adds = True
  scaling: float = surgery.field(default=2.0, doc='Factor.')

  def init(self, site, key):
    return {'delta': jnp.ones(site.in_shape + site.out_shape)}

  def apply(self, site, name, base, weights):
    return base + self.scaling * weights['delta']


class Second(surgery.Adapter):
  """The second release renamed it, and turned it round."""

  name = 'released'
  adds = True
  version = 2
  divisor: float = surgery.field(default=1.0, gt=0, doc='Divisor.')

  def init(self, site, key):
    return {'delta': jnp.ones(site.in_shape + site.out_shape)}

  def apply(self, site, name, base, weights):
    return base + weights['delta'] / self.divisor

  @classmethod
  def upgraded(cls, config, version):
    assert version == 1
    config = dict(config)
    if 'scaling' in config:
      config['divisor'] = 1 / config.pop('scaling')
    return config


def host(one):
  return surgery.Host(plugins=[one], entry_points=False)


FIRST, SECOND = host(First), host(Second)


def saved(path, adapter, used):
  model, params, _ = models.mlp()
  params = surgery.attach(params, adapter, to='**/hidden*', host=used)
  surgery.save(path, params, host=used)
  return surgery.merge(params, host=used)


@pytest.mark.parametrize('suffix', ['msgpack', 'safetensors'])
def test_an_older_file_does_what_it_did(tmp_path, suffix):
  path = tmp_path / f'model.{suffix}'
  patterns = {'**/hidden1': {'scaling': 8.0}}
  expected = saved(path, First(scaling=4.0, patterns=patterns), FIRST)
  params = surgery.load(path, host=SECOND)
  merged = surgery.merge(params, host=SECOND)
  for name, param in expected.items():
    assert (param.value == merged[name].value).all()
  [info] = surgery.adapters(params)
  assert {
    'divisor': 0.25,
    'patterns': {'**/hidden1': {'divisor': 0.125}},
  } == info.config


def test_an_upgraded_file_is_written_as_of_the_new_version(tmp_path):
  old, new = tmp_path / 'old.msgpack', tmp_path / 'new.msgpack'
  saved(old, First(), FIRST)
  surgery.save(new, surgery.load(old, host=SECOND), host=SECOND)
  [said] = surgery.open(old, host=FIRST).manifest.adapters
  assert 'version' not in said
  [said] = surgery.open(new, host=SECOND).manifest.adapters
  assert (2, {'divisor': 0.5}) == (said['version'], said['config'])
  [info] = surgery.adapters(surgery.load(new, host=SECOND))
  assert {'divisor': 0.5} == info.config


def test_a_file_of_an_adapter_alone_is_upgraded(tmp_path):
  path = tmp_path / 'adapter.msgpack'
  _, params, _ = models.mlp()
  adapted = surgery.attach(params, First(), to='**/hidden0', host=FIRST)
  surgery.save_adapter(path, adapted, host=FIRST)
  loaded = surgery.load_adapter(path, params, host=SECOND)
  expected = surgery.merge(adapted, host=FIRST)
  found = surgery.merge(loaded, host=SECOND)
  for name, param in expected.items():
    assert (param.value == found[name].value).all()


def test_a_newer_file_is_refused(tmp_path):
  path = tmp_path / 'model.msgpack'
  saved(path, Second(), SECOND)
  message = (
    "adapter 'default': a configuration of type 'released' has version 2, and "
    'the installed type reads versions up to 1. Update'
  )
  with pytest.raises(surgery.FormatError, match=re.escape(message)):
    surgery.load(path, host=FIRST)


@pytest.mark.parametrize('version', [0, -1, True, 'two', None])
def test_a_version_that_is_none_is_refused(tmp_path, version):
  path = tmp_path / 'model.msgpack'
  saved(path, Second(), SECOND)
  opened = surgery.open(path, host=SECOND)
  [said] = opened.manifest.adapters
  changed = opened.manifest.replace(adapters=({**said, 'version': version},))
  with pytest.raises(surgery.FormatError, match='expected a version of at'):
    opened.replace(manifest=changed).records(SECOND)


@pytest.mark.parametrize(
  ('answer', 'kind', 'message'),
  [
    (lambda c: None, surgery.PluginError, 'upgraded returned None, expected'),
    (lambda c: c['lost'], surgery.PluginError, "failed: KeyError: 'lost'"),
    (lambda c: float('x'), surgery.ConfigError, "'released': could not"),
    (lambda c: c, surgery.ConfigError, "no option 'scaling'"),
  ],
)
def test_a_wrong_upgrade_is_named(tmp_path, answer, kind, message):
  class Wrong(Second):
    @classmethod
    def upgraded(cls, config, version):
      return answer(config)

  path = tmp_path / 'model.msgpack'
  saved(path, First(), FIRST)
  with pytest.raises(kind, match=re.escape(message)):
    surgery.load(path, host=host(Wrong))


def test_a_higher_version_needs_an_upgrade():
  class Bare(First):
    name = 'bare'
    version = 2

  with pytest.raises(surgery.PluginError, match='version 2 needs a classmeth'):
    Bare()


@pytest.mark.parametrize('number', [0, '2', True, 1.5])
def test_a_declared_version_is_a_whole_number(number):
  class Odd(First):
    name = 'odd'
    version = number

  with pytest.raises(surgery.PluginError, match='expected a whole number'):
    Odd()
