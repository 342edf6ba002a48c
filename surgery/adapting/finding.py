"""Finds sites: the parameters that a selector means and an adapter rewrites."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
  """The shape, dtype and sharding of a parameter.

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
    ConfigError: if a number is negative or not an integer.
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
    """Whether a layout is meant for matrices, and the parameter is none.

    A layout for all parameters, or for layers, is not meant for the vectors
    among these, the biases and norms, unless it names them.

    Args:
      path: the parameter.
      rank: number of its axes.
      stack: number of them that are stacked.
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
    """Returns the layout that is inferred for PyTorch's, if none is given."""
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
    name, rank = path[-1], len(info.shape)
    layout, stack = self._given(path, rank)
    if layout is None:
      layout = self._known(path, rank - (stack or 0))
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

  def _given(self, path: Path, rank: int) -> tuple[str | None, int | None]:
    """Returns the layout and the number of stacked axes that were given.

    Args:
      path: the parameter.
      rank: number of its axes.

    Returns:
      Letters without stacked axes; None for what was not given.
    """
    letters = self._letters(path)
    if letters is None and (one := self.taken(path)) is not None:
      letters = one.letters
    stack = self._stack(path)
    if letters is None:
      return None, stack
    layout = letters.lstrip('s')
    marked = len(letters) - len(layout)
    # Both layout= and stacked= may say how many axes are stacked.
    agreed = stack is None or marked in (0, stack)
    stack = marked if stack is None else stack
    if agreed and self._is_beside(path, rank, stack, layout):
      # A bias has as many stacked axes as its kernel, but not its letters.
      return None, min(stack, rank)
    return layout, stack

  def _stack(self, path: Path) -> int | None:
    """Returns the number of stacked axes that stacked= gives a parameter."""
    for selector, number in self.stacked:
      if selectors.parse(selector).matches(path, self.names(path[:-1])):
        return number
    return None

  def _known(self, path: Path, rank: int) -> str:
    """Returns the layout of a parameter by its layer's type, or by default."""
    known = self.types.get(path[:-1])
    if known is not None and path[-1] in known.layouts:
      return known.layouts[path[-1]]
    return default_layout(max(rank, 0))

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

    A parameter of the outputs' shape, such as a bias, has the roles of the
    outputs, unless a layout of as many letters was given for it.

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
    """Returns the primary parameters of a layer that was named as a whole."""
    first = self.adapter.rewrites[0]
    if first != 'kernel':
      return [first] if first in params else []
    usual = [n for n in DEFAULT_PARAMS if n in params]
    if usual:
      return usual
    # Layers of other programs name their matrices after what they do.
    return [
      n
      for n, info in params.items()
      if len(self.spec((*layer, n), info).shape) > 1
    ]

  def term(self, layers: Mapping[Path, Mapping[str, Info]]) -> Any:
    """Returns a function that answers a selector's terms by hooks."""

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
  """Raises if a layout or number of stacked axes matches no parameter.

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
    left: a list that gets the layers that are matched and yield no site; None
      where layers may still be incomplete, so that nothing is known of them.

  Returns:
    Sites, each with the indices of the selector's items that mean it.

  Raises:
    SelectorError: for an item that matches nothing.
    SiteError: for a named parameter or layer that cannot be served.
  """
  layers = by_layer(info)
  if isinstance(to, Selection):
    return _of_selection(finder, to, layers, left)
  match = selectors.resolve(
    to, info, finder.names, finder.term(layers), missing=missing
  )
  search = _Search(finder, to.positive, match, layers)
  search.run()
  if missing != 'pass':
    search.check_met(missing)
  if left is not None:
    left += search.unserved()
  return [(site, frozenset(ids)) for site, ids in search.found.values()]


