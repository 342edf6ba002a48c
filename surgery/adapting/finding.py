"""Finding sites: from a selector to the parameters that an adapter rewrites."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from surgery import errors
from surgery.contract.adapter import DEFAULT_PARAMS, Adapter, unserved
from surgery.contract.site import ParamSpec, Site, default_layout
from surgery.host import foreign
from surgery.host.manager import Host
from surgery.model.layers import LayerTypes
from surgery.model.layouts import Layout
from surgery.naming import paths, selectors
from surgery.naming.paths import Path
from surgery.naming.selection import Selection

# By selector, for some parameters; or for all of them.
Layouts = str | Mapping[str, str] | None
Stacked = int | Mapping[str, int] | None


@dataclasses.dataclass(frozen=True)
class Info:
  """What finding needs to know of a parameter.

  Attributes:
    shape: its whole shape.
    dtype: name of its dtype.
    sharding: mesh axis names of its axes, or empty.
  """

  shape: tuple[int, ...]
  dtype: str
  sharding: tuple[Any, ...] = ()


def layout_pairs(layout: Layouts) -> tuple[tuple[str, str], ...]:
  """Returns layouts as pairs of selector and letters, checked.

  Raises:
    ConfigError: if letters other than `i`, `o` and leading `s` are used.
  """
  pairs = {'all': layout} if isinstance(layout, str) else dict(layout or {})
  for selector, letters in pairs.items():
    core = letters.lstrip('s')
    if not core or set(core) - set('io'):
      raise errors.ConfigError(
        f'layout for {selector!r}: expected a letter an axis, s (stacked, in '
        f"front), i (input) or o (output), e.g. 'sio', found {letters!r}."
      )
    selectors.parse(selector)
  return tuple(pairs.items())


def stacked_pairs(stacked: Stacked) -> tuple[tuple[str, int], ...]:
  """Returns numbers of stacked axes as pairs with selectors, checked.

  Raises:
    ConfigError: if a number is negative or no integer.
  """
  pairs = {'all': stacked} if isinstance(stacked, int) else dict(stacked or {})
  for selector, number in pairs.items():
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
      raise errors.ConfigError(
        f'stacked for {selector!r}: expected a number of axes >= 0, found '
        f'{number!r}.'
      )
    selectors.parse(selector)
  return tuple(pairs.items())


@dataclasses.dataclass(frozen=True)
class Finder:
  """Finds the sites of one adapter.

  Attributes:
    adapter: the adapter.
    host: whose hooks are asked.
    types: types of layers, where they are known.
    layouts: layouts by selector.
    stacked: numbers of stacked axes by selector.
    detected: layouts of a checkpoint that PyTorch wrote.
  """

  adapter: Adapter
  host: Host
  types: LayerTypes
  layouts: tuple[tuple[str, str], ...] = ()
  stacked: tuple[tuple[str, int], ...] = ()
  detected: Mapping[Path, Layout] = dataclasses.field(default_factory=dict)

  def names(self, layer: Path) -> tuple[str, ...]:
    """Returns names of a layer's class and bases, if known."""
    known = self.types.get(layer)
    return known.names if known else ()

  def _letters(self, path: Path) -> str | None:
    """Returns the layout that was given for a parameter."""
    for selector, letters in self.layouts:
      if selectors.parse(selector).matches(path, self.names(path[:-1])):
        return letters
    return None

  def _is_beside(self, path: Path, rank: int, stack: int, letters: str) -> bool:
    """Whether a layout is meant for the matrices beside a parameter.

    One that is given for all, or for layers, says nothing of the vectors among
    these, the biases and norms, unless it names them.

    Args:
      path: the parameter.
      rank: how many axes it has.
      stack: how many of them are stacked.
      letters: the layout without these.
    """
    if rank - stack > 1 or len(letters) <= rank - stack:
      return False
    given = (
      item
      for selector, _ in self.layouts
      for item in selectors.parse(selector).positive
    )
    return not any(selectors.naming(item, path) == 'name' for item in given)

  def taken(self, path: Path) -> Layout | None:
    """Returns the layout that is taken for PyTorch's, if nobody says one."""
    known = self.types.get(path[:-1])
    if known is not None and path[-1] in known.layouts:
      return None
    for selector, _ in (*self.layouts, *self.stacked):
      if selectors.parse(selector).matches(path, self.names(path[:-1])):
        return None
    return self.detected.get(path)

  def spec(self, path: Path, info: Info) -> ParamSpec:
    """Returns what is known of a parameter, with roles of its axes.

    Raises:
      SiteError: if a layout or number of stacked axes does not fit its rank.
    """
    layer, name = path[:-1], path[-1]
    rank, stack = len(info.shape), None
    layout = self._letters(path)
    if layout is None and (one := self.taken(path)) is not None:
      layout = one.letters
    given = 0
    if layout is not None:
      given = stack = len(layout) - len(layout.lstrip('s'))
      layout = layout.lstrip('s')
    for selector, number in self.stacked:
      if selectors.parse(selector).matches(path, self.names(layer)):
        stack = number
        break
    agreed = given in (0, stack)  # Both may say what is stacked.
    if layout and agreed and self._is_beside(path, rank, stack or 0, layout):
      layout, stack = None, min(stack or 0, rank)
    known = self.types.get(layer)
    if layout is None and known is not None and name in known.layouts:
      layout = known.layouts[name]
    if layout is None:
      layout = default_layout(max(rank - (stack or 0), 0))
    extra = rank - len(layout)
    if extra < 0 or (stack is not None and extra != stack):
      raise errors.SiteError(
        f'{paths.show(path)}: shape {info.shape} does not fit the layout '
        f'{layout!r} with {stack or 0} stacked axes. Give it a layout of its '
        f'own, a letter an axis, e.g. layout={{{paths.literal(path)!r}: '
        f'{default_layout(rank)!r}}}, or the right stacked=.'
      )
    sharding = info.sharding if len(info.sharding) == rank else ()
    return ParamSpec(
      name, info.shape[extra:], info.dtype, layout, tuple(sharding[extra:])
    )

  def site(
    self, layer: Path, name: str, params: Mapping[str, Info], extras: bool
  ) -> Site:
    """Returns the site whose primary parameter is `name`.

    Args:
      layer: path of the layer.
      name: the primary parameter.
      params: the layer's parameters.
      extras: whether the others in `rewrites` belong to it.
    """
    primary = self.spec((*layer, name), params[name])
    others = self.adapter.rewrites[1:] if extras else ()
    beside = [
      self._beside((*layer, n), params[n], primary, params[name])
      for n in others
      if n in params and n != name
    ]
    return Site(layer, (primary, *beside), self.names(layer))

  def _beside(
    self, path: Path, info: Info, primary: ParamSpec, whole: Info
  ) -> ParamSpec:
    """Returns what is known of a parameter beside a site's primary one.

    One that is shaped as the outputs are, such as a bias, has their roles,
    unless a layout of as many letters was given for it.

    Args:
      path: the parameter.
      info: its shape.
      primary: the primary parameter.
      whole: that one's shape.

    Raises:
      SiteError: if not the same axes are stacked in front of both.
    """
    stack = whole.shape[: len(whole.shape) - len(primary.shape)]
    letters = self._letters(path)
    given = letters is not None and len(letters) == len(info.shape)
    if info.shape == stack + primary.out_shape and not given:
      roles = 'o' * len(primary.out_shape)
      sharding = tuple(info.sharding[len(stack) :])
      return ParamSpec(path[-1], primary.out_shape, info.dtype, roles, sharding)
    spec = self.spec(path, info)
    front = info.shape[: len(info.shape) - len(spec.shape)]
    if front != stack:
      raise errors.SiteError(
        f'{paths.show(path)}: its stacked axes are {front}, those of '
        f"{primary.name!r} are {stack}, and adapter type '{self.adapter.name}' "
        'rewrites both together. Give the right stacked= or layout= for each.'
      )
    return spec

  def unserved(self, site: Site) -> str | None:
    """Asks hooks, the adapter's first, why it cannot serve a site.

    Returns:
      The reason, without a full stop; None if it is served.

    Raises:
      PluginError: if the type fails, naming the site and the distribution.
    """
    term = f'serves:{self.adapter.name}'
    with errors.within(paths.show(site.path)):
      served = self.host.ask(
        'surgery_match_layer', of=self.adapter, site=site, term=term
      )
      if served:
        return None
      # The hook says that, not why.
      with foreign.printing():
        return unserved(self.adapter, site) or 'a plugin refused it'

  def defaults(self, layer: Path, params: Mapping[str, Info]) -> list[str]:
    """Returns the primary parameters that the layer's name stands for."""
    first = self.adapter.rewrites[0]
    if first != 'kernel':
      return [first] if first in params else []
    usual = [n for n in DEFAULT_PARAMS if n in params]
    if usual:
      return usual
    return [
      n
      for n, info in params.items()
      if len(self.spec((*layer, n), info).shape) > 1
    ]

  def term(self, layers: Mapping[Path, Mapping[str, Info]]) -> Any:
    """Returns a function that asks hooks for a selector's terms."""

    def ask(text: str, layer: Path) -> bool:
      params = layers.get(layer)
      if not params:
        return False
      specs = tuple(self.spec((*layer, n), i) for n, i in params.items())
      site = Site(layer, specs, self.names(layer))
      return bool(
        self.host.ask(
          'surgery_match_layer', of=self.adapter, site=site, term=text
        )
      )

    return ask


