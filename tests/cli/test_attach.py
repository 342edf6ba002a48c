import json

import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from tests.cli.saved import steps
from tests.files.trees import checkpoint_of

LORA = ('--adapter', 'lora', '--to', '**/{query,value}', '--set', 'rank=2')


@pytest.fixture
def out(tmp_path):
  return tmp_path / 'out.msgpack'


def arrays(params):
  return {p: params[p].value for p in params.keys() if 'rng' not in p}


def assert_same_bits(expected, actual):
  assert set(expected) == set(actual)
  for path, value in expected.items():
    assert value.dtype == actual[path].dtype, path
    assert value.tobytes() == actual[path].tobytes(), path


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_file_and_live_give_the_same_bits(
  model, tmp_path, out, surgery_cli, dtype
):
  params = model.params.unlocked()
  for path in list(params.keys()):
    if 'rng' not in path:
      params[path] = params[path].replace(
        value=params[path].value.astype(dtype)
      )
  base = tmp_path / 'typed.msgpack'
  surgery.save(base, params.locked())
  live = surgery.attach(
    params.locked(), surgery.LoRA(rank=2), to='**/{query,value}', seed=3
  )
  assert 0 == surgery_cli('attach', base, *LORA, '--seed', 3, '-o', out).code
  assert_same_bits(arrays(live), arrays(surgery.load(out)))


def test_what_is_attached_is_loaded_and_used(model, out, surgery_cli):
  result = surgery_cli('attach', model.file, *LORA, '-o', out)
  assert (0, '') == (result.code, result.out)
  assert 'wrote' in result.err
  params = surgery.load(out)
  [info] = surgery.adapters(params)
  assert ('default', 'lora', 2) == (info.name, info.type, info.config['rank'])
  surgery.check(model.net, params, model.x)


def test_options_for_some_sites_only(model, out, surgery_cli):
  surgery_cli(
    'attach', model.file, *LORA, '--set', '**/value:rank=3', '-o', out
  )
  params = surgery.load(out)
  shapes = [
    params[('model', 'net', name, 'lora_a')].value.shape
    for name in ('query', 'value')
  ]
  assert [(6, 2), (8, 3)] == shapes


def test_types_of_layers_are_known_from_the_file(model, out, surgery_cli):
  result = surgery_cli(
    'attach',
    model.file,
    '--adapter',
    'lora',
    '--to',
    'type:Linear',
    '--set',
    'rank=1',
    '-o',
    out,
  )
  assert 0 == result.code
  assert 2 == len(surgery.adapters(surgery.load(out))[0].sites)


def test_an_adapter_in_a_file_is_attached_to_its_base(
  model, tmp_path, out, surgery_cli
):
  adapted = surgery.attach(model.params, surgery.LoRA(rank=2), to='**')
  alone = tmp_path / 'a.msgpack'
  surgery.save_adapter(alone, adapted)
  result = surgery_cli('attach', model.file, '--from', alone, '-o', out)
  assert 0 == result.code, result.err
  assert_same_bits(arrays(adapted), arrays(surgery.load(out)))


def test_another_base_is_refused_unless_told(model, tmp_path, out, surgery_cli):
  adapted = surgery.attach(model.params, surgery.LoRA(rank=2), to='**')
  alone, other = tmp_path / 'a.msgpack', tmp_path / 'other.msgpack'
  surgery.save_adapter(alone, adapted)
  params = model.params.unlocked()
  path = ('model', 'net', 'query', 'kernel')
  params[path] = params[path].replace(value=params[path].value + 1)
  surgery.save(other, params.locked())
  result = surgery_cli('attach', other, '--from', alone, '-o', out)
  assert 3 == result.code
  assert "model/net/query/kernel: adapter 'default' was made for" in result.err
  assert not out.exists()
  args = ('attach', other, '--from', alone, '--no-check-base', '-o', out)
  assert 0 == surgery_cli(*args).code


def test_a_dry_run_shows_the_plan_and_writes_nothing(model, out, surgery_cli):
  result = surgery_cli('attach', model.file, *LORA, '-o', out, '--dry-run')
  assert 0 == result.code
  assert not out.exists()
  assert 'new       model/net/query/lora_a  float32(6, 2)' in result.out
  assert 'would write' in result.out
  assert '6 copied' in result.out
  assert '4 new' in result.out


