"""The conformance kit: tests that any adapter type has to pass.

    from surgery.testing import AdapterConformance

    class TestMine(AdapterConformance):
      adapter = Mine(rank=2)

That is all of a test file. A type says what it does not do by class attributes,
and the kit sees to it that it refuses. Without pytest: `check(Mine(rank=2))`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from surgery.core import errors
from surgery.core.adapter import Adapter
from surgery.testing import laws as _laws
from surgery.testing.laws import LAWS, Broken, Case, Declared

__all__ = ['LAWS', 'AdapterConformance', 'Broken', 'Case', 'Declared', 'check']


class AdapterConformance:
  """A test class for pytest; derive from it and set `adapter`.

  Attributes:
    adapter: the adapter, with a configuration that suits layers of width 4.
    identity: whether a new adapter changes nothing.
    mergeable: whether it can be merged; what the type says by default.
    trains: whether it has weights that train; a mask has none.
    factored: whether the low-rank values that it gives stay factored through
      `surgery.factored`.
    unsupported: kinds of layers that it does not serve: `linear`, `no_bias`,
      `conv`, `embed`, `einsum`, `stacked`, `norm`.
    kinds: kinds of layers to look at, where a configuration does not suit all
      of them; all but `norm` by default, which has vectors only: a type for
      these says `('norm',)`.
    too_large: options with values that no layer can have, which have to be
      refused, e.g. `{'block_size': 10_000}`; a rank of 10,000 by default where
      the type has that option; `{}` if nothing bounds it.
  """

  adapter: ClassVar[Adapter]
  identity: ClassVar[bool] = True
  mergeable: ClassVar[bool | None] = None
  trains: ClassVar[bool] = True
  factored: ClassVar[bool] = True
  unsupported: ClassVar[tuple[str, ...]] = ()
  kinds: ClassVar[tuple[str, ...] | None] = None
  too_large: ClassVar[Mapping[str, Any] | None] = None

  @classmethod
  def cases(cls) -> list[Case]:
    """Returns what there is to look at."""
    declared = _declared(
      cls.adapter,
      cls.identity,
      cls.mergeable,
      cls.trains,
      cls.factored,
      cls.unsupported,
      cls.too_large,
    )
    return _laws.cases(cls.adapter, declared, kinds=cls.kinds)

  def test_law(self, case: Case) -> None:
    """Looks at one law on one kind of layer."""
    case.look()


def _declared(
  adapter: Any,
  identity: bool,
  mergeable: bool | None,
  trains: bool,
  factored: bool,
  unsupported: Iterable[str],
  too_large: Mapping[str, Any] | None,
) -> Declared:
  """Returns what is said of an adapter.

  Raises:
    ConfigError: if it is something else, as its type.
  """
  if not isinstance(adapter, Adapter):
    shown = getattr(adapter, '__name__', type(adapter).__name__)
    raise errors.ConfigError(
      f'expected an adapter, found {shown}. Give one with its options, e.g. '
      f'{shown}(rank=2).'
    )
  if mergeable is None:
    mergeable = type(adapter).mergeable
  return Declared(
    identity, mergeable, trains, factored, tuple(unsupported), too_large
  )


def check(
  adapter: Adapter,
  *,
  identity: bool = True,
  mergeable: bool | None = None,
  trains: bool = True,
  factored: bool = True,
  unsupported: Iterable[str] = (),
  too_large: Mapping[str, Any] | None = None,
  laws: Iterable[str] | None = None,
  kinds: Iterable[str] | None = None,
  dtypes: Iterable[str] | None = None,
) -> None:
  """Raises unless an adapter obeys the laws.

  Args:
    adapter: the adapter.
    identity: whether a new adapter changes nothing.
    mergeable: whether it can be merged; what the type says by default.
    trains: whether it has weights that train.
    factored: whether the low-rank values that it gives stay factored.
    unsupported: kinds of layers that it does not serve.
    too_large: options with values that no layer can have; a rank of 10,000 by
      default where the type has that option; `{}` if nothing bounds it.
    laws: names of the laws to look at; all by default.
    kinds: kinds of layers to look at; all but `norm` by default.
    dtypes: dtypes to look at; all by default.

  Raises:
    Broken: for the first law that is broken.
  """
  declared = _declared(
    adapter, identity, mergeable, trains, factored, unsupported, too_large
  )
  for case in _laws.cases(
    adapter, declared, laws=laws, kinds=kinds, dtypes=dtypes
  ):
    case.look()


def broken(adapter: Adapter, **options: Any) -> dict[str, Exception]:
  """Returns the laws that an adapter breaks, each with its first failure.

  Args:
    adapter: the adapter.
    **options: as for `check`.
  """
  found: dict[str, Exception] = {}
  for law in options.pop('laws', None) or LAWS:
    try:
      check(adapter, laws=[law], **options)
    except Exception as error:
      found[law] = error
  return found
