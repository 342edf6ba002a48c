"""What hooks are shown of a parameter: the same in params and in a file."""

import blox as bx
import jax
import jax.numpy as jnp
import pytest

import surgery


class Shown:
  """Remembers what terms and policies are shown."""

  def __init__(self):
    self.sites = {}

  def note(self, site):
    for spec in site.params:
      said = (spec.shape, spec.dtype, spec.layout)
      self.sites[*site.layer, spec.name] = said

  @surgery.hookimpl
  def surgery_match_layer(self, site, term):
    if not term.startswith('rank:'):
      return None
    self.note(site)
    return any(str(len(p.shape)) == term[5:] for p in site.params)

  @surgery.hookimpl
  def surgery_freeze_param(self, site, policy):
    if policy != 'matrices':
      return None
    self.note(site)
    return len(site.primary.shape) > 1


@pytest.fixture(params=['threefry2x32', 'rbg'])
def model(request):
  params = bx.Params()
  params['net', 'kernel'] = bx.Param(jnp.ones((3, 4)))
  key = jax.random.key(0, impl=request.param)
  params['rng', 'key'] = bx.Param(key, trainable=False)
  params['rng', 'counter'] = bx.Param(jnp.uint32(0), trainable=False)
  keys = jax.random.split(key, 6).reshape(2, 3)
  params['many', 'keys'] = bx.Param(keys, trainable=False)
  params['old', 'key'] = bx.Param(jax.random.PRNGKey(0), trainable=False)
  params['plain', 'number'] = bx.Param(3, trainable=False)
  return params.locked()


EXPECTED = {
  ('net', 'kernel'): ((3, 4), 'float32', 'io'),
  ('rng', 'key'): ((), '', ''),
  ('rng', 'counter'): ((), 'uint32', ''),
  ('many', 'keys'): ((2, 3), '', 'io'),
  ('old', 'key'): ((2,), 'uint32', 'o'),
  ('plain', 'number'): ((), '', ''),
}


def opened(model, folder, suffix):
  surgery.save(folder / f'm.{suffix}', model)
  return surgery.open(folder / f'm.{suffix}')


@pytest.mark.parametrize('kind', ['params', 'msgpack', 'safetensors'])
def test_hooks_see_the_logical_shape_of_keys(model, kind, tmp_path):
  held = model if kind == 'params' else opened(model, tmp_path, kind)
  shown = Shown()
  host = surgery.Host(plugins=[shown])
  found = surgery.select(held, 'rank:2', host=host)
  assert {('net', 'kernel'), ('many', 'keys')} == set(found)
  assert shown.sites == EXPECTED
  shown.sites.clear()
  surgery.freeze(held, policy='matrices', host=host)
  assert shown.sites == EXPECTED


@pytest.mark.parametrize('kind', ['params', 'msgpack'])
def test_passes_are_given_the_same_by_a_term(model, kind, tmp_path):
  held = model if kind == 'params' else opened(model, tmp_path, kind)
  host = surgery.Host(plugins=[Shown()])
  kept = surgery.drop(held, 'rank:0', host=host)
  assert {'net', 'many', 'old'} == {path[0] for path, _ in kept.items()}


def policy(answer):
  class Mine:
    @surgery.hookimpl
    def surgery_freeze_param(self, site, policy):
      head, _, name = policy.partition(':')
      return answer(site, name) if head == 'mine' else None

  return surgery.Host(plugins=[Mine()])


def nets():
  params = bx.Params()
  for name in ('a', 'b'):
    params['net', name, 'kernel'] = bx.Param(jnp.ones((2, 2)))
  return params.locked()


@pytest.mark.parametrize('kind', ['params', 'file'])
def test_a_policy_that_freezes_nothing_is_an_error(kind, tmp_path):
  held = nets() if kind == 'params' else opened(nets(), tmp_path, 'msgpack')
  for answer in (True, None):
    with pytest.raises(
      surgery.SelectorError if answer else surgery.PluginError,
      match="'mine:x' freezes nothing: .* all 2 parameters train"
      if answer
      else "no plugin knows the policy 'mine:x'",
    ):
      surgery.freeze(
        held, policy='mine:x', host=policy(lambda site, name, a=answer: a)
      )


@pytest.mark.parametrize('kind', ['params', 'file'])
def test_a_policy_after_which_nothing_trains_is_warned_of(kind, tmp_path):
  held = nets() if kind == 'params' else opened(nets(), tmp_path, 'msgpack')
  host = policy(lambda site, name: site.layer[-1] == name)
  with pytest.warns(UserWarning, match="'mine:c' nothing trains .* misspelt"):
    frozen = surgery.freeze(held, policy='mine:c', host=host)
  leaves = frozen.items()
  assert not any(leaf.trainable for _, leaf in leaves)
  # What is frozen already is no mistake, and neither is a policy asked again.
  once = surgery.freeze(held, policy='mine:a', host=host)
  again = surgery.freeze(once, policy='mine:a', host=host)
  assert [('net', 'a', 'kernel')] == [
    p for p, v in again.items() if v.trainable
  ]


def test_freezing_the_base_before_anything_is_attached_is_no_mistake():
  frozen = surgery.freeze(nets())
  assert not any(param.trainable for _, param in frozen.items())
