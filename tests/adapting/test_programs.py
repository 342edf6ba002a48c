"""Programs: kept by their text, and no more of them than said."""

from __future__ import annotations

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from surgery.adapting import blocks, compute, drawing, programs
from surgery.model import grid

KEY = jax.ShapeDtypeStruct((2,), jnp.uint32)


@pytest.fixture
def kept(monkeypatch):
  made = programs.Programs(128)
  monkeypatch.setattr(drawing, '_PROGRAMS', made)
  return made


def model(layers=1):
  params = bx.Params()
  for i in range(layers):
    params['net', f'layer{i}', 'kernel'] = bx.Param(jnp.ones((5, 7)))
  return params.locked()


def test_draws_that_no_option_changes_share_a_program(kept):
  for alpha in (1.0, 3.0):
    surgery.attach(model(), surgery.LoRA(rank=2, alpha=alpha), to='**')
  assert len(kept) == 1


def test_draws_of_other_ranks_have_programs_of_their_own(kept):
  for rank in (2, 3):
    surgery.attach(model(), surgery.LoRA(rank=rank), to='**')
  assert len(kept) == 2


def test_any_number_of_layers_is_drawn_by_one_program(kept):
  for layers in (1, 2, 5, 70):
    surgery.attach(model(layers), surgery.LoRA(rank=2), to='**')
  assert len(kept) == 1


def test_programs_with_other_constants_are_told_apart():
  made = programs.Programs(8)
  size = 20_000
  found = []
  for at in (0, size // 2):
    table = np.zeros(size, np.float32)
    table[at] = 1
    run = made.get(
      at, lambda key, table=table: jnp.asarray(table) + key[0], KEY
    )
    found.append(np.asarray(run(np.zeros(2, np.uint32))).argmax())
  assert found == [0, size // 2]


def test_programs_that_call_python_are_not_shared():
  made = programs.Programs(8)
  found = []
  for number in (1, 2):

    def draw(key, number=number):
      struct = jax.ShapeDtypeStruct((), jnp.float32)
      answer = lambda _: np.float32(number)
      return jax.pure_callback(answer, struct, key)

    found.append(float(made.get(number, draw, KEY)(np.zeros(2, np.uint32))))
  assert found == [1, 2]


def test_programs_with_other_names_are_told_apart():
  made = programs.Programs(8)
  runs = [made.get(n, lambda key, n=n: {n: key}, KEY) for n in ('a', 'b')]
  names = [list(run(np.zeros(2, np.uint32))) for run in runs]
  assert names == [['a'], ['b']]


def test_no_more_programs_are_kept_than_said():
  made = programs.Programs(2)
  runs = [made.get(n, lambda key, n=n: key + n, KEY) for n in range(4)]
  assert len(made) == 2
  assert made.get(3, lambda key: key + 3, KEY) is runs[3]
  again = made.get(0, lambda key: key + 0, KEY)
  assert again(np.ones(2, np.uint32)).tolist() == [1, 1]


# What layers get.


class Started(surgery.Adapter):
  """Has an option for each of the two functions."""

  name = 'started'
  start: float = surgery.field(default=0.0, doc='With what it begins.')
  scale: float = surgery.field(default=1.0, doc='By what it counts.')

  def init(self, site, key):
    return {'shift': jnp.full(site.out_shape, self.start)}

  def apply(self, site, name, base, weights):
    return base * jnp.tanh(weights['shift']) * self.scale


def compiled(caplog):
  """Returns how many programs were compiled of what layers get."""
  said = [record.getMessage() for record in caplog.records]
  done = [text for text in said if text.startswith('Finished XLA compilation')]
  return len([text for text in done if 'answer' in text or 'block' in text])


def merged(shape, adapter, **options):
  params = bx.Params()
  params['net', 'layer', 'kernel'] = bx.Param(jnp.ones(shape))
  params['net', 'other', 'kernel'] = bx.Param(jnp.ones(shape))
  params = surgery.attach(params.locked(), adapter, **options)
  with jax.log_compiles():
    done = surgery.merge(params)
  return np.asarray(done['net', 'layer', 'kernel'].value)[0, 0]


@pytest.mark.parametrize('shape', [(5, 7), (3, grid.BLOCK // 2)])
def test_a_merge_depends_on_what_apply_reads_alone(shape, monkeypatch, caplog):
  monkeypatch.setattr(compute, '_PROGRAMS', programs.Programs(8))
  monkeypatch.setattr(blocks, '_PROGRAMS', programs.Programs(8))
  assert np.tanh(1.0) == pytest.approx(
    merged(shape, Started(start=1.0), to='**/layer', name='a', seed=1)
  )
  # A large one is computed in blocks of two sizes.
  first = compiled(caplog)
  assert first == (1 if shape == (5, 7) else 2)
  # Names, seeds, selectors and what only `init` reads change no program.
  assert np.tanh(2.0) == pytest.approx(
    merged(shape, Started(start=2.0), to='net/*', name='b', seed=2)
  )
  patterns = {'**/layer': {'start': 3.0}}
  assert np.tanh(3.0) == pytest.approx(
    merged(shape, Started(patterns=patterns), to='**', name='c')
  )
  assert compiled(caplog) == first
  # What `apply` reads does.
  assert 2 * np.tanh(1.0) == pytest.approx(
    merged(shape, Started(start=1.0, scale=2.0), to='**/layer')
  )
  assert compiled(caplog) == 2 * first


def test_eager_answers_are_given_by_the_programs_of_merges(monkeypatch, caplog):
  made = programs.Programs(8)
  monkeypatch.setattr(compute, '_PROGRAMS', made)
  params = surgery.attach(model(), surgery.LoRA(rank=2), to='**')
  surgery.merge(params)
  assert len(made) == 1
  with jax.log_compiles():
    params._get(('net', 'layer0', 'kernel'), (5, 7), None)
  assert compiled(caplog) == 0
  assert len(made) == 1


def test_programs_with_weak_types_are_told_apart():
  made = programs.Programs(8)
  half = jnp.ones(2, jnp.bfloat16)
  strong, weak = jnp.ones(()), jnp.asarray(1.0)
  assert weak.weak_type
  found = [
    made.get('sum', lambda a, b: a + b, half, one)(half, one).dtype
    for one in (strong, weak)
  ]
  assert found == [jnp.float32, jnp.bfloat16]
  assert len(made) == 2
