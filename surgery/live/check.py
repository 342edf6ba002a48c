"""Check: whether a model asks for the parameters that adapters rewrite."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from surgery import errors, expect
from surgery.aliases import Params
from surgery.live import adoption, dropping, reads
from surgery.live import params as live
from surgery.model.records import Probe
from surgery.naming import paths
from surgery.naming.paths import Path


def check(
  model: Callable[..., Any], params: Params, *args: Any, **kwargs: Any
) -> tuple[Path, ...]:
  """Traces a call and raises if it uses a base without its adapter.

  No adapter can reach layers that read `params[path].value` themselves, so
  merged params would give another result. This names their parameters, even if
  another layer asks for the same one by `get_param`. Nothing is computed.

  Args:
    model: a module, or any function that takes params first.
    params: params with adapters.
    *args: further arguments of the call.
    **kwargs: further arguments of the call.

  Returns:
    The adapted parameters. All were asked for, and their bases reach results
    through their adapters only.

  Raises:
    UnreachedError: naming the parameters that were never asked for, or read
      as they are stored.
    AdapterError: if no adapter is attached.

  Warns:
    DropoutWarning: if an adapter has dropout and the call, which is in
      training, is not one of `surgery.factored(model)`: it drops nothing.
  """
  expect.model(model, check)
  params = adoption.adopted(expect.params(params, check))
  records = live.records_of(params)
  if not records.adapters:
    raise errors.AdapterError('check: no adapter is attached.')
  probe = Probe(reads=True)
  probed = live.with_records(params, records.probed(probe))
  assert isinstance(probed, live.AdaptedParams)
  raw = reads.raw_reads(model, probed, args, kwargs)
  if dropping.in_training(model, (params, *args), kwargs):
    for name in sorted(probe.dropless):
      dropping.warn(name, 'in training, as is_training says by default')
  adapted = tuple(dict.fromkeys((*records.chains, *records.standing)))
  missed = [p for p in adapted if p not in probe.asked]
  if missed:
    raise errors.UnreachedError(
      f'{len(missed)} of {len(adapted)} adapted parameters were never '
      f'asked for through get_param: {_listed(map(paths.show, missed))}. '
      'Either this call does not use them, or a layer reads params[…].value '
      'itself, which no adapter can change: let it call get_param.',
      missed,
    )
  if raw:
    named = (f'{paths.show(path)} ({read})' for path, read in raw.items())
    raise errors.UnreachedError(
      f'{len(raw)} of {len(adapted)} adapted parameters are read '
      f'without their adapter: {_listed(named)}. There the call uses '
      'params[…].value, which is the base alone, so merged params would give '
      'another result. Let it call get_param.',
      raw,
    )
  return adapted


def _listed(names: Iterable[str]) -> str:
  """Returns the first ten names, and the number of others."""
  first = list(names)
  more = f' and {len(first) - 10} more' if len(first) > 10 else ''
  return f'{", ".join(first[:10])}{more}'
