"""The suites of hook plugins: broken plugins, each caught by its law."""

import hashlib
import pathlib
import pickle
import subprocess
import sys
import textwrap
from typing import Any, ClassVar

import numpy as np
import pytest

import surgery
from surgery import testing
from surgery.files import plugin as files


def suite(of, plugin, **said):
  return type('Mine', (of,), {'plugin': plugin, **said})


# Passes. The right one doubles kernels.


def double(
  checkpoint: surgery.Checkpoint,
  select: str,
  by: float = 2.0,
  *,
  host: surgery.Host,
) -> surgery.Checkpoint:
  """Multiplies tensors."""
  if by == 0:
    raise surgery.SurgeryError('double: by may not be 0.')
  leaves = dict(checkpoint)
  for path in surgery.select(checkpoint, select, host=host):
    leaves[path] = times(leaves[path], by)
  return checkpoint.replace(leaves=leaves)


def times(leaf, by):
  def load():
    return (np.asarray(leaf.load()) * by).astype(leaf.dtype)

  def part(index):
    return (np.asarray(leaf.part(index)) * by).astype(leaf.dtype)

  return leaf.replace(load=load, part=None if leaf.part is None else part)


class Plugin:
  """Offers some function as the pass `double`."""

  def __init__(self, function):
    self.function = function

  @surgery.hookimpl
  def surgery_passes(self):
    return {'double': self.function}


class Right(testing.PassConformance):
  plugin: ClassVar[Any] = Plugin(double)
  name = 'double'
  options: ClassVar[Any] = {'select': '**/kernel', 'by': 2.0}
  refused: ClassVar[Any] = [
    ({'select': '**', 'by': 0.0}, 'may not be 0'),
    ({}, "'select' must be given"),
  ]
  adapters = 'refuse'


def changed(how):
  """Returns the right pass with what it makes changed once more."""

  def function(checkpoint, select, by=2.0, *, host):
    return how(checkpoint, double(checkpoint, select, by, host=host))

  function.__doc__ = double.__doc__
  return function


def nothing(before, after):
  return before


def eager(before, after):
  for leaf in before.values():
    leaf.load()
  return after


def by_block(before, after):
  """Divides by the largest value of what it happens to see."""
  leaves = dict(after)
  for path, leaf in before.items():
    if path[-1] == 'kernel':

      def load(leaf=leaf):
        value = np.asarray(leaf.load())
        return value / np.abs(value).max()

      def part(index, leaf=leaf):
        value = np.asarray(leaf.part(index))
        return value / np.abs(value).max()

      leaves[path] = leaf.replace(
        load=load, part=None if leaf.part is None else part
      )
  return after.replace(leaves=leaves)


def only_of_files(before, after):
  """Does something else where a tensor comes from a file."""
  leaves = {
    path: leaf.replace(metadata={'from': 'a file'})
    if before[path].source is not None
    else leaf
    for path, leaf in after.items()
  }
  return after.replace(leaves=leaves)


COUNT = [0]


def moody(before, after):
  COUNT[0] += 1
  leaves = {
    path: leaf.replace(metadata={'count': COUNT[0]})
    if path[-1] == 'kernel'
    else leaf
    for path, leaf in after.items()
  }
  return after.replace(leaves=leaves)


def another_dtype(before, after):
  leaves = {
    path: leaf.replace(dtype='float64') if path[-1] == 'kernel' else leaf
    for path, leaf in after.items()
  }
  return after.replace(leaves=leaves)


def everywhere(before, after):
  leaves = dict(after)
  path = ('net', 'norm', 'scale')
  leaves[path] = times(before[path], 3)
  return after.replace(leaves=leaves)


def thawed(before, after):
  leaves = {p: leaf.replace(trainable=True) for p, leaf in after.items()}
  return after.replace(leaves=leaves)


def bare(before, after):
  return surgery.Checkpoint(dict(after))