def check_axes(finder: Finder, info: Iterable[Path]) -> None:
  """Raises if a layout or number of stacked axes is for no parameter.

  Raises:
    SelectorError: naming the selector, and the nearest paths or the selector
      that decides before it.
  """
  universe = {path: finder.names(path[:-1]) for path in info}
  for what, pairs in (('layout', finder.layouts), ('stacked', finder.stacked)):
    if universe:
      selectors.check_deciding([text for text, _ in pairs], universe, what)


def by_layer(info: Mapping[Path, Info]) -> dict[Path, dict[str, Info]]:
  """Returns parameters by layer and name."""
  layers: dict[Path, dict[str, Info]] = {}
  for path, one in info.items():
    layers.setdefault(path[:-1], {})[path[-1]] = one
  return layers


def sites(
  finder: Finder,
  to: selectors.Selector | Selection,
  info: Mapping[Path, Info],
  *,
  missing: str = 'error',
  left: list[Refused] | None = None,
) -> list[tuple[Site, frozenset[int]]]:
  """Finds the sites that a selector means.

  A layer means its default sites, `all` every site that the adapter can
  serve, a parameter that site.

  Args:
    finder: knows adapter, types and layouts.
    to: the selector, or a selection of parameters.
    info: all parameters that may be rewritten.
    missing: `'error'` raises for an item, or an alternative of one, that
      yields no site; `'sites'` for one that matches something and yields no
      site; `'pass'` for none.
    left: is told of the layers that are matched and yield no site; None where
      layers may be incomplete as yet, so that nothing can be said of them.

  Returns:
    Sites, each with the indices of the selector's items that mean it.

  Raises:
    SelectorError: for an item that matches nothing.
    SiteError: for a named parameter or layer that cannot be served.
  """
  layers = by_layer(info)
  if isinstance(to, Selection):
    return _of_selection(finder, to, layers, left)
  types = finder.names
  match = selectors.resolve(
    to, info, types, finder.term(layers), missing=missing
  )
  items = list(to.positive)
  found: dict[Path, tuple[Site, set[int]]] = {}
  reasons: dict[Path, str] = {}
  refused: dict[Path, str] = {}
  defaults = {
    layer: finder.defaults(layer, params)
    for layer, params in layers.items()
    if any((*layer, n) in match.levels for n in params)
  }
  for index, item in enumerate(items):
    for path in match.by_item[item]:
      layer, name = path[:-1], path[-1]
      at_layer = item.layer(layer, types, finder.term(layers))
      usual = name in defaults[layer]
      if at_layer and item.kind != selectors.ALL and not usual:
        continue
      if path in found:
        found[path][1].add(index)
        continue
      site = finder.site(layer, name, layers[layer], usual)
      why = finder.unserved(site)
      if why is not None:
        reasons.setdefault(path, f'{paths.show(path)}: {why}')
        if at_layer:
          refused.setdefault(layer, f'{name}: {why}')
        if not at_layer and item.literal:
          raise errors.SiteError(
            f"{paths.show(path)}: adapter type '{finder.adapter.name}' cannot "
            f'serve it: {why}.'
          )
        continue
      found[path] = (site, {index})
  if missing != 'pass':
    met = set().union(*(ids for _, ids in found.values()))
    for index, item in enumerate(items):
      if index not in met:
        met_by = match.by_item[item]
        if not met_by and missing == 'sites':
          continue
        what = repr(item.written)
        raise _no_site(finder, what, met_by, _reason(reasons, met_by))
      if not item.choices:
        continue
      sites_of = [path for path, (_, ids) in found.items() if index in ids]
      for choice in selectors.unmet(item.choices, sites_of):
        there = [p for p in match.by_item[item] if choice.meets(p)]
        if not there and missing == 'sites':
          continue
        what = f'{item.written!r}: its alternative {choice.text!r}'
        raise _no_site(finder, what, there, _reason(reasons, there))
  if left is None:
    return [(site, frozenset(ids)) for site, ids in found.values()]
  for item in items:
    for one in _unserved(finder, item, match, found, refused, layers):
      if one.how == 'name':
        raise errors.SiteError(
          f'{paths.show(one.layer)}: selector {item.written!r} names this '
          f"layer, and adapter type '{finder.adapter.name}' cannot serve it: "
          f'{one.reason}. Leave it out of the selector, or add '
          f'{"!" + paths.literal(one.layer)!r}.'
        )
      left.append(one)
  return [(site, frozenset(ids)) for site, ids in found.values()]


