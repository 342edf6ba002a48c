"""Recipes: reading, checking, planning, running."""

import json
import re
from typing import Any

import jsonschema
import numpy as np
import pytest

import surgery
from surgery.recipes import definitions, text
from surgery.recipes.recipe import Recipe
from tests.recipes.models import HOST, same, saved, values

NET = {
  'h/0/q': np.ones((2, 3), 'float32'),
  'h/1/q': np.full((2, 3), 2, 'float32'),
  'out': np.arange(3, dtype='float32'),
}


@pytest.fixture
def file(tmp_path):
  return saved(NET, tmp_path)


@pytest.fixture
def run(file, tmp_path, surgery_cli):
  def run(written, *arguments):
    recipe = tmp_path / 'r.yaml'
    recipe.write_text(written)
    out = tmp_path / 'out.msgpack'
    return surgery_cli('run', recipe, f'model={file}', f'out={out}', *arguments)

  return run


def test_the_shell_runs_it(run, tmp_path):
  result = run("steps: [drop: out, {rename: 'h/<i> -> b/<i>'}]")
  assert 0 == result.code, result.err
  same(
    {'b/0/q': NET['h/0/q'], 'b/1/q': NET['h/1/q']},
    values(surgery.open(tmp_path / 'out.msgpack')),
  )
  assert 'wrote' in result.err and '2 renamed' in result.err


def test_a_list_of_steps_is_a_recipe(run):
  assert 0 == run('- drop: out').code


def test_json_is_a_recipe(run):
  assert 0 == run(json.dumps({'steps': [{'drop': 'out'}]})).code


def test_python_runs_it(file, tmp_path):
  out = tmp_path / 'out.msgpack'
  plan = surgery.Recipe([{'drop': 'out'}]).run(model=file, out=out)
  assert ['copied', 'copied', 'gone'] == [
    r['what'] for r in plan.report()['tensors']
  ]
  assert 2 == len(surgery.open(out))
  with pytest.raises(surgery.SurgeryError, match='exists already'):
    surgery.Recipe([{'drop': 'out'}]).run(model=file, out=out)
  surgery.Recipe(['freeze']).run(model=file, out=out, overwrite=True)
  assert not any(leaf.trainable for leaf in surgery.open(out).values())


def test_files_are_relative_to_the_recipe(file, tmp_path, surgery_cli):
  folder = tmp_path / 'recipes'
  folder.mkdir()
  recipe = folder / 'r.yaml'
  recipe.write_text(
    'inputs: {model: ../m.msgpack}\nsteps: [drop: out]\n'
    'outputs: {out: out.msgpack}\n'
  )
  assert 0 == surgery_cli('run', recipe).code
  assert (folder / 'out.msgpack').exists()


def test_variables(run, tmp_path):
  written = """
vars: {by: 2, what: h, none: null}
steps:
  - scale: {select: '${what}/**', by: '${by}'}
  - copy: 'out -> $$x'
"""
  assert 0 == run(written, 'by=0.5').code
  after = values(surgery.open(tmp_path / 'out.msgpack'))
  assert [0.5, 1.0] == [float(after[f'h/{i}/q'][0, 0]) for i in (0, 1)]
  assert '$x' in after
  result = run("vars: {a: null}\nsteps: [drop: '${a}']")
  assert "the variable 'a' has no value. Give a=VALUE" in result.err
  result = run("vars: {names: 1}\nsteps: [drop: '${name}']")
  assert (
    "r.yaml:2: no variable is called 'name'. Did you mean 'names'?"
    in result.err
  )


def test_plain_dollars_stay_plain(file, tmp_path, surgery_cli):
  """In what is recorded of a recipe, and where steps are taken from one."""
  recipe = surgery.Recipe([{'copy': 'out -> a$$$$b'}])
  out = tmp_path / 'out.msgpack'
  recipe.run(model=file, out=out)
  assert 'a$$b' in values(surgery.open(out))
  again = tmp_path / 'again.yaml'
  again.write_text(surgery_cli('inspect', out, '--history').out)
  made = tmp_path / 'made.msgpack'
  result = surgery_cli('run', again, f'model={file}', f'out={made}')
  assert 0 == result.code, result.err
  assert 'a$$b' in values(surgery.open(made))
  step = {'copy': 'b::out -> a$$$$b'}
  after = surgery.apply(surgery.open(file), step, b=file)
  assert ('a$$b',) in after


