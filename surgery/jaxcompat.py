"""What the library uses of JAX that JAX does not promise to keep.

Jaxprs are read, and primitives are defined, through this module alone, so that
a new release of JAX is met in one place: `tests/test_jaxcompat.py` has a test
for each of its parts, whose message says what to mend. It knows JAX 0.10 to
0.12.

JAX documents equations (`primitive`, `params`, `invars`, `outvars`) for who
writes interpreters, and neither the names of primitives nor their parameters.
`PRIMITIVES` has those that are read anywhere in the library. What is not in it
is not touched: a parameter that is new may change what a primitive computes, so
`check` refuses it, and the primitive is bound as it stands.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import jax
import jax.extend.core as jex
from jax.interpreters import ad, batching, mlir, partial_eval

Equation = jex.JaxprEqn
Jaxpr = jex.Jaxpr
ClosedJaxpr = jex.ClosedJaxpr

# Primitives by name, with their parameters; a `?` ends those that some of the
# releases that are supported do not have.

# Operate on each element alone.
# fmt: off
ELEMENTWISE: dict[str, str] = {
  **dict.fromkeys((
    'abs', 'acos', 'acosh', 'add', 'and', 'asin', 'asinh', 'atan', 'atan2',
    'atanh', 'ceil', 'clamp', 'copy', 'copy_p', 'cosh', 'div', 'eq', 'erf',
    'erf_inv', 'floor', 'ge', 'gt', 'imag', 'is_finite', 'le', 'lt', 'max',
    'min', 'ne', 'neg', 'nextafter', 'not', 'or', 'pow', 'real', 'rem',
    'select_n', 'sign', 'sinh', 'square', 'sub', 'xor',
  ), ''),
  **dict.fromkeys((
    'cbrt', 'cos', 'erfc', 'exp', 'exp2', 'expm1', 'log', 'log1p', 'logistic',
    'rsqrt', 'sin', 'sqrt', 'tan', 'tanh',
  ), 'accuracy?'),
  'convert_element_type': 'new_dtype sharding? weak_type?',
  'integer_pow': 'y',
  'mul': 'out_dtype?',
  'reduce_precision': 'exponent_bits mantissa_bits',
  'round': 'rounding_method',
}
REDUCTIONS: dict[str, str] = dict.fromkeys((
  'reduce_sum', 'reduce_max', 'reduce_min', 'reduce_prod', 'reduce_and',
  'reduce_or',
), 'axes out_sharding?')
CUMULATIVE: dict[str, str] = dict.fromkeys((
  'cumsum', 'cumprod', 'cummax', 'cummin', 'cumlogsumexp',
), 'axis reverse')
# fmt: on

# Call a jaxpr, and do nothing else: it may be written out in their place.
_JIT = (
  'jaxpr compiler_options_kvs? ctx_mesh? donated_invars? in_layouts? '
  'in_shardings? inline? keep_unused? name? out_layouts? out_shardings?'
)
CALLS: dict[str, str] = {
  'jit': _JIT,
  'pjit': _JIT,
  'closed_call': 'call_jaxpr',
  'core_call': 'call_jaxpr',
}
# Call a jaxpr, computed again for the backward pass.
CHECKPOINTS: dict[str, str] = dict.fromkeys(
  ('remat', 'remat2', 'checkpoint'),
  'jaxpr differentiated? policy prevent_cse',
)
# Call a jaxpr, differentiated in another way.
CUSTOM: dict[str, str] = {
  'custom_jvp_call': 'call_jaxpr jvp_jaxpr_fun? num_consts? symbolic_zeros?',
  'custom_vjp_call': 'call_jaxpr bwd? fwd_jaxpr_thunk? num_consts? out_trees? '
  'symbolic_zeros?',
}

PRIMITIVES: Mapping[str, str] = {
  **ELEMENTWISE,
  **REDUCTIONS,
  **CUMULATIVE,
  **CALLS,
  **CHECKPOINTS,
  **CUSTOM,
  'add_any': '',
  'broadcast_in_dim': 'broadcast_dimensions shape sharding?',
  'concatenate': 'dimension',
  'cond': 'branches',
  'conv_general_dilated': 'batch_group_count dimension_numbers '
  'feature_group_count lhs_dilation out_sharding? padding precision '
  'preferred_element_type rhs_dilation window_strides',
  'dot_general': 'dimension_numbers out_sharding? precision '
  'preferred_element_type',
  'dynamic_slice': 'slice_sizes',
  'gather': 'dimension_numbers fill_value indices_are_sorted mode slice_sizes '
  'unique_indices',
  'name': 'name',
  'optimization_barrier': '',
  'pad': 'padding_config',
  'pbroadcast': 'axes?',
  'pvary': 'axes?',
  'reshape': 'dimensions new_sizes sharding?',
  'rev': 'dimensions',
  # As of 0.11 `ft_in` and `ft_out` instead of the two counts.
  'scan': 'jaxpr length reverse unroll num_carry? num_consts? ft_in? ft_out? '
  '_split_transpose?',
  # Its axes were called `manual_axes` in 0.10.0.
  'shard_map': 'check_vma in_specs jaxpr mesh out_specs manual_axes? '
  'newly_manual_axes? debug_info?',
  'sharding_constraint': 'layout sharding unconstrained_dims context_mesh?',
  'slice': 'limit_indices start_indices strides',
  'split': 'axis sizes',
  'squeeze': 'dimensions',
  'stop_gradient': '',
  'transpose': 'permutation',
  'while': 'body_jaxpr body_nconsts cond_jaxpr cond_nconsts',
}


class Unfamiliar(Exception):  # noqa: N818 - never reaches a user as it is.
  """A primitive has other parameters than this module knows."""


def check(name: str, params: Mapping[str, Any]) -> None:
  """Raises if a primitive of the table has other parameters than known.

  A new parameter that is None, False or empty is taken to ask for nothing.

  Args:
    name: the primitive's name.
    params: its parameters.

  Raises:
    Unfamiliar: if one is gone that is needed, or one is new and not empty.
  """
  listed = PRIMITIVES[name].split()
  known = {one.removesuffix('?') for one in listed}
  new = [
    key
    for key, value in params.items()
    if key not in known and not _is_nothing(value)
  ]
  gone = [one for one in listed if one[-1] != '?' and one not in params]
  if not new and not gone:
    return
  found = [
    f'{what} {", ".join(map(repr, names))}'
    for what, names in (('new', new), ('gone', gone))
    if names
  ]
  raise Unfamiliar(
    f'JAX {jax.__version__} gives the primitive {name!r} other parameters '
    f'than this version of surgery knows ({"; ".join(found)})'
  )


def _is_nothing(value: Any) -> bool:
  return value is None or value is False or value == ()


# Values.


def is_traced(value: Any) -> bool:
  """Whether a value is known by shape and dtype only, in a transformation."""
  return isinstance(value, jax.core.Tracer)


def is_differentiated(value: Any) -> bool:
  """Whether a derivative is taken of a value, as far as that is to be seen.

  The classes are no public names, and not the same in all releases; without
  them nothing is seen.
  """
  return is_traced(value) and type(value).__name__ in (
    'JVPTracer',
    'LinearizeTracer',
  )


def is_array_like(value: Any) -> bool:
  """Whether a value can be an operand of a primitive."""
  return bool(jex.valid_jaxtype(value))


def is_literal(atom: Any) -> bool:
  """Whether an operand of an equation is a constant that stands in it."""
  return isinstance(atom, jex.Literal)


# Jaxprs.


def closed(jaxpr: Jaxpr | ClosedJaxpr) -> ClosedJaxpr:
  """Returns a jaxpr with its constants; it has none if it was open."""
  if hasattr(jaxpr, 'consts'):
    return cast(ClosedJaxpr, jaxpr)
  return ClosedJaxpr(jaxpr, ())


def interpret(
  jaxpr: ClosedJaxpr,
  operands: Sequence[Any],
  equation: Callable[[Equation, list[Any]], Sequence[Any]],
  constant: Callable[[Any], Any] = lambda value: value,
  literal: Callable[[Any], Any] = lambda value: value,
) -> list[Any]:
  """Goes through a closed jaxpr with values of any kind.

  Args:
    jaxpr: the jaxpr.
    operands: the values of its inputs.
    equation: returns the values of an equation's results, given the equation
      and the values of its operands.
    constant: returns the value of a constant of the jaxpr.
    literal: returns the value of a constant in an equation.

  Returns:
    The values of its results.
  """
  open_ = jaxpr.jaxpr
  values: dict[Any, Any] = {}
  values.update(zip(open_.constvars, map(constant, jaxpr.consts), strict=True))
  values.update(zip(open_.invars, operands, strict=True))

  def read(atom: Any) -> Any:
    return literal(atom.val) if is_literal(atom) else values[atom]

  for eqn in open_.eqns:
    results = equation(eqn, [read(atom) for atom in eqn.invars])
    values.update(zip(eqn.outvars, results, strict=True))
  return [read(atom) for atom in open_.outvars]


def needed(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
  """Returns a closed jaxpr without what reaches none of its results.

  Where JAX does not say how, it is returned as it is.
  """
  remove = getattr(partial_eval, 'dce_jaxpr', None)
  if remove is None:
    return jaxpr
  open_ = jaxpr.jaxpr
  less, _ = remove(open_, [True] * len(open_.outvars), instantiate=True)
  return jaxpr.replace(jaxpr=less)


def inner(eqn: Equation) -> Iterator[Jaxpr]:
  """Yields the jaxprs that an equation has among its parameters."""
  yield from jex.jaxprs_in_params(eqn.params)


def called(eqn: Equation, *tables: Mapping[str, str]) -> ClosedJaxpr | None:
  """Returns the closed jaxpr that an equation calls.

  Args:
    eqn: the equation.
    *tables: which primitives are meant: `CALLS`, `CHECKPOINTS`, `CUSTOM`.

  Returns:
    The jaxpr; None if the primitive is another, or not as it is known.
  """
  name = eqn.primitive.name
  for table in tables:
    if name in table:
      found = eqn.params.get(table[name].split()[0])
      return None if found is None else closed(found)
  return None


def bind(
  primitive: Any, operands: Sequence[Any], params: Mapping[str, Any]
) -> list[Any]:
  """Binds a primitive with the parameters of an equation.

  Returns:
    Its results, of which there may be one.
  """
  made = primitive.bind(*operands, **primitive.get_bind_params(params))
  return list(made) if primitive.multiple_results else [made]


def ambient() -> Any:
  """Returns the context in which an equation is made here and now."""
  return jax.make_jaxpr(lambda x: -x)(0.0).jaxpr.eqns[0].ctx


def bind_again(eqn: Any, operands: Sequence[Any], ambient: Any) -> list[Any]:
  """Binds an equation's primitive in the context that it was made in.

  Args:
    eqn: the equation.
    operands: its operands.
    ambient: the context of here and now, which need not be entered.
  """
  if eqn.ctx is ambient:
    return bind(eqn.primitive, operands, eqn.params)
  with eqn.ctx.manager:  # A mesh, metadata, how random bits are made.
    return bind(eqn.primitive, operands, eqn.params)


def scope(eqn: Any) -> AbstractContextManager[Any]:
  """Returns the context in which profiles have an equation's names."""
  names = str(eqn.source_info.name_stack)
  if not names:
    return _NO_SCOPE
  stack = contextlib.ExitStack()
  for name in names.split('/'):
    stack.enter_context(jax.named_scope(name))
  return stack


