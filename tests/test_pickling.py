"""Errors and objects that go to another process and back."""

import concurrent.futures
import copy
import importlib
import multiprocessing
import pickle
import pkgutil
from typing import Any

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from surgery import errors

# Compiled as another process does: bits are compared (see conftest.py).
OPTIMIZED = True


def kinds(cls):
  """Yields all classes that derive from one."""
  for sub in cls.__subclasses__():
    if sub.__module__.startswith('surgery.'):
      yield sub
      yield from kinds(sub)


for module in pkgutil.walk_packages(surgery.__path__, 'surgery.'):
  if not module.name.endswith('__main__'):
    importlib.import_module(module.name)
ERRORS = [surgery.SurgeryError, *kinds(surgery.SurgeryError)]
# What the others take beside a message.
MORE = {'UnreachedError': [[('net', 'a'), ('net', 'b')]], 'FormatError': [12]}


class OfPlugin(surgery.PluginError):
  """An error of a plugin's, as an author may write it."""

  def __init__(self, number, *, unit):
    super().__init__(f'{number} {unit}')
    self.number = number


@pytest.mark.parametrize('cls', ERRORS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
  'passed',
  [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy],
  ids=['pickle', 'copy', 'deepcopy'],
)
def test_errors_stay_what_they_are(cls, passed):
  error = cls('net/a: wrong.', *MORE.get(cls.__name__, []))
  error.add_note('seen')
  again = passed(error)
  assert type(error) is type(again)
  assert str(error) == str(again)
  assert error.args == again.args
  assert vars(error) == vars(again)
  assert ['seen'] == again.__notes__


def test_errors_of_plugins_stay_what_they_are():
  again = pickle.loads(pickle.dumps(OfPlugin(3, unit='ranks')))
  assert (OfPlugin, '3 ranks', 3) == (type(again), str(again), again.number)
  with pytest.raises(OfPlugin) as caught, errors.within('step 1'):
    raise again
  said = pickle.loads(pickle.dumps(caught.value))
  assert 'step 1: 3 ranks' == str(said)
  assert (OfPlugin, ('step 1',), 3) == (type(said), said.context, said.number)


def model():
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  layer = bx.Linear(graph.child('layer'), 3, rng)
  x = jnp.linspace(-1, 1, 8).reshape(2, 4)
  return graph, layer, layer(rng.seed(bx.Params(), seed=0), x)[1].locked(), x


def objects(tmp_path):
  """Returns an object of each public class."""
  graph, layer, params, x = model()
  adapted = surgery.attach(params, surgery.LoRA(rank=2), to='**')
  surgery.save(tmp_path / 'm.msgpack', adapted, graph=graph)
  saved = surgery.open(tmp_path / 'm.msgpack')
  factors = jnp.ones((2, 3)), jnp.ones((2, 1)), jnp.ones((1, 3))
  spec = surgery.ParamSpec('kernel', (2, 3), 'float32', 'io')
  site = surgery.Site(('net', 'layer'), (spec,), ('Linear',))
  child = bx.Graph('other').child('layer')
  plain: Any = {'net': {'kernel': jnp.ones((2, 3))}}
  tree = surgery.attach(plain, surgery.LoRA(rank=1), to='**')
  return {
    'AdaptedParams': adapted,
    'AdaptedTree': tree,
    'Adapter': surgery.LoRA(rank=2, patterns={'**/a': {'rank': 1}}),
    'AdapterInfo': surgery.adapters(adapted)[0],
    'Checkpoint': saved,
    'DenseFallbackWarning': surgery.DenseFallbackWarning('dense'),
    'DropoutWarning': surgery.DropoutWarning('nothing drops'),
    'Explanation': surgery.explain(layer, adapted, x),
    'Host': surgery.Host(entry_points=False),
    'Leaf': saved['net', 'layer', 'kernel'],
    'LoRA': surgery.LoRA(rank=2),
    'LoraLinear': surgery.LoraLinear(child, 4, bx.Rng(child.child('rng'))),
    'LayerType': surgery.LayerType(('Linear',), {'kernel': 'io'}),
    'LowRank': surgery.LowRank(*factors, scale=2.0),
    'Method': surgery.default_host().methods['linear'](),
    'ParamSpec': spec,
    'PeftLayer': surgery.PeftLayer('net.layer', 'linear', site),
    'PeftLoRA': surgery.PeftLoRA(),
    'PeftMapping': surgery.PeftLoRA(),
    'PeftModule': surgery.PeftModule('net.layer', {'lora_A': (2, 3)}, {}),
    'PluginWarning': surgery.PluginWarning('left out'),
    'Recipe': surgery.Recipe([{'drop': '**/bias'}], inputs={'model': 'a'}),
    'Refusal': surgery.Refusal('it has no inverse'),
    'Selection': surgery.select(adapted, '**/kernel'),
    'ShardWarning': surgery.ShardWarning('one of three'),
    'SiteWarning': surgery.SiteWarning('left out'),
    'Site': site,
    'Slot': surgery.Slot(3.0),
    'TensorStats': surgery.TensorStats('net/a', (2,), 'float32', 2, norm=1.5),
    'Tree': tree._kind,
  }