def test_other_models_and_results(file, tmp_path):
  other = saved({'h/0/q': np.full((2, 3), 9, 'float32')}, tmp_path, 'other')
  recipe = Recipe.loads(f"""
inputs: {{a: {file}, b: {other}}}
steps:
  - {{scale: {{select: h, by: 2}}, in: b}}
  - {{keep: h/0, in: a, as: c}}
  - {{add: 'b::h/0/q', in: c}}
outputs:
  all: {{path: {tmp_path}/all.msgpack, of: c}}
  rest: {tmp_path}/rest.safetensors
""")
  recipe.run()
  found = values(surgery.open(tmp_path / 'all.msgpack'))
  same({'h/0/q': np.full((2, 3), 19, 'float32')}, found)
  assert 3 == len(surgery.open(tmp_path / 'rest.safetensors'))


def test_an_output_can_be_sharded_and_plain(file, tmp_path):
  cases: Any = (
    ({'shard-size': 40}, 'a.msgpack.index.json'),
    ({'strict-flax': True}, 'b.msgpack'),
    ({'format': 'safetensors'}, 'c.bin'),
  )
  for said, name in cases:
    path = tmp_path / name.removesuffix('.index.json')
    outputs = {'out': {'path': path, **said}}
    Recipe([], outputs=outputs).run(model=file)
    assert 3 == len(surgery.open(tmp_path / name, format=said.get('format')))


def test_all_outputs_are_written_or_none(file, tmp_path, monkeypatch):
  from surgery.model.checkpoint import Checkpoint

  first, second = tmp_path / 'a.msgpack', tmp_path / 'b.msgpack'
  second.write_bytes(b'old')
  write = Checkpoint.write

  def fail(self, path, **options):
    if path == first:
      raise OSError(28, 'No space left on device')
    write(self, path, **options)

  monkeypatch.setattr(Checkpoint, 'write', fail)
  third = {'path': tmp_path / 'c.msgpack', 'shard-size': 40}
  recipe = Recipe([], outputs={'a': first, 'b': second, 'c': third})
  with pytest.raises(OSError, match='nothing was written'):
    recipe.run(model=file, overwrite=True)
  assert b'old' == second.read_bytes()
  assert {'b.msgpack', 'm.msgpack'} == {p.name for p in tmp_path.iterdir()}


def test_dry_run_prints_the_plan(run, tmp_path):
  written = """
- assert: {count: {of: '**', is: 3}}
- assert: {finite: '**'}
- copy: 'out -> more/out'
- scale: {select: h, by: 2}
- factorise: {rules: 'h/0/q -> h/0/{a,b}', rank: 1}
- rename: 'h/1 -> g/1'
- drop: out
"""
  result = run(written, '--dry-run')
  assert 0 == result.code, result.err
  assert not (tmp_path / 'out.msgpack').exists()
  rows = [' '.join(line.split()) for line in result.out.splitlines()]
  assert 'check ** are finite' in rows
  assert 'gone h/0/q float32(2, 3)' in rows
  assert 'renamed more/out float32(3,) from out' in rows
  assert 'new h/0/a float32(2, 1) whole takes long' in rows
  assert 'new g/1/q float32(2, 3) in blocks' in rows
  data = json.loads(run(written, '--dry-run', '--json').out)
  assert ('heavy', ['** are finite']) == (data['time'], data['checks'])
  assert data['memory'] >= 8 * 6
  assert data == json.loads(run(written, '--json').out)


SHAPE = 'h/0/q is float32[2,3]'


