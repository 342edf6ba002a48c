import pytest

from tests.cli.saved import assert_same, flags, values


@pytest.fixture
def frozen(model, surgery_cli):
  file = model.file.with_name('frozen.msgpack')
  assert 0 == surgery_cli('freeze', model.file, '-o', file).code
  return file


def test_what_freeze_froze_trains_again(model, frozen, out, surgery_cli):
  assert 0 == surgery_cli('unfreeze', frozen, '-o', out).code
  assert flags(model.file) == flags(out)
  assert_same(values(model.file), values(out))
  assert 0 == surgery_cli('diff', model.file, out).code


def test_only_what_is_selected_trains_again(frozen, out, surgery_cli):
  assert 0 == surgery_cli('unfreeze', frozen, '**/value', '-o', out).code
  assert ['model/net/value/bias', 'model/net/value/kernel'] == sorted(
    path for path, trains in flags(out).items() if trains
  )


def test_nothing_to_do_is_an_error(model, out, surgery_cli):
  result = surgery_cli('unfreeze', model.file, '-o', out)
  assert 3 == result.code
  assert 'unfreeze: freeze froze none of the 6 selected' in result.err
  assert not out.exists()
