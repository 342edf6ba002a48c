"""Verbs on params that accept a `Checkpoint` as well."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from surgery import errors
from surgery.editing import devices
from surgery.host.manager import Host, default_host
from surgery.model import layers
from surgery.model.checkpoint import Checkpoint

Verb = TypeVar('Verb', bound=Callable[..., Any])


@contextlib.contextmanager
def told(host: Host | None, verb: str, **arguments: Any) -> Iterator[Host]:
  """The scope of a verb: observers are notified, and errors name the verb.

  Transfers between devices are allowed within it.
  """
  host = host or default_host()
  with (
    errors.within(verb),
    host.observed(verb, arguments),
    devices.transfers(),
  ):
    yield host


def types_of(graph: Any) -> layers.LayerTypes:
  """Returns the types of the layers of a graph.

  Raises:
    SurgeryError: if it is something else.
  """
  if not layers.is_graph(graph):
    raise errors.SurgeryError(
      f'graph: expected a bx.Graph, found {type(graph).__name__}.'
    )
  return layers.of_graph(graph)


def takes_checkpoints(
  pass_: Callable[..., Checkpoint],
) -> Callable[[Verb], Verb]:
  """Lets a verb on params accept a `Checkpoint` too, and return one.

  Then the verb's pass alone is called, which is lazy.

  Args:
    pass_: the pass. Its arguments have the names of the verb's, except that it
      gets `layer_types` instead of `graph`, and no `checkify`.
  """

  def decorate(verb: Verb) -> Verb:
    signature = inspect.signature(verb)

    @functools.wraps(verb)
    def either(*args: Any, **kwargs: Any) -> Any:
      if not args or not isinstance(args[0], Checkpoint):
        return verb(*args, **kwargs)
      given = dict(signature.bind(*args, **kwargs).arguments)
      del given[next(iter(given))]
      graph, host = given.pop('graph', None), given.pop('host', None)
      # A checkpoint has values, so its checks need no transformation.
      given.pop('checkify', None)
      if graph is not None:
        given['layer_types'] = types_of(graph)
      with told(host, verb.__name__, **said(pass_, given)) as asked:
        return pass_(args[0], host=asked, **given)

    return either  # type: ignore[return-value]

  return decorate


def said(
  pass_: Callable[..., Any], arguments: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the arguments that observers get: JSON data that is no default."""
  taken = inspect.signature(pass_).parameters
  return {
    name: value
    for name, value in arguments.items()
    if _plain(value) and name in taken and value != taken[name].default
  }


def _plain(value: Any) -> bool:
  """Whether a value is JSON data."""
  if isinstance(value, Mapping):
    return all(map(_plain, value.values()))
  if isinstance(value, (list, tuple)):
    return all(map(_plain, value))
  return value is None or isinstance(value, (bool, int, float, str))