@pytest.mark.parametrize(
  ('written', 'message'),
  [
    ('steps: [drop: **/q]', r"r.yaml:1: YAML reads a '\*' at the start"),
    (
      'steps:\n- drop: {q,k}',
      r"r.yaml:2: YAML reads '\{q,k\}' as a mapping.*in quotes",
    ),
    ('steps:\n- keep: !x', "r.yaml:2: YAML reads a word that starts with '!'"),
    ('stepz: []', "r.yaml:1: a recipe has no 'stepz'. Did you mean 'steps'"),
    ('- drop: out\n  keep: h', 'r.yaml:1: step 1: expected one step, found d'),
    ('- [drop]', "step 1: expected e.g. 'drop: SELECTOR', found"),
    ('- dorp: out', r"step 1 \(dorp\): no step is called 'dorp'. Did you mean"),
    (
      "- drop: out\n- cast: {to: bf16, kept: '**'}",
      r"r.yaml:2: step 2 \(cast\): it has no option 'kept'. Did you mean 'keep'",
    ),
    ('- slice: {keep: 1}', "'select' must be given: the tensors."),
    (
      '- slice: {select: out, axis: x, keep: 0}',
      "'axis': expected a whole number, found 'x'",
    ),
    ('- drop: 5', "'select': expected text.*found 5 .*in quotes"),
    ('- drop: outt', r"r.yaml:1: step 1 \(drop\): selector 'outt' matches no"),
    ("- drop: 're:('", r"step 1 \(drop\): .*re:"),
    ('- {drop: out, in: b}', "in: no model is called 'b'. Known: model"),
    ('- {drop: out, in: 5}', 'in: expected the name of a model, found 5'),
    ("- copy: 'b::x'", r"step 1 \(copy\): no input is called 'b'; the inputs are: m"),
    ("- merge: {with: b}", "with: no model is called 'b'"),
    ("- copy: 'out -> h/0/q'", 'copy.: h/0/q exists already. Drop it first'),
    ("- copy: 'out -> out/x'", 'out/x would lie beneath the tensor out'),
    ("- rename: 'out -> h/0/q'", 'would all be h/0/q'),
    ("- renumber: 'h/<i>'", 'the numbers are consecutive already'),
    ("- renumber: 'h/*'", 'expected a pattern with one number'),
    ("- repeat: {layers: 'h/<i>', numbers: 5}", 'there is no place 5'),
    ("- stack: 'h/<i> -> h/<i>'", 'one side must have one pair of braces'),
    ("- stack: 'h -> h/<i>'", r'stack.: rule .* makes several of one'),
    ("- concat: '{out,h/0/q} -> x'", 'h/0/q is .2, 3. and out is .3,.'),
    ("- concat: '{out,h/0/k} -> x'", 'x would be made of 1 parts, and h/0/k is m'),
    ("- split: 'out -> {a,b}'", 'axis 0 has 3 places and cannot be cut into 2'),
    ('- slice: {select: out, keep: 9}', 'there is no place 9; the axis has 3'),
    ("- slice: {select: out, keep: '1:9'}", "the range '1:9' leaves the axis"),
    ('- slice: {select: out, drop: 0, of: 2}', 'cannot be cut into 2 equal'),
    ("- slice: {select: out, drop: '0:3'}", 'nothing would be left'),
    ('- slice: {select: out, axis: 1, keep: 0}', 'has no axis 1, its shape is'),
    ('- permute: {select: out, order: [0, 1]}', 'expected each of 3 places'),
    ('- reshape: {select: out, shape: [2]}', r'3 elements, cannot be \(2,\)'),
    ('- transpose: out', 'a tensor with the axes'),
    ('- pad: {select: out, to: 2}', 'expected places to add'),
    ('- pad: {select: out, to: 4, value: 1e99}', 'float32 cannot hold 1e.99'),
    ('- fill: {rules: out, shape: [3]}', 'matches existing tensors'),
    ("- fill: {rules: '-> x'}", 'give shape and dtype'),
    ("- random: {rules: '-> x', shape: [1], dtype: f33}", "no dtype is called"),
    ('- random: {rules: out, distribution: beta}', "'normal' or 'uniform'"),
    ("- add: 'h/0/q -> out'", r'h/0/q is \(2, 3\) and out is'),
    ("- add: 'h/0/q -> h/9/q'", 'there is no h/9/q to which'),
    ('- scale: {select: out, by: .nan}', 'expected a finite number'),
    ("- matmul: '{out,h/0/q} -> x'", 'a matrix of'),
    ("- factorise: {rules: 'h/0/q -> {a,b}', rank: 3}", 'a rank from 1 to 2'),
    ("- factorise: {rules: 'out -> {a,b}', rank: 1}", 'expected a matrix'),
    ("- tie: 'out -> h/0/q'", 'they cannot be one'),
    ('- resize-vocab: {select: out, size: 3}', 'nothing would change'),
    ("- fold-norm: 'h/<i> -> n/<i>'", 'matches nothing'),
    ('- assert: {exists: zzz}', r'assert.: zzz exists: selector .zzz. match'),
    ('- assert: {exist: zzz}', "no condition is called 'exist'. Did you mean"),
    ('- assert: {count: {of: out, is: 2}}', '2 tensors are out: found 1'),
    ("- assert: {shape: {of: '**', is: [3]}}", re.escape(SHAPE)),
    ('- assert: {dtype: {of: h/0, is: bf16}}', re.escape(SHAPE)),
    ('- assert: {not: {exists: out}}', r'not \(out exists\): it holds'),
    ('- assert: {any: [{exists: a}, {exists: b}]}', 'a exists or b exists'),
    ('- assert: {count: {of: out}}', "'count': 'is' must be given"),
    ('- assert: {zero: {of: out, esp: 1}}', "no option 'esp'. Did you mean 'eps"),
  ],
)  # fmt: skip
def test_mistakes_are_found_before_a_byte_is_read(
  run, tmp_path, written, message
):
  result = run(written)
  assert 3 == result.code, result.err
  assert re.search(message, result.err), result.err
  assert not (tmp_path / 'out.msgpack').exists()


