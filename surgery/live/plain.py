"""`bx.Params` for type checkers.

blox has no `py.typed`. So its classes are `Any` to mypy, and a class that
derives from `Any` is compatible with everything: `optimizer(params, params)`
would pass. Other checkers read the source of blox and see its class.
"""
# ruff: noqa: D102 - blox says what its methods do.

from __future__ import annotations

from collections.abc import Callable, ItemsView, KeysView, ValuesView
from typing import Any, Final

# Mypy alone takes a variable of this name to be true.
MYPY: Final = False

if MYPY:

  class PlainParams:
    """What blox's class has."""

    _data: Any
    _locked: bool

    @property
    def is_locked(self) -> bool: ...

    def locked(self) -> PlainParams: ...

    def unlocked(self) -> PlainParams: ...

    def split(
      self, predicate: Callable[..., bool] | None = None
    ) -> tuple[PlainParams, PlainParams]: ...

    def merge(self, other: PlainParams) -> PlainParams: ...

    def keys(self) -> KeysView[tuple[str, ...]]: ...

    def values(self) -> ValuesView[Any]: ...

    def items(self) -> ItemsView[tuple[str, ...], Any]: ...

    def __getitem__(self, key: tuple[str, ...]) -> Any: ...

    def __setitem__(self, key: tuple[str, ...], param: Any) -> None: ...

    def __contains__(self, key: object) -> bool: ...

    def __len__(self) -> int: ...

    def _get(self, *args: Any, **kwargs: Any) -> Any: ...

    def _set(self, *args: Any, **kwargs: Any) -> Any: ...

    def _clone(self) -> Any: ...

    def tree_flatten(self) -> tuple[Any, Any]: ...

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> Any: ...

  BloxParams = PlainParams
else:
  from blox import Params as BloxParams  # noqa: F401 - it is for others.