def in_place(before, after):
  leaves = dict(after)
  for path, leaf in before.items():
    if path[-1] == 'kernel':

      def load(leaf=leaf):
        value = np.asarray(leaf.load())
        if value.flags.writeable:
          value *= 2
          return value
        return (value * 2).astype(value.dtype)

      leaves[path] = leaf.replace(load=load)
  return after.replace(leaves=leaves)


def at_random(before, after):
  numbers = np.random.default_rng()
  leaves = dict(after)
  for path, leaf in before.items():
    if path[-1] == 'kernel':
      leaves[path] = times(leaf, 1 + numbers.random())
  return after.replace(leaves=leaves)


@surgery.handles_adapters
def knows_adapters(checkpoint, select, by=2.0, *, host):
  """Says that it knows adapters, and does not."""
  return double(checkpoint, '**/{first,second,large}/kernel', by, host=host)


def takes_all(checkpoint, select, by=2.0, *, host):
  """Refuses nothing."""
  return double(checkpoint, select, by or 1.0, host=host)


def fails(checkpoint, select, by=2.0, *, host):
  """Fails in an unforeseen way where it should refuse."""
  _ = 1 / by
  return double(checkpoint, select, by, host=host)


# Laws that take no time, so that all broken passes are looked at by them.
QUICK = {'it_does_something', 'nothing_else_changes', 'what_is_refused'}

PASSES: dict[str, tuple[Any, set[str]]] = {
  'nothing': (changed(nothing), {'it_does_something'}),
  'eager': (changed(eager), {'planning_reads_nothing'}),
  'by block': (changed(by_block), {'blocks_give_the_whole', 'live_is_file'}),
  'only of files': (changed(only_of_files), {'live_is_file'}),
  'moody': (
    changed(moody),
    {'live_is_file', 'the_plan_is_what_is_done', 'the_same_bytes_again'},
  ),
  'another dtype': (
    changed(another_dtype),
    {
      'blocks_give_the_whole',
      'live_is_file',
      'the_plan_is_what_is_done',
      'what_the_caller_holds_stays',
      'the_same_bytes_again',
    },
  ),
  'everywhere': (changed(everywhere), {'nothing_else_changes'}),
  'thawed': (changed(thawed), {'nothing_else_changes'}),
  'bare': (
    changed(bare),
    {'nothing_else_changes', 'adapters_follow_or_refuse'},
  ),
  'in place': (changed(in_place), {'what_the_caller_holds_stays'}),
  'at random': (
    changed(at_random),
    {'the_same_bytes_again', 'live_is_file'},
  ),
  'knows adapters': (knows_adapters, {'adapters_follow_or_refuse'}),
  'takes all': (takes_all, {'what_is_refused'}),
  'fails': (fails, {'what_is_refused'}),
}


# Formats. The right one is that of the library, under another suffix.


class Copied:
  """flax msgpack, named `.copied`, and what `before` makes worse of it."""

  suffixes = ('.copied',)

  def open(self, path):
    return files.Msgpack().open(path)

  def write(self, checkpoint, path, *, overwrite=False):
    files.Msgpack().write(checkpoint, path, overwrite=overwrite)

  @surgery.hookimpl
  def surgery_formats(self):
    return {'copied': self}


class LosesFlags(Copied):
  def write(self, checkpoint, path, *, overwrite=False):
    leaves = {p: leaf.replace(trainable=True) for p, leaf in checkpoint.items()}
    super().write(checkpoint.replace(leaves=leaves), path, overwrite=overwrite)


class Dated(Copied):
  """Writes something else each time."""

  def write(self, checkpoint, path, *, overwrite=False):
    COUNT[0] += 1
    said = {**checkpoint.manifest.extra, 'count': COUNT[0]}
    checkpoint = checkpoint.replace(
      manifest=checkpoint.manifest.replace(extra=said)
    )
    super().write(checkpoint, path, overwrite=overwrite)


class Replaces(Copied):
  def write(self, checkpoint, path, *, overwrite=False):
    super().write(checkpoint, path, overwrite=True)


