"""The examples work, each in a host of its own."""

import importlib.metadata
import importlib.util
import json
import pathlib
import shlex
import shutil
import sys

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from surgery.testing import check

HERE = pathlib.Path(__file__).parents[1]


def example(name):
  known = f'example_{name}'
  if known in sys.modules:
    return sys.modules[known]
  spec = importlib.util.spec_from_file_location(known, HERE / f'{name}.py')
  module = sys.modules[known] = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def network():
  params = bx.Params()
  for name, size in (('small', 2), ('large', 40)):
    params['net', name, 'kernel'] = bx.Param(
      jnp.linspace(-1, 1, size * size).reshape(size, size)
    )
    params['net', name, 'bias'] = bx.Param(jnp.zeros(size))
  return params.locked()


def test_a_selector_term():
  host = surgery.Host(plugins=[example('selector_term')], only=())
  params = network()
  chosen = surgery.select(params, 'larger:1000', host=host)
  assert {'large'} == {path[1] for path in chosen}
  adapted = surgery.attach(
    params, surgery.LoRA(rank=1), to='larger:3', host=host
  )
  assert 2 == len(surgery.adapters(adapted)[0].sites)
  with pytest.raises(surgery.SelectorError, match='expected a number of elem'):
    surgery.select(params, 'larger:x', host=host)


def test_a_freeze_policy():
  host = surgery.Host(plugins=[example('freeze_policy')], only=())
  frozen = surgery.freeze(network(), policy='bitfit', host=host)
  assert {'bias'} == {p[-1] for p, one in frozen.items() if one.trainable}


def output(params, x=None):
  layer = bx.Linear(bx.Graph('net').child('large'), 40, None)
  return layer(params, jnp.ones((1, 40)) if x is None else x)[0]


def gradients(params):
  """Returns the gradients of what trains, by path."""
  loss = lambda half, rest: (output(half.merge(rest)) ** 2).sum()
  return {p: g.value for p, g in jax.grad(loss)(*params.split()).items()}


def quantised(values, bits, axis=0):
  """Plain numpy: multiples of a step for each output."""
  most = 2 ** (bits - 1) - 1
  step = np.abs(values).max(axis, keepdims=True) * np.float32(1 / most)
  return np.round(values / np.where(step == 0, 1, step)) * step


def test_fake_quantisation_is_attached_like_any_type():
  quantise = example('fake_quantise').Quantise(bits=3)
  host = surgery.Host(plugins=[type(quantise)], only=())
  base = network()
  params = surgery.attach(base, quantise, to='**', host=host)
  assert base.keys() == params.keys()
  merged = surgery.merge(params, host=host)
  for name in ('small', 'large'):
    kernel = np.asarray(merged['net', name, 'kernel'].value)
    expected = quantised(np.asarray(base['net', name, 'kernel'].value), 3)
    assert np.array_equal(expected, kernel)
    assert all(len(np.unique(column)) <= 7 for column in kernel.T)
  assert np.array_equal(output(params), output(merged))
  # Straight through: the gradients of a model that stores what is answered.
  for path, gradient in gradients(params).items():
    assert np.array_equal(gradients(merged)[path], gradient), path
  # Axes that are stacked have steps of their own, wherever outputs lie.
  turned = bx.Params()
  values = jnp.linspace(-1, 2, 24).reshape(2, 3, 4)
  turned['net', 'kernel'] = bx.Param(values.astype(jnp.bfloat16))
  turned = surgery.merge(
    surgery.attach(
      turned.locked(), quantise, to='**', layout='soi', host=host
    ),
    host=host,
  )['net', 'kernel'].value  # fmt: skip
  exact = quantised(np.asarray(values.astype(jnp.bfloat16), np.float32), 3, 2)
  assert np.array_equal(jnp.asarray(exact, jnp.bfloat16), turned)


def test_what_other_types_answer_is_quantised_by_a_wrapper(tmp_path):
  plugin = example('fake_quantise').QuantiseAnswers(bits=3)
  host = surgery.Host(plugins=[plugin], only=())
  lora = surgery.LoRA(rank=2)
  params = surgery.attach(network(), lora, to='**', host=host)
  plain = surgery.attach(network(), lora, to='**')
  merged = surgery.merge(params, host=host)
  kernel = merged['net', 'large', 'kernel'].value
  wanted = surgery.merge(plain)['net', 'large', 'kernel'].value
  assert np.array_equal(quantised(np.asarray(wanted), 3), kernel)
  # A file is loaded by the same host, and answers alike.
  surgery.save(tmp_path / 'm.msgpack', params, host=host)
  loaded = surgery.load(tmp_path / 'm.msgpack', host=host)
  assert np.array_equal(output(params), output(loaded))


