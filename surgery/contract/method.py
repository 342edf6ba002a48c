"""The contract of merge methods: several tensors in, one out.

A method is data, a frozen dataclass whose fields are its options, and two pure
functions: `prepare` looks at the whole of a tensor, block by block, and
`combine` makes one block of the result. Whoever calls them sees to it that
blocks come, that results are rounded once, and that nothing depends on how
large blocks are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from surgery import errors
from surgery.contract import config

if TYPE_CHECKING:
  import numpy as np

Base = Literal['none', 'optional', 'required']


@dataclasses.dataclass(frozen=True)
class Block:
  """A piece of the same tensor of several models.

  Attributes:
    tensors: one array a model, in the order in which models are given. Of most
      methods they are float64 arrays of one axis, elements in C order; of
      methods with `rows` they are matrices of whole rows.
    base: the same piece of the base, or None if there is none.
    start: how many elements of the tensor lie before it.
    uniform: returns random numbers for a model, by its number: float64 of the
      shape of the block, evenly distributed over [0, 1). They depend on the
      seed, the tensor's path, the model's number and the place of the element
      in the tensor, and on nothing else.
  """

  tensors: tuple[np.ndarray, ...]
  base: np.ndarray | None
  start: int
  uniform: Callable[[int], np.ndarray]

  @functools.cached_property
  def deltas(self) -> tuple[np.ndarray, ...]:
    """How each model differs from the base; without one, the tensors."""
    if self.base is None:
      return self.tensors
    return tuple(one - self.base for one in self.tensors)


class Cut(Protocol):
  """Which elements are among the largest of a tensor."""

  @property
  def value(self) -> float:
    """The smallest of them; infinite if there is none."""
    ...

  def mask(self, values: np.ndarray, start: int) -> np.ndarray:
    """Returns which elements of a block are meant, as booleans.

    Args:
      values: the values of the block, as `largest` was given them.
      start: `start` of the block.
    """
    ...


class Whole(Protocol):
  """The same tensor of several models, of which blocks can be asked for."""

  @property
  def shape(self) -> tuple[int, ...]:
    """Its shape."""
    ...

  @property
  def size(self) -> int:
    """Number of elements."""
    ...

  @property
  def count(self) -> int:
    """Number of models, without the base."""
    ...

  def total(self, measure: Callable[[Block], Any]) -> Any:
    """Returns the sum of what a function returns for all blocks.

    The blocks of one tensor are the same each time, and are added up in their
    order, so a sum has the same bits whatever else is cut how.

    Args:
      measure: from a block to an array, of one shape for all blocks.
    """
    ...

  def largest(
    self,
    values: Callable[[Block], Sequence[np.ndarray]],
    counts: Sequence[Sequence[int]],
  ) -> list[list[Cut]]:
    """Finds the largest elements exactly, without sorting.

    Of equal elements those are taken that come first in C order. Values are
    compared as float32, or as float64 if a tensor is float64.

    Args:
      values: from a block to arrays of its shape that are 0 or larger.
      counts: for each of these arrays, how many elements are wanted; several
        numbers give several cuts.
    """
    ...


class Method:
  """A way in which the same tensor of several models becomes one.

  Derive from it; a subclass is a frozen dataclass whose fields are its options,
  declared by `surgery.field`. An option annotated as `tuple[float, ...]` has a
  value for each model: whoever gives one number gives it for all. Any option
  may be given by selector, or as a list over the depth of the model; a method
  sees what holds for the tensor at hand.

  Attributes:
    name: the name by which it is asked for.
    base: whether it takes a base: `none`, `optional` or `required`.
    least: smallest number of models, without the base.
    most: largest number of models, or None.
    pointwise: whether a number depends on those at the same place alone, and on
      nothing that is drawn. Others are given a head that is stored transposed
      as its embedding lies, so that copies of it stay copies.

  Example:
    class Median(surgery.Method):
      name = 'median'

      def combine(self, block, prepared):
        return np.median(block.tensors, axis=0)
  """

  name: ClassVar[str] = ''
  base: ClassVar[Base] = 'none'
  least: ClassVar[int] = 1
  most: ClassVar[int | None] = None
  pointwise: ClassVar[bool] = False

  _called: ClassVar[str] = 'method'

  def __init_subclass__(cls, **kwargs: Any) -> None:
    super().__init_subclass__(**kwargs)
    config.make_dataclass(cls)
    made: Any = cls.__init__

    @functools.wraps(made)
    def checked(self: Any, **given: Any) -> None:
      cls: Any = type(self)
      check_class(cls)
      config.check_keys(cls, given)
      config.check_required(cls, given)
      made(self, **{k: config.check(cls, k, v) for k, v in given.items()})
      self.check()

    cls.__init__ = checked  # type: ignore[method-assign]

  def check(self) -> None:
    """Raises for options that do not go together; may be overridden.

    Raises:
      ConfigError: naming them.
    """

  @property
  def rows(self) -> bool:
    """Whether blocks have to be matrices of whole rows.

    A row is the last axis of the tensor. It is what is normalised, or ranked,
    by itself.
    """
    return False

  def prepare(self, whole: Whole) -> Any:
    """Returns what `combine` needs to know of the whole tensor.

    It is called once for each tensor, before the first block. Only a method
    that overrides it has its inputs read more than once.

    Args:
      whole: goes over the tensor, as often as it is asked.
    """
    del whole

  def combine(self, block: Block, prepared: Any) -> Any:
    """Returns a block of the result, an array of the shape of the block.

    Args:
      block: the same piece of all models.
      prepared: what `prepare` returned.
    """
    raise NotImplementedError


def option(name: str) -> str:
  """Returns the name by which people give an option: `lambda` for `lambda_`."""
  return name.rstrip('_')


def is_measured(method: Method | type[Method]) -> bool:
  """Whether a method reads its inputs before it combines them."""
  cls = method if isinstance(method, type) else type(method)
  return cls.prepare is not Method.prepare


# What `surgery.combine` takes beside the options of a method.
_TAKEN = frozenset(
  (
    *('models', 'method', 'base', 'only', 'seed', 'nonfinite', 'host', 'depth'),
    *('tokens', 'missing_rows', 'tokenizers', 'vocab', 'check_tokenizers'),
  )
)


@functools.lru_cache(maxsize=256)
def check_class(cls: Any) -> None:
  """Raises unless a class is a method.

  Raises:
    PluginError: naming it and what is wrong.
  """
  where = f'{cls.__module__}.{cls.__qualname__}'
  if not isinstance(cls.name, str) or not cls.name:
    raise errors.PluginError(
      f'{where} has no name. Set the class attribute `name`, e.g. name = '
      "'mine'."
    )
  if cls.base not in ('none', 'optional', 'required'):
    raise errors.PluginError(
      f"method '{cls.name}': base: expected 'none', 'optional' or 'required', "
      f'found {cls.base!r}.'
    )
  if cls.combine is Method.combine:
    raise errors.PluginError(
      f"method '{cls.name}' ({where}) has no combine(block, prepared)."
    )
  for name in _TAKEN.intersection(config.options(cls)):
    raise errors.PluginError(
      f"method '{cls.name}': an option cannot be called {name!r}, which is an "
      'argument of surgery.combine. Give it another name.'
    )
  config.check_declaration(cls)
