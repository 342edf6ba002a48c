import json

import pytest

import surgery
from surgery.cli import history


def test_people_read_command_lines(model, tmp_path, out, surgery_cli):
  adapted = tmp_path / 'adapted.msgpack'
  args = ('--to', '**/{query,value}', '--set', 'rank=2', '--seed', 3)
  more = ('--set', '**/value:rank=1', '--layout', '**/kernel=io')
  surgery_cli(
    'attach', model.file, '--adapter', 'lora', *args, *more, '-o', adapted
  )
  surgery_cli('freeze', adapted, '**/bias', '!**/query', '-o', out)
  first, source, second, other = surgery_cli(
    'inspect', out, '--history'
  ).out.splitlines()
  assert (
    'surgery attach base.msgpack --adapter lora --set rank=2 --set rslora=false '
    "--set '**/value:rank=1' --to '**/{query,value}' --name default --seed 3 "
    "--layout '**/kernel=io'"
  ) == first
  assert source.startswith('  # surgery 0.1.0, base.msgpack xxh3:')
  assert "surgery freeze adapted.msgpack '**/bias' '!**/query'" == second
  assert other.startswith('  # surgery 0.1.0, adapted.msgpack xxh3:')


def test_what_is_shown_gives_the_same_tensors_again(
  model, tmp_path, out, surgery_cli, monkeypatch
):
  import shlex

  monkeypatch.chdir(tmp_path)
  surgery_cli(
    'attach', 'base.msgpack', '--adapter', 'lora', '--to', '**/query', '--set',
    'rank=2', '--seed', 5, '-o', 'out.msgpack',
  )  # fmt: skip
  line = surgery_cli('inspect', 'out.msgpack', '--history').out.splitlines()[0]
  again = shlex.split(line)[1:]
  assert 0 == surgery_cli(*again, '-o', 'again.msgpack').code
  assert out.read_bytes() == (tmp_path / 'again.msgpack').read_bytes()


def test_json_is_as_recorded(model, out, surgery_cli):
  surgery_cli('freeze', model.file, '-o', out)
  said = json.loads(surgery_cli('inspect', out, '--history', '--json').out)
  assert list(surgery.open(out).manifest.history) == said


def test_no_history_is_told(model, surgery_cli):
  result = surgery_cli('inspect', model.file, '--history')
  assert (0, '') == (result.code, result.out)
  assert 'no history is recorded' in result.err


@pytest.mark.parametrize(
  ('entry', 'line'),
  [
    ({'pass': 'x', 'version': '9'}, 'surgery x'),
    (
      {'pass': 'x', 'arguments': {'flag': True, 'off': False}},
      'surgery x --flag',
    ),
    (
      {'pass': 'x', 'arguments': {'a_b': [1, 'c d']}},
      "surgery x --a-b 1 --a-b 'c d'",
    ),
    ({'pass': 'x', 'arguments': {'rules': ['a -> b']}}, "surgery x 'a -> b'"),
    ({'pass': 'x', 'arguments': ['?'], 'inputs': ['?']}, 'surgery x'),
    ({}, 'surgery None'),
  ],
)
def test_entries_of_others_are_shown_too(entry, line):
  assert line == history.command_line(entry)
  assert next(iter(history.lines([entry]))) == line