_NO_SCOPE: AbstractContextManager[None] = contextlib.nullcontext()


# Control flow.


@dataclasses.dataclass(frozen=True)
class Scan:
  """A `scan`: its operands are constants, then the carry, then rows.

  Attributes:
    consts: the number of constants.
    carry: the number of values that are carried.
    body: a closed jaxpr.
    options: keywords of `jax.lax.scan`.
  """

  consts: int
  carry: int
  body: Any
  options: Mapping[str, Any]


def scan(eqn: Any) -> Scan:
  """Reads a `scan`.

  Raises:
    Unfamiliar: if how many constants there are is not said in a known way.
  """
  params = eqn.params
  if 'ft_in' in params:
    consts, carry, _ = map(len, params['ft_in'].unpack())
  elif 'num_consts' in params and 'num_carry' in params:
    consts, carry = params['num_consts'], params['num_carry']
  else:
    raise Unfamiliar(
      f"JAX {jax.__version__} does not say by 'ft_in' nor by 'num_consts' how "
      "many constants a 'scan' has"
    )
  names = ('length', 'reverse', 'unroll', '_split_transpose')
  options = {name: params[name] for name in names if name in params}
  return Scan(consts, carry, closed(params['jaxpr']), options)


def shard_map_axes(eqn: Any) -> set[Any]:
  """Returns the names of the axes of a mesh that a `shard_map` maps over."""
  params = eqn.params
  new = 'newly_manual_axes'
  return set(params[new if new in params else 'manual_axes'])


