"""A folder that we wrote knows its base, in whatever order its axes are."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import surgery
from surgery.interop.peft import bases
from tests.interop.peft.conftest import made

FILE = 'adapter_model.safetensors'


@pytest.fixture
def case(tmp_path):
  """A linear network with an embedding and a convolution."""
  return made('netv_lora', tmp_path)


@pytest.fixture
def written(case, surgery_cli, tmp_path):
  """A folder that we wrote, of an adapter on the torch checkpoint."""
  adapted, out = tmp_path / 'adapted.safetensors', tmp_path / 'out'
  for args in (
    ('attach', case.base_file, '--from', case.folder, '-o', adapted),
    ('extract', adapted, '--to', 'peft', '-o', out),
  ):
    result = surgery_cli(*args)
    assert result.code == 0, result.err
  return out


def merge(base, folder, out):
  surgery.Recipe(
    [{'merge': {'with': 'adapter'}}],
    inputs={'model': base, 'adapter': folder},
    outputs={'out': out},
  ).plan().write()


def changed(params):
  """Params in which the last number of each array is another."""
  params = params.unlocked()
  for path, param in list(params.items()):
    at = (-1,) * param.value.ndim
    params[path] = param.replace(value=param.value.at[at].add(1))
  return params.locked()


def test_another_base_is_refused_unless_it_is_meant(
  case, written, surgery_cli, tmp_path
):
  tensors = load_file(case.base_file)
  name = 'mlp.hidden0.weight'
  tensors[name][-1, -1] += 1
  other = tmp_path / 'other.safetensors'
  save_file(tensors, other)
  out = tmp_path / 'merged.safetensors'
  result = surgery_cli('merge', other, '--with', written, '-o', out)
  assert result.code == 3
  assert f'{name.replace(".", "/")}: adapter' in result.err
  assert 'was made for other values' in result.err
  assert '--no-check-base' in result.err
  assert not out.exists()
  given = ('merge', other, '--with', written, '--no-check-base', '-o', out)
  assert surgery_cli(*given).code == 0
  # PEFT's own folder does not say what it is for.
  for folder, base in ((case.folder, other), (written, case.base_file)):
    result = surgery_cli('merge', base, '--with', folder, '-o', out, '--force')
    assert result.code == 0, result.err


def test_the_same_base_in_jax_is_known_and_another_is_not(case, written):
  params = surgery.load_adapter(written, case.params)
  y, _ = case.model(params, *case.inputs)
  np.testing.assert_allclose(y, case.y, atol=1e-5, rtol=1e-5)
  with pytest.raises(surgery.BaseMismatchError, match='kernel: adapter'):
    surgery.load_adapter(written, changed(case.params))
  surgery.load_adapter(written, changed(case.params), check_base=False)


def test_a_folder_of_jax_params_knows_the_torch_checkpoint(case, tmp_path):
  params = surgery.load_adapter(case.folder, case.params)
  out = tmp_path / 'out'
  surgery.save_adapter(out, params, format='peft')
  with safe_open(out / FILE, 'np') as file:
    said = json.loads(file.metadata()[bases.KEY])
  assert said['modules'].keys() == {
    n.rpartition('.lora')[0].removeprefix('base_model.model.')
    for n in load_file(out / FILE)
  }
  again = surgery.load_adapter(out, case.params)
  y, _ = case.model(again, *case.inputs)
  np.testing.assert_allclose(y, case.y, atol=1e-5, rtol=1e-5)
  merge(case.base_file, out, tmp_path / 'merged.safetensors')
  found = load_file(tmp_path / 'merged.safetensors')
  for name, value in case.merged.items():
    np.testing.assert_allclose(found[name], value, atol=2e-5)
  tensors = load_file(case.base_file)
  for value in tensors.values():
    value[(0,) * value.ndim] += 1
  save_file(tensors, tmp_path / 'other.safetensors')
  with pytest.raises(surgery.RecipeError, match='conv/weight: .* other values'):
    merge(tmp_path / 'other.safetensors', out, tmp_path / 'no.msgpack')


def test_an_adapter_beneath_is_asked_for(case, tmp_path):
  base = surgery.attach(case.params, surgery.LoRA(rank=1), to='**/output')
  base = surgery.with_weights(
    base,
    'default',
    {
      site: {name: w + 0.1 for name, w in weights.items()}
      for site, weights in surgery.weights(base).items()
    },
  )
  params = surgery.load_adapter(case.folder, base, name='over')
  out = tmp_path / 'out'
  surgery.save_adapter(out, params, 'over', format='peft')
  with pytest.raises(surgery.BaseMismatchError, match='was trained over'):
    surgery.load_adapter(out, case.params)
  surgery.load_adapter(out, base, name='again')
  # What was beneath may have been merged since.
  surgery.load_adapter(out, surgery.merge(base))


@pytest.mark.parametrize(
  'text',
  [
    '[]',
    '{}',
    'null',
    '{"modules": {"a": [{"shape": [2], "layout": "oi"}]}}',
    '{"modules": {"a": [{"name": "w", "dtype": "f", "shape": [2], '
    '"layout": "o", "digest": 3}]}}',
  ],
)
def test_what_is_no_record_of_a_base_is_refused(case, text):
  path = case.folder / FILE
  save_file(load_file(path), path, metadata={'format': 'pt', bases.KEY: text})
  with pytest.raises(surgery.FormatError, match='Save the adapter again'):
    surgery.load_adapter(case.folder, case.params)


def test_shapes_that_no_turn_explains_are_another_base(case, written):
  path = written / FILE
  with safe_open(path, 'np') as file:
    metadata = file.metadata()
  said = json.loads(metadata[bases.KEY])
  for params in said['modules'].values():
    params[0]['shape'][0] *= 2
  metadata[bases.KEY] = json.dumps(said)
  save_file(load_file(path), path, metadata=metadata)
  with pytest.raises(surgery.BaseMismatchError, match='other values'):
    surgery.load_adapter(written, changed(case.params))