def test_the_plan_as_json_is_what_is_done(model, out, surgery_cli):
  args = ('attach', model.file, *LORA, '-o', out, '--json')
  planned = json.loads(surgery_cli(*args, '--dry-run').out)
  done = json.loads(surgery_cli(*args).out)
  assert planned == done
  assert {r['path'] for r in done['tensors']} == {
    '/'.join(p) for p in surgery.open(out)
  }


def test_an_existing_file_is_kept_unless_forced(model, out, surgery_cli):
  out.write_bytes(b'precious')
  result = surgery_cli('attach', model.file, *LORA, '-o', out)
  assert 3 == result.code
  assert 'exists already. Give --force' in result.err
  assert b'precious' == out.read_bytes()
  args = ('attach', model.file, *LORA, '-o', out, '--force')
  assert 0 == surgery_cli(*args).code
  assert len(surgery.load(out)) == 10


def test_a_file_may_be_written_over_itself(model, surgery_cli):
  args = ('attach', model.file, *LORA, '-o', model.file, '--force')
  assert 0 == surgery_cli(*args).code
  params = surgery.load(model.file)
  assert jnp.array_equal(
    model.net(model.params, model.x)[0], model.net(params, model.x)[0]
  )


def test_history_records_the_pass_with_its_arguments(model, out, surgery_cli):
  surgery_cli('attach', model.file, *LORA, '--seed', 5, '-o', out)
  [(verb, said)] = steps(out)
  assert 'attach' == verb
  assert 5 == said['seed']
  assert '**/{query,value}' == said['to']
  assert 2 == said['set']['rank']


@pytest.mark.parametrize(
  ('arguments', 'code', 'message'),
  [
    (('--adapter', 'lorra', '--to', '**'), 3, "Did you mean 'lora'"),
    (
      ('--adapter', 'lora', '--to', '**', '--set', 'rnak=8'),
      3,
      "adapter type 'lora' has no option 'rnak'. Did you mean 'rank'?",
    ),
    (
      ('--adapter', 'lora', '--to', '**', '--set', 'rank=x'),
      3,
      "option 'rank': expected int, found 'x' (str)",
    ),
    (
      ('--adapter', 'lora', '--to', '**', '--set', 'rank=0'),
      3,
      "option 'rank': expected a value >= 1, found 0",
    ),
    (
      ('--adapter', 'lora', '--to', '**/quary', '--set', 'rank=1'),
      3,
      "selector '**/quary' matches nothing among 5 parameters. Nearest: "
      'model/net/query.',
    ),
    (
      ('--adapter', 'lora', '--to', '**/query/bias', '--set', 'rank=1'),
      3,
      "model/net/query/bias: adapter type 'lora' cannot serve it",
    ),
    (('--adapter', 'lora', '--to', '**', '--set', 'rank'), 2, 'expected --set'),
    (
      ('--adapter', 'lora', '--to', '**', '--set', 'rank=1', '--set', 'rank=2'),
      2,
      '--set rank: given twice',
    ),
    (('--adapter', 'lora'), 2, 'give --to SELECTOR'),
    (('--to', '**'), 2, 'give --type TYPE, or --from FILE'),
    (('--from', 'x', '--to', '**'), 2, '--to does not go with --from'),
    (
      ('--adapter', 'lora', '--to', '**', '--layout', 'xy', '--set', 'rank=1'),
      3,
      'expected a letter an axis',
    ),
    (
      (
        '--adapter',
        'lora',
        '--to',
        '**',
        '--set',
        'rank=1',
        '--set',
        '**/nope:rank=2',
      ),
      3,
      "patterns: selector '**/nope' matches nothing",
    ),
  ],
)
def test_bad_input_is_refused_with_its_reason(
  model, out, surgery_cli, arguments, code, message
):
  result = surgery_cli('attach', model.file, *arguments, '-o', out)
  assert code == result.code
  assert message in result.err
  assert not out.exists()


def test_a_duplicate_adapter_name_is_refused(model, out, surgery_cli):
  surgery_cli('attach', model.file, *LORA, '-o', out)
  result = surgery_cli('attach', out, *LORA, '-o', model.file, '--force')
  assert 3 == result.code
  assert "adapter 'default' is attached already, as 'lora'" in result.err


@pytest.fixture
def torch_like(tmp_path):
  """A matrix, a norm and a convolution."""
  tree = {
    'proj': {'kernel': np.ones((4, 6), 'float32'), 'bias': np.ones(4, 'f4')},
    'norm': {'scale': np.ones(4, 'float32'), 'kernel': np.ones(4, 'float32')},
  }
  file = tmp_path / 'torch.msgpack'
  checkpoint_of({'net': tree}).write(file)
  return file