# Compiling.

# As of 0.11.2 `inline=True` leaves an equation until the program is lowered.
_EARLY: Any = getattr(getattr(jax, 'Inline', None), 'JAX_EARLY', True)


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns a compiled function that is written out where it is traced."""
  return jax.jit(function, inline=_EARLY)


# Primitives of our own.


def primitive(
  name: str,
  impl: Callable[..., Any],
  *,
  compute: Callable[..., Any],
  abstract: Callable[..., Any],
  batch: Callable[..., Any],
  jvp: Callable[..., Any] | None = None,
  transpose: Callable[..., Any] | None = None,
) -> Any:
  """Returns a new primitive that has one result.

  Args:
    name: its name.
    impl: computes it eagerly.
    compute: computes it in a compiled program.
    abstract: returns the abstract value of its result.
    batch: the rule for `vmap`: from operands, and the axis of each, to the
      result and its axis.
    jvp: its derivative: from primals and tangents to those of the result. A
      tangent may be one that `is_zero`.
    transpose: of a linear one: from the cotangent and operands to cotangents.
  """
  made = jex.Primitive(name)
  made.def_impl(impl)
  made.def_abstract_eval(abstract)
  mlir.register_lowering(made, mlir.lower_fun(compute, multiple_results=False))
  batching.primitive_batchers[made] = batch
  if jvp is not None:
    ad.primitive_jvps[made] = jvp
  if transpose is not None:
    ad.deflinear2(made, transpose)
  return made


def is_zero(tangent: Any) -> bool:
  """Whether a tangent is known to be zero, and is no array."""
  return isinstance(tangent, ad.Zero)