def test_a_pruning_mask_stays_while_the_base_trains():
  prune = example('pruning_mask').Prune(fraction=0.3)
  host = surgery.Host(plugins=[type(prune)], only=())
  base = network()
  params = surgery.attach(base, prune, to='**', host=host)
  kernel = np.asarray(base['net', 'large', 'kernel'].value)
  smallest = np.argsort(np.abs(kernel).ravel(), kind='stable')[:480]
  mask = np.ones(1600, bool)
  mask[smallest] = False
  mask = mask.reshape(kernel.shape)
  assert np.array_equal(mask, params['net', 'large', 'mask'].value)
  expected = np.ones((1, 40), np.float32) @ np.where(mask, kernel, 0)
  np.testing.assert_allclose(expected, output(params), atol=1e-5)
  # What is masked gets no gradient, and a step does not bring it back.
  gradient = gradients(params)['net', 'large', 'kernel']
  assert np.array_equal(mask, np.asarray(gradient) != 0)
  path = ('net', 'large', 'kernel')
  moved = params.unlocked()
  moved[path] = moved[path].replace(value=moved[path].value + 1)
  merged = surgery.merge(moved.locked(), host=host)
  assert np.array_equal(np.where(mask, kernel + 1, 0), merged[path].value)
  assert not np.signbit(merged[path].value[~mask]).any()
  assert base.keys() == merged.keys()


def test_types_that_train_nothing_obey_the_laws():
  said = {'identity': False, 'trains': False, 'kinds': ['stacked']}
  quantise = example('fake_quantise').Quantise(bits=4)
  check(quantise, dtypes=['float32'], **said)
  # Weights that never train are saved, and merged, stacked and several, too.
  laws = [
    'file_merge_is_live_merge',
    'several_adapters_work_together',
    'an_adapter_is_saved_alone',
    'training_changes_the_adapter_alone',
    'what_is_declared_frozen_does_not_train',
  ]
  prune = example('pruning_mask').Prune(fraction=0.4)
  check(prune, laws=laws, dtypes=['float32'], **said)


@pytest.fixture
def offered(tmp_path, monkeypatch):
  """Both types, by entry points of a distribution on the path."""
  for module in ('fake_quantise', 'pruning_mask'):
    shutil.copy(HERE / f'{module}.py', tmp_path)
  info = tmp_path / 'nothing_trains-1.0.dist-info'
  info.mkdir()
  (info / 'METADATA').write_text(
    'Metadata-Version: 2.1\nName: nothing-trains\nVersion: 1.0\n'
  )
  (info / 'entry_points.txt').write_text(
    '[surgery.adapters]\nquantise = fake_quantise:Quantise\n'
    'prune = pruning_mask:Prune\n'
  )
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.chdir(tmp_path)
  yield surgery.Host()
  for module in ('fake_quantise', 'pruning_mask'):
    sys.modules.pop(module, None)