@pytest.mark.parametrize(
  ('written', 'message'),
  [
    ('outputs: {}\nsteps: []', 'expected an output'),
    ('inputs: {}\nsteps: []', 'expected an input'),
    ('inputs: [a]\nsteps: []', 'inputs: expected names and values'),
    ('inputs: {a: 5}\nsteps: []', 'a: expected a file, found 5'),
    ("inputs: {a b: x}\nsteps: []", 'a name has letters, digits'),
    ('inputs: {a: x}\noutputs: {a: y}\nsteps: []', "'a' is used twice"),
    ('outputs: {o: {pth: x}}\nsteps: []', "no 'pth'. Did you mean 'path'"),
    ('outputs: {o: {shard-size: x}}\nsteps: []', 'expected a number of bytes'),
    ('outputs: {o: {of: zz}}\nsteps: []', "of: no model is called 'zz'"),
    (
      'outputs: {o: {strict-flax: true, shard-size: 1GB}}\nsteps: []',
      'does not go with shard-size',
    ),
    ('steps: 5', 'steps: expected a list, found 5'),
    ('5', 'expected a mapping with steps'),
    ('', 'expected a recipe, found nothing'),
    ('a: [', 'not YAML'),
    ('- &a [*a, *a]', 'too deep|step 1'),
  ],
)  # fmt: skip
def test_what_is_no_recipe_is_refused(file, tmp_path, written, message):
  with pytest.raises(surgery.RecipeError, match=message):
    Recipe.loads(written).plan(
      **{
        **({'model': file} if 'inputs' not in written else {}),
        **({'o': tmp_path / 'o.msgpack'} if 'outputs: {o' in written else {}),
      }
    )


