"""Random convolutions: `factored` gives what the dense kernel does."""

from __future__ import annotations

import dataclasses
import string
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

import surgery
from surgery.factoring.transform import walked
from surgery.factoring.walking import Walk

MOVES = ('kernel and input', 'kernel', 'input', 'factors')


def normal(seed, shape, dtype='float32'):
  """Returns the same normal numbers every time."""
  return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@dataclasses.dataclass
class Conv:
  """A convolution and how it is differentiated.

  Attributes:
    x: shape of the input, batch and channels first.
    kernel: shape of the kernel, `(*taps, in, out)`.
    specs: how axes of input, kernel and output are ordered, as letters.
    params: of the primitive.
    rank: of the update.
    adapters: how many there are.
    moves: what is differentiated.
  """

  x: tuple[int, ...]
  kernel: tuple[int, ...]
  specs: tuple[str, str, str]
  params: dict[str, Any]
  rank: int
  adapters: int
  moves: str

  def __call__(self, make, x, w, pairs):
    """Returns the result with a kernel of a base and factors."""
    for a, b in pairs:
      w = make(w, a, b)
    taps = string.digits[: len(self.kernel) - 2]
    x = jnp.einsum(f'NC{taps}->{self.specs[0]}', x)
    w = jnp.einsum(f'{taps}IO->{self.specs[1]}', w)
    return jax.lax.conv_general_dilated(
      x, w, dimension_numbers=self.specs, **self.params
    )


@st.composite
def convs(draw):
  """Draws a convolution."""
  ndim = draw(st.integers(1, 2))
  small = lambda: tuple(draw(st.integers(1, 2)) for _ in range(ndim))
  order = lambda letters: ''.join(draw(st.permutations(letters)))
  taps = string.digits[:ndim]
  groups = draw(st.sampled_from([1, 1, 2]))
  ins = draw(st.integers(1, 3))
  padding = draw(
    st.sampled_from(['SAME', 'VALID', [(1, 2)] * ndim, [(0, -1)] * ndim])
  )
  lhs_dilation = small() if not isinstance(padding, str) else (1,) * ndim
  return Conv(
    (draw(st.integers(1, 2)), groups * ins, *[5] * ndim),
    (*[draw(st.integers(1, 3)) for _ in range(ndim)], ins, groups * 2),
    (order('NC' + taps), order('IO' + taps), order('NC' + taps)),
    {
      'window_strides': small(),
      'padding': padding,
      'lhs_dilation': lhs_dilation,
      'rhs_dilation': small(),
      'feature_group_count': groups,
      'preferred_element_type': draw(st.sampled_from([None, 'float32'])),
    },
    draw(st.integers(1, 3)),
    draw(st.integers(1, 2)),
    draw(st.sampled_from(MOVES)),
  )


def both(conv):
  """Returns a function of values and derivatives, dense and factored."""
  *outer, out = conv.kernel
  pairs = [
    (normal(10 + i, (*outer, conv.rank)), normal(20 + i, (conv.rank, out)))
    for i in range(conv.adapters)
  ]
  args = (normal(1, conv.x), normal(2, conv.kernel), pairs)
  numbers = {
    'kernel and input': (0, 1, 2),
    'kernel': (1, 2),
    'input': (0,),
    'factors': (2,),
  }[conv.moves]

  def oracle(*args):
    return conv(lambda w, a, b: w - 0.5 * jnp.tensordot(a, b, 1), *args)

  def low_rank(*args):
    make = lambda w, a, b: surgery.LowRank(w, a, b, -0.5).dense()
    return conv(make, *args)

  def factored(*args):
    # Not `surgery.factored`: if the walk fails, that goes on densely.
    return walked(low_rank, *jax.tree.flatten((args, {})), Walk())

  def derivatives(function):
    def loss(*moving):
      whole = list(args)
      for i, value in zip(numbers, moving, strict=True):
        whole[i] = value
      y = function(*whole)
      return jnp.sum(normal(7, y.shape) * jnp.sin(y)), y

    moving = [args[i] for i in numbers]
    gradient = jax.grad(loss, argnums=range(len(numbers)), has_aux=True)
    directions = jax.tree.map(lambda v: normal(8, v.shape), moving)
    # Value and gradient, and a product with the Hessian.
    return jax.jvp(gradient, moving, directions, has_aux=False)

  return lambda: (derivatives(oracle), derivatives(factored))


@hypothesis.settings(
  max_examples=8,
  database=None,
  suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(st.lists(convs(), min_size=5, max_size=5))
def test_random_convolutions(layers):
  functions = [both(layer) for layer in layers]
  # One program: the compiler takes most of the time.
  found = jax.jit(lambda: [f() for f in functions])()
  for layer, (dense, fast) in zip(layers, found, strict=True):
    for one, other in zip(*map(jax.tree.leaves, (dense, fast)), strict=True):
      assert (one.shape, one.dtype) == (other.shape, other.dtype), layer
      one, other = (np.asarray(v, np.float64) for v in (one, other))
      size = max(1.0, abs(one).max(initial=0))
      np.testing.assert_allclose(
        other / size, one / size, atol=1e-4, err_msg=str(layer)
      )
