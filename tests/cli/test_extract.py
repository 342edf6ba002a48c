import pytest

import surgery
from tests.cli.saved import assert_same, planned, steps, values


def test_it_is_what_save_adapter_writes(adapted, tmp_path, out, surgery_cli):
  plan = planned(surgery_cli, 'extract', adapted, '-o', out)
  saved = tmp_path / 'saved.msgpack'
  surgery.save_adapter(saved, surgery.load(adapted))
  assert 0 == surgery_cli('diff', saved, out).code
  assert {'copied'} == {r['what'] for r in plan['tensors']}
  assert list(values(out)) == [r['path'] for r in plan['tensors']]
  assert ['extract'] == [verb for verb, _ in steps(out)]


def test_it_is_bound_to_its_base(adapted, model, tmp_path, out, surgery_cli):
  surgery_cli('extract', adapted, '-o', out)
  again = tmp_path / 'again.msgpack'
  assert 0 == surgery_cli('attach', model.file, '--from', out, '-o', again).code
  assert 0 == surgery_cli('diff', adapted, again).code


@pytest.mark.parametrize(
  ('arguments', 'code', 'message'),
  [
    (('--adapter', 'x'), 3, "there is no adapter 'x'"),
    (('--adapter', 'x', '--adapter', 'y'), 2, 'a file holds one adapter'),
    (('--strict-flax',), 3, '--strict-flax leaves out the records'),
  ],
)
def test_bad_input_is_refused_with_its_reason(
  adapted, out, surgery_cli, arguments, code, message
):
  result = surgery_cli('extract', adapted, *arguments, '-o', out)
  assert code == result.code
  assert message in result.err
  assert not out.exists()


def test_a_model_without_adapters_is_refused(model, out, surgery_cli):
  result = surgery_cli('extract', model.file, '-o', out)
  assert 3 == result.code
  assert 'no adapter is attached' in result.err


# What was trained along.


@pytest.fixture
def headed(model, adapted):
  """The adapted model in which a bias of the base was trained, too."""
  params = surgery.load(adapted).unlocked()
  path = ('model', 'net', 'value', 'bias')
  params[path] = params[path].replace(value=params[path].value + 1)
  file = adapted.with_name('headed.msgpack')
  surgery.save(file, params.locked(), graph=model.graph)
  return file


@pytest.mark.parametrize('suffix', ['msgpack', 'safetensors'])
def test_what_was_trained_along_goes_along_and_comes_back(
  model, headed, tmp_path, suffix, surgery_cli
):
  alone, again, base, merged = (
    tmp_path / f'{name}.{suffix}' for name in ('a', 'again', 'base', 'merged')
  )
  plan = planned(surgery_cli, 'extract', headed, '-o', alone)
  assert 'model/net/value/saved.default.bias' in [
    r['path'] for r in plan['tensors']
  ]
  assert 5 == len(surgery.open(alone))
  live = tmp_path / f'live.{suffix}'
  surgery.save_adapter(live, surgery.load(headed))
  assert 0 == surgery_cli('diff', live, alone).code
  # Attached, the base is still what it was.
  plan = planned(
    surgery_cli, 'attach', model.file, '--from', alone, '-o', again
  )
  assert {'copied', 'new'} == {r['what'] for r in plan['tensors']}
  here = model.net(surgery.load(again), model.x)[0]
  there = model.net(surgery.load(headed), model.x)[0]
  assert (here == there).all()
  surgery_cli('detach', again, '-o', base)
  assert_same(values(model.file), values(base))
  # And merged it is the base that was trained.
  plan = planned(surgery_cli, 'merge', again, '-o', merged)
  [bias] = [r for r in plan['tensors'] if r['path'] == 'model/net/value/bias']
  assert ('renamed', 'model/net/value/saved.default.bias') == (
    bias['what'],
    bias['from'],
  )
  assert values(headed)['model/net/value/bias'].tolist() == (
    values(merged)['model/net/value/bias'].tolist()
  )
  direct = tmp_path / f'direct.{suffix}'
  surgery_cli('merge', model.file, '--with', alone, '-o', direct)
  assert_same(values(merged), values(direct))


def test_a_selector_says_what_goes_along(headed, out, surgery_cli):
  args = ('extract', headed, '--force', '-o', out)
  surgery_cli(*args, '--no-modules-to-save')
  assert 4 == len(surgery.open(out))
  query = ('--modules-to-save', '**/query/bias')
  assert 0 == surgery_cli(*args, *query, '--modules-to-save', '**/value').code
  saved = {'/'.join(p) for p in surgery.open(out) if p[-1].startswith('saved')}
  assert {
    'model/net/query/saved.default.bias',
    'model/net/value/saved',
    'model/net/value/saved.default.bias',
  } == saved
  result = surgery_cli(*args, *query, '--no-modules-to-save')
  assert 2 == result.code
  assert '--modules-to-save does not go with' in result.err
  result = surgery_cli(*args, '--modules-to-save', '**/nowhere')
  assert 3 == result.code
  assert 'nowhere' in result.err


def test_it_is_seen_when_an_adapter_is_looked_at(headed, out, surgery_cli):
  surgery_cli('extract', headed, '-o', out)
  result = surgery_cli('inspect', out)
  assert 'with model/net/value/bias' in result.out


def test_what_changed_in_a_file_stays_known_through_passes(
  headed, tmp_path, out, surgery_cli
):
  steps_ = [
    ('rename', headed, 'model/net -> other'),
    ('cast', '1.msgpack', '--to', 'bf16'),
    ('disable', '2.msgpack'),
    ('enable', '3.msgpack'),
    ('freeze', '4.msgpack'),
  ]
  for number, (verb, file, *rest) in enumerate(steps_, 1):
    target = tmp_path / f'{number}.msgpack'
    result = surgery_cli(verb, tmp_path / file, *rest, '-o', target)
    assert 0 == result.code, result.err
  pieces = tmp_path / 'set.safetensors'
  surgery_cli('convert', tmp_path / '5.msgpack', pieces, '--shard-size', '200')
  pieces = tmp_path / 'set.safetensors.index.json'
  assert 0 == surgery_cli('extract', pieces, '-o', out).code
  assert {'lora_a', 'lora_b', 'saved.default.bias'} == {
    p[-1] for p in surgery.open(out)
  }