@pytest.mark.parametrize(
  'layout',
  [('oi',), ('all=oi',), ('**=oi',), ('net=oi',), ('re:.*=oi',), ('**/*=oi',)],
)
def test_a_layout_for_all_is_that_of_matrices(
  torch_like, out, surgery_cli, layout
):
  for to in ('all', '**', 'net'):
    result = surgery_cli(
      'attach', torch_like, '--adapter', 'lora', '--to', to, '--set', 'rank=2',
      '--layout', *layout, '-o', out, '--force',
    )  # fmt: skip
    assert 0 == result.code, result.err
    found = surgery.open(out)
    assert (6, 2) == found['net', 'proj', 'lora_a'].shape
    assert ('net', 'norm', 'lora_a') not in found


def test_a_layout_that_names_a_vector_has_to_fit(torch_like, out, surgery_cli):
  result = surgery_cli(
    'attach', torch_like, '--adapter', 'lora', '--to', 'all', '--layout',
    '**/norm/kernel=oi', '-o', out,
  )  # fmt: skip
  assert 3 == result.code
  assert (
    "net/norm/kernel: shape (4,) does not fit the layout 'oi' with 0 stacked "
    'axes. Give it a layout of its own, a letter an axis, e.g. --layout '
    "'net/norm/kernel=o', or the right --stacked."
  ) in result.err


def test_one_layout_may_be_for_all_others(tmp_path, out, surgery_cli):
  tree = {
    'conv': {'kernel': np.ones((3, 5, 6), 'float32')},
    'proj': {'kernel': np.ones((4, 6), 'float32')},
  }
  file = tmp_path / 'conv.msgpack'
  checkpoint_of({'net': tree}).write(file)
  given = (
    '--adapter', 'lora', '--to', 'all', '--set', 'rank=2', '-o', out, '--force'
  )  # fmt: skip
  result = surgery_cli('attach', file, *given, '--layout', 'oi')
  assert 3 == result.code
  assert "e.g. --layout 'net/conv/kernel=iio'" in result.err
  result = surgery_cli(
    'attach', file, *given, '--layout', 'oi', '--layout', '**/conv/kernel=iio'
  )
  assert 0 == result.code, result.err
  found = surgery.open(out)
  assert (6, 2) == found['net', 'proj', 'lora_a'].shape
  assert (3, 5, 2) == found['net', 'conv', 'lora_a'].shape
  result = surgery_cli(
    'attach', file, *given, '--layout', 'oi', '--layout', 'io'
  )
  assert 2 == result.code


def test_a_rank_that_is_larger_than_it_need_be_is_noted(
  torch_like, out, surgery_cli
):
  given = (
    'attach', torch_like, '--adapter', 'lora', '--to', '**/proj', '-o', out,
    '--set', 'rank=40',
  )  # fmt: skip
  with pytest.warns(surgery.SiteWarning, match='rank 40 .* exceeds'):
    result = surgery_cli(*given, '--dry-run')
  assert 0 == result.code
  assert 'of which rank 4 makes any update: net/proj/kernel. ' in result.out
  assert "by --set 'net/proj/kernel:rank=4'.\n" in result.out
  with pytest.warns(surgery.SiteWarning):
    assert 0 == surgery_cli(*given).code
  assert (40, 6) == surgery.open(out)['net', 'proj', 'lora_b'].shape


def test_warnings_name_layers_in_the_order_of_the_file(
  tmp_path, out, surgery_cli
):
  layers = [f'o{k}' for k in (3, 1, 4, 15, 9, 2, 6)]
  tree = {name: {'scale': np.ones(3, 'float32')} for name in layers}
  tree['proj'] = {'kernel': np.ones((4, 6), 'float32')}
  file = tmp_path / 'm.msgpack'
  checkpoint_of({'net': tree}).write(file)
  with pytest.warns(surgery.SiteWarning) as caught:
    surgery_cli(
      'attach', file, '--adapter', 'lora', '--to', '**/*o*', '--set', 'rank=2',
      '-o', out,
    )  # fmt: skip
  message = str(caught[0].message)
  order = [name for name in surgery.open(file) if name[1] in layers]
  shown = [f'{"/".join(name[:-1])} (' for name in order[:5]]
  places = [message.index(one) for one in shown]
  assert places == sorted(places)
  assert '; and 2 more. If this is' in message
