"""Folders of LoRA equal PEFT's outputs, merged weights and bytes."""

import json

import blox as bx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import surgery


def values(path):
  opened = surgery.open(path)
  return {'.'.join(p): np.asarray(leaf.load()) for p, leaf in opened.items()}


def folder_of(path):
  config = json.loads((path / 'adapter_config.json').read_text())
  return load_file(path / 'adapter_model.safetensors'), config


def same(expected, found):
  assert set(expected) == set(found)
  for name, value in expected.items():
    assert (value.dtype, value.shape) == (found[name].dtype, found[name].shape)
    np.testing.assert_array_equal(value, found[name], err_msg=name)


def test_a_merged_file_has_the_weights_that_peft_merges(
  case, surgery_cli, tmp_path
):
  out = tmp_path / 'merged.safetensors'
  result = surgery_cli(
    'merge', case.base_file, '--with', case.folder, '-o', out
  )
  assert result.code == 0, result.err
  found = values(out)
  assert set(case.merged) == set(found)
  for name, value in case.merged.items():
    np.testing.assert_allclose(found[name], value, atol=2e-5, err_msg=name)


def test_live_params_give_the_outputs_of_peft(case):
  params = surgery.load_adapter(case.folder, case.params)
  y, _ = case.model(params, *case.inputs)
  np.testing.assert_allclose(y, case.y, atol=1e-5, rtol=1e-5)
  y, _ = surgery.factored(case.model)(params, *case.inputs)
  np.testing.assert_allclose(y, case.y, atol=2e-5, rtol=1e-5)


def test_merged_params_give_the_outputs_of_peft(case):
  params = surgery.merge(surgery.load_adapter(case.folder, case.params))
  y, _ = case.model(params, *case.inputs)
  np.testing.assert_allclose(y, case.y, atol=1e-5, rtol=1e-5)


def test_what_was_read_is_written_as_it_was(case, surgery_cli, tmp_path):
  adapted, out = tmp_path / 'adapted.msgpack', tmp_path / 'again'
  attach = surgery_cli(
    'attach', case.base_file, '--from', case.folder, '-o', adapted
  )
  assert attach.code == 0, attach.err
  result = surgery_cli('extract', adapted, '--to', 'peft', '-o', out)
  assert result.code == 0, result.err
  tensors, config = folder_of(out)
  same(case.tensors, tensors)
  assert case.config == config
  header = (out / 'adapter_model.safetensors').read_bytes()
  assert b'"format":"pt"' in header[:2000]


def test_live_params_are_written_as_they_were_read(case, tmp_path):
  out = tmp_path / 'again'
  params = surgery.load_adapter(case.folder, case.params, name='tuned')
  surgery.save_adapter(out, params, 'tuned', format='peft')
  tensors, config = folder_of(out)
  same(case.tensors, tensors)
  assert case.config == config


def test_an_adapter_of_ours_becomes_a_folder_and_comes_back(tmp_path, lora):
  adapter = surgery.LoRA(
    rank=4, alpha=6, rslora=True, patterns={'**/output': {'rank': 2}}
  )
  params = surgery.attach(lora.params, adapter, to='**/{hidden0,output}')
  drawn = surgery.weights(params)
  changed = {
    site: {n: w + 0.1 * (k + 1) for k, (n, w) in enumerate(weights.items())}
    for site, weights in drawn.items()
  }
  params = surgery.with_weights(params, 'default', changed)
  surgery.save_adapter(tmp_path / 'out', params, format='peft')
  _, config = folder_of(tmp_path / 'out')
  assert config['r'] == 4
  assert config['use_rslora'] is True
  assert {r'^root\.net\.mlp\.output': 2} == config['rank_pattern']
  again = surgery.load_adapter(tmp_path / 'out', lora.params)
  y, _ = lora.model(params, *lora.inputs)
  z, _ = lora.model(again, *lora.inputs)
  np.testing.assert_array_equal(y, z)


def test_ranks_that_were_pruned_keep_their_scale(tmp_path, lora):
  params = surgery.load_adapter(lora.folder, lora.params)
  site = 'root/net/mlp/hidden0/kernel'
  params = surgery.prune_ranks(params, {site: [0, 3]})
  y, _ = lora.model(params, *lora.inputs)
  surgery.save_adapter(tmp_path / 'out', params, format='peft')
  _, config = folder_of(tmp_path / 'out')
  assert list(config['rank_pattern'].values()) == [2]
  again = surgery.load_adapter(tmp_path / 'out', lora.params)
  z, _ = lora.model(again, *lora.inputs)
  np.testing.assert_allclose(y, z, rtol=1e-6, atol=1e-6)


def test_names_say_what_modules_are_called_in_a_model(lora):
  renamed = bx.Params()
  for path, param in lora.params.items():
    renamed[('body', 'layers', 'deep', *path[-2:])] = param
  renamed = renamed.locked()
  with pytest.raises(surgery.FormatError, match=r'no place in the base for'):
    surgery.load_adapter(lora.folder, renamed)
  expected = surgery.load_adapter(lora.folder, lora.params)
  for names in (
    {'mlp': 'body.layers.deep'},
    {
      f'mlp.{n}': f'body/layers/deep/{n}'
      for n in ('hidden0', 'hidden1', 'output')
    },
    'mlp/** -> body/layers/deep/**',
  ):
    found = surgery.load_adapter(lora.folder, renamed, names=names)
    for path, param in expected.items():
      if path[:3] == ('root', 'net', 'mlp'):
        other = found[('body', 'layers', 'deep', *path[3:])]
        np.testing.assert_array_equal(param.value, other.value)


