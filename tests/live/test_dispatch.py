"""Verbs take saved models too, and then are their passes."""

from typing import Any

import jax
import numpy as np
import pytest

import surgery
from tests.live import models

LORA = surgery.LoRA(rank=2)
ON = '**/hidden*'

# Each verb with its arguments, and whether it goes on an adapted model.
VERBS: dict[str, tuple[Any, dict[str, Any], bool]] = {
  'attach': ((LORA,), {'to': ON, 'seed': 3}, False),
  'cast': (('bf16',), {'keep': '**/output'}, True),
  'detach': ((), {}, True),
  'disable': (('default',), {}, True),
  'drop': (('**/hidden0',), {}, True),
  'enable': ((), {}, True),
  'freeze': (('**/bias',), {}, True),
  'keep': ((ON,), {}, True),
  'merge': ((), {}, True),
  'rename': (('net -> model',), {}, True),
}


@pytest.fixture
def graph():
  return models.mlp()[0].root


def saved(tmp_path, params):
  file = tmp_path / 'in.msgpack'
  surgery.save(file, params)
  return file


def params_of(adapted):
  _, params, _ = models.mlp()
  if not adapted:
    return params
  return models.stirred(surgery.attach(params, LORA, to=ON, seed=3))


@pytest.mark.parametrize('verb', VERBS)
def test_a_saved_model_becomes_what_params_become(tmp_path, verb):
  args, kwargs, adapted = VERBS[verb]
  file = saved(tmp_path, params_of(adapted))
  call = getattr(surgery, verb)
  before = surgery.open(file)
  count, known = len(before), before.manifest
  after = call(before, *args, **kwargs)
  assert isinstance(after, surgery.Checkpoint)
  assert (count, known) == (len(before), before.manifest)
  after.write(tmp_path / 'out.msgpack')
  live = call(surgery.load(file), *args, **kwargs)
  surgery.save(tmp_path / 'live.msgpack', live)
  out, expected = ((tmp_path / f'{name}.msgpack') for name in ('out', 'live'))
  assert jax.tree.structure(surgery.load(expected)) == jax.tree.structure(
    surgery.load(out)
  )
  one, two = surgery.open(expected), surgery.open(out)
  assert sorted(one) == sorted(two)
  for path, leaf in one.items():
    other = two[path]
    assert (leaf.digest, leaf.dtype) == (other.digest, other.dtype), path
    assert (leaf.trainable, leaf.metadata) == (other.trainable, other.metadata)
  strip = lambda c: c.manifest.replace(locked=True)
  assert strip(one) == strip(two)


def test_unfreezing_a_saved_model(tmp_path):
  ckpt = surgery.freeze(surgery.open(saved(tmp_path, params_of(False))))
  after = surgery.unfreeze(ckpt, select='**/bias')
  trains = [path for path, leaf in after.items() if leaf.trainable]
  assert trains
  assert {'bias'} == {path[-1] for path in trains}


def test_a_graph_gives_a_saved_model_types(tmp_path, graph):
  ckpt = surgery.open(saved(tmp_path, params_of(False)))
  after = surgery.keep(ckpt, 'type:Linear', graph=graph)
  assert {'kernel', 'bias'} == {path[-1] for path in after}
  with pytest.raises(surgery.SurgeryError, match='expected a bx.Graph, found'):
    surgery.keep(ckpt, 'type:Linear', graph=3)


def test_types_of_layers_choose_in_params(graph):
  params = params_of(False)
  for verb, count in ((surgery.keep, 6), (surgery.drop, len(params) - 6)):
    assert count == len(verb(params, 'type:Linear', graph=graph))
  cast = surgery.cast(params, 'bf16', keep='type:Linear=f16', graph=graph)
  assert 'float16' == cast['net', 'mlp', 'hidden0', 'kernel'].value.dtype


def test_observers_are_told_of_both(tmp_path):
  events = []

  class Observer:
    @surgery.hookimpl
    def surgery_started(self, event):
      events.append((event.verb, dict(event.arguments)))

  host = surgery.Host(plugins=[Observer()])
  params = params_of(False)
  surgery.cast(params, 'bf16', host=host)
  ckpt = surgery.open(saved(tmp_path, params))
  surgery.cast(ckpt, 'bf16', keep=['**/bias'], overflow=True, host=host)
  chosen = surgery.select(params, '**/bias')
  surgery.cast(ckpt, 'bf16', keep=chosen, host=host)
  assert [
    ('cast', {'to': 'bf16'}),
    ('cast', {'to': 'bf16', 'keep': ['**/bias'], 'overflow': True}),
    ('cast', {'to': 'bf16'}),
  ] == events


def test_passes_of_a_saved_model_are_lazy():
  def load():
    raise AssertionError('read')

  leaf = surgery.Leaf(load, (2, 2), 'float32')
  ckpt = surgery.Checkpoint({('net', 'a', 'kernel'): leaf})
  ckpt = surgery.cast(surgery.rename(ckpt, 'net -> model'), 'bf16')
  ckpt = surgery.merge(surgery.attach(ckpt, LORA, to='**'))
  assert ['model/a/kernel'] == ['/'.join(path) for path in ckpt]


def test_adapters_of_a_saved_model_are_told(tmp_path):
  params = params_of(True)
  file = saved(tmp_path, params)
  assert surgery.adapters(params) == surgery.adapters(surgery.open(file))


def test_a_verb_keeps_its_name_and_documentation():
  assert 'rename' == surgery.rename.__name__
  assert 'RenameError' in (surgery.rename.__doc__ or '')


@pytest.mark.parametrize('verb', ['cast', 'rename', 'drop', 'keep'])
def test_what_is_neither_is_refused(verb):
  with pytest.raises(
    surgery.SurgeryError, match=f'{verb}: expected bx.Params, found dict'
  ):
    getattr(surgery, verb)({}, 'x')


def test_params_are_not_changed():
  params = params_of(True)
  before = {path: np.asarray(p.value).tobytes() for path, p in _arrays(params)}
  for verb, (args, kwargs, adapted) in VERBS.items():
    if adapted:
      getattr(surgery, verb)(params, *args, **kwargs)
  after = {path: np.asarray(p.value).tobytes() for path, p in _arrays(params)}
  assert before == after


def _arrays(params):
  for path, param in params.items():
    if not str(param.value.dtype).startswith('key'):
      yield path, param


def test_an_error_says_in_which_verb_it_was():
  params = models.mlp()[1]
  with pytest.raises(surgery.SelectorError, match=r"^drop: .*'nowhere'") as one:
    surgery.drop(params, 'nowhere')
  assert ('drop',) == one.value.context
  checkpoint = surgery.apply(surgery.Checkpoint({}), [])
  with pytest.raises(surgery.SurgeryError, match=r'^keep: '):
    surgery.keep(checkpoint, 'nowhere')
