import pytest

import surgery
from tests.cli.saved import planned, steps, values


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
    (('--strict-flax',), 3, '--strict-flax leaves out what adapters are'),
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
