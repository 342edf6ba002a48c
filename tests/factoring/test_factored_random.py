"""Whatever is done to a kernel, `factored` gives what the dense array does.

Hypothesis writes layers: a chain of operations on the kernel, then a use of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

import surgery
from surgery.factoring.transform import walked
from surgery.factoring.walking import Walk

SIZES = st.integers(1, 4)
# Elements of a kernel, at most.
LARGEST = 400


@dataclasses.dataclass
class Step:
  """An operation: what it is called, and what it does to kernel and input."""

  name: str
  apply: Callable[[Any, Any], Any]

  def __repr__(self) -> str:
    return self.name


def normal(seed, shape):
  """Returns the same normal numbers every time; numpy has nothing to compile."""
  return np.random.default_rng(seed).normal(size=shape).astype('float32')


def positive(seed, shape):
  """Returns numbers that can be divided by."""
  return 0.5 + abs(normal(seed, shape))


def part(draw, size):
  """Returns a slice of an axis that is not empty."""
  start = draw(st.integers(0, size - 1))
  stop = draw(st.integers(start + 1, size))
  return slice(start, stop, draw(st.integers(1, 2)))


def at(axis, index):
  """Returns an index along one axis."""
  return (*[slice(None)] * axis, index)


def traced(x, count):
  """Returns an index that is known when the program runs."""
  return jnp.argmax(x.reshape(-1)) % count


# Each takes `draw` and a shape, and returns an operation or None.


def transposed(draw, shape):
  order = draw(st.permutations(range(len(shape))))
  return Step(f'transpose{order}', lambda k, x: k.transpose(order))


def reshaped(draw, shape):
  """Axes joined with their neighbours, divided, or mixed up."""
  new: Any = list(shape)
  for _ in range(draw(st.integers(1, 2))):
    i = draw(st.integers(0, len(new) - 1))
    if draw(st.booleans()) and i + 1 < len(new):
      new[i : i + 2] = [new[i] * new[i + 1]]
    else:
      ways = [d for d in range(1, new[i] + 1) if new[i] % d == 0]
      one = draw(st.sampled_from(ways))
      new[i : i + 1] = [one, new[i] // one]
  new = tuple(new[:5]) if math.prod(new[5:]) == 1 else tuple(new)
  return Step(f'reshape{new}', lambda k, x: k.reshape(new))


def flattened(draw, shape):
  del draw
  return Step('ravel', lambda k, x: k.reshape(-1)) if len(shape) > 1 else None


def expanded(draw, shape):
  axis = draw(st.integers(0, len(shape)))
  return Step(f'expand_dims{axis}', lambda k, x: jnp.expand_dims(k, axis))


def squeezed(draw, shape):
  axes = tuple(i for i, n in enumerate(shape) if n == 1)
  if not axes or len(axes) == len(shape):
    return None
  return Step(f'squeeze{axes}', lambda k, x: k.squeeze(axes))


def sliced(draw, shape):
  cut = tuple(part(draw, n) for n in shape)
  return Step(f'slice{cut}', lambda k, x: k[cut])


def turned(draw, shape):
  axis = draw(st.integers(0, len(shape) - 1))
  return Step(f'flip{axis}', lambda k, x: jnp.flip(k, axis))


def rolled(draw, shape):
  axis = draw(st.integers(0, len(shape) - 1))
  return Step(f'roll{axis}', lambda k, x: jnp.roll(k, 1, axis))


def indexed(draw, shape):
  if len(shape) == 1:
    return None
  axis = draw(st.integers(0, len(shape) - 1))
  n, known = shape[axis], draw(st.booleans())
  i = draw(st.integers(-n, n - 1))
  if known:
    return Step(f'index{axis, i}', lambda k, x: k[at(axis, i)])
  return Step(
    f'index{axis}, traced', lambda k, x: k[at(axis, traced(x, n) + min(i, 0))]
  )


def dynamically_sliced(draw, shape):
  axis = draw(st.integers(0, len(shape) - 1))
  size, start = draw(st.integers(1, shape[axis])), draw(st.integers(-9, 9))
  return Step(
    f'dynamic_slice{axis, start, size}',
    lambda k, x: jax.lax.dynamic_slice_in_dim(
      k, traced(x, 3) + start, size, axis
    ),
  )


def taken(draw, shape):
  axis = draw(st.integers(0, len(shape) - 1))
  indices = st.integers(-shape[axis], shape[axis] - 1)
  which = np.array(draw(st.lists(indices, min_size=1, max_size=3)))
  mode = draw(st.sampled_from([None, 'clip', 'wrap']))
  return Step(
    f'take{axis, mode}', lambda k, x: jnp.take(k, which, axis, mode=mode)
  )


def narrowed(draw, shape):
  del shape
  kind = draw(st.sampled_from(['bfloat16', 'float16']))
  return Step(kind, lambda k, x: k.astype(kind))


def widened(draw, shape):
  del draw, shape
  return Step('float32', lambda k, x: k.astype('float32'))


def scaled(draw, shape):
  del shape
  return draw(
    st.sampled_from(
      [
        Step('times 2', lambda k, x: 2 * k),
        Step('over 3', lambda k, x: k / 3),
        Step('negated', lambda k, x: -k),
        Step('times a value', lambda k, x: k * x.ravel()[0].astype(k.dtype)),
        Step('over a value', lambda k, x: k / (1 + x.ravel()[0] ** 2)),
        Step('1 - k', lambda k, x: 1 - k),
      ]
    )
  )


def scaled_along(draw, shape):
  """By numbers for each row, each column, or some of both."""
  axes = draw(st.sets(st.integers(0, len(shape) - 1), min_size=1))
  by = positive(len(axes), [n if i in axes else 1 for i, n in enumerate(shape)])
  if draw(st.booleans()):
    return Step(f'times by {axes}', lambda k, x: k * by.astype(k.dtype))
  return Step(f'over by {axes}', lambda k, x: k / by.astype(k.dtype))


def repeated(draw, shape):
  """Scaled by what has more axes, or longer ones, than the kernel."""
  if 1 in shape and draw(st.booleans()):
    new = tuple(3 if n == 1 else 1 for n in shape)
  else:
    new = (2, *[1] * len(shape))
  by = positive(3, new)
  if math.prod(np.broadcast_shapes(new, shape)) > LARGEST:
    return None
  return draw(
    st.sampled_from(
      [
        Step(f'times {new}', lambda k, x: k * by.astype(k.dtype)),
        Step(
          f'broadcast to {new}',
          lambda k, x: jnp.broadcast_to(k, jnp.broadcast_shapes(new, k.shape)),
        ),
      ]
    )
  )


def normalised(draw, shape):
  axes = tuple(
    sorted(draw(st.sets(st.integers(0, len(shape) - 1), min_size=1)))
  )
  return Step(
    f'over norm{axes}',
    lambda k, x: k / jnp.sqrt((k**2).sum(axes, keepdims=True) + 1),
  )


def added(draw, shape):
  other = normal(5, shape)
  backwards = lambda k: k.transpose(range(k.ndim)[::-1])
  symmetric = shape == shape[::-1]
  return draw(
    st.sampled_from(
      [
        Step('plus an array', lambda k, x: k + other.astype(k.dtype)),
        Step('an array minus', lambda k, x: other.astype(k.dtype) - k),
        Step('plus 1', lambda k, x: k + 1),
        Step('plus itself flipped', lambda k, x: k + jnp.flip(k, 0)),
        Step('minus its mean', lambda k, x: k - k.mean(0)),
        Step(
          'plus its transpose',
          lambda k, x: k - 2 * backwards(k) if symmetric else k,
        ),
      ]
    )
  )


def split(draw, shape):
  axis = draw(st.integers(0, len(shape) - 1))
  if shape[axis] == 1:
    return None
  where, which = draw(st.integers(1, shape[axis] - 1)), draw(st.integers(0, 1))
  return Step(
    f'split{axis, where}[{which}]',
    lambda k, x: jnp.split(k, [where], axis)[which],
  )


def joined(draw, shape):
  axis = draw(st.integers(0, len(shape) - 1))
  if 2 * math.prod(shape) > LARGEST:
    return None
  other = normal(6, shape)
  return draw(
    st.sampled_from(
      [
        Step(
          f'concatenated with 2k{axis}',
          lambda k, x: jnp.concatenate([k, 2 * k], axis),
        ),
        Step(
          f'behind an array{axis}',
          lambda k, x: jnp.concatenate([other.astype(k.dtype), k], axis),
        ),
        Step(f'stacked{axis}', lambda k, x: jnp.stack([k, -k], axis)),
        Step(f'tiled{axis}', lambda k, x: jnp.repeat(k, 2, axis)),
      ]
    )
  )


def padded(draw, shape):
  axis = draw(st.integers(0, len(shape) - 1))
  widths = [(1, 0) if i == axis else (0, 0) for i in range(len(shape))]
  return Step(f'padded{axis}', lambda k, x: jnp.pad(k, widths))


def changed(draw, shape):
  """What needs the dense array."""
  del shape
  return draw(
    st.sampled_from(
      [
        Step('tanh', lambda k, x: jnp.tanh(k)),
        Step('squared', lambda k, x: k * k),
        Step('masked', lambda k, x: jnp.where(k > 0, k, 0 * k)),
        Step('cumulated', lambda k, x: jnp.cumsum(k, 0)),
        Step('k·mean(k)', lambda k, x: k * k.mean()),
        Step('stop_gradient', lambda k, x: jax.lax.stop_gradient(k)),
        Step('barrier', lambda k, x: jax.lax.optimization_barrier(k)),
      ]
    )
  )


STEPS = [
  *[transposed, reshaped, sliced, scaled, scaled_along, added, indexed] * 2,
  flattened,
  expanded,
  squeezed,
  turned,
  rolled,
  dynamically_sliced,
  taken,
  narrowed,
  widened,
  repeated,
  normalised,
  split,
  joined,
  padded,
  changed,
]


# Around the rest of a chain: calls with jaxprs of their own.


def _loop(rest, k, x):
  return jax.lax.fori_loop(
    0, 2, lambda i, y: y + rest(k, x), jnp.zeros_like(rest(k, x))
  )


CALLS: dict[str, Callable[[Any, Any, Any], Any]] = {
  'jit': lambda rest, k, x: jax.jit(rest)(k, x),
  'checkpoint': lambda rest, k, x: jax.checkpoint(rest)(k, x),
  'cond': lambda rest, k, x: jax.lax.cond(
    x.sum() > 0, rest, lambda k, x: 2 * rest(k, x), k, x
  ),
  'fori_loop': _loop,
  'vmap': lambda rest, k, x: jax.vmap(lambda x: rest(k, x))(
    jnp.stack([x, 2 * x])
  ),
  'vmap of a stack': lambda rest, k, x: jax.vmap(lambda k: rest(k, x))(
    jnp.stack([k, 2 * k])
  ),
  'scan': lambda rest, k, x: jax.lax.scan(
    lambda c, x: (c, rest(k, x)), 0, jnp.stack([x, 2 * x])
  )[1],
  'scan of a stack': lambda rest, k, x: jax.lax.scan(
    lambda c, k: (c + 1, rest(k, x)), 0, jnp.stack([k, -k])
  )[1],
}


# Uses: each returns a function of kernel and input.


def einsum(draw, shape):
  labels = 'abcdefgh'[: len(shape)]
  contracted, kept = [], []
  for label in labels:
    kinds = ['contract', 'contract', 'keep', 'keep', 'batch', 'sum']
    kind = draw(st.sampled_from(kinds))
    contracted += [label] if kind in ('contract', 'batch') else []
    kept += [label] if kind in ('keep', 'batch') else []
  ins = ''.join(draw(st.permutations([*contracted, *'xy'[: draw(SIZES) // 2]])))
  free = [n for n in ins if n in 'xy']
  out = ''.join(draw(st.permutations([*kept, *free])))
  sizes = dict(zip(labels, shape, strict=True))
  other = normal(8, [sizes.get(n, 3) for n in ins])
  left = draw(st.booleans())
  spec = f'{labels},{ins}->{out}' if left else f'{ins},{labels}->{out}'

  def use(k, x):
    y = other * x.ravel()[0]
    return jnp.einsum(spec, k, y) if left else jnp.einsum(spec, y, k)

  return Step(spec, use)


def matmul(draw, shape):
  left = draw(st.booleans())
  if len(shape) < 2:
    other = normal(8, shape)
    return Step('dot', lambda k, x: jnp.dot(k, other) * x)
  if left:
    other = normal(8, (shape[-1], 3))
    return Step('k @ x', lambda k, x: k @ (other * x.ravel()[0]))
  other = normal(8, (2, shape[-2]))
  return Step('x @ k', lambda k, x: (other * x.ravel()[0]) @ k)


def mixed(draw, shape):
  """A product of two dtypes."""
  del draw
  other = normal(8, (shape[0], 3))
  return Step(
    'dot_general of dtypes',
    lambda k, x: jax.lax.dot_general(
      k,
      other.astype(k.dtype) * x.ravel()[0].astype(k.dtype),
      (((0,), (0,)), ((), ())),
      preferred_element_type=jnp.float32,
    ),
  )


def looked_up(draw, shape):
  axis = draw(st.integers(0, len(shape) - 1))
  n = shape[axis]
  where = np.array(
    draw(st.lists(st.integers(-n - 1, n), min_size=1, max_size=3))
  ).reshape(draw(st.sampled_from([(-1,), (-1, 1)])))
  mode = draw(st.sampled_from(['fill', 'clip', 'wrap']))
  return Step(
    f'take{axis, mode}',
    lambda k, x: (
      x.ravel()[0] * jnp.take(k, where, axis, mode=mode, fill_value=0)
    ),
  )


def convolved(draw, shape):
  """With a kernel of any order of axes."""
  if not 3 <= len(shape) <= 4:
    return None
  spatial = 'HW'[: len(shape) - 2]
  order = ''.join(draw(st.permutations(['I', 'O', *spatial])))
  ins = ''.join(draw(st.permutations(['N', 'C', *spatial])))
  outs = ''.join(draw(st.permutations(['N', 'C', *spatial])))
  sizes = dict(zip(order, shape, strict=True))
  groups = draw(st.sampled_from([1, 1, sizes['O']]))
  channels = sizes['I'] * groups
  x_shape = [{'N': 2, 'C': channels}.get(n, 5) for n in ins]
  image = normal(9, x_shape)
  strides = draw(st.sampled_from([1, 2]))
  dilation = draw(st.sampled_from([1, 2]))

  def use(k, x):
    return jax.lax.conv_general_dilated(
      (image * x.ravel()[0]).astype(k.dtype),
      k,
      [strides] * len(spatial),
      'SAME',
      rhs_dilation=[dilation] * len(spatial),
      dimension_numbers=(ins, order, outs),
      feature_group_count=groups,
    )

  return Step(f'conv {ins},{order}->{outs} /{groups}', use)


def scanned(draw, shape):
  """As the layers of a stack."""
  del draw
  if len(shape) < 2:
    return None
  other = normal(8, (3, shape[1]))
  return Step(
    'scan over k',
    lambda k, x: jax.lax.scan(
      lambda c, w: (c, jnp.tensordot(other * x.ravel()[0] + c, w, 1)), 0.0, k
    )[1],
  )


def returned(draw, shape):
  del draw, shape
  return Step('k', lambda k, x: k * x.ravel()[0].astype(k.dtype))


USES = [*[einsum] * 4, *[matmul] * 2, convolved, convolved]
USES += [mixed, looked_up, scanned, returned]


@dataclasses.dataclass
class Written:
  """A layer: shape of its kernel, where inputs end, and what it does."""

  shape: tuple[int, ...]
  outer: int
  stacked: int
  scale: float
  steps: list[Step]
  call: tuple[int, str] | None

  def kernel(self, w, a, b, make):
    """Returns the kernel, made by `make` for each of a stack."""
    for _ in range(self.stacked):
      make = jax.vmap(make)
    return make(w, a, b)

  def use(self, k, x):
    """Returns what the layer makes of a kernel and an input."""

    def rest(number):
      def run(k, x):
        for step in self.steps[number:]:
          k = step.apply(k, x)
        return k

      return run

    if self.call is None:
      return rest(0)(k, x)
    number, name = self.call
    for step in self.steps[:number]:
      k = step.apply(k, x)
    return CALLS[name](rest(number), k, x)


@st.composite
def layers(draw):
  shape = tuple(draw(st.lists(SIZES, min_size=2, max_size=4)))
  stacked = draw(st.integers(0, 1)) if len(shape) > 2 else 0
  outer = draw(st.integers(1, len(shape) - stacked - 1))
  steps: list[Step] = []
  struct = jax.ShapeDtypeStruct(shape, jnp.dtype('float32'))
  for _ in range(draw(st.integers(0, 4))):
    step = draw(st.sampled_from(STEPS))(draw, struct.shape)
    if step is None:
      continue
    new = jax.eval_shape(step.apply, struct, X)
    if 0 < new.size <= LARGEST and 0 < len(new.shape) <= 5:
      steps.append(step)
      struct = new
  use = draw(st.sampled_from(USES))(draw, struct.shape)
  steps.append(use or returned(draw, struct.shape))
  call = None
  if draw(st.integers(0, 3)) == 0:
    number = draw(st.integers(0, len(steps) - 1))
    call = number, draw(st.sampled_from(sorted(CALLS)))
  scale = draw(st.sampled_from([1.0, 0.5, -2.0]))
  return Written(shape, outer, stacked, scale, steps, call)


X = normal(1, (2, 3))


def results(layer):
  """Returns values and gradients of a layer, and how they are compared.

  Returns:
    A function of no arguments, for one program of many, and a tolerance.
  """
  stack, core = layer.shape[: layer.stacked], layer.shape[layer.stacked :]
  w = normal(2, layer.shape)
  a = normal(3, (*stack, *core[: layer.outer], 2))
  b = normal(4, (*stack, 2, *core[layer.outer :]))

  def oracle(w, a, b, x):
    product = lambda w, a, b: w + layer.scale * jnp.tensordot(a, b, 1)
    return layer.use(layer.kernel(w, a, b, product), x)

  def low_rank(w, a, b, x):
    make = lambda w, a, b: surgery.LowRank(w, a, b, layer.scale).dense()
    return layer.use(layer.kernel(w, a, b, make), x)

  def factored(*args):
    # Not `surgery.factored`: if the walk fails, that goes on densely.
    return walked(low_rank, *jax.tree.flatten((args, {})), Walk())

  def loss(function):
    def of(*args):
      y = function(*args)
      weights = normal(7, y.shape)
      return (weights * y.astype(weights.dtype)).sum(), y

    return jax.value_and_grad(of, argnums=(0, 1, 2, 3), has_aux=True)

  both = lambda *args: (loss(oracle)(*args), loss(factored)(*args))
  narrow = any(s.name in ('bfloat16', 'float16') for s in layer.steps)
  return both, (w, a, b, X), 4e-2 if narrow else 1e-4


def check(layers):
  """Asserts that values and gradients are those of dense kernels."""
  functions, args, tolerances = zip(*map(results, layers), strict=True)
  # One program: the compiler takes most of the time.
  every = jax.jit(
    lambda args: [f(*a) for f, a in zip(functions, args, strict=True)]
  )
  for (dense, fast), tolerance in zip(every(args), tolerances, strict=True):
    for one, other in zip(*map(jax.tree.leaves, (dense, fast)), strict=True):
      assert (one.shape, one.dtype) == (other.shape, other.dtype)
      one, other = (np.asarray(v, np.float64) for v in (one, other))
      size = max(1.0, abs(one).max(initial=0))
      np.testing.assert_allclose(other / size, one / size, atol=tolerance)


@hypothesis.settings(
  max_examples=10,
  deadline=None,
  database=None,
  suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(st.lists(layers(), min_size=6, max_size=6))
def test_random_layers(layers):
  check(layers)
