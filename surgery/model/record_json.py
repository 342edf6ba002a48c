"""Records as JSON data, for the manifest, and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from surgery import errors
from surgery.contract import adapter as adapters
from surgery.contract.site import Site
from surgery.model import records
from surgery.naming import paths

if TYPE_CHECKING:
  from surgery.host.manager import Host


# The configuration of an adapter in another program's file.
FOREIGN = 'foreign'
# What no record holds, and the file of an adapter does: what it was trained on,
# and of how many adapters its weights are.
_KEPT = ('base', 'beneath', 'given', 'many')


def adapter_to_json(
  record: records.AdapterRecord,
  host: Host,
  known: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Returns one adapter as JSON data.

  Args:
    record: the adapter.
    host: knows the distribution that its type comes from.
    known: its JSON data in a file, from which is kept what records lack.
  """
  known = known or {}
  kept = {k: known[k] for k in _KEPT if k in known}
  if record.seed is not None:
    kept['seed'] = record.seed
  if record.pending is not None:
    kept['to'] = record.pending.selector.text
  elif record.to is not None:
    to = record.to
    kept['to'] = to if isinstance(to, str) else list(to)
  if record.foreign is not None:
    kept[FOREIGN] = json.loads(record.foreign)
  return {
    'name': record.name,
    'type': record.adapter.name,
    'distribution': host.distribution(record.adapter.name)
    or known.get('distribution', ''),
    'config': record.adapter.config(),
    **_version_to_json(record.adapter),
    'enabled': record.enabled,
    **kept,
    'sites': [
      {
        **r.site.to_json(),
        'weights': {name: spec.to_json() for name, spec in r.weights.items()},
        # Left out where no ranks were pruned, as older releases write it.
        **({} if r.drawn_rank is None else {'drawn_rank': r.drawn_rank}),
      }
      for r in record.sites.values()
    ],
    'shared': {n: spec.to_json() for n, spec in record.shared.items()},
    **_saved_to_json(record),
  }


def _version_to_json(adapter: adapters.Adapter) -> dict[str, Any]:
  # Left out for version 1, since older releases know no versions.
  return {} if adapter.version == 1 else {'version': adapter.version}


def _saved_to_json(record: records.AdapterRecord) -> dict[str, Any]:
  if not record.saved:
    return {}  # Left out where empty, since older releases do not know it.
  return {
    'saved': {paths.show(p): s.to_json() for p, s in record.saved.items()}
  }


def to_json(
  all_records: records.Records,
  host: Host,
  known: Iterable[Mapping[str, Any]] = (),
) -> tuple[dict[str, Any], ...]:
  """Returns all adapters as JSON data, innermost first."""
  by_name = {k['name']: k for k in known}
  return tuple(
    adapter_to_json(a, host, by_name.get(a.name)) for a in all_records.adapters
  )


def adapter_from_json(
  data: Mapping[str, Any], host: Host
) -> records.AdapterRecord:
  """Returns the adapter that `adapter_to_json` wrote.

  Raises:
    UnknownAdapterType: if its type is not installed.
    FormatError: if the data is malformed.
  """
  try:
    name, kind = data['name'], data['type']
  except (KeyError, TypeError):
    raise errors.FormatError(
      'manifest: an adapter without name or type.'
    ) from None
  try:
    cls = host.adapter_type(kind)
  except errors.UnknownAdapterType as error:
    came = data.get('distribution') or 'a distribution that was not recorded'
    raise errors.UnknownAdapterType(
      f'adapter {name!r} needs its type, which came from {came}. {error}'
    ) from None
  try:
    origin = host.distribution(kind) or ''
    with errors.within(f'adapter {name!r}'):
      config = adapters.current(
        cls, data['config'], data.get('version', 1), origin
      )
      adapter = cls.from_config(config)
    sites = (_site_from_json(entry, adapter, host) for entry in data['sites'])
    saved = _weights_from_json(data.get('saved', {}))
    to = data.get('to')
    return records.AdapterRecord(
      name,
      adapter,
      bool(data['enabled']),
      {record.site.path: record for record in sites},
      _weights_from_json(data['shared']),
      seed=data.get('seed'),
      saved={paths.parse(p): spec for p, spec in saved.items()},
      to=None if to is None else records.written(to),
      foreign=json.dumps(data[FOREIGN]) if FOREIGN in data else None,
    )
  except (LookupError, TypeError, ValueError, AttributeError) as error:
    if isinstance(error, errors.SurgeryError):
      raise
    raise errors.FormatError(
      f'manifest: adapter {name!r} is malformed: '
      f'{type(error).__name__}: {error}.'
    ) from None


def _site_from_json(
  entry: Mapping[str, Any], adapter: adapters.Adapter, host: Host
) -> records.SiteRecord:
  site = Site.from_json(entry)
  return records.SiteRecord(
    site,
    _weights_from_json(entry['weights']),
    # A file holds no code, so a plugin's interceptor is made again.
    host.ask('surgery_intercept_param', of=adapter, site=site),
    entry.get('drawn_rank'),
  )


def _weights_from_json(
  data: Mapping[str, Any],
) -> dict[str, records.WeightSpec]:
  return {n: records.WeightSpec.from_json(w) for n, w in data.items()}


def from_json(data: Iterable[Mapping[str, Any]], host: Host) -> records.Records:
  """Returns the adapters that `to_json` wrote."""
  return records.Records(adapter_from_json(d, host) for d in data)


def describe(data: Mapping[str, Any]) -> str:
  """Returns an adapter's JSON data in a few words, for people."""
  config = ', '.join(f'{k}={v}' for k, v in data.get('config', {}).items())
  sites = [
    paths.show((*paths.parse(s['layer']), s['params'][0]['name']))
    for s in data.get('sites', [])
  ]
  state = '' if data.get('enabled', True) else ', disabled'
  if data.get('beneath'):
    state += f', over {", ".join(one["name"] for one in data["beneath"])}'
  if data.get('saved'):
    state += f', with {", ".join(data["saved"])}'
  return f'{data["name"]}: {data["type"]}({config}) on {len(sites)}{state}'