# Why those that cannot be pickled cannot be.
REASONS = {
  'Checkpoint': r'surgery\.Checkpoint cannot .*reads .* Pass the path',
  'Leaf': r'surgery\.Leaf cannot be pickled: it reads .* Pass the path',
  'Host': r'surgery\.Host cannot be pickled: it holds plugins',
  # It is a module of blox's, whose modules hold functions without a name.
  'LoraLinear': '(pickle|get) local object',
}


def shown(value):
  """Returns all that there is of a value, to compare."""
  if isinstance(value, bx.Params):
    return {
      path: (repr(p.value), p.trainable, p.metadata)
      for path, p in value.items()
    }, repr(surgery.adapters(value))
  if isinstance(value, surgery.AdaptedTree):
    leaves = [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(value)]
    return repr(value), jax.tree.structure(value), leaves
  if isinstance(value, surgery.LowRank):
    return np.asarray(value.dense()).tolist()
  if isinstance(value, surgery.Recipe):
    return value.data(), value.inputs
  if isinstance(value, surgery.PeftMapping):
    return type(value), vars(value)
  if isinstance(value, Warning):
    return type(value), value.args
  return value


def test_objects_survive_or_say_why_not(tmp_path):
  made = objects(tmp_path)
  classes = {
    name
    for name in surgery.__all__
    if isinstance(getattr(surgery, name), type)
    and not issubclass(getattr(surgery, name), surgery.SurgeryError)
  }
  assert classes == made.keys()
  for name, value in made.items():
    if name in REASONS:
      with pytest.raises((TypeError, AttributeError), match=REASONS[name]):
        pickle.dumps(value)
    else:
      assert shown(value) == shown(pickle.loads(pickle.dumps(value))), name
    copy.copy(value)
    copy.deepcopy(value)


@pytest.mark.parametrize('name', surgery.__all__)
def test_public_names_are_passed_by_name(name):
  value = getattr(surgery, name)
  again = pickle.loads(pickle.dumps(value))
  if name == 'hookimpl':  # pluggy's marker is any object with that name.
    assert value.project_name == again.project_name
  else:
    assert value is again


def test_params_that_wait_for_layers_say_why_they_cannot_be_pickled():
  graph, layer, _, x = model()
  pending = surgery.attach(bx.Params(), surgery.LoRA(rank=2), to='**')
  again = pickle.loads(pickle.dumps(pending))
  assert surgery.adapters(again) == surgery.adapters(pending)
  waiting = surgery.attach(
    bx.Params(), surgery.LoRA(rank=2), to='**', graph=graph
  )
  with pytest.raises(TypeError, match=r'call params\.locked\(\) first'):
    pickle.dumps(waiting)


def raising(name):
  cls = getattr(surgery, name)
  raise cls('net/a: wrong.', *MORE.get(name, []))


def answered(params, x):
  return np.asarray(model()[1](params, x)[0])


def test_a_pool_of_processes_reports_errors_and_answers():
  _, layer, params, x = model()
  adapted = surgery.attach(params, surgery.LoRA(rank=2), to='**', seed=1)
  spawned = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawned) as pool:
    for cls in ERRORS:
      if cls.__name__ not in surgery.__all__:
        continue
      with pytest.raises(cls, match='net/a: wrong') as caught:
        pool.submit(raising, cls.__name__).result()
      if cls is surgery.UnreachedError:
        assert (('net', 'a'), ('net', 'b')) == caught.value.paths
      if cls is surgery.FormatError:
        assert 12 == caught.value.offset
    there = pool.submit(answered, adapted, x).result()
  np.testing.assert_array_equal(np.asarray(layer(adapted, x)[0]), there)


def layer(params, x):
  return x @ params['net', 'kernel'].value


def made(strict):
  return surgery.factored(layer, strict=strict)


@pytest.mark.parametrize(
  'passed',
  [lambda f: pickle.loads(pickle.dumps(f)), copy.copy, copy.deepcopy],
)
def test_a_factored_function_goes_where_its_model_goes(passed):
  fast = passed(made(True))
  params = bx.Params()
  params['net', 'kernel'] = bx.Param(jnp.eye(3))
  x = jnp.arange(6.0).reshape(2, 3)
  assert np.array_equal(x, fast(params, x))
  assert 'layer' == fast.__name__


def test_a_factored_function_comes_out_of_a_pool():
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
    fast = pool.submit(made, True).result()
  assert fast.__wrapped__ is layer


def test_a_factored_function_is_a_method_of_its_class():
  class Owner:
    call = surgery.factored(lambda self, params, x: (self, x))

  owner = Owner()
  assert owner is owner.call(bx.Params(), 1.0)[0]