class Forgets(Copied):
  """Takes the old file away before it writes the new one."""

  def write(self, checkpoint, path, *, overwrite=False):
    if overwrite:
      pathlib.Path(path).unlink(missing_ok=True)
    super().write(checkpoint, path, overwrite=overwrite)


class Direct(Copied):
  """Has all it needs in memory, and then writes to where it should go.

  What no lazy tensor shows: only a disk that is full does.
  """

  def open(self, path):
    text = pathlib.Path(path).read_bytes()
    if hashlib.sha256(text[32:]).digest() != text[:32]:
      raise surgery.FormatError(f'{path}: damaged.')
    said, tensors = pickle.loads(text[32:])
    leaves = {
      name: surgery.Leaf(lambda value=value: value, *rest)
      for name, value, *rest in tensors
    }
    return surgery.Checkpoint(leaves, said)

  def write(self, checkpoint, path, *, overwrite=False):
    if pathlib.Path(path).exists() and not overwrite:
      raise FileExistsError(path)
    tensors = [
      (
        name,
        leaf.load() if leaf.shape is None else np.asarray(leaf.load()),
        *(leaf.shape, leaf.dtype, leaf.trainable, dict(leaf.metadata)),
        leaf.key,
      )
      for name, leaf in checkpoint.items()
    ]
    text = pickle.dumps((checkpoint.manifest, tensors))
    text = hashlib.sha256(text).digest() + text
    pathlib.Path(path).write_bytes(text)


class Litters(Copied):
  """Leaves a temporary file where it fails."""

  def write(self, checkpoint, path, *, overwrite=False):
    mark = pathlib.Path(path).with_suffix('.tmp')
    mark.touch()
    super().write(checkpoint, path, overwrite=overwrite)
    mark.unlink()


class Surprised(Copied):
  """Raises what it gets where a file makes no sense."""

  def open(self, path):
    try:
      return super().open(path)
    except surgery.FormatError as error:
      raise KeyError('tensors') from error


class Trusting(Copied):
  """Takes a file that makes no sense for an empty one."""

  def open(self, path):
    try:
      return super().open(path)
    except surgery.FormatError:
      return surgery.Checkpoint({})


FORMATS: dict[str, tuple[type[Copied], set[str]]] = {
  'loses flags': (
    LosesFlags,
    {
      'what_is_written_comes_back',
      'trees_come_back',
      'a_file_is_not_replaced_unasked',
      'a_file_may_be_written_over_itself',
    },
  ),
  'dated': (Dated, {'the_same_bytes_again'}),
  'replaces': (Replaces, {'a_file_is_not_replaced_unasked'}),
  'forgets': (
    Forgets,
    {'a_write_that_fails_leaves_the_old_file'},
  ),
  'direct': (Direct, {'a_write_that_fails_leaves_the_old_file'}),
  'litters': (
    Litters,
    {
      'a_write_that_fails_leaves_the_old_file',
      'a_file_is_not_replaced_unasked',
    },
  ),
  'surprised': (Surprised, {'a_damaged_file_is_refused'}),
  'trusting': (Trusting, {'a_damaged_file_is_refused'}),
}


@pytest.mark.parametrize(
  ('plugin', 'name', 'refused'),
  [
    (Copied, 'copied', ()),
    (files, 'msgpack', ()),
    (files, 'safetensors', ()),
  ],
)
def test_a_format_that_is_right_is_right(plugin, name, refused):
  said = {'name': name, 'refused': refused}
  assert {} == suite(testing.FormatConformance, plugin, **said).broken()


@pytest.mark.parametrize('name', FORMATS)
def test_each_format_is_caught_by_its_law(name):
  plugin, laws = FORMATS[name]
  mine = suite(testing.FormatConformance, plugin, name='copied')
  found = mine.broken()
  assert laws == found.keys(), {law: str(found[law]) for law in found}


