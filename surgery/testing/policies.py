"""The laws of freeze policies and of terms of selectors."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, ClassVar

import blox as bx

from surgery import errors
from surgery.contract.site import Site
from surgery.host.manager import Host
from surgery.live import checkpoints, saving, verbs
from surgery.live.applying import apply
from surgery.model.checkpoint import open_checkpoint
from surgery.naming import paths
from surgery.testing import suites
from surgery.testing.suites import Fault, law


class PolicyConformance(suites.Suite):
  """The laws of freeze policies; set `plugin`, `name` and `trains`.

  Attributes:
    plugin: the plugin: a module, a class or an object.
    name: name of the policy.
    trains: selector of what trains under it in the model of the suite.

  Example:
    class TestBitFit(PolicyConformance):
      plugin = my_package
      name = 'bitfit'
      trains = '**/bias'
  """

  trains: ClassVar[str | Iterable[str]]

  def model(self) -> bx.Params:
    """Returns the params of `Suite.model`, and keys and a counter in `rng`."""
    return suites.with_keys(super().model())

  def _asked(self, site: Site, policy: str, host: Host) -> Any:
    return host.ask('surgery_freeze_param', site=site, policy=policy)

  def _sites(self) -> list[Site]:
    host, params = self.host(), self.model()
    return suites.sites(suites.adapted(params, host), each=True)

  @law
  def test_it_answers_every_parameter(self) -> None:
    """A policy decides for each parameter whether it trains: True or False."""
    host = self.host()
    for site in self._sites():
      if self._asked(site, self.name, host) is None:
        raise Fault(
          f'{paths.show(site.path)}: it answers None, so the '
          'parameter would stay as it is without a word.'
        )

  @law
  def test_other_policies_are_somebody_elses(self) -> None:
    """A policy of another name is answered by None."""
    host = self.host()
    for other in (f'{self.name}x', f'x{self.name}', self.name.upper(), ''):
      for site in self._sites():
        if other != self.name and self._asked(site, other, host) is not None:
          raise Fault(
            f'the policy {other!r} is answered, too, so that its own plugin '
            'might not be asked.'
          )

  @law
  def test_an_answer_depends_on_the_parameter_alone(self) -> None:
    """Asked again, and in another order, a policy answers the same."""
    host, sites = self.host(), self._sites()
    first = [self._asked(site, self.name, host) for site in sites]
    again = [self._asked(site, self.name, host) for site in reversed(sites)]
    for site, one, two in zip(sites, first, reversed(again), strict=True):
      if one != two:
        raise Fault(f'{paths.show(site.path)}: first {one}, then {two}.')

  @law
  def test_what_is_declared_trains(self) -> None:
    """Under the policy `trains` trains, unless frozen before, and no more."""
    if not hasattr(self, 'trains'):
      raise errors.ConfigError('set `trains`, a selector of what trains.')
    host, params = self.host(), self.model()
    frozen = verbs.freeze(params, policy=self.name, host=host)
    meant = suites.chosen(suites.checkpoint(params), self.trains, host)
    for path, param in params.items():
      expected = param.trainable and path in meant
      if frozen[path].trainable != expected:
        raise Fault(
          f'{paths.show(path)}: expected trainable {expected}, found '
          f'{frozen[path].trainable}.'
        )

  @law
  def test_live_is_file(self) -> None:
    """Params and files get the same flags."""
    host, params = self.host(), self.model()
    frozen = verbs.freeze(params, policy=self.name, host=host)
    # As they are written, since a file holds the numbers of a key.
    live = checkpoints.to_tensors(suites.checkpoint(frozen))
    with suites.folder() as folder:
      saving.save(folder / 'm.msgpack', params)
      step = {'freeze': {'policy': self.name}}
      found = apply(open_checkpoint(folder / 'm.msgpack'), step, host=host)
      suites.same_leaves(live, found, 'params and file differ')


class TermConformance(suites.Suite):
  """The laws of terms of selectors; set `plugin`, `name` and `matches`.

  Attributes:
    plugin: the plugin: a module, a class or an object.
    name: the term as it is written in a selector, e.g. `larger:1000`.
    matches: selector, without terms, of the layers that it means in the model
      of the suite.
    refused: texts of the term that cannot be read, with a part of the message.

  Example:
    class TestLarger(TermConformance):
      plugin = my_package
      name = 'larger:1000'
      matches = 'net/large'
      refused = [('larger:x', 'expected a number')]
  """

  matches: ClassVar[str | Iterable[str]]
  refused: ClassVar[Iterable[tuple[str, str]]] = ()

  def model(self) -> bx.Params:
    """Returns the params of `Suite.model`, and keys and a counter in `rng`."""
    return suites.with_keys(super().model())

  def _asked(self, site: Site, term: str, host: Host) -> Any:
    return host.ask('surgery_match_layer', site=site, term=term)

  def _sites(self) -> list[Site]:
    return suites.sites(self.model(), each=False)

  def _all(self, term: str, host: Host) -> list[Any]:
    return [self._asked(site, term, host) for site in self._sites()]

  @law
  def test_it_selects_what_is_declared(self) -> None:
    """The term means `matches`, in params and in files alike."""
    if not hasattr(self, 'matches'):
      raise errors.ConfigError('set `matches`, a selector without terms.')
    host, params = self.host(), self.model()
    with suites.folder() as folder:
      saving.save(folder / 'm.msgpack', params)
      opened = open_checkpoint(folder / 'm.msgpack')
      for what, model in (
        ('params', suites.checkpoint(params)),
        ('a file', opened),
      ):
        expected = suites.chosen(model, self.matches, host)
        found = suites.chosen(model, self.name, host)
        if not expected or expected != found:
          raise Fault(
            f'of {what}: expected {_shown(expected)}, found {_shown(found)}.'
          )

  @law
  def test_it_answers_every_layer(self) -> None:
    """Its own term is answered by True or False for each layer."""
    host = self.host()
    for site in self._sites():
      if self._asked(site, self.name, host) is None:
        raise Fault(f'{paths.show(site.layer)}: it answers None.')

  @law
  def test_other_terms_are_somebody_elses(self) -> None:
    """The answer for a term of another name is None."""
    host, head = self.host(), self.name.partition(':')[0]
    rest = self.name[len(head) :]
    for other in (f'{head}x{rest}', f'x{head}{rest}', 'serves:lora', 'other:'):
      for site in self._sites():
        if self._asked(site, other, host) is not None:
          raise Fault(f'the term {other!r} is answered, too.')

  @law
  def test_an_answer_depends_on_the_layer_alone(self) -> None:
    """Asked again, and in another order, a term answers the same."""
    host, sites = self.host(), self._sites()
    first = [self._asked(site, self.name, host) for site in sites]
    again = [self._asked(site, self.name, host) for site in reversed(sites)]
    for site, one, two in zip(sites, first, reversed(again), strict=True):
      if one != two:
        raise Fault(f'{paths.show(site.layer)}: first {one}, then {two}.')

  @law
  def test_what_cannot_be_read_is_refused(self) -> None:
    """A term that is its own but makes no sense is an error that says why."""
    host = self.host()
    for text, wanted in self.refused:
      said = suites.refusal(functools.partial(self._all, text, host))
      if said is None or wanted not in str(said):
        raise Fault(f'{text!r}: expected {wanted!r}, found: {said}')


def _shown(found: Iterable[Any]) -> str:
  return ', '.join(map(paths.show, sorted(found))) or 'nothing'