@pytest.mark.parametrize(
  ('old', 'new'), [('mlp', 'model.mlp'), ('mlp.', '')], ids=['more', 'less']
)
def test_a_base_without_the_name_in_front_is_found(lora, old, new, tmp_path):
  base = {
    k.replace(old, new, 1): v for k, v in load_file(lora.base_file).items()
  }
  save_file(base, tmp_path / 'other.safetensors')
  merged = surgery.Recipe(
    [{'merge': {'with': 'adapter'}}],
    inputs={
      'model': tmp_path / 'other.safetensors',
      'adapter': lora.folder,
    },
    outputs={'out': tmp_path / 'out.safetensors'},
  )
  merged.plan().write()
  found = values(tmp_path / 'out.safetensors')
  for name, value in lora.merged.items():
    got = found[name.replace(old, new, 1)]
    np.testing.assert_allclose(got, value, atol=2e-5)


def test_dropout_is_kept_and_comes_back(lora, config, tmp_path):
  config(lora_dropout=0.25)
  params = surgery.load_adapter(lora.folder, lora.params)
  assert surgery.adapters(params)[0].config['dropout'] == 0.25
  y, _ = surgery.factored(lora.model)(params, *lora.inputs)
  assert bool(jnp.isfinite(y).all())
  surgery.save_adapter(tmp_path / 'out', params, format='peft')
  tensors, said = folder_of(tmp_path / 'out')
  same(lora.tensors, tensors)
  assert said['lora_dropout'] == 0.25


def test_a_low_precision_adapter_keeps_its_dtype(lora, tensors, tmp_path):
  def cast(found):
    for name, value in found.items():
      found[name] = value.astype(ml_dtypes.bfloat16)

  tensors(cast)
  expected = load_file(lora.folder / 'adapter_model.safetensors')
  params = surgery.load_adapter(lora.folder, lora.params)
  surgery.save_adapter(tmp_path / 'out', params, format='peft')
  same(expected, folder_of(tmp_path / 'out')[0])


def test_a_stacked_layer_has_no_folder(tmp_path):
  params = bx.Params()
  params['net', 'kernel'] = bx.Param(jnp.ones((3, 8, 4)))
  params = surgery.attach(
    params.locked(), surgery.LoRA(rank=2), to='net', stacked=1
  )
  with pytest.raises(surgery.FormatError, match='unstack the model first'):
    surgery.save_adapter(tmp_path / 'out', params, format='peft')
  assert not (tmp_path / 'out').exists()


def test_conv1d_is_told_by_its_shape_and_the_configuration(
  lora, surgery_cli, tmp_path
):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype('float32')
  base = {'h.0.c_attn.weight': draw(8, 24), 'h.0.c_proj.weight': draw(8, 8)}
  save_file(base, tmp_path / 'gpt.safetensors')
  factors = {}
  for name, out in (('c_attn', 24), ('c_proj', 8)):
    front = f'base_model.model.transformer.h.0.{name}'
    factors[f'{front}.lora_A.weight'] = draw(2, 8)
    factors[f'{front}.lora_B.weight'] = draw(out, 2)
  save_file(factors, lora.folder / 'adapter_model.safetensors')
  path = lora.folder / 'adapter_config.json'
  said = json.loads(path.read_text())
  said |= {'r': 2, 'target_modules': ['c_attn', 'c_proj']}
  out = tmp_path / 'out.safetensors'
  merge = ('merge', tmp_path / 'gpt.safetensors', '--with', lora.folder)
  path.write_text(json.dumps({**said, 'fan_in_fan_out': False}))
  result = surgery_cli(*merge, '-o', out)
  assert result.code != 0
  assert 'is square, and other modules are (in, out)' in result.err
  path.write_text(json.dumps({**said, 'fan_in_fan_out': True}))
  result = surgery_cli(*merge, '-o', out)
  assert result.code == 0, result.err
  found = values(out)
  for name in ('c_attn', 'c_proj'):
    front = f'base_model.model.transformer.h.0.{name}'
    a, b = (factors[f'{front}.lora_{m}.weight'] for m in 'AB')
    expected = base[f'h.0.{name}.weight'] + 8 / 2 * (b @ a).T
    np.testing.assert_allclose(found[f'h.0.{name}.weight'], expected, atol=1e-5)


def test_jit_and_gradients_go_through_a_loaded_adapter(lora):
  params = surgery.load_adapter(lora.folder, lora.params)
  half, rest = params.split()

  def loss(half):
    y, _ = surgery.factored(lora.model)(half.merge(rest), *lora.inputs)
    return (y**2).mean()

  grads = jax.jit(jax.grad(loss))(half)
  assert all(bool(jnp.any(g.value)) for g in grads.values() if g.trainable)


@pytest.mark.parametrize(
  'names', [{'mlp': 'root.net.mlp'}, 'mlp/** -> root/net/mlp/**']
)
def test_names_are_told_again_after_a_transformation(lora, tmp_path, names):
  params = surgery.load_adapter(lora.folder, lora.params)
  through = jax.jit(lambda p: p)(params)
  out = tmp_path / 'out'
  surgery.save_adapter(
    out, through, format='peft', names=names, modules_to_save=[]
  )
  same(lora.tensors, folder_of(out)[0])


def test_names_are_for_formats_of_other_programs(lora, tmp_path):
  params = surgery.load_adapter(lora.folder, lora.params)
  with pytest.raises(surgery.ConfigError, match='names goes with a format'):
    surgery.save_adapter(tmp_path / 'a.msgpack', params, names={'a': 'b'})
