"""Attach, as recipes and the shell say it: types by name, files by alias."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery import errors
from surgery.adapting import attachment as attaching
from surgery.adapting.beneath import handles_adapters
from surgery.contract import config
from surgery.contract.adapter import Adapter
from surgery.host.manager import Host
from surgery.model.checkpoint import Checkpoint
from surgery.model.layers import LayerTypes
from surgery.naming import selectors
from surgery.naming.selection import Selection
from surgery.passes import extract


@handles_adapters
def attach(
  checkpoint: Checkpoint,
  adapter: str | Adapter | None = None,
  *,
  to: selectors.Text | Selection | None = None,
  set: Mapping[str, Any] | None = None,
  name: str | None = None,
  seed: int | None = None,
  stacked: int | Mapping[str, int] | None = None,
  layout: str | Mapping[str, str] | None = None,
  from_: Checkpoint | None = None,
  check_base: bool = True,
  check_same: bool = True,
  names: str | Sequence[str] | Mapping[str, str] | None = None,
  layer_types: LayerTypes | None = None,
  host: Host,
) -> Checkpoint:
  """Attaches a new adapter, or one that was written to a file of its own.

  Args:
    checkpoint: the model.
    adapter: the adapter's type, e.g. `lora`.
    to: the layers or parameters.
    set: options of the type, e.g. `{rank: 8}`; for some sites only under
      `'SELECTOR:rank'`, or as `patterns: {SELECTOR: {rank: 16}}`.
    name: the adapter's name; `default` by default.
    seed: from which its weights derive; 0 by default.
    stacked: number of axes stacked in front of parameters.
    layout: a letter an axis: `s` stacked, `i` input, `o` output.
    from_: attach the adapter of this input instead of a new one.
    check_base: whether the base must have the values and the adapters beneath
      that it was trained over.
    check_same: whether it is an error that the very same adapter is attached
      and enabled already.
    names: with from, for an adapter of another program: what its modules are
      called in this model, by name, as rules of `rename`, or by a map.
    layer_types: types of layers; by default those of the checkpoint.
    host: whose hooks are asked.

  Raises:
    UnknownAdapterType: if nothing offers the type.
    ConfigError: for a wrong option.
    SelectorError: if a selector matches nothing.
    AdapterError: if the same adapter is attached already.

  Example:
    attach: {adapter: lora, to: '**/{query,value}', set: {rank: 8}}
    attach: {from: tuned}
  """
  if (adapter is None) == (from_ is None):
    raise errors.ConfigError('give adapter, or from, and not both.')
  if from_ is not None:
    given = {
      'to': to,
      'set': set,
      'seed': seed,
      'stacked': stacked,
      'layout': layout,
    }
    for key, value in given.items():
      if value is not None:
        raise errors.ConfigError(
          f'{key} does not go with from: the file says it.'
        )
    return extract.insert(
      checkpoint,
      from_,
      name=name,
      check_base=check_base,
      check_same=check_same,
      names=names,
      host=host,
    )
  if names is not None:
    raise errors.ConfigError('attach: names goes with from.')
  if to is None:
    raise errors.ConfigError("give to, e.g. to: '**/query'.")
  if isinstance(adapter, str):
    adapter = _configured(adapter, set or {}, host)
  elif set is not None:
    raise errors.ConfigError('set goes with the name of a type.')
  assert adapter is not None
  return attaching.attach(
    checkpoint,
    adapter,
    to=to,
    name='default' if name is None else name,
    seed=0 if seed is None else seed,
    stacked=stacked,
    layout=layout,
    layer_types=layer_types,
    host=host,
  )


def _configured(kind: str, said: Mapping[str, Any], host: Host) -> Adapter:
  """Returns an adapter from options as data.

  Raises:
    UnknownAdapterType: if nothing offers the type.
    ConfigError: for an unknown option or a wrong value.
  """
  cls = host.adapter_type(kind)
  general: dict[str, Any] = {}
  patterns: dict[str, dict[str, Any]] = {}

  def put(selector: str, option: str, value: Any) -> None:
    options = patterns.setdefault(selector, {})
    if option in options:
      raise errors.ConfigError(f'set: {selector}:{option} is given twice.')
    options[option] = value

  for key, value in said.items():
    selector, _, option = key.rpartition(':')
    if key == 'patterns':
      if not isinstance(value, Mapping) or not all(
        isinstance(one, Mapping) for one in value.values()
      ):
        raise errors.ConfigError(
          f'patterns: expected {{SELECTOR: {{OPTION: VALUE}}}}, found '
          f'{value!r}.'
        )
      for where, some in value.items():
        # One without options stands for those of the type.
        patterns.setdefault(where, {})
        for name, one in some.items():
          put(where, name, one)
    elif selector:
      put(selector, option, value)
    else:
      general[key] = value
  return cls(
    **config.from_json(cls, general),
    patterns={s: config.from_json(cls, v) for s, v in patterns.items()},
  )