def test_what_a_format_is_said_to_refuse_it_refuses():
  mine = suite(
    testing.FormatConformance, Copied, name='copied', refused=('bfloat16',)
  )
  [text] = [str(error) for error in mine.broken().values()]
  assert 'bfloat16: it is declared to be refused, and was written' in text
  mine = suite(
    testing.FormatConformance, Copied, name='copied', refused=('bfloat61',)
  )
  with pytest.raises(testing.Broken, match="Did you mean 'bfloat16'"):
    mine().test_what_is_written_comes_back()


# Policies and terms.


class Policy:
  """Offers a function of site and policy as the policy `biases`."""

  def __init__(self, function):
    self.function = function

  @surgery.hookimpl
  def surgery_freeze_param(self, site, policy):
    return self.function(site, policy)


def biases(site, policy):
  return site.name == 'bias' if policy == 'biases' else None


def by_turns(site, policy):
  if policy != 'biases':
    return None
  COUNT[0] += 1
  return COUNT[0] % 2 == 0


class Biases(testing.PolicyConformance):
  plugin: ClassVar[Any] = Policy(biases)
  name = 'biases'
  trains = '**/bias'


POLICIES: dict[str, tuple[Any, set[str]]] = {
  'says only yes': (
    lambda site, policy: True if biases(site, policy) else None,
    {
      'it_answers_every_parameter',
      'what_is_declared_trains',
      # It freezes nothing, which is an error.
      'live_is_file',
    },
  ),
  'answers all': (
    lambda site, policy: site.name == 'bias',
    {'other_policies_are_somebody_elses'},
  ),
  'answers those that begin alike': (
    lambda site, policy: (
      site.name == 'bias' if policy.startswith('biases') else None
    ),
    {'other_policies_are_somebody_elses'},
  ),
  'by turns': (
    by_turns,
    {
      'an_answer_depends_on_the_parameter_alone',
      'what_is_declared_trains',
      'live_is_file',
    },
  ),
  'scales': (
    lambda site, policy: site.name == 'scale' if policy == 'biases' else None,
    {'what_is_declared_trains'},
  ),
}


def test_a_policy_that_is_right_is_right():
  assert {} == Biases.broken()


@pytest.mark.parametrize('name', POLICIES)
def test_each_policy_is_caught_by_its_law(name):
  function, laws = POLICIES[name]
  found = suite(Biases, Policy(function)).broken()
  assert laws == found.keys(), {law: str(found[law]) for law in found}


class Term:
  """Offers a function of site and term as the term `named:NAME`."""

  def __init__(self, function):
    self.function = function

  @surgery.hookimpl
  def surgery_match_layer(self, site, term):
    return self.function(site, term)


def named(site, term):
  head, _, name = term.partition(':')
  if head != 'named':
    return None
  if not name:
    raise surgery.SelectorError('named: expected a name.')
  return site.layer[-1] == name


def named_by_turns(site, term):
  if named(site, term) is None:
    return None
  COUNT[0] += 1
  return COUNT[0] % 2 == 0


class Named(testing.TermConformance):
  plugin: ClassVar[Any] = Term(named)
  name = 'named:first'
  matches = 'net/first/**'
  refused: ClassVar[Any] = [('named:', 'expected a name')]


TERMS: dict[str, tuple[Any, set[str]]] = {
  'another layer': (
    lambda site, term: (
      None if named(site, term) is None else site.layer[-1] == 'second'
    ),
    {'it_selects_what_is_declared'},
  ),
  'says only yes': (
    lambda site, term: named(site, term) or None,
    {'it_answers_every_layer'},
  ),
  'answers all': (
    lambda site, term: site.layer[-1] == term.partition(':')[2],
    {'other_terms_are_somebody_elses', 'what_cannot_be_read_is_refused'},
  ),
  'by turns': (
    named_by_turns,
    {'an_answer_depends_on_the_layer_alone', 'it_selects_what_is_declared'},
  ),
  'reads all': (
    lambda site, term: (
      site.layer[-1] == term[6:] if term.startswith('named:') else None
    ),
    {'what_cannot_be_read_is_refused'},
  ),
}