@pytest.mark.parametrize('name', ['quantise', 'prune'])
def test_they_work_in_the_shell_in_recipes_and_alone(
  offered, monkeypatch, capfd, name
):
  # What the installed command `surgery` runs.
  (script,) = importlib.metadata.entry_points(
    group='console_scripts', name='surgery'
  )
  main = script.load()

  def shell(line):
    # A host of this command's own: the default one has looked already.
    words = ['surgery', '--no-plugin', 'x', *shlex.split(line)]
    monkeypatch.setattr(sys, 'argv', words)
    with pytest.raises(SystemExit) as ended:
      main()
    return ended.value.code

  base = network()
  surgery.save('base.msgpack', base)
  adapter = offered.adapter_type(name)()
  params = surgery.attach(base, adapter, to='**', host=offered)
  recipe = f"- attach: {{adapter: {name}, to: '**'}}\n- merge\n"
  pathlib.Path('r.yaml').write_text(recipe)
  for line in (
    f"attach base.msgpack --adapter {name} --to '**' -o adapted.msgpack",
    'merge adapted.msgpack -o merged.msgpack',
    'run r.yaml model=base.msgpack out=by-recipe.msgpack',
    'diff merged.msgpack by-recipe.msgpack',
    'detach adapted.msgpack --save-adapter alone.msgpack -o off.msgpack',
    'diff base.msgpack off.msgpack',
    'merge base.msgpack --with alone.msgpack -o direct.msgpack',
    'diff merged.msgpack direct.msgpack',
    'inspect alone.msgpack',
  ):
    assert 0 == shell(line), (line, capfd.readouterr().err)
  out, told = capfd.readouterr()
  assert f'adapter default: {name}(' in out
  assert 'wrote alone.msgpack: ' in told and ': \n' not in told
  adapted = surgery.load('adapted.msgpack', host=offered)
  assert np.array_equal(output(params), output(adapted))
  merged, live = surgery.load('merged.msgpack'), surgery.merge(params)
  for path, param in live.items():
    assert np.array_equal(param.value, merged[path].value), path
  alone = surgery.load_adapter('alone.msgpack', base, host=offered)
  assert surgery.adapters(params)[0].sites == surgery.adapters(alone)[0].sites
  assert np.array_equal(output(params), output(alone))
  assert 1 == shell('diff base.msgpack adapted.msgpack')
  assert f"adapter 'default': only in b ({name})" in capfd.readouterr().out


def test_a_pass(tmp_path):
  host = surgery.Host(plugins=[example('clip')], only=())
  surgery.save(tmp_path / 'm.msgpack', network())
  step = {'clip': {'select': '**/kernel', 'at': 0.5}}
  surgery.Recipe([step]).run(
    model=tmp_path / 'm.msgpack', out=tmp_path / 'o.msgpack', host=host
  )
  live = surgery.apply(network(), step, host=host)
  for path, param in surgery.load(tmp_path / 'o.msgpack').items():
    expected = np.clip(network()[path].value, -0.5, 0.5)
    assert np.array_equal(expected, param.value)
    assert np.array_equal(expected, live[path].value)
  with pytest.raises(surgery.RecipeError, match='expected a bound above 0'):
    surgery.apply(network(), {'clip': {'select': '**', 'at': 0}}, host=host)
  with pytest.raises(surgery.RecipeError, match="'at' must be given"):
    surgery.apply(network(), {'clip': '**'}, host=host)


def test_a_format(tmp_path):
  host = surgery.Host(plugins=[example('npz')], only=())
  surgery.save(tmp_path / 'm.msgpack', network())
  ckpt = surgery.open(tmp_path / 'm.msgpack', host=host)
  ckpt.write(tmp_path / 'm.npz', host=host)
  with np.load(tmp_path / 'm.npz') as file:
    assert {'/'.join(p) for p in network().keys()} == set(file.files)
  again = surgery.open(tmp_path / 'm.npz', host=host)
  for path, leaf in again.items():
    assert np.array_equal(network()[path].value, leaf.load())
  with pytest.raises(FileExistsError):
    ckpt.write(tmp_path / 'm.npz', host=host)
  adapted = surgery.attach(again, surgery.LoRA(rank=1), to='**', host=host)
  with pytest.raises(surgery.FormatError, match='no place for adapters'):
    adapted.write(tmp_path / 'a.npz', host=host)
  assert ['m.msgpack', 'm.npz'] == sorted(p.name for p in tmp_path.iterdir())


def test_an_observer(tmp_path):
  observer = example('provenance').Provenance(tmp_path / 'done.jsonl')
  host = surgery.Host(plugins=[observer], only=())
  params = surgery.attach(
    network(), surgery.LoRA(rank=1), to='**', seed=3, host=host
  )
  surgery.merge(params, host=host)
  with pytest.raises(surgery.AdapterError):
    surgery.merge(params, 'x', host=host)
  lines = (tmp_path / 'done.jsonl').read_text().splitlines()
  first, second, third = map(json.loads, lines)
  assert ('attach', 3) == (first['verb'], first['arguments']['seed'])
  assert ('merge', None) == (second['verb'], second['failed'])
  assert "no adapter 'x'" in third['failed']


def test_the_table_has_all():
  table = (HERE / 'README.md').read_text()
  for file in HERE.glob('*.py'):
    assert f'({file.name})' in table
