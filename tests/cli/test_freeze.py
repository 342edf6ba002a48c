import pytest

import surgery
from tests.cli.saved import assert_same, flags, steps, values


def test_all_but_the_adapter_is_frozen(adapted, out, surgery_cli):
  assert 0 == surgery_cli('freeze', adapted, '-o', out).code
  assert_same(values(adapted), values(out))
  assert {'lora_a', 'lora_b'} == {
    path.split('/')[-1] for path, trains in flags(out).items() if trains
  }
  live = surgery.freeze(surgery.load(adapted))
  loaded = surgery.load(out)
  assert {p: live[p].trainable for p in live.keys()} == {
    p: loaded[p].trainable for p in loaded.keys()
  }


def test_what_is_selected_is_frozen(model, out, surgery_cli):
  result = surgery_cli('freeze', model.file, '**/bias', '!**/query', '-o', out)
  assert 0 == result.code, result.err
  before, after = flags(model.file), flags(out)
  assert ['model/net/value/bias'] == [p for p in before if before[p] > after[p]]


def test_types_of_layers_choose(model, out, surgery_cli):
  surgery_cli('freeze', model.file, 'type:Linear', '-o', out)
  assert not any(t for p, t in flags(out).items() if 'net' in p)


def test_the_plan_says_what_is_frozen(model, out, surgery_cli):
  result = surgery_cli('freeze', model.file, '**/bias', '-o', out, '--dry-run')
  assert 'copied    model/net/query/bias  float32(8,)  frozen' in result.out
  assert 'kernel' not in result.out
  assert '6 copied (524 B), 2 frozen' in result.out
  assert not out.exists()


def test_a_policy_is_asked_of_adapters(adapted, out, surgery_cli):
  args = ('freeze', adapted, '--policy', 'adapters', '-o', out)
  assert 0 == surgery_cli(*args).code
  assert [('freeze', {'policy': 'adapters'})] == steps(out)


@pytest.mark.parametrize(
  ('arguments', 'code', 'message'),
  [
    (('**/bios',), 3, "selector '**/bios' matches nothing"),
    (('--policy', 'x'), 3, "no plugin knows the policy 'x'"),
    (('**', '--policy', 'adapters'), 2, 'give SELECTOR or --policy, not both'),
  ],
)
def test_bad_input_is_refused_with_its_reason(
  model, out, surgery_cli, arguments, code, message
):
  result = surgery_cli('freeze', model.file, *arguments, '-o', out)
  # A policy that nobody knows is a matter of plugins.
  assert result.code in ((code, 4) if '--policy' in arguments else (code,))
  assert message in result.err
  assert not out.exists()
