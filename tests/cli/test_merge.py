import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surgery


@pytest.fixture
def out(tmp_path):
  return tmp_path / 'merged.msgpack'


def randomised(params, dtype='float32'):
  """Returns params of that dtype with a random adapter."""
  params = params.unlocked()
  for path in list(params.keys()):
    if 'rng' not in path:
      params[path] = params[path].replace(
        value=params[path].value.astype(dtype)
      )
  params = surgery.attach(
    params.locked(), surgery.LoRA(rank=2), to='**'
  ).unlocked()
  for i, path in enumerate(list(params.keys())):
    if path[-1] == 'lora_b':
      value = jax.random.normal(jax.random.key(i), params[path].value.shape)
      params[path] = params[path].replace(value=value)
  return params.locked()


def assert_same(expected, file):
  actual = surgery.load(file)
  assert type(expected) is type(actual)
  assert set(expected.keys()) == set(actual.keys())
  for path, param in expected.items():
    if 'rng' not in path:
      assert (
        np.asarray(param.value).tobytes()
        == np.asarray(actual[path].value).tobytes()
      ), path


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_file_and_live_give_the_same_bits(
  model, tmp_path, out, surgery_cli, dtype
):
  params = randomised(model.params, dtype)
  file = tmp_path / 'adapted.msgpack'
  surgery.save(file, params)
  assert 0 == surgery_cli('merge', file, '-o', out).code
  assert_same(surgery.merge(params), out)


def test_an_adapter_in_a_file_is_merged_into_its_base(
  model, tmp_path, out, surgery_cli
):
  params = randomised(model.params)
  alone = tmp_path / 'a.msgpack'
  surgery.save_adapter(alone, params)
  result = surgery_cli('merge', model.file, '--with', alone, '-o', out)
  assert 0 == result.code, result.err
  assert_same(surgery.merge(params), out)


def saved_alone(folder, base, name, seed, **options):
  """Returns params with one random adapter, and its file."""
  params = surgery.attach(
    base, surgery.LoRA(rank=2, **options), to='**', name=name, seed=seed
  ).unlocked()
  for path, param in list(params.items()):
    if path[-1].startswith('lora_b'):
      key = jax.random.key(hash((seed, *map(len, path))))
      value = jax.random.normal(key, param.value.shape)
      params[path] = param.replace(value=value)
  file = folder / f'{name}{seed}.msgpack'
  surgery.save_adapter(file, params.locked(), name)
  return file


def test_several_adapters_are_merged_in_their_order(
  model, tmp_path, out, surgery_cli
):
  # Both were made for the base, and are called alike.
  files = [saved_alone(tmp_path, model.params, 'x', seed) for seed in (1, 2)]
  expected = model.params
  for name, file in zip('ab', files, strict=True):
    expected = surgery.load_adapter(file, expected, name=name)
  options = [item for file in files for item in ('--with', file)]
  result = surgery_cli('merge', model.file, *options, '-o', out)
  assert 0 == result.code, result.err
  assert_same(surgery.merge(expected), out)


def test_adapters_in_files_are_merged_over_one_that_stays(
  model, tmp_path, out, surgery_cli
):
  files = [saved_alone(tmp_path, model.params, 'x', seed) for seed in (1, 2)]
  base = surgery.attach(
    model.params, surgery.LoRA(rank=1), to='**', name='with0'
  )
  adapted = tmp_path / 'adapted.msgpack'
  surgery.save(adapted, base)
  options = [item for file in files for item in ('--with', file)]
  result = surgery_cli('merge', adapted, *options, '-o', out)
  assert 0 == result.code, result.err
  for name, file in zip('ab', files, strict=True):
    base = surgery.load_adapter(file, base, name=name)
  assert_same(surgery.merge(base, ['a', 'b']), out)


