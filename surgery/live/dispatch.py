"""Verbs take params, and saved models too."""

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
  """The scope of a verb: it tells observers, and errors say which it was.

  Within it values may move to and from devices.
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
  """Lets a verb on params take a `Checkpoint` too, and return one.

  That is the verb's pass alone, and as lazy as that.

  Args:
    pass_: the pass; its arguments are called as the verb's, but for a `graph`,
      of which it gets the `layer_types`, and `checkify`, which is for params.
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
  """Returns arguments as observers are told them.

  Those are the ones that are JSON data and no defaults.
  """
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
