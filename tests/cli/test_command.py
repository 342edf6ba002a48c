"""What is given twice is taken twice, or refused."""

import click
import pytest

import surgery
from surgery.cli import command as commands
from surgery.cli import main

ONCE = (commands.Command, commands.Group)


def every(command, path=()):
  """Yields all commands with their names, the whole one first."""
  yield path, command
  if isinstance(command, click.Group):
    context = click.Context(command)
    for name in command.list_commands(context):
      yield from every(command.get_command(context, name), (*path, name))


ALL = list(every(main.cli))
OPTIONS = [
  pytest.param(command, option, id=' '.join((*path, option.opts[-1])))
  for path, command in ALL
  for option in command.params
  if isinstance(option, click.Option)
  and not (option.multiple or option.is_eager)
]


def test_all_verbs_refuse_what_is_given_twice():
  assert len(main.VERBS) < len(ALL)
  assert [] == [p for p, c in ALL if not isinstance(c, ONCE)]
  context = click.Context(main.cli)
  for name in main.VERBS:
    assert isinstance(main.cli.get_command(context, name), ONCE)


@pytest.mark.parametrize(('command', 'option'), OPTIONS)
def test_an_option_that_takes_one_value_refuses_a_second(command, option):
  for name in option.opts:
    once = [name] if option.is_flag else [name, '1']
    with pytest.raises(click.UsageError) as raised:
      command.make_context('x', [*once, *once])
    assert 'is given twice' in str(raised.value)


def test_a_second_output_is_refused_and_nothing_is_written(
  model, tmp_path, surgery_cli
):
  a, b = tmp_path / 'a.msgpack', tmp_path / 'b.msgpack'
  result = surgery_cli('cast', model.file, '--to', 'bf16', '-o', a, '-o', b)
  assert 2 == result.code
  assert '--output is given twice. It takes one value.' in result.err
  assert not a.exists() and not b.exists()


@pytest.mark.parametrize(
  'options',
  [
    ['--set', 'rank=8', '--set', 'rank=4'],
    ['--set', 'rank=8', '--set', '**/head:alpha=4', '--set', '**/head:alpha=5'],
    ['--set', 'rank=8', '--layout', '**/head=io', '--layout', '**/head=oi'],
  ],
)
def test_a_key_that_is_given_twice_is_refused(
  model, tmp_path, surgery_cli, options
):
  out = tmp_path / 'a.msgpack'
  result = surgery_cli(
    *('attach', model.file, '--adapter', 'lora', '--to', 'all', '-o', out),
    *options,
  )
  assert 2 == result.code
  assert 'given twice' in result.err
  assert not out.exists()


def test_an_alias_that_is_given_twice_is_refused(model, tmp_path, surgery_cli):
  recipe = tmp_path / 'recipe.yaml'
  recipe.write_text('- cast: bf16')
  given = [f'model={model.file}', f'model={model.file}', f'out={tmp_path}/o']
  result = surgery_cli('run', recipe, *given)
  assert 2 == result.code
  assert 'model: given twice' in result.err


@pytest.mark.parametrize(
  'text',
  [
    '- cast: {to: bf16, to: f16}',
    '- merge: {check-finite: true, check_finite: false}',
    '- attach: {adapter: lora, to: all, set: {rank: 2, "a:rank": 3, '
    'patterns: {a: {rank: 4}}}}',
    '{vars: {a: x, b: x}, steps: [{add: {"m::${a}": 1, "m::${b}": 2}}]}',
    '{outputs: {out: {shard-size: 5GB, shard_size: 6GB}}, steps: []}',
  ],
)
def test_a_key_of_a_recipe_that_is_given_twice_is_refused(text, model):
  with pytest.raises(surgery.SurgeryError, match='given twice'):
    surgery.Recipe.loads(text).apply(surgery.open(model.file))