def test_one_adapter_file_is_not_merged_twice(
  model, tmp_path, out, surgery_cli
):
  file = saved_alone(tmp_path, model.params, 'x', 1)
  result = surgery_cli(
    'merge', model.file, '--with', file, '--with', file, '-o', out
  )
  assert 2 == result.code
  assert 'given twice' in result.err
  assert not out.exists()


def test_one_of_two_is_merged_and_the_other_goes_on(
  model, tmp_path, out, surgery_cli
):
  params = surgery.attach(
    randomised(model.params), surgery.LoRA(rank=1), to='**', name='b'
  )
  file = tmp_path / 'adapted.msgpack'
  surgery.save(file, params)
  assert 0 == surgery_cli('merge', file, '--adapter', 'default', '-o', out).code
  merged = surgery.load(out)
  assert ['b'] == [a.name for a in surgery.adapters(merged)]
  assert jnp.allclose(
    model.net(params, model.x)[0], model.net(merged, model.x)[0], atol=1e-6
  )


@pytest.mark.parametrize(
  ('arguments', 'code', 'message'),
  [
    ((), 3, 'no adapter is attached'),
    (('--adapter', 'x'), 3, "there is no adapter 'x': no adapter is attached"),
    (('--no-check-base',), 2, '--no-check-base goes with --with'),
    (('--with', 'a', '--adapter', 'b'), 2, '--adapter does not go with --with'),
    (('--with', 'nowhere.msgpack'), 3, 'nowhere.msgpack'),
  ],
)
def test_bad_input_is_refused_with_its_reason(
  model, out, surgery_cli, arguments, code, message
):
  result = surgery_cli('merge', model.file, *arguments, '-o', out)
  assert code == result.code
  assert message in result.err
  assert not out.exists()


def test_a_model_is_wanted_not_an_adapter(model, tmp_path, out, surgery_cli):
  alone = tmp_path / 'a.msgpack'
  surgery.save_adapter(alone, randomised(model.params))
  result = surgery_cli('merge', alone, '-o', out)
  assert 3 == result.code
  assert 'an adapter without its base, not a model' in result.err


def test_a_file_that_is_none_is_refused(tmp_path, out, surgery_cli):
  file = tmp_path / 'x.msgpack'
  file.write_bytes(b'\xc1nonsense')
  result = surgery_cli('merge', file, '-o', out)
  assert 3 == result.code
  assert result.err.startswith('error: ')
  assert 'x.msgpack' in result.err


def test_a_result_that_is_not_finite_is_refused(
  model, tmp_path, out, surgery_cli
):
  params = randomised(model.params).unlocked()
  path = ('model', 'net', 'query', 'lora_b')
  params[path] = params[path].replace(value=params[path].value * jnp.nan)
  file = tmp_path / 'adapted.msgpack'
  surgery.save(file, params.locked())
  result = surgery_cli('merge', file, '-o', out)
  assert 3 == result.code
  assert 'model/net/query/kernel: the merged parameter has NaN' in result.err
  assert not out.exists()
  assert '--no-check-finite' in result.err
  only = ('--adapter', 'default', '--no-check-finite')
  for more in (('--no-check-finite',), only):
    result = surgery_cli('merge', file, *more, '-o', out, '--force')
    assert 0 == result.code, result.err
    merged = surgery.load(out)['model', 'net', 'query', 'kernel'].value
    assert jnp.isnan(merged).all()


def test_adapters_in_files_may_give_what_is_not_finite(
  model, tmp_path, out, surgery_cli
):
  params = randomised(model.params).unlocked()
  path = ('model', 'net', 'query', 'lora_b')
  params[path] = params[path].replace(value=params[path].value * jnp.nan)
  alone = tmp_path / 'a.msgpack'
  surgery.save_adapter(alone, params.locked())
  args = ('merge', model.file, '--with', alone, '-o', out)
  result = surgery_cli(*args)
  assert 3 == result.code
  assert '--no-check-finite' in result.err
  assert 0 == surgery_cli(*args, '--no-check-finite').code
  merged = surgery.load(out)['model', 'net', 'query', 'kernel'].value
  assert jnp.isnan(merged).all()


