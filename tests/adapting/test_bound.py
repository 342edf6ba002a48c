"""An adapter's file goes onto what it was trained on, and nothing else."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from tests.live import models

HIDDEN, OUTPUT = ('net/mlp/hidden0', 'net/mlp/output')


class Scales(surgery.Adapter):
  """Scales outputs: it does not add to its base."""

  name = 'scales'
  rewrites = ('kernel',)

  def init(self, site, key):
    del key
    return {'scale': jnp.ones(site.out_shape)}

  def apply(self, site, name, base, weights):
    del site, name
    return base * weights['scale']


@pytest.fixture(scope='module')
def net():
  return models.mlp()


@pytest.fixture(scope='module')
def host():
  return surgery.Host(plugins=[Scales])


def over(base, to=HIDDEN, inner=HIDDEN, adapter=None):
  """Returns params with an adapter `b` that was trained over another, `a`."""
  params = surgery.attach(base, surgery.LoRA(rank=2), to=inner, name='a')
  params = surgery.attach(
    params, adapter or surgery.LoRA(rank=1), to=to, name='b'
  )
  return models.stirred(params)


def save(folder, params, *names):
  files = [folder / f'{name}.msgpack' for name in names]
  for name, file in zip(names, files, strict=True):
    surgery.save_adapter(file, params, name)
  return files


def outputs(net, params):
  return np.asarray(net[0](params, net[2])[0])


# An adapter over another.


@pytest.mark.parametrize('to', [HIDDEN, OUTPUT], ids=['same', 'elsewhere'])
def test_the_bare_base_is_refused_unless_told(tmp_path, net, to):
  [file] = save(tmp_path, over(net[1], to), 'b')
  with pytest.raises(
    surgery.BaseMismatchError,
    match=r"adapter 'b' was trained over 'a' \(lora\), and 'a' is not attached "
    r"here\. Attach 'a' first .* or say check_base=False\.",
  ):
    surgery.load_adapter(file, net[1])
  surgery.load_adapter(file, net[1], check_base=False)


def test_files_loaded_in_order_give_what_was_saved(tmp_path, net):
  params = over(net[1])
  a, b = save(tmp_path, params, 'a', 'b')
  loaded = surgery.load_adapter(b, surgery.load_adapter(a, net[1]))
  assert np.array_equal(outputs(net, params), outputs(net, loaded))


def test_the_adapter_beneath_may_have_another_name(tmp_path, net):
  a, b = save(tmp_path, over(net[1]), 'a', 'b')
  loaded = surgery.load_adapter(a, net[1], 'renamed')
  loaded = surgery.load_adapter(b, loaded)
  assert ['renamed', 'b'] == [one.name for one in surgery.adapters(loaded)]


def test_a_base_into_which_the_adapter_beneath_was_merged_is_as_good(
  tmp_path, net
):
  params = over(net[1])
  a, b = save(tmp_path, params, 'a', 'b')
  merged = surgery.merge(surgery.load_adapter(a, net[1]))
  loaded = surgery.load_adapter(b, merged)
  np.testing.assert_allclose(
    outputs(net, params), outputs(net, loaded), rtol=1e-5, atol=1e-6
  )


def test_a_merged_adapter_that_is_attached_again_is_refused(tmp_path, net):
  a, b = save(tmp_path, over(net[1]), 'a', 'b')
  merged = surgery.merge(surgery.load_adapter(a, net[1]))
  twice = surgery.load_adapter(a, merged, check_base=False)
  with pytest.raises(surgery.BaseMismatchError, match='other values'):
    surgery.load_adapter(b, twice)


def test_other_weights_beneath_are_refused_by_name(tmp_path, net):
  a, b = save(tmp_path, over(net[1]), 'a', 'b')
  beneath = models.stirred(surgery.load_adapter(a, net[1]), seed=9)
  with pytest.raises(
    surgery.BaseMismatchError,
    match=r"'a' has other weights \(net/mlp/hidden0/kernel:lora_a, "
    r'net/mlp/hidden0/kernel:lora_b\) here',
  ):
    surgery.load_adapter(b, beneath)


def test_another_configuration_beneath_is_refused(tmp_path, net):
  _, b = save(tmp_path, over(net[1]), 'a', 'b')
  beneath = surgery.attach(
    net[1], surgery.LoRA(rank=2, alpha=99), to=HIDDEN, name='a'
  )
  with pytest.raises(
    surgery.BaseMismatchError, match=r"'a' has another configuration .*99"
  ):
    surgery.load_adapter(b, models.stirred(beneath))


def test_one_that_is_disabled_here_is_refused(tmp_path, net):
  a, b = save(tmp_path, over(net[1]), 'a', 'b')
  beneath = surgery.disable(surgery.load_adapter(a, net[1]))
  with pytest.raises(
    surgery.BaseMismatchError, match="'a' is disabled here.*enable what is"
  ):
    surgery.load_adapter(b, beneath)
  surgery.load_adapter(b, surgery.enable(beneath))


def test_one_that_was_disabled_in_training_is_not_missed(tmp_path, net):
  params = surgery.disable(over(net[1]), 'a')
  [b] = save(tmp_path, params, 'b')
  loaded = surgery.load_adapter(b, net[1])
  assert np.array_equal(outputs(net, params), outputs(net, loaded))


def test_another_order_is_refused(tmp_path, net):
  params = surgery.attach(
    over(net[1]), surgery.LoRA(rank=1), to=HIDDEN, name='c'
  )
  a, b, c = save(tmp_path, models.stirred(params), 'a', 'b', 'c')
  swapped = surgery.load_adapter(b, net[1], check_base=False)
  swapped = surgery.load_adapter(a, swapped)
  with pytest.raises(
    surgery.BaseMismatchError,
    match="trained over 'a' .lora., 'b' .lora., and they are attached in "
    "another order here. Attach 'a', then 'b' first",
  ):
    surgery.load_adapter(c, swapped)


# Others that were not there.


def test_adapters_that_add_may_be_put_together(tmp_path, net):
  for name in 'ab':
    params = surgery.attach(net[1], surgery.LoRA(rank=1), to=HIDDEN, name=name)
    save(tmp_path, models.stirred(params), name)
  loaded = surgery.load_adapter(tmp_path / 'a.msgpack', net[1])
  loaded = surgery.load_adapter(tmp_path / 'b.msgpack', loaded)
  assert 2 == len(surgery.adapters(loaded))


@pytest.mark.parametrize('first', ['lora', 'scales'])
def test_one_that_does_not_add_is_not_put_over_or_under_another(
  tmp_path, net, host, first
):
  kinds = {'lora': surgery.LoRA(rank=1), 'scales': Scales()}
  for name, kind in kinds.items():
    params = surgery.attach(net[1], kind, to=HIDDEN, name=name, host=host)
    file = tmp_path / f'{name}.msgpack'
    surgery.save_adapter(file, models.stirred(params), name, host=host)
  last = 'scales' if first == 'lora' else 'lora'
  loaded = surgery.load_adapter(
    tmp_path / f'{first}.msgpack', net[1], host=host
  )
  with pytest.raises(
    surgery.BaseMismatchError,
    match=f"net/mlp/hidden0/kernel: adapter '{last}' .* was not trained over "
    f"'{first}' .* Disable or merge '{first}'",
  ):
    surgery.load_adapter(tmp_path / f'{last}.msgpack', loaded, host=host)
  off = surgery.disable(loaded)
  surgery.load_adapter(tmp_path / f'{last}.msgpack', off, host=host)


# Files, and what old ones and damaged ones say.


def test_all_parameters_that_differ_are_listed(tmp_path, net):
  [file] = save(tmp_path, over(net[1], to=[HIDDEN, OUTPUT]), 'a')
  params = surgery.attach(net[1], surgery.LoRA(rank=1), to='**', name='all')
  file = save(tmp_path, params, 'all')[0]
  other = jax.tree.map(lambda x: x + 1, net[1].split()[0])
  with pytest.raises(
    surgery.BaseMismatchError,
    match=r'hidden0/kernel: adapter .* and for other values of 2 more: '
    r'net/mlp/hidden1/kernel, net/mlp/output/kernel\. Load',
  ):
    surgery.load_adapter(file, other)


def _changed(file, **entry):
  """Rewrites a file with another entry of its adapter."""
  opened = surgery.open(file)
  [said] = opened.manifest.adapters
  said = {k: v for k, v in {**said, **entry}.items() if v is not ...}
  changed = opened.replace(manifest=opened.manifest.replace(adapters=(said,)))
  changed.write(file, overwrite=True)


def test_a_file_of_an_older_release_is_held_against_values_alone(tmp_path, net):
  [file] = save(tmp_path, over(net[1]), 'b')
  _changed(file, beneath=..., given=...)
  assert surgery.load_adapter(file, net[1])


@pytest.mark.parametrize(
  'entry', [{'beneath': 3}, {'beneath': [3]}, {'given': []}, {'base': 'x'}]
)
def test_nonsense_in_an_entry_is_refused(tmp_path, net, entry):
  [file] = save(tmp_path, over(net[1]), 'b')
  _changed(file, **entry)
  with pytest.raises(surgery.FormatError, match="manifest: adapter 'b'"):
    surgery.load_adapter(file, net[1])


@pytest.mark.parametrize('verb', ['attach', 'merge', 'run'])
def test_the_shell_speaks_of_its_own_options(tmp_path, net, verb, surgery_cli):
  base, out = tmp_path / 'base.msgpack', tmp_path / 'out.msgpack'
  surgery.save(base, net[1])
  [b] = save(tmp_path, over(net[1]), 'b')
  recipe = tmp_path / 'r.yaml'
  recipe.write_text(
    f'inputs: {{m: {base}, b: {b}}}\noutputs: {{out: {out}}}\nsteps: [{{merge: '
    '{with: b}}]\n'
  )
  arguments = {
    'attach': ('attach', base, '--from', b, '-o', out),
    'merge': ('merge', base, '--with', b, '-o', out),
    'run': ('run', recipe),
  }[verb]
  result = surgery_cli(*arguments)
  assert 3 == result.code
  option = 'check-base: false' if verb == 'run' else '--no-check-base'
  assert f'or say {option}.' in result.err
  assert "trained over 'a'" in result.err
  assert not out.exists()


def test_files_are_attached_in_order_in_the_shell(tmp_path, net, surgery_cli):
  base = tmp_path / 'base.msgpack'
  surgery.save(base, net[1])
  whole = tmp_path / 'whole.msgpack'
  surgery.save(whole, over(net[1]))
  for name in 'ab':
    out = tmp_path / f'{name}.msgpack'
    assert 0 == surgery_cli('extract', whole, '--adapter', name, '-o', out).code
  one, two = tmp_path / '1.msgpack', tmp_path / '2.msgpack'
  surgery_cli('attach', base, '--from', tmp_path / 'a.msgpack', '-o', one)
  # Over the adapter, and over the base into which it was merged.
  last = ('--from', tmp_path / 'b.msgpack', '-o', two, '--force')
  assert 0 == surgery_cli('attach', one, *last).code
  assert 0 == surgery_cli('diff', whole, two).code
  merged = tmp_path / 'merged.msgpack'
  assert 0 == surgery_cli('merge', one, '-o', merged).code
  assert 0 == surgery_cli('attach', merged, *last).code


def test_what_lay_beneath_is_in_the_file(tmp_path, net):
  params = over(net[1])
  [file] = save(tmp_path, params, 'b')
  [entry] = surgery.open(file).manifest.adapters
  [beneath] = entry['beneath']
  assert ('a', 'lora') == (beneath['name'], beneath['type'])
  assert 2 == beneath['config']['rank']
  kernel = 'net/mlp/hidden0/kernel'
  assert {f'{kernel}:lora_a', f'{kernel}:lora_b'} == set(beneath['weights'])
  assert [kernel] == list(entry['given'])
  json.dumps(entry)