class _Search:
  """The search for an adapter's sites among what a selector matches.

  Args:
    finder: knows adapter, types and layouts.
    items: the positive items of the selector.
    match: the parameters that they match.
    layers: all layers.

  Attributes:
    found: sites by path, each with the numbers of the items that mean it.
  """

  def __init__(
    self,
    finder: Finder,
    items: Sequence[selectors.Item],
    match: selectors.Match,
    layers: Mapping[Path, Mapping[str, Info]],
  ) -> None:
    self._finder = finder
    self._items = items
    self._match = match
    self._layers = layers
    self._term = finder.term(layers)
    self.found: dict[Path, tuple[Site, set[int]]] = {}
    # Why parameters cannot be served, and layers that were named as a whole.
    self._reasons: dict[Path, str] = {}
    self._refused: dict[Path, str] = {}
    self._defaults = {
      layer: finder.defaults(layer, params)
      for layer, params in layers.items()
      if any((*layer, n) in match.levels for n in params)
    }

  def run(self) -> None:
    """Finds the sites.

    Raises:
      SiteError: for a parameter that is written out and cannot be served.
    """
    for index, item in enumerate(self._items):
      for path in self._match.by_item[item]:
        layer, name = path[:-1], path[-1]
        at_layer = item.layer(layer, self._finder.names, self._term)
        # A layer means its default parameters, `all` whatever can be served,
        # and a parameter that is matched itself that one.
        usual = name in self._defaults[layer]
        if usual or not at_layer or item.kind == selectors.ALL:
          self._look(index, path, at_layer)

  def _look(self, index: int, path: Path, at_layer: bool) -> None:
    """Adds a site if it can be served, or notes why it cannot be.

    Args:
      index: number of the item that matches it.
      path: its primary parameter.
      at_layer: whether the item matches the layer rather than the parameter.
    """
    if path in self.found:
      self.found[path][1].add(index)
      return
    layer, name = path[:-1], path[-1]
    usual = name in self._defaults[layer]
    site = self._finder.site(layer, name, self._layers[layer], usual)
    why = self._finder.unserved(site)
    if why is None:
      self.found[path] = (site, {index})
      return
    self._reasons.setdefault(path, f'{paths.show(path)}: {why}')
    if at_layer:
      self._refused.setdefault(layer, f'{name}: {why}')
    elif self._items[index].literal:
      raise errors.SiteError(
        f"{paths.show(path)}: adapter type '{self._finder.adapter.name}' "
        f'cannot serve it: {why}.'
      )

  def check_met(self, missing: str) -> None:
    """Raises if an item, or an alternative of one, yields no site.

    Args:
      missing: `'sites'` lets those pass that match nothing at all.

    Raises:
      SurgeryError: naming the item.
    """
    sites_of: dict[int, list[Path]] = {}
    for path, (_, indices) in self.found.items():
      for index in indices:
        sites_of.setdefault(index, []).append(path)
    for index, item in enumerate(self._items):
      matched = self._match.by_item[item]
      lacking = {repr(item.written): matched}
      if index in sites_of:
        lacking = {
          f'{item.written!r}: its alternative {choice.text!r}': tuple(
            path for path in matched if choice.meets(path)
          )
          for choice in selectors.unmet(item.choices, sites_of[index])
        }
      for what, there in lacking.items():
        if there or missing != 'sites':
          reason = _reason(self._reasons, there)
          raise _no_site(self._finder, what, there, reason)

  def unserved(self) -> list[Refused]:
    """Returns the layers that are matched and yield no site.

    Raises:
      SiteError: for a layer that is named, in a list or in braces.
    """
    left = []
    for item in self._items:
      for one in _unserved(
        self._finder, item, self._match, self.found, self._refused, self._layers
      ):
        if one.how == 'name':
          raise errors.SiteError(
            f'{paths.show(one.layer)}: selector {item.written!r} names this '
            f"layer, and adapter type '{self._finder.adapter.name}' cannot "
            f'serve it: {one.reason}. Leave it out of the selector, or add '
            f'{"!" + paths.literal(one.layer)!r}.'
          )
        left.append(one)
    return left


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

  A layer that holds others counts as served if one of these is. Layers beneath
  the one that was named are not yielded: who names an encoder does not ask for
  an adapter on each norm in it.

  Args:
    finder: knows the adapter.
    item: the item.
    match: what the selector means.
    found: paths of the sites.
    refused: why layers were refused that have a parameter to rewrite.
    layers: all layers.
  """
  if item.kind == selectors.ALL:
    return  # `all` means all that can be served, so nothing is left out.
  served = {path[:n] for path in found for n in range(len(path))}
  met = dict.fromkeys(path[:-1] for path in match.by_item[item])
  places = dict.fromkeys(
    layer[:n] for layer in met for n in range(1, len(layer) + 1)
  )
  term = finder.term(layers)
  for place in [place for place in places if place not in served]:
    how = selectors.naming(item, place, finder.names, term)
    # A level above layers is one only where it is written out.
    if how and (place in layers or how == 'name'):
      why = _lacks(finder, layers.get(place, ()))
      yield Refused(place, refused.get(place, why), how)


def _lacks(finder: Finder, names: Iterable[str]) -> str:
  """Returns why a layer of these parameters has no default site."""
  first, shown = finder.adapter.rewrites[0], ', '.join(names)
  if not shown:
    return 'nothing beneath it can be served'
  return f'it has no {first!r}, which the type rewrites, only {shown}'


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
      f"selector {what}: a '!' item takes out all that it matches."
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