def test_names_that_are_not_there_are_refused(run, file, tmp_path, surgery_cli):
  assert (
    "no input, output or variable 'modle'" in run('- drop: out', 'modle=x').err
  )
  recipe = tmp_path / 'r.yaml'
  result = surgery_cli('run', recipe, f'model={file}')
  assert "output 'out' has no file. Give out=FILE" in result.err
  result = surgery_cli('run', recipe, f'out={tmp_path}/o.msgpack')
  assert "input 'model' has no file. Give model=FILE" in result.err
  assert 2 == surgery_cli('run', recipe, 'x').code
  assert 2 == surgery_cli('run', recipe, 'out=x', 'out=y').code
  result = surgery_cli('run', tmp_path / 'no.yaml')
  assert (3, True) == (result.code, 'No such file' in result.err)


def test_an_adapter_type_that_nobody_offers_is_named_with_its_step(run):
  result = run("- drop: out\n- attach: {adapter: lara, to: '**'}")
  message = r"r\.yaml:2: step 2 \(attach\): unknown adapter type 'lara'"
  assert re.search(message, result.err), result.err
  assert "Did you mean 'lora'" in result.err


def test_bombs_are_refused():
  levels = '\n'.join(
    f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * 9)}]' for i in range(1, 12)
  )
  with pytest.raises(surgery.RecipeError, match='too large, or too deep'):
    Recipe.loads(f'a0: &a0 [x]\n{levels}')
  with pytest.raises(surgery.RecipeError):
    Recipe.loads('[' * 5000)


# Assertions about values.


@pytest.mark.parametrize(
  ('condition', 'message'),
  [
    ("{finite: '**'}", None),
    ('{finite: bad}', 'bad has NaN or infinity'),
    ('{zero: zero}', None),
    ('{zero: small}', 'small has 0.5'),
    ('{zero: {of: small, eps: 0.5}}', None),
    ('{zero: bad}', 'bad has nan'),
    ("{equal: {of: 'small -> zero', eps: 0.5}}", None),
    ("{equal: 'small -> zero'}", 'small and zero differ by 0.5'),
    ("{equal: {of: 'bad', to: model}}", None),
    ('{not: {zero: small}}', None),
    ('{not: {zero: zero}}', 'it holds'),
    ('{any: [{zero: small}, {zero: zero}]}', None),
    ('{all: [{zero: small}, {zero: zero}]}', 'small has 0.5'),
    ('{zero: small, exists: n}', 'small has 0.5'),
    ('{unchanged-except: small}', 'zero has changed'),
    ("{unchanged-except: ['small', 'zero']}", None),
  ],
)
def test_values_are_checked_before_anything_is_written(
  tmp_path, condition, message
):
  net = {
    'zero': np.zeros(3, 'float32'),
    'small': np.array([0.5, -0.25, 0], 'float32'),
    'bad': np.array([np.nan, np.inf], 'float32'),
    'n': np.arange(3),
  }
  file, out = saved(net, tmp_path), tmp_path / 'out.msgpack'
  before = (
    '' if 'unchanged' not in condition else '- fill: {rules: zero, value: 1}\n'
  )
  if 'finite' in condition and 'bad' not in condition:
    before = '- fill: bad\n'
  recipe = Recipe.loads(f'{before}- assert: {condition}')
  plan = recipe.plan(model=file, out=out)
  if message is None:
    plan.write()
    assert out.exists()
  else:
    with pytest.raises(surgery.CheckError, match=message):
      plan.write()
    assert not out.exists()


def test_unchanged_except_takes_no_change_for_a_change(tmp_path):
  file = saved(NET, tmp_path)
  twice = [{'transpose': 'h/0/q'}] * 2
  for steps, message in (
    (twice, None),
    ([*twice, {'drop': 'out'}], 'out is gone'),
    ([{'copy': 'out -> x'}], 'x is new'),
    ([{'cast': {'to': 'f64', 'keep': 'out'}}], 'h/1/q has changed'),
  ):
    recipe = Recipe([*steps, {'assert': {'unchanged-except': 'h/0/q'}}])
    given = {'model': file, 'out': tmp_path / 'o.msgpack'}
    if message is None:
      recipe.plan(**given).write()
    else:
      with pytest.raises(surgery.CheckError, match=message):
        recipe.plan(**given)


