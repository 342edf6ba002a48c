"""Every step of recipes is a verb, those of plugins too."""

import inspect

import click
import numpy as np
import pytest

import surgery
from surgery.cli import main, steps
from surgery.host.manager import used
from surgery.live import verbs
from surgery.recipes import definitions

SHARED = ('cast', 'disable', 'drop', 'enable', 'freeze', 'keep', 'rename')


class Clip:
  """A plugin with a pass that has options of each kind."""

  @surgery.hookimpl
  def surgery_passes(self):
    return {'clip-norm': clip_norm}


def clip_norm(
  checkpoint: surgery.Checkpoint,
  select: str | list[str] = '**',
  *,
  limit: float,
  force: bool = False,
  exact: bool = True,
  weights: dict[str, float] | None = None,
  by: surgery.Checkpoint | None = None,
  host: surgery.Host,
) -> surgery.Checkpoint:
  """Scales tensors whose norm is above a limit.

  Args:
    checkpoint: the model.
    select: which tensors.
    limit: largest norm.
    force: whether others are brought to that norm, too.
    exact: whether norms are computed in float64.
    weights: limits by path.
    by: a model that is scaled in place of this one.
    host: the host.
  """
  chosen = set(surgery.select(checkpoint, select, host=host))
  source = checkpoint if by is None else by
  leaves = {}
  for path, leaf in checkpoint.items():
    value = np.asarray(source[path].load())
    if path in chosen and value.dtype.kind == 'f':
      kind = np.float64 if exact else np.float32
      most = (weights or {}).get('/'.join(path), limit)
      norm = np.sqrt(np.sum(np.square(value.astype(kind))))
      if force or norm > most:
        value = (value * (most / norm)).astype(value.dtype)
      leaf = leaf.replace(load=lambda value=value: value, part=None)
    leaves[path] = leaf
  return checkpoint.replace(leaves=leaves)


@pytest.fixture
def plugin():
  with used(surgery.Host(plugins=[Clip()])):
    yield


def norms(path):
  return {
    '/'.join(p): float(np.linalg.norm(np.asarray(leaf.load()).ravel()))
    for p, leaf in surgery.open(path).items()
    if leaf.dtype == 'float32'
  }


def test_a_plugins_pass_is_a_verb(plugin, model, tmp_path, surgery_cli):
  out = tmp_path / 'o.msgpack'
  done = surgery_cli('clip-norm', model.file, '--limit', '0.5', '-o', out)
  assert 0 == done.code, done.err
  before, after = norms(model.file), norms(out)
  assert max(before.values()) > 0.5
  for path, norm in before.items():
    assert np.isclose(min(norm, 0.5), after[path], rtol=1e-5)
  # It is recorded as the step that it is.
  [entry] = surgery.open(out).manifest.history
  assert [{'clip-norm': {'limit': 0.5}}] == entry['recipe']['steps']


def test_options_of_all_kinds_are_read(plugin, model, tmp_path, surgery_cli):
  out = tmp_path / 'o.msgpack'
  path = 'model/net/query/kernel'
  done = surgery_cli(
    *('clip-norm', model.file, path, '--limit', '2', '--no-exact'),
    *('--clip-norm-force', '--weights', f'{{{path}: 0.25}}'),
    *('--by', model.file, '-o', out),
  )
  assert 0 == done.code, done.err
  assert np.isclose(0.25, norms(out)[path], rtol=1e-5)
  [entry] = surgery.open(out).manifest.history
  assert {
    'select': path,
    'limit': 2.0,
    'force': True,
    'exact': False,
    'weights': {path: 0.25},
    'by': 'by_',
  } == entry['recipe']['steps'][0]['clip-norm']


def test_what_is_missing_or_wrong_is_a_usage_error(
  plugin, model, tmp_path, surgery_cli
):
  out = tmp_path / 'o.msgpack'
  done = surgery_cli('clip-norm', model.file, '-o', out)
  assert 2 == done.code and "Missing option '--limit'" in done.err
  done = surgery_cli('clip-norm', model.file, '--limit', 'x', '-o', out)
  assert 2 == done.code and "'x' is not a valid float" in done.err
  done = surgery_cli('clip-nrm', model.file, '-o', out)
  assert 2 == done.code and "no verb 'clip-nrm'. Did you mean 'clip-norm'" in (
    done.err
  )
  assert not out.exists()


def test_help_says_what_the_docstring_says(plugin, surgery_cli):
  done = surgery_cli('clip-norm', '--help')
  assert 'Scales tensors whose norm is above a limit.' in done.out
  assert 'Largest norm.' in done.out and '--no-exact' in done.out


def test_plugins_lists_steps_with_their_owners(plugin, surgery_cli):
  done = surgery_cli('plugins', '--steps')
  lines = {line.split()[0]: line for line in done.out.splitlines()}
  assert 'Clip' in lines['clip-norm'] and '(' not in lines['drop']


def test_every_step_is_a_verb_that_has_help(surgery_cli):
  for name in definitions.every(surgery.default_host()):
    done = surgery_cli(name, '--help')
    assert 0 == done.code and f'surgery {name} ' in done.out


def test_a_step_of_the_library_does_the_same_as_in_a_recipe(
  model, tmp_path, surgery_cli
):
  a, b = tmp_path / 'a.msgpack', tmp_path / 'b.msgpack'
  done = surgery_cli(
    *('scale', model.file, '**/kernel', '--by', '0.5', '-o', a)
  )
  assert 0 == done.code, done.err
  recipe = surgery.Recipe([{'scale': {'select': '**/kernel', 'by': 0.5}}])
  recipe.run(model=model.file, out=b)
  assert a.read_bytes() == b.read_bytes()


def test_what_is_written_of_options_is_of_options_that_exist():
  for name, verb in steps.VERBS.items():
    options = definitions.find(name, surgery.default_host()).options
    assert verb.options.keys() | set(verb.either) <= options.keys(), name
  assert steps.VERBS.keys() == main.STEPS


@pytest.mark.parametrize('name', [*SHARED, 'unfreeze', 'merge', 'detach'])
def test_a_verb_in_python_takes_what_its_pass_takes(name):
  """Names and defaults cannot drift apart."""
  definition = definitions.find(name, surgery.default_host())
  live = dict(inspect.signature(getattr(verbs, name)).parameters)
  del live[next(iter(live))]
  for key in ('graph', 'host', 'checkify'):
    live.pop(key, None)
  taken = {
    o.argument: o
    for o in definition.options.values()
    if o.argument not in ('with_', 'with_names', 'check_base', 'check_same')
  }
  assert live.keys() == taken.keys()
  for key, one in live.items():
    default = None if one.default is one.empty else one.default
    assert default == taken[key].default, key
    assert (one.default is one.empty) == taken[key].required, key


def test_an_option_cannot_take_the_name_of_one_that_all_verbs_have(plugin):
  command = steps.command('clip-norm')
  context = click.Context(command)
  assert '--clip-norm-force' in command.get_help(context)
