"""What is made once, also when several threads ask for it first.

`functools.cache` and, from Python 3.12 on, `functools.cached_property` run the
function in each thread that finds nothing yet. Where what they make is compared
by identity, as primitives and plugins are, each thread then has another.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

T = TypeVar('T')


def once(make: Callable[[], T]) -> Callable[[], T]:
  """Returns a function that calls another at most once, and answers the same.

  If it raises, the next call tries again.

  Args:
    make: makes the value.
  """
  lock = threading.RLock()
  made: list[T] = []

  @functools.wraps(make)
  def get() -> T:
    if not made:
      with lock:
        if not made:
          made.append(make())
    return made[0]

  return get


class attribute(Generic[T]):  # noqa: N801 - written as functools' is.
  """A `functools.cached_property` that is made under the object's `_lock`.

  Args:
    make: makes the value, given the object.
  """

  def __init__(self, make: Callable[[Any], T]) -> None:
    self._make = make
    self.__doc__ = make.__doc__

  def __set_name__(self, owner: type, name: str) -> None:
    self._name = name

  @overload
  def __get__(self, of: None, owner: type) -> attribute[T]: ...

  @overload
  def __get__(self, of: object, owner: type) -> T: ...

  def __get__(self, of: Any, owner: type) -> Any:
    if of is None:
      return self
    # Once it is there Python finds it in the object and does not come here.
    with of._lock:
      if self._name not in of.__dict__:
        of.__dict__[self._name] = self._make(of)
      return of.__dict__[self._name]
