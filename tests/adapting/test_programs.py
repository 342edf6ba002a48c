"""Programs that draw: kept by their text, and no more of them than said."""

from __future__ import annotations

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from surgery.adapting import drawing, programs

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