def test_a_term_that_is_right_is_right():
  assert {} == Named.broken()


def test_a_term_by_shapes_sees_keys_alike_in_params_and_in_files():
  def vectors_of_keys(site, term):
    if term != 'keys:typed':
      return None
    return any(p.shape and not p.dtype for p in site.params)

  said = {'name': 'keys:typed', 'matches': 'rng/many', 'refused': ()}
  assert {} == suite(Named, Term(vectors_of_keys), **said).broken()


@pytest.mark.parametrize('name', TERMS)
def test_each_term_is_caught_by_its_law(name):
  function, laws = TERMS[name]
  found = suite(Named, Term(function)).broken()
  assert laws == found.keys(), {law: str(found[law]) for law in found}


# All of them.


@pytest.mark.parametrize(
  ('wrong', 'said'),
  [
    ({'name': 'dubble'}, 'dubble'),
    ({'adapters': 'follows'}, "expected 'follow', 'refuse' or None"),
    ({'adapters': 'follow'}, 'it was declared that adapters follow, found:'),
    ({'changes': 'net/norm/**'}, 'net/first/kernel'),
    ({'options': {'select': '**/kernel', 'by': 1.0}}, 'as it was, so other'),
  ],
)
def test_what_is_declared_wrongly_is_said(wrong, said):
  laws = [*QUICK, 'adapters_follow_or_refuse']
  found = suite(Right, Plugin(double), **wrong).broken(laws)
  assert any(said in str(error) for error in found.values()), found


def test_a_suite_says_what_it_lacks():
  with pytest.raises(testing.Broken, match='Lacks: set `plugin`; the plugin'):
    type('Lacks', (testing.PassConformance,), {})().test_live_is_file()
  mine = suite(testing.PolicyConformance, Policy(biases), name='biases')
  with pytest.raises(testing.Broken, match='set `trains`, a selector'):
    mine().test_what_is_declared_trains()


def test_a_failure_says_the_law_and_how_to_see_it_again():
  with pytest.raises(testing.Broken) as told:
    suite(Right, Plugin(changed(eager)))().test_planning_reads_nothing()
  text = str(told.value)
  assert "law 'planning_reads_nothing' is broken by Mine ('double')" in text
  assert 'net/first/kernel was read before' in text
  assert 'The law: A pass reads a tensor when it is loaded' in text
  assert 'Reproduce: Mine().test_planning_reads_nothing()' in text
  assert 'planning_reads_nothing' == told.value.law


def test_every_law_has_a_sentence():
  for kind in (
    testing.PassConformance,
    testing.FormatConformance,
    testing.PolicyConformance,
    testing.TermConformance,
  ):
    assert kind.laws()
    for name, law in kind.laws().items():
      assert (law.__doc__ or '').split('\n')[0].endswith('.'), name


def test_pytest_collects_what_is_derived(tmp_path):
  (tmp_path / 'test_mine.py').write_text(
    textwrap.dedent("""
      import sys
      import surgery
      from surgery.testing import PolicyConformance

      @surgery.hookimpl
      def surgery_freeze_param(site, policy):
        return site.name == 'bias' if policy == 'mine' else None

      class TestMine(PolicyConformance):
        plugin = sys.modules[__name__]
        name = 'mine'
        trains = '**/scale'
    """)
  )
  done = subprocess.run(
    [
      sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider',
      str(tmp_path),
    ],
    capture_output=True,
    text=True,
  )  # fmt: skip
  assert '1 failed, 4 passed' in done.stdout, done.stdout
  assert "law 'what_is_declared_trains' is broken by TestMine" in done.stdout


def test_a_pass_that_is_right_is_right():
  assert {} == Right.broken()


@pytest.mark.parametrize('name', PASSES)
def test_each_pass_is_caught_by_its_law(name):
  function, laws = PASSES[name]
  said = {'adapters': None}
  found = suite(Right, Plugin(function), **said).broken(laws | QUICK)
  assert laws == found.keys(), {law: str(found[law]) for law in found}
