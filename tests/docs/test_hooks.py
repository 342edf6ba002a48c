"""The reference of plugins is whole: nothing undocumented gets past it."""

import dataclasses
import re

import pytest

import surgery
from docs.tools import hooks as page
from surgery.contract import hookspecs

PAGE = page.markdown()

# What a plugin's author writes or is given, by its public name.
CONTRACT = [
  'Adapter', 'Host', 'LowRank', 'ParamSpec', 'PluginWarning', 'Refusal', 'Site',
  'default_host', 'field', 'hookimpl', 'named_key',
]  # fmt: skip


def section(title, level=3):
  """Returns what the page says under a heading."""
  mark = '#' * level
  [text] = re.findall(
    rf'^{mark} {re.escape(title)}\b(.*?)(?=^#{{1,{level}}} |\Z)',
    PAGE,
    re.MULTILINE | re.DOTALL,
  )
  return text


@pytest.mark.parametrize('name', CONTRACT)
def test_all_that_is_public_of_a_class_is_on_the_page(name):
  said, it = section(f'surgery.{name}'), getattr(surgery, name)
  if not isinstance(it, type) or issubclass(it, Warning):
    return
  for member in dir(it):
    if not member.startswith('_'):
      entry = rf'^(#### {member}\(|\* `{member}`: |  {member}: )'
      assert re.search(entry, said, re.MULTILINE), member
  for field in dataclasses.fields(it) if dataclasses.is_dataclass(it) else ():
    assert re.search(rf'^  {field.name}: ', said, re.MULTILINE), field.name


def test_every_hook_is_on_the_page_with_all_that_it_must_say():
  hooks = [name for name in vars(hookspecs) if name.startswith('surgery_')]
  assert tuple(hooks) == page.hooks()
  for name in hooks:
    said = section(name)
    for label in ('Called', 'Order', 'Return', 'May raise', 'Since'):
      assert re.search(rf'^\* \*\*{label}\*\*: \S', said, re.MULTILINE)


def test_ranges_of_options_are_on_the_page():
  assert 'surgery.field(*, default, gt, ge, lt, le, doc)' in PAGE


def test_what_is_not_documented_is_an_error(monkeypatch):
  def surgery_bare(site):
    pass

  def surgery_curt(site):
    """Says little.

    Called: now and then.
    """

  for hook, message in (
    (surgery_bare, 'surgery_bare: it has no docstring'),
    (surgery_curt, "surgery_curt: its docstring must say ['Order', 'Return'"),
  ):
    with monkeypatch.context() as patched:
      patched.setattr(hookspecs, hook.__name__, hook, raising=False)
      with pytest.raises(ValueError, match=re.escape(message)):
        page.markdown()
  monkeypatch.setattr(surgery.Adapter, 'bare', lambda self: 3, raising=False)
  with pytest.raises(ValueError, match='bare: it has no docstring'):
    page.markdown()
  monkeypatch.setattr(surgery.Adapter, 'bare', 3)
  with pytest.raises(ValueError, match='does not say what it is'):
    page.markdown()
