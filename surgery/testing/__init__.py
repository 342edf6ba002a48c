"""The conformance kit: tests that any adapter type has to pass.

    from surgery.testing import AdapterConformance

    class TestMine(AdapterConformance):
      adapter = Mine(rank=2)

That is all of a test file. A type says what it does not do by class attributes,
and the kit sees to it that it refuses. Without pytest: `check(Mine(rank=2))`.

Passes, formats, merge methods, freeze policies and terms of selectors have
suites of the same kind: `PassConformance`, `FormatConformance`,
`MethodConformance`, `PolicyConformance` and `TermConformance`.
`TestMine.broken()` says what is broken without pytest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from surgery import errors
from surgery.contract.adapter import Adapter
from surgery.testing import laws as _laws
from surgery.testing.cases import (
  LAWS,
  Broken,
  Case,
  Declared,
)
from surgery.testing.formats import FormatConformance
from surgery.testing.methods import MethodConformance
from surgery.testing.passes import PassConformance
from surgery.testing.policies import PolicyConformance, TermConformance

__all__ = [
  'LAWS',
  'AdapterConformance',
  'Broken',
  'Case',
  'Declared',
  'FormatConformance',
  'MethodConformance',
  'PassConformance',
  'PolicyConformance',
  'TermConformance',
  'check',
]


class AdapterConformance:
  """A test class for pytest; derive from it and set `adapter`.

  Attributes:
    adapter: the adapter, with a configuration that suits the layers below.
    identity: whether a new adapter changes nothing.
    mergeable: whether it can be merged; what the type says by default.
    trains: whether it has trainable weights, unlike a mask.
    factored: whether the low-rank values that it gives stay factored through
      `surgery.factored`.
    unsupported: kinds of layers that it does not serve: `linear`, `no_bias`,
      `conv`, `embed`, `einsum`, `stacked`, `norm`.
    kinds: kinds of layers to look at, where a configuration does not suit all
      of them; all but `norm` by default, which has vectors only: a type for
      these says `('norm',)`.
    too_large: options with values that no layer can have, which have to be
      refused, e.g. `{'block_size': 10_000}`; a rank of 10,000 by default where
      the type has that option; `{}` if nothing bounds it. The library warns of
      ranks itself where the type has `rank_axes`.
    seeded: whether weights that look drawn differ from seed to seed; False if
      they are computed, as a cosine basis is.
    multiple_of: what divides the numbers of inputs and outputs of all layers;
      a type that works in blocks of 4 says 4.

  The layers, with numbers of inputs × outputs; there are two of each kind:

  | kind | first | second |
  | --- | --- | --- |
  | `linear`, `no_bias` | 6 × 5 | 5 × 4 |
  | `conv` | (3, 2, 3) × 5 | (3, 5) × 4 |
  | `embed` | 7 × 5 | a linear one, 5 × 4 |
  | `einsum` | 6 × (2, 3) | 6 × (2, 2) |
  | `stacked` | 3 of 6 × 6 | 2 of 6 × 6 |
  | `norm` | a scale and a bias of 6 | a scale of 6 |

  `multiple_of` multiplies the last number on each side of each `×`.
  """

  adapter: ClassVar[Adapter]
  identity: ClassVar[bool] = True
  mergeable: ClassVar[bool | None] = None
  trains: ClassVar[bool] = True
  factored: ClassVar[bool] = True
  unsupported: ClassVar[tuple[str, ...]] = ()
  kinds: ClassVar[tuple[str, ...] | None] = None
  too_large: ClassVar[Mapping[str, Any] | None] = None
  seeded: ClassVar[bool] = True
  multiple_of: ClassVar[int] = 1

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
      cls.seeded,
      cls.multiple_of,
    )
    return _laws.cases(cls.adapter, declared, kinds=cls.kinds)

  def test_law(self, case: Case) -> None:
    """Looks at one law on one kind of layer."""
    case.look()

  def test_framework(self, framework: str) -> None:
    """Looks at layers of linen, nnx and equinox: `pytest -m frameworks`."""
    from surgery.testing import frameworks

    mergeable = self.mergeable
    frameworks.look(
      framework,
      self.adapter,
      mergeable=self.adapter.mergeable if mergeable is None else mergeable,
      multiple_of=self.multiple_of,
    )


def _declared(
  adapter: Any,
  identity: bool,
  mergeable: bool | None,
  trains: bool,
  factored: bool,
  unsupported: Iterable[str],
  too_large: Mapping[str, Any] | None,
  seeded: bool,
  multiple_of: int,
) -> Declared:
  """Returns what is said of an adapter.

  Raises:
    ConfigError: if it is something else, as its type, or a size is none.
  """
  if not isinstance(adapter, Adapter):
    shown = getattr(adapter, '__name__', type(adapter).__name__)
    raise errors.ConfigError(
      f'expected an adapter, found {shown}. Give one with its options, e.g. '
      f'{shown}(rank=2).'
    )
  if mergeable is None:
    mergeable = type(adapter).mergeable
  whole = isinstance(multiple_of, int) and not isinstance(multiple_of, bool)
  if not whole or multiple_of < 1:
    raise errors.ConfigError(
      f'multiple_of: expected a whole number of at least 1, found '
      f'{multiple_of!r}.'
    )
  return Declared(
    identity,
    mergeable,
    trains,
    factored,
    tuple(unsupported),
    too_large,
    seeded,
    multiple_of,
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
  seeded: bool = True,
  multiple_of: int = 1,
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
    seeded: whether weights that look drawn differ from seed to seed.
    multiple_of: what divides the numbers of inputs and outputs of all layers.
    laws: names of the laws to look at; all by default.
    kinds: kinds of layers to look at; all but `norm` by default.
    dtypes: dtypes to look at; all by default.

  Raises:
    Broken: for the first law that is broken.
  """
  declared = _declared(
    adapter,
    identity,
    mergeable,
    trains,
    factored,
    unsupported,
    too_large,
    seeded,
    multiple_of,
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