def test_tying_what_differs_is_refused(tmp_path):
  net = {'a': np.ones((2, 2), 'float32'), 'b': np.zeros((2, 2), 'float32')}
  file, out = saved(net, tmp_path), tmp_path / 'o.msgpack'
  with pytest.raises(surgery.CheckError, match='a and b are not equal'):
    Recipe([{'tie': 'a -> b'}]).run(model=file, out=out)
  Recipe([{'tie': {'rules': 'a -> b', 'check': False}}]).run(
    model=file, out=out
  )
  assert ['a'] == list(values(surgery.open(out)))


# Steps as data.


def test_every_step_says_what_it_takes():
  for name, step in definitions.every(HOST).items():
    assert step.summary, name
    for option in step.options.values():
      assert option.doc, (name, option.name)
      assert definitions.schema(option.annotation) or name in ('cast',), (
        name,
        option.name,
      )


def test_every_example_of_a_step_can_be_read():
  for name, step in definitions.every(HOST).items():
    assert step.example, name
    for line in step.example.splitlines():
      data, _ = text.read(line, name)
      if data != name:  # Alone, it has no options.
        assert [name] == list(data)
        step.read(data[name])


def test_the_schema_is_one_and_recipes_fit_it(surgery_cli):
  schema = json.loads(surgery_cli('recipe-schema').out)
  check = jsonschema.Draft202012Validator
  check.check_schema(schema)
  good: list[Any] = [
    {'steps': [{'drop': '**/x'}, 'merge', {'cast': {'to': 'bf16'}, 'in': 'a'}]},
    [{'slice': {'select': 'x', 'axis': 0, 'keep': ['0:2', 5]}}],
    {
      'vars': {'r': 1},
      'steps': [{'factorise': {'rules': 'x', 'rank': '${r}'}}],
    },
    {
      'inputs': {'a': None},
      'steps': [],
      'outputs': {'o': {'shard-size': '1GB'}},
    },
    [{'add': {'a::x': 0.5}}, {'assert': {'exists': 'x'}}],
  ]
  bad: list[Any] = [
    {'stepz': []},
    {'steps': [{'dorp': 'x'}]},
    [{'slice': {'selct': 'x'}}],
    [{'slice': {'select': 'x', 'axis': 'y'}}],
    ['drop'],
    {'steps': [], 'outputs': {'o': {'pth': 'x'}}},
  ]
  for one in good:
    check(schema).validate(one)
  for one in bad:
    assert not check(schema).is_valid(one), one


def test_steps_of_plugins_are_steps_too(file, tmp_path):
  class Plugin:
    @surgery.hookimpl
    def surgery_passes(self):
      def negate(checkpoint, select: str, times: int = 1, *, host):
        """Negates tensors.

        Args:
          checkpoint: the model.
          select: which.
          times: how often.
          host: knows adapters.
        """
        step = {'scale': {'select': select, 'by': (-1.0) ** times}}
        return Recipe([step]).apply(checkpoint, host=host)

      return {'negate': negate}

  host = surgery.Host(plugins=[Plugin()])
  out = tmp_path / 'o.msgpack'
  Recipe([{'negate': 'out'}]).run(model=file, out=out, host=host)
  same({**NET, 'out': -NET['out']}, values(surgery.open(out)))
  with pytest.raises(surgery.RecipeError, match="'times': expected a whole"):
    Recipe([{'negate': {'select': 'out', 'times': 'x'}}]).plan(
      model=file, out=out, host=host
    )


def test_a_weight_that_is_text_is_named(run):
  for weight in ("'-${w}'", "'x'"):
    result = run(
      f"vars: {{w: 0.5}}\nsteps: [add: {{'h/** -> h/**': {weight}}}]"
    )
    assert 3 == result.code
    assert "'terms: h/** -> h/**': expected a number, found '" in result.err
    assert 'Text is no number: write it without quotes' in result.err
