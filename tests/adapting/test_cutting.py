"""A cut computation gives the blocks of the whole one."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from surgery.adapting.cutting import cut

ROWS, COLUMNS = 6, 4
LARGE = 1 << 20


def blocks(shape, sizes):
  """Yields where the blocks of an array start, and their sizes."""
  ranges = [
    range(0, total, size) for total, size in zip(shape, sizes, strict=False)
  ]
  for starts in itertools.product(*ranges):
    yield (
      starts,
      tuple(
        min(size, total - start)
        for start, size, total in zip(starts, sizes, shape, strict=False)
      ),
    )


def check(function, *arguments, axes=1, sizes=(4,), most=LARGE):
  """Compares every block with that part of the whole."""
  made = cut(
    function,
    [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments],
    axes,
    most,
  )
  assert made is not None
  whole = np.asarray(function(*arguments))
  for starts, shape in blocks(whole.shape, sizes):
    index = tuple(slice(s, s + n) for s, n in zip(starts, shape, strict=True))
    own = arguments[0][index]
    block = made(shape, np.asarray(starts, np.int32), (own, *arguments[1:]))
    assert whole[index].shape == block.shape
    np.testing.assert_allclose(whole[index], block, rtol=1e-5, atol=1e-5)


def is_cut(function, *arguments, axes=1, most=LARGE):
  specs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments]
  return cut(function, specs, axes, most) is not None


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


W = normal(ROWS, COLUMNS)

FUNCTIONS = {
  'lora': (lambda w, a, b: w + 2 * a @ b, normal(ROWS, 2), normal(2, COLUMNS)),
  'transposed': (
    lambda w, a, b: w + jnp.transpose(b @ a),
    normal(2, ROWS),
    normal(COLUMNS, 2),
  ),
  'row scale': (lambda w, s: w * s[:, None], normal(ROWS)),
  'column scale': (lambda w, s: w * s, normal(COLUMNS)),
  'row norm': (lambda w: w / jnp.sqrt(jnp.sum(w * w, axis=1, keepdims=True)),),
  'left product': (
    lambda w, r: jnp.eye(ROWS) @ w + 0 * r,
    normal(1),
  ),
  'right product': (lambda w, r: w @ r, normal(COLUMNS, COLUMNS)),
  'kronecker': (lambda w, a, b: w + jnp.kron(a, b), normal(3, 2), normal(2, 2)),
  'hadamard': (
    lambda w, a, b, c, d: w + (a @ b) * (c @ d),
    normal(ROWS, 2),
    normal(2, COLUMNS),
    normal(ROWS, 2, seed=1),
    normal(2, COLUMNS, seed=1),
  ),
  'mask by position': (lambda w: w * (jnp.arange(ROWS) % 2)[:, None],),
  'sliced': (lambda w, a: w + a[:, 1:5], normal(ROWS, 8)),
  'rows sliced': (lambda w, a: w + a[1 : ROWS + 1], normal(ROWS + 2, COLUMNS)),
  'reversed': (lambda w, a: w + a[::-1], normal(ROWS, COLUMNS)),
  'sorted rows': (lambda w, a: w + jnp.sort(a, axis=0), normal(ROWS, COLUMNS)),
  'gathered': (
    lambda w, a: w + a[jnp.asarray([3, 1, 2, 0, 5, 4])],
    normal(ROWS, COLUMNS),
  ),
  'cumulative': (
    lambda w, a: w + jnp.cumsum(a, axis=0),
    normal(ROWS, COLUMNS),
  ),
  'joined': (
    lambda w, a: w + jnp.concatenate([a, a], axis=0),
    normal(ROWS // 2, COLUMNS),
  ),
  'joined columns': (
    lambda w, a: w + jnp.concatenate([a, a], axis=1),
    normal(ROWS, COLUMNS // 2),
  ),
  'split columns': (
    lambda w, a: w + sum(jnp.split(a, 2, axis=1)),
    normal(ROWS, 2 * COLUMNS),
  ),
  'padded': (
    lambda w, a: w + jnp.pad(a, ((1, 1), (0, 0))),
    normal(ROWS - 2, COLUMNS),
  ),
  'broadcast row': (
    lambda w, a: w + jnp.broadcast_to(a, w.shape),
    normal(1, COLUMNS),
  ),
  'softmax': (lambda w, a: w * jax.nn.softmax(a, axis=-1), normal(ROWS, 4)),
  'softmax of rows': (
    lambda w, a: w * jax.nn.softmax(a, axis=0),
    normal(ROWS, COLUMNS),
  ),
  'nested jit': (
    lambda w, a: jax.jit(lambda x: jax.checkpoint(jnp.tanh)(x) + a)(w),
    normal(ROWS, COLUMNS),
  ),
  'used twice, as rows and columns': (
    lambda w, a: w[:, :4] + (a @ a.T)[:, :4] + a[:4, :4].sum(),
    normal(ROWS, COLUMNS),
  ),
  'solved': (
    lambda w, a: w + jnp.linalg.solve(jnp.eye(ROWS) + 0.1 * a, a)[:, :4],
    normal(ROWS, ROWS),
  ),
  'scanned': (
    lambda w, a: w + jax.lax.fori_loop(0, 3, lambda _, x: x * 0.5, a),
    normal(ROWS, COLUMNS),
  ),
  'literal': (lambda w: jnp.where(w > 0, w, 0.5),),
}


@pytest.mark.parametrize('size', [1, 2, 4, ROWS])
@pytest.mark.parametrize('name', FUNCTIONS)
def test_blocks_of_rows_are_those_of_the_whole(name, size):
  function, *arguments = FUNCTIONS[name]
  if name == 'left product':
    # Row r of R @ W needs all of W, which comes in blocks: not cut.
    assert not is_cut(function, W, *arguments)
    return
  check(function, W, *arguments, sizes=(size,))


def test_two_axes_are_cut_together():
  function = lambda w, a, b: w + jnp.einsum('sir,sro->sio', a, b)
  w, a, b = normal(3, ROWS, COLUMNS), normal(3, ROWS, 2), normal(3, 2, COLUMNS)
  check(function, w, a, b, axes=2, sizes=(1, 4))


def test_vmapped_adapters_over_stacked_layers_are_cut():
  function = jax.vmap(lambda w, a, b: w + a @ b)
  w, a, b = normal(3, ROWS, COLUMNS), normal(3, ROWS, 2), normal(3, 2, COLUMNS)
  check(function, w, a, b, axes=2, sizes=(1, 4))


def test_a_reshaped_convolution_is_cut_by_its_first_axis():
  function = lambda w, a, b: w + (a @ b).reshape(w.shape)
  w, a, b = normal(ROWS, 2, COLUMNS), normal(ROWS, 3), normal(3, 2 * COLUMNS)
  check(function, w, a, b)


@pytest.mark.parametrize(
  'function',
  [
    lambda w: w / jnp.linalg.norm(w, axis=0),
    lambda w: w - w.mean(),
    lambda w: w[::-1],
    lambda w: jnp.cumsum(w, axis=0),
    lambda w: jnp.sort(w, axis=0),
    lambda w: jnp.roll(w, 1, axis=0),
    lambda w: w.T.reshape(w.shape),
    lambda w: w @ w.T @ w,
  ],
)
def test_what_needs_the_whole_base_is_not_cut(function):
  assert not is_cut(function, W)


def test_what_is_large_on_the_way_is_not_cut():
  function = lambda w, a: w + jnp.sort(a @ a.T, axis=0)[:, :COLUMNS]
  a = normal(ROWS, 3)
  assert is_cut(function, W, a, most=ROWS * ROWS)
  assert not is_cut(function, W, a, most=ROWS * ROWS - 1)


def test_a_constant_result_is_not_cut():
  assert not is_cut(lambda w: np.float32(1.0), W)


UNARY = {
  'tanh': jnp.tanh,
  'transpose twice': lambda x: x.T.T + 1,
  'flatten': lambda x: x.reshape(-1).reshape(x.shape),
  'row sum': lambda x: x + x.sum(axis=1, keepdims=True),
  'column sum': lambda x: x + x.sum(axis=0, keepdims=True),
  'reverse columns': lambda x: x[:, ::-1],
  'reverse rows': lambda x: x[::-1],
  'halves': lambda x: jnp.concatenate([x[: ROWS // 2], x[ROWS // 2 :]]),
  'third axis': lambda x: x.reshape(ROWS, 2, -1).sum(axis=1).repeat(2, 1),
  'squeeze': lambda x: x[:, None, :].squeeze(1),
}
BINARY = {
  'add': jnp.add,
  'mul': jnp.multiply,
  'product': lambda x, y: x @ (y.T @ y),
  'where': lambda x, y: jnp.where(x > y, x, y),
  'max': jnp.maximum,
}


@st.composite
def programs(draw):
  """A program over the base and two other arrays, as a list of steps."""
  count = 3
  steps = []
  for _ in range(draw(st.integers(1, 6))):
    pick = st.integers(0, count - 1)
    if draw(st.booleans()):
      steps.append((draw(st.sampled_from(sorted(UNARY))), draw(pick), None))
    else:
      name = draw(st.sampled_from(sorted(BINARY)))
      steps.append((name, draw(pick), draw(pick)))
    count += 1
  return steps


@settings(max_examples=60, deadline=None)
@given(programs(), st.integers(1, ROWS))
def test_any_program_is_cut_rightly_or_not_at_all(steps, size):
  def function(*arguments):
    values = list(arguments)
    for name, left, right in steps:
      if right is None:
        made = UNARY[name](values[left])
      else:
        made = BINARY[name](values[left], values[right])
      values.append(made / (1 + jnp.abs(made)))
    return values[-1]

  arguments = [W, normal(ROWS, COLUMNS, seed=1), normal(ROWS, COLUMNS, seed=2)]
  if is_cut(function, *arguments):
    check(function, *arguments, sizes=(size,))
