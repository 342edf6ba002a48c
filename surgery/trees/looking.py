"""Verbs that look at models, and import no JAX for a saved one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from surgery.editing import choosing
from surgery.host.manager import Host
from surgery.looking import stats as describing
from surgery.looking.stats import TensorStats
from surgery.model.checkpoint import Checkpoint
from surgery.naming import selectors
from surgery.naming.selection import Selection


def select(
  model: Any,
  *select: selectors.Text,
  graph: Any = None,
  layers: Any = None,
  host: Host | None = None,
) -> Selection:
  """Chooses parameters of a model, or layers of a graph.

  Args:
    model: `bx.Params`, a `bx.Graph`, a `Checkpoint`, or a model of another
      framework.
    *select: selectors; several are one list. Everything by default.
    graph: the graph, for `type:` selectors on params.
    layers: types of layers, for `type:` selectors on trees of arrays, as
      `surgery.layers` gives them.
    host: whose plugins answer further terms.

  Returns:
    A selection; a layer stands for everything beneath it.

  Raises:
    SelectorError: for a selector that matches nothing.

  Example:
    surgery.select(params, '**/{query,value}', '!**/bias')
  """
  asked = choosing.select
  options = {'graph': graph, 'host': host}
  if not isinstance(model, Checkpoint):
    from surgery.trees import verbs

    asked = verbs.on_trees(asked, 'model', saved=True)
    options = options if layers is None else {**options, 'layers': layers}
  return asked(model, *select, **options)


def stats(
  checkpoint: Any,
  select: selectors.Text | Selection | None = None,
  *,
  singular: int = 0,
  host: Host | None = None,
) -> Iterator[TensorStats]:
  """Describes tensors; see `surgery.looking.stats`."""
  asked = describing.stats
  if not isinstance(checkpoint, Checkpoint):
    from surgery.trees import verbs

    asked = verbs.on_trees(asked, 'checkpoint', saved=True)
  return asked(checkpoint, select, singular=singular, host=host)


# From Python 3.13 on docstrings have no indentation of their own.
stats.__doc__ = inspect.cleandoc(describing.stats.__doc__ or '').replace(
  'the model or adapter, as `surgery.open` gives it.',
  'the model or adapter, as `surgery.open` gives it, or a model of '
  'another\n    framework.',
)
