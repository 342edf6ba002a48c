"""`explain`: which parameters stay factored, and why others do not."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from surgery import errors, expect, html
from surgery.adapting import compute
from surgery.aliases import Params
from surgery.factoring import transform, walking
from surgery.live import adoption, dropping, reads
from surgery.live import params as live
from surgery.model.records import Probe
from surgery.naming import paths
from surgery.naming.paths import Path
from surgery.trees import resolving


@dataclasses.dataclass(frozen=True)
class Use:
  """How a call uses an adapted parameter.

  Attributes:
    factored: how often it is used and stays factored.
    dense: because of what it is made dense, and how often: a primitive of JAX
      that the model applies to it, or one inside of the type's `apply`
      (`tanh inside apply`); `not low-rank` where the type gives no low-rank
      value; or what went wrong in the library (`failure of surgery: …`).
    asked: whether the call asks for it at all.
    raw: where its base is used without the adapter, as by a layer that reads
      `params[…].value`: the primitive of JAX; empty if nowhere.
    dtypes: the dtypes in which its factors are used.
    stored: the dtype in which its base is stored, to which the model by itself
      rounds the parameter.
    drops: whether an adapter drops elements there in training, which
      `surgery.factored(model)` does and the model by itself does not.
  """

  factored: int = 0
  dense: Mapping[str, int] = dataclasses.field(default_factory=dict)
  asked: bool = True
  raw: str = ''
  dtypes: tuple[str, ...] = ()
  stored: str = ''
  drops: bool = False

  @property
  def state(self) -> str:
    """`factored`, `dense`, `both`, `unused` or `never asked for`."""
    if not self.asked:
      return 'never asked for'
    if self.dense:
      return 'both' if self.factored else 'dense'
    return 'factored' if self.factored else 'unused'

  def __str__(self) -> str:
    raw = f', read without its adapter by {self.raw}' if self.raw else ''
    dense = f' ({", ".join(self.dense)})' if self.dense else ''
    drops = ', dropout by surgery.factored alone' if self.drops else ''
    return f'{self.state}{dense}{self._rounding()}{drops}{raw}'

  def _rounding(self) -> str:
    """Returns the dtypes in which factors are used, unless all is float32."""
    if not self.dtypes or {*self.dtypes, self.stored} == {'float32'}:
      return ''
    stored = (
      '' if {self.stored} == {*self.dtypes} else f', stored in {self.stored}'
    )
    return f' in {" and ".join(self.dtypes)}{stored}'


class Explanation(Mapping[Path, Use]):
  """How a call uses each adapted parameter, by path.

  Printed, it has a line for each parameter.
  """

  def __init__(self, uses: Mapping[Path, Use]) -> None:
    self._uses = dict(uses)

  def __getitem__(self, path: Path) -> Use:
    return self._uses[path]

  def __iter__(self) -> Iterator[Path]:
    return iter(self._uses)

  def __len__(self) -> int:
    return len(self._uses)

  def __str__(self) -> str:
    width = max((len(paths.show(p)) for p in self), default=0)
    return '\n'.join(
      f'{paths.show(path):<{width}}  {use}' for path, use in self.items()
    )

  __repr__ = __str__

  def _repr_html_(self) -> str:
    rows = [
      (
        paths.show(path),
        use.state,
        use.factored,
        ', '.join(f'{why} ({count})' for why, count in use.dense.items()),
      )
      for path, use in self.items()
    ]
    names = ('parameter', 'state', 'factored', 'dense because of')
    return html.table('Explanation', names, rows)

  def to_json(self) -> dict[str, Any]:
    """Returns it as JSON data, by path."""
    return {
      paths.show(path): {
        'state': use.state,
        'factored': use.factored,
        'dense': dict(use.dense),
        **({'dtypes': list(use.dtypes)} if use.dtypes != ('float32',) else {}),
        **({'drops': True} if use.drops else {}),
        **({'raw': use.raw} if use.raw else {}),
      }
      for path, use in self.items()
    }


def explain(
  model: Callable[..., Any], params: Params, *args: Any, **kwargs: Any
) -> Explanation:
  """Returns which parameters `factored(model)` keeps factored in a call.

  Nothing is computed; the call is traced.

  Args:
    model: a module, or any function that takes params first.
    params: params with adapters.
    *args: further arguments of the call, arrays or `jax.ShapeDtypeStruct`s.
    **kwargs: further arguments of the call.

  Returns:
    How the call uses each parameter that an enabled adapter rewrites.

  Raises:
    AdapterError: if no adapter is attached.

  Example:
    print(surgery.explain(model, params, x))
  """
  expect.model(model, explain)
  is_tree = resolving.holds(params)
  if is_tree:
    model, params = resolving.of_params(model, params)
  params = adoption.adopted(expect.params(params, explain))
  records = live.records_of(params)
  if not records.adapters:
    raise errors.AdapterError('explain: no adapter is attached.')
  probe = Probe()
  probed = live.with_records(params, records.probed(probe))
  walk = walking.Walk()
  kept = transform.arguments(model, kwargs)
  reason = ''

  def call(given: Any) -> int:
    nonlocal reason
    leaves, tree = jax.tree.flatten(given)
    try:
      transform.walked(model, leaves, tree, walk, prune=is_tree)
    except transform.NotFollowed as found:
      if found.model_raised:
        # If it is the model's own error, it is raised here.
        model(*given[0], **given[1])
      reason = str(found.note)
    return 0

  # Only arrays are traced: a flag may decide what the model does.
  arrays, static = _split(((probed, *args), kept))
  jax.eval_shape(lambda arrays: call(_joined(arrays, static)), arrays)
  if is_tree and not reason:
    # All of a tree is asked for; what counts is what reaches a result.
    probe.asked &= walk.notes.keys()
  raw = _raw(model, params, args, kept)
  uses = {}
  for path, chain in records.chains.items():
    if not compute.enabled(chain):
      continue
    # A parameter that was asked for without a note lies in a call that the walk
    # did not enter.
    notes = collections.Counter(map(str, walk.notes.get(path, ())))
    if reason or (path in probe.asked and path not in walk.notes):
      notes[reason or 'a call that is not traced again'] += 1
    often = notes.pop(str(walking.KEPT), 0)
    uses[path] = Use(
      often,
      dict(notes),
      path in probe.asked,
      str(raw.get(path, '')),
      tuple(sorted(walk.dtypes.get(path, ()))) if often else (),
      _stored(params, path),
      any(dropping.drops(*link) for link in compute.enabled(chain)),
    )
  return Explanation(uses)


def _stored(params: Any, path: Path) -> str:
  """Returns the dtype of a stored parameter, where it is in these params."""
  return str(params[path].value.dtype) if path in params else ''


def _raw(
  model: Callable[..., Any],
  params: Any,
  args: Sequence[Any],
  kwargs: Mapping[str, Any],
) -> Mapping[Path, reads.RawRead]:
  """Returns where bases are used without their adapters."""
  records = live.records_of(params).probed(Probe(reads=True))
  probed = live.with_records(params, records)
  assert isinstance(probed, live.AdaptedParams)
  try:
    return reads.raw_reads(model, probed, args, kwargs)
  except transform.UNTRACEABLE:
    return {}  # The model needs values of params, so it cannot be traced.


def _split(tree: Any) -> tuple[list[Any], tuple[Any, list[Any]]]:
  """Returns the arrays among arguments, and the rest."""
  leaves, structure = jax.tree.flatten(tree)
  is_array = [hasattr(v, 'shape') and hasattr(v, 'dtype') for v in leaves]
  pairs = list(zip(leaves, is_array, strict=True))
  rest = [None if array else v for v, array in pairs]
  return [v for v, array in pairs if array], (structure, [is_array, rest])


def _joined(arrays: list[Any], static: tuple[Any, list[Any]]) -> Any:
  structure, (is_array, rest) = static
  given = iter(arrays)
  return jax.tree.unflatten(
    structure,
    [
      next(given) if array else v
      for v, array in zip(rest, is_array, strict=True)
    ],
  )