@dataclasses.dataclass(frozen=True)
class Refused:
  """A layer that a selector matches and that yields no site.

  Attributes:
    layer: its path.
    reason: why, without a full stop.
    how: how the selector names it, see `selectors.naming`.
  """

  layer: Path
  reason: str
  how: str


def _unserved(
  finder: Finder,
  item: selectors.Item,
  match: selectors.Match,
  found: Iterable[Path],
  refused: Mapping[Path, str],
  layers: Mapping[Path, Mapping[str, Info]],
) -> Iterator[Refused]:
  """Yields the layers that an item matches and that yield no site.

  One that others lie in is served if one of these is. A layer beneath the one
  that was named is nobody's wish: a norm in an encoder.

  Args:
    finder: knows the adapter.
    item: the item.
    match: what the selector means.
    found: paths of the sites.
    refused: why layers were refused that have a parameter to rewrite.
    layers: all layers.
  """
  if item.kind == selectors.ALL:
    return  # It means what can be served.
  served = {path[:n] for path in found for n in range(len(path))}
  met = dict.fromkeys(path[:-1] for path in match.by_item[item])
  places = dict.fromkeys(
    layer[:n] for layer in met for n in range(1, len(layer) + 1)
  )
  term = finder.term(layers)
  for place in places:
    if place in served:
      continue
    how = selectors.naming(item, place, finder.names, term)
    if not how or (place not in layers and how != 'name'):
      continue
    first = finder.adapter.rewrites[0]
    names = ', '.join(layers.get(place, ()))
    lacks = f'it has no {first!r}, which the type rewrites, only {names}'
    why = lacks if names else 'nothing beneath it can be served'
    yield Refused(place, refused.get(place, why), how)