def test_a_copy_of_an_adapter_is_not_merged_beside_it(
  model, tmp_path, out, surgery_cli
):
  file = saved_alone(tmp_path, model.params, 'x', 1)
  copies = [shutil.copy(file, tmp_path / 'copy.msgpack')]
  # The same adapter under another name and in another format.
  other = tmp_path / 'other.safetensors'
  assert 0 == surgery_cli('convert', file, other).code
  renamed = tmp_path / 'renamed.msgpack'
  params = surgery.load_adapter(file, model.params, name='y')
  surgery.save_adapter(renamed, params, 'y')
  for copy in (*copies, other, renamed):
    options = ('--with', file, '--with', copy)
    result = surgery_cli('merge', model.file, *options, '-o', out)
    assert 3 == result.code, copy
    assert f'{copy}: adapter ' in result.err
    assert f'(in {file})' in result.err
    assert 'its update would count twice' in result.err
    assert '--no-check-same' in result.err
    assert not out.exists()
  twice = surgery_cli(
    'merge', model.file, *options, '--no-check-same', '-o', out
  )
  assert 0 == twice.code, twice.err
  expected = model.params
  for name in 'ab':
    expected = surgery.load_adapter(file, expected, name=name)
  assert_same(surgery.merge(expected), out)


def test_an_adapter_of_other_weights_is_no_copy(
  model, tmp_path, out, surgery_cli
):
  first = saved_alone(tmp_path, model.params, 'x', 1)
  for number, options in ((2, {}), (1, {'alpha': 3})):
    folder = tmp_path / f'{number}-{len(options)}'
    folder.mkdir()
    other = saved_alone(folder, model.params, 'x', number, **options)
    result = surgery_cli(
      'merge', model.file, '--with', first, '--with', other, '-o', out,
      '--force',
    )  # fmt: skip
    assert 0 == result.code, result.err


@pytest.mark.parametrize('digests', [True, False])
def test_an_adapter_that_is_attached_is_not_attached_again(
  model, tmp_path, out, surgery_cli, digests
):
  file = saved_alone(tmp_path, model.params, 'x', 1)
  adapted = tmp_path / 'adapted.msgpack'
  surgery_cli('attach', model.file, '--from', file, '-o', adapted)
  if not digests:
    # They are computed where they are not on record.
    opened = surgery.open(adapted)
    leaves = {p: leaf.replace(digest=None) for p, leaf in opened.items()}
    opened.replace(leaves=leaves).write(adapted, overwrite=True)
  again = ('--from', file, '--name', 'y', '-o', out)
  result = surgery_cli('attach', adapted, *again)
  assert 3 == result.code
  assert "adapter 'x' is the same as 'x'" in result.err
  result = surgery_cli('merge', adapted, '--with', file, '-o', out)
  assert 3 == result.code
  # One that is switched off adds nothing.
  off = tmp_path / 'off.msgpack'
  surgery_cli('disable', adapted, '--adapter', 'x', '-o', off)
  assert 0 == surgery_cli('attach', off, *again).code
  result = surgery_cli('attach', adapted, *again, '--no-check-same', '--force')
  assert 0 == result.code, result.err


def test_a_recipe_says_where_an_adapter_comes_twice(
  model, tmp_path, out, surgery_cli
):
  file = saved_alone(tmp_path, model.params, 'x', 1)
  recipe = tmp_path / 'r.yaml'
  recipe.write_text(
    f'inputs: {{model: {model.file}, a: {file}, b: {file}}}\n'
    'steps:\n'
    '  - attach: {from: a, name: one}\n'
    '  - merge: {with: b}\n'
  )
  result = surgery_cli('run', recipe, f'out={out}')
  assert 3 == result.code
  assert f'{recipe}:4: step 2 (merge): ' in result.err
  assert "is the same as 'one'" in result.err