def _of_selection(
  finder: Finder,
  chosen: Selection,
  layers: Mapping[Path, Mapping[str, Info]],
  left: list[Refused] | None,
) -> list[tuple[Site, frozenset[int]]]:
  """The default sites among the parameters of a selection."""
  found = []
  for layer, params in layers.items():
    for name in finder.defaults(layer, params):
      if (*layer, name) in chosen or layer in chosen:
        site = finder.site(layer, name, params, True)
        why = finder.unserved(site)
        if why is None:
          found.append((site, frozenset({0})))
        elif left is not None:
          left.append(Refused(layer, why, 'part'))
  if not found:
    raise errors.SelectorError(
      f"adapter type '{finder.adapter.name}' can serve none of the "
      f'{len(chosen)} selected parameters by default. Name parameters by a '
      'selector.'
    )
  return found


def _reason(reasons: Mapping[Path, str], met: Iterable[Path]) -> str | None:
  """Returns why the first of some parameters cannot be served, if so."""
  return next((reasons[p] for p in met if p in reasons), None)


def _no_site(
  finder: Finder, what: str, met: Iterable[Path], reason: str | None
) -> errors.SurgeryError:
  """Returns the error for what an adapter cannot serve.

  Args:
    finder: knows the adapter.
    what: an item of a selector, or an alternative of one.
    met: the parameters that it matches, but for those taken out again.
    reason: why the type does not serve the first of them, if it was asked.
  """
  met = list(met)
  kind = finder.adapter.name
  if not met:
    return errors.SelectorError(
      f"selector {what}: all that it matches is taken out again by a '!' item."
    )
  shown = ', '.join(paths.literal(p) for p in met[:5])
  if reason:
    return errors.SiteError(
      f"selector {what}: adapter type '{kind}' can serve nothing that it "
      f'matches. {reason}.'
    )
  return errors.SelectorError(
    f'selector {what}: it matches {len(met)} parameters, none of '
    f"which is a default site of adapter type '{kind}' "
    f'({finder.adapter.rewrites[0]}). Name one of them: {shown}.'
  )
