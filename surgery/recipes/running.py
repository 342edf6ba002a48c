"""Planning a recipe and carrying it out.

A plan is made by doing all steps on inputs that are open and not yet read:
passes are lazy, so the names, shapes and dtypes of the plan are those that will
be written, and collisions show before a tensor is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from surgery import errors, html
from surgery.adapting import beneath
from surgery.files import atomic_folders, strict_json
from surgery.host import location
from surgery.host.manager import Host
from surgery.interop import folders
from surgery.model import checkpoint as checkpoints
from surgery.model import manifest
from surgery.model.checkpoint import Checkpoint
from surgery.naming import selectors
from surgery.recipes import definitions, history, performing, planning
from surgery.recipes.spec import Spec, Target


class _Models(Mapping[str, Checkpoint]):
  """Checkpoints by alias, each opened when it is first read.

  Args:
    recipe: the recipe.
    host: offers the formats.
    given: checkpoints that are open already.

  Attributes:
    now: the checkpoints as the steps have left them.
    opened: the inputs as they were opened.
  """

  def __init__(
    self, recipe: Spec, host: Host, given: Mapping[str, Checkpoint]
  ) -> None:
    self._recipe = recipe
    self._host = host
    given = {alias: self._marked(one) for alias, one in given.items()}
    self.now: dict[str, Checkpoint] = dict(given)
    self.opened: dict[str, Checkpoint] = dict(given)

  def __getitem__(self, alias: str) -> Checkpoint:
    if alias not in self.now:
      if alias not in self._recipe.inputs:
        raise KeyError(alias)
      self.now[alias] = self.opened[alias] = self._open(alias)
    return self.now[alias]

  def _open(self, alias: str) -> Checkpoint:
    path = self._recipe.inputs[alias]
    if path is None:
      where = self._recipe.where('inputs', alias)
      raise errors.RecipeError(
        f'{where}: input {alias!r} has no file. Give {alias}=FILE.'
      )
    opened = checkpoints.open_checkpoint(path, host=self._host)
    manifest.check_no_patch(opened.manifest, opened.origin)
    return self._marked(opened)

  def _marked(self, opened: Checkpoint) -> Checkpoint:
    """Lets tensors know where they were read, if a folder asks for it."""
    if not any(one.is_folder for one in self._recipe.outputs.values()):
      return opened
    leaves = {path: leaf.replace(was=path) for path, leaf in opened.items()}
    return opened.replace(leaves=leaves)

  def __iter__(self) -> Iterator[str]:
    return iter(dict.fromkeys((*self._recipe.inputs, *self.now)))

  def __len__(self) -> int:
    return len(list(iter(self)))


def _performed(recipe: Spec, models: _Models, host: Host) -> None:
  """Does all steps; their results are in `models`."""
  # Mistakes in the text are found before a file is opened.
  steps = [_defined(recipe, k, host) for k in range(len(recipe.steps))]
  _check_names(recipe)
  # All inputs are opened before the first step, so that a missing file is found
  # before passes do any work.
  for alias in recipe.inputs:
    models[alias]
  for number, step in enumerate(recipe.steps):
    definition, arguments = steps[number]
    alias = step.on or recipe.first
    # Checks of earlier steps name their steps already.
    before = {id(one) for ckpt in models.now.values() for one in ckpt.checks}
    with _placed(recipe, number):
      after = _done(definition, arguments, models, alias, host)
    if any(id(one) not in before for one in after.checks):
      after = _with_place(after, before, recipe.place(number))
    models.now[step.result or alias] = after


def _check_names(recipe: Spec) -> None:
  """Raises for a name of a model that neither inputs nor earlier steps have."""
  known = set(recipe.inputs)
  for number, step in enumerate(recipe.steps):
    with _placed(recipe, number):
      _check_alias(step.on or recipe.first, known)
      known.add(step.result or step.on or recipe.first)
  for name, target in recipe.outputs.items():
    if target.of is not None and target.of not in known:
      raise errors.RecipeError(
        f'{recipe.where("outputs", name)}: of: no model is called '
        f'{target.of!r}.{errors.suggest(target.of, known)}'
      )


def _with_place(after: Checkpoint, known: set[int], place: str) -> Checkpoint:
  """Returns a checkpoint whose new checks name the step that made them.

  They run after all steps, when the step is no longer known.
  """
  checks = (
    one if id(one) in known else _checked(one, place) for one in after.checks
  )
  return after.replace(checks=tuple(checks))


def _checked(check: checkpoints.Check, place: str) -> checkpoints.Check:
  """Returns a check whose errors name the step that made it."""

  def run() -> None:
    with errors.within(place):
      check.run()

  return dataclasses.replace(check, run=run)


def _defined(
  recipe: Spec, number: int, host: Host
) -> tuple[definitions.Definition, dict[str, Any]]:
  """Returns the definition of a step, and the arguments of its pass."""
  step = recipe.steps[number]
  with _placed(recipe, number):
    definition = definitions.find(step.name, host)
    arguments = definition.read(step.value)
    _check_selectors(definition, arguments)
    return definition, arguments


def _check_selectors(
  definition: definitions.Definition, arguments: Mapping[str, Any]
) -> None:
  """Raises for a selector that cannot be read."""
  for option in definition.options.values():
    value = arguments.get(option.argument)
    if option.name == 'select' and isinstance(value, (str, list)):
      selectors.parse(value)


def _check_alias(alias: str, known: set[str]) -> None:
  if alias not in known:
    raise errors.RecipeError(
      f'in: no model is called {alias!r}.{errors.suggest(alias, known)}'
    )


@contextlib.contextmanager
def _placed(recipe: Spec, number: int) -> Iterator[None]:
  """Adds to errors where in the recipe the step is; a verb has no recipe."""
  with errors.within(recipe.place(number)):
    if not recipe.lines.name:
      yield
      return
    try:
      yield
    except (errors.PluginError, errors.CheckError):
      raise
    except (errors.SurgeryError, KeyError) as error:
      text = str(error.args[0] if isinstance(error, KeyError) else error)
      if isinstance(error, errors.BaseMismatchError):
        # The message names Python's argument; a recipe has an option.
        text = text.replace('check_base=False', 'check-base: false')
      raise errors.RecipeError(text) from error


def _done(
  definition: definitions.Definition,
  arguments: Mapping[str, Any],
  models: _Models,
  alias: str,
  host: Host,
) -> Checkpoint:
  """Does one step."""
  given = definition.bound(arguments, models, models.opened.get(alias))
  if 'host' in definition.given:
    given['host'] = host
  with host.observed(definition.name, _plain(arguments)):
    return performing.performed(
      definition.name,
      definition.function,
      models[alias],
      host,
      given,
      run=beneath.performed,
    )


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the arguments that observers get: those that are plain data."""
  plain = (str, int, float, bool, list, dict, type(None))
  return {k: v for k, v in arguments.items() if isinstance(v, plain)}


def applied(
  recipe: Spec, given: Mapping[str, Checkpoint], host: Host
) -> Checkpoint:
  """Does a recipe on checkpoints; returns what its first output would have.

  Raises:
    RecipeError: for a mistake, with line and step.
  """
  for alias in given:
    if alias not in recipe.inputs:
      raise errors.RecipeError(
        f'{recipe.origin}: it has no input {alias!r}.'
        f'{errors.suggest(alias, recipe.inputs)}'
      )
  models = _Models(recipe, host, given)
  _performed(recipe, models, host)
  target = next(iter(recipe.outputs.values()), None)
  alias = (target and target.of) or recipe.first
  return models[alias]


# Plans.


@dataclasses.dataclass(frozen=True)
class Output:
  """A file or folder that is to be written.

  Attributes:
    name: its name in the recipe.
    target: where and how it is written.
    sources: the inputs, by alias.
    main: alias of the input whose history it continues.
    after: the checkpoint that is written.
    folder: further files, if it is a folder.
  """

  name: str
  target: Target
  sources: Mapping[str, Checkpoint]
  main: str
  after: Checkpoint
  folder: folders.Folder | None = None

  @property
  def path(self) -> pathlib.Path:
    """The file, or the folder."""
    assert self.target.path is not None
    return self.target.path

  @property
  def shown(self) -> pathlib.Path:
    """The file that opens it: itself, or the index of its shards."""
    if self.target.shard_size is None or self.folder is not None:
      return self.path
    return self.path.with_name(self.path.name + location.INDEX)

  def rows(self) -> list[dict[str, Any]]:
    """Returns what happens to each tensor; see `planning.plan`."""
    return planning.plan(self.sources, self.main, self.after)

  def report(self) -> dict[str, Any]:
    """Returns its part of the plan as JSON data."""
    report = planning.report(
      self.rows(),
      str(self.shown),
      planning.needed(self.after),
      [one.text for one in self.after.checks],
      [one.to_json() for one in self.after.left_out],
      self.after.remarks,
    )
    if self.folder is not None:
      report['folder'] = self.folder.report()
    if (extracted := planning.extracted(self.after)) is not None:
      report['extracted'] = extracted
    found = planning.found(self.after)
    return {**report, 'found': found} if found else report

  @property
  def shard_size(self) -> int | None:
    """Largest number of bytes of each file; None for a single file."""
    size = self.target.shard_size
    if size is None and self.folder is not None:
      return folders.shard_size(self.after)
    return size


@dataclasses.dataclass(frozen=True)
class Plan:
  """A recipe whose steps are done, and whose outputs are not yet written.

  Attributes:
    recipe: the recipe, with all files.
    outputs: its outputs, in order; none if all steps are assertions.
    host: offers the formats.
    checks: assertions about values, made before anything is written.
  """

  recipe: Spec
  outputs: tuple[Output, ...]
  host: Host
  checks: tuple[checkpoints.Check, ...]

  def report(self) -> dict[str, Any]:
    """Returns it as JSON data: the first output, and others under `saved`.

    Returns:
      `output`, the name of the file; `memory`, about how many bytes it takes;
      `time`, the class of the slowest tensor; `checks`; `tensors`, each with
      `path`, `what`, `shape`, `dtype`, `bytes`, `time`, and see
      `planning.plan`; and `left_out`, if there are any: layers that an adapter
      cannot serve, with `path`, `adapter` and `why`. After writing also
      `found`: numbers that a cast rounded to zero.
    """
    if not self.outputs:
      return planning.report([], None, 0, [one.text for one in self.checks])
    first, *others = [one.report() for one in self.outputs]
    return {**first, 'saved': others} if others else first

  def _repr_html_(self) -> str:
    names = ('path', 'what', 'shape', 'dtype', 'bytes')
    tables = []
    for output in self.outputs:
      report = output.report()
      rows = [[t.get(n, '') for n in names] for t in report['tensors']]
      caption = (
        f'{report["output"]}: about {report["memory"]:,} bytes of memory'
      )
      tables.append(html.table(caption, names, rows))
    return ''.join(tables)

  def check(self, overwrite: bool = False) -> None:
    """Raises if an output cannot be written, as far as is known before.

    Raises:
      SurgeryError: if a file exists, or its folder does not.
    """
    # Two outputs in one file would replace each other.
    seen: dict[pathlib.Path, str] = {}
    for one in self.outputs:
      check_target(one.target, overwrite)
      if one.folder is None:
        if one.target.format is None and not location.suffix(one.path):
          raise errors.SurgeryError(
            f'{one.path}: the name has no suffix, so the format is not known. '
            f'Give one, as {one.path}.safetensors, or write a new folder: '
            f'{one.path}/.'
          )
        self.host.format_of(one.path, one.target.format)
      other = seen.setdefault(one.path.resolve(), one.name)
      if other != one.name:
        raise errors.RecipeError(
          f'outputs {other!r} and {one.name!r} name the same file, {one.path}.'
        )

  def write(
    self,
    *,
    overwrite: bool = False,
    watched: Callable[[Checkpoint], Any] | None = None,
  ) -> None:
    """Writes all outputs, or none.

    Args:
      overwrite: whether existing outputs are replaced.
      watched: returns a context manager that gives the function that is called
        with progress, or None.

    Raises:
      CheckError: if an assertion of the recipe fails.
      SurgeryError: if an output cannot be written.
      OSError: if the system cannot write it, with the file's name.
    """
    self.check(overwrite)
    for check in self.checks:
      check.run()
    if not self.outputs:
      return
    # The first is the main one. It appears last, so if it is there, all are.
    order = list(reversed(self.outputs))
    with contextlib.ExitStack() as undo:
      for one in order[:-1]:
        undo.enter_context(_restored(one))
        self._write(one, overwrite, watched)
      self._write(order[-1], overwrite, watched)

  def _write(
    self,
    one: Output,
    overwrite: bool,
    watched: Callable[[Checkpoint], Any] | None,
  ) -> None:
    if one.folder is None:
      self._write_model(one, one.path, overwrite, watched)
      return
    with folders.writing(one.folder, one.path) as model:
      self._write_model(one, model, False, watched)

  def _write_model(
    self,
    one: Output,
    path: pathlib.Path,
    overwrite: bool,
    watched: Callable[[Checkpoint], Any] | None,
  ) -> None:
    """Writes the file, or the set, of an output."""
    target = one.target
    after = one.after.replace(checks=())  # `write` has run them.
    shown = watched(after) if watched else contextlib.nullcontext()
    try:
      with shown as progress:
        after.write(
          path,
          overwrite=overwrite,
          format=target.format,
          host=self.host,
          manifest=target.plain is None,
          shard_size=one.shard_size,
          metadata=target.metadata,
          progress=progress,
        )
    except OSError as error:
      if error.filename is not None:
        raise
      # The error of a full disk has no file's name.
      text = f'{error.strerror or error}; nothing was written'
      raise OSError(error.errno, text, str(path)) from error


def check_target(target: Target, overwrite: bool) -> None:
  """Raises if a file cannot be written, as far as is known beforehand.

  Raises:
    SurgeryError: if the file exists, or its folder does not.
    OSError: if a folder exists and has something in it.
  """
  path = target.path
  assert path is not None
  folder = path.parent
  if target.is_folder:
    atomic_folders.check(path)
  if not folder.is_dir():
    raise errors.SurgeryError(
      f'{folder}: there is no such folder. Make it first: mkdir -p {folder}.'
    )
  if not os.access(folder, os.W_OK | os.X_OK):
    raise errors.SurgeryError(f'{folder}: the folder is not writable.')
  if target.is_folder:
    return
  index = path.with_name(path.name + location.INDEX)
  there = [path] if target.shard_size is None else [index, path]
  for one in there:
    if one.exists() and not overwrite:
      raise errors.SurgeryError(
        f'{one}: exists already. Give --force (overwrite=True) to replace it.'
      )


def plan(
  recipe: Spec, host: Host, given: Mapping[str, Checkpoint] | None = None
) -> Plan:
  """Plans a recipe; see `Recipe.plan`.

  Args:
    recipe: the recipe.
    host: offers the passes and formats.
    given: inputs that are open already, by alias.
  """
  # Options of outputs are checked first, before a file is opened.
  targets = _targets(recipe)
  models = _Models(recipe, host, given or {})
  _performed(recipe, models, host)
  outputs = tuple(
    _output(recipe, name, target, models, host)
    for name, target in targets.items()
  )
  # Several outputs may have the same checks, which read tensors: each is run
  # once.
  afters = [one.after for one in outputs] or [*models.now.values()]
  checks = {id(c): c for after in afters for c in after.checks}
  return Plan(recipe, outputs, host, tuple(checks.values()))


def _targets(recipe: Spec) -> Mapping[str, Target]:
  """Returns the outputs that are written, whose options are checked.

  Raises:
    SurgeryError: if one has no file, or options that it cannot have.
  """
  targets = recipe.outputs
  if _only_asserts(recipe):
    targets = {k: v for k, v in targets.items() if v.path is not None}
  elif not targets:
    raise errors.RecipeError(f'{recipe.origin}: expected an output.')
  for name, target in targets.items():
    if target.path is None:
      raise errors.RecipeError(
        f'{recipe.where("outputs", name)}: output {name!r} has no file. Give '
        f'{name}=FILE.'
      )
    if target.strict_flax:
      _check_strict(target)
    _check_metadata(target)
    _check_folder(target)
  return targets


def _output(
  recipe: Spec, name: str, target: Target, models: _Models, host: Host
) -> Output:
  """Returns an output, with an entry in its history."""
  after = models[target.of or recipe.first]
  main = _main_of(after, models)
  target = _settled(target, models.opened[main], host)
  entry = history.entry(recipe, name, main, models.opened)
  after = history.recorded(after, entry)
  if target.plain is not None:
    _check_plain(target, after, host)
  # A format may know of readers that do not take what it writes.
  noted = getattr(host.formats.get(target.format or ''), 'notes', None)
  if noted is not None:
    after = after.replace(remarks=(*after.remarks, *noted(after, host)))
  folder = None
  if target.is_folder and not _is_folder_format(target, host):
    folder = _folder(recipe, target, models.opened[main], after, host)
  return Output(name, target, dict(models.opened), main, after, folder)


def _folder(
  recipe: Spec,
  target: Target,
  before: Checkpoint,
  after: Checkpoint,
  host: Host,
) -> folders.Folder | None:
  """Returns the further files of a folder; None if its format writes them."""
  form = _format(target)
  if form not in host.formats:
    raise errors.FormatError(
      f'unknown format {form!r}.{errors.suggest(form, host.formats)}'
    )
  suffixes = host.formats[form].suffixes
  if not suffixes:
    return None
  return folders.planned(
    before,
    after,
    suffixes[0],
    host,
    like=target.like,
    given=target.config,
    tied=any(step.name == 'tie' for step in recipe.steps),
  )


def _settled(target: Target, before: Checkpoint, host: Host) -> Target:
  """Returns a target with its format, where the input's decides it.

  A folder becomes a model folder as transformers has them, unless its name has
  the suffix of another format of folders, or the input is a folder of a format
  that says `keeps_format`, as Orbax's does.
  """
  if not target.is_folder or target.format is not None:
    return target
  assert target.path is not None
  origin = pathlib.Path(before.origin)
  for name, form in host.formats.items():
    if not hasattr(form, 'recognises'):
      continue
    stays = before.origin and getattr(form, 'keeps_format', False)
    if target.path.suffix in form.suffixes or (
      stays and form.recognises(origin)
    ):
      return dataclasses.replace(target, format=name)
  return target


def _is_folder_format(target: Target, host: Host) -> bool:
  """Whether a format writes the whole of a folder itself, as PEFT's does."""
  return hasattr(host.formats.get(target.format or ''), 'recognises')


def _format(target: Target) -> str:
  """Returns the name of the format in which a target is written."""
  assert target.path is not None
  if target.format is not None:
    return target.format
  if target.is_folder:
    return 'safetensors'  # Programs that read model folders expect it.
  return location.suffix(target.path).lstrip('.')


def _check_folder(target: Target) -> None:
  """Raises for options of a folder, if a file is written."""
  if target.is_folder:
    return
  for name, value in (('config', target.config), ('like', target.like)):
    if value:
      raise errors.SurgeryError(
        f'{target.path}: --{name} is for folders, which have a config.json. '
        f'Write the folder as {target.path}/.'
      )


def _only_asserts(recipe: Spec) -> bool:
  """Whether all steps of a recipe are assertions."""
  return bool(recipe.steps) and all(s.name == 'assert' for s in recipe.steps)


def _main_of(after: Checkpoint, models: _Models) -> str:
  """Returns the alias of the input whose history a checkpoint continues."""
  for alias, one in models.opened.items():
    if one.origin == after.origin:
      return alias
  for alias, one in models.opened.items():
    if one.manifest.history and one.manifest.history == after.manifest.history:
      return alias
  return next(iter(models.opened))


def _check_strict(target: Target) -> None:
  form = _format(target)
  if form != 'msgpack':
    raise errors.SurgeryError(
      f'{target.path}: --strict-flax is for flax msgpack, found {form!r}.'
    )


def _check_metadata(target: Target) -> None:
  """Raises for metadata that a file without a manifest cannot hold."""
  # Other formats have a place for it in their own headers.
  form = _format(target)
  if target.metadata and target.plain and form == 'msgpack':
    raise errors.SurgeryError(
      f'{target.path}: flax msgpack holds --metadata in the manifest, which '
      f'{target.plain} leaves out. Give only one of the two options.'
    )


def _check_plain(target: Target, after: Checkpoint, host: Host) -> None:
  """Raises for adapters, which a file without a manifest cannot hold."""
  adapters = after.resolved(host).adapters
  if adapters:
    names = ', '.join(repr(one['name']) for one in adapters)
    raise errors.SurgeryError(
      f'{target.plain} leaves out the records of adapters, without which the '
      f'weights of {names} could not be used. Merge or detach first.'
    )


def lost(plan: Plan) -> Iterator[str]:
  """Yields lines about what outputs leave out: tokenizers, manifests."""
  for one in plan.outputs:
    if one.after.vocabulary is not None and one.folder is None:
      yield (
        f'{one.path}: its rows follow the tokens of another tokenizer, which '
        'only a folder contains: -o out/.'
      )
    if one.target.plain is not None:
      counts = _in_manifest(one.after, plan.host)
      shown = [f'{count} {what}' for what, count in counts.items() if count]
      if shown:
        yield f'{one.target.plain} leaves out: {", ".join(shown)}.'


def _in_manifest(after: Checkpoint, host: Host) -> dict[str, int]:
  """Returns how many things of each kind only a manifest holds."""
  resolved = after.resolved(host)
  notes = after.notes().values()
  return {
    'flags (not trainable)': sum(not n.trainable for n in notes),
    'metadata of tensors': sum(bool(n.metadata) for n in notes),
    'kinds of PRNG keys': sum(n.key is not None for n in notes),
    'digests': sum(n.digest is not None for n in notes),
    'marks of quantised weights': sum(n.codes is not None for n in notes),
    'types of layers': len(resolved.layer_types),
    'structures of values': len(resolved.trees),
    'passes of the history': len(resolved.history),
  }


@contextlib.contextmanager
def _restored(output: Output) -> Iterator[None]:
  """Restores a file or a folder if an output after it cannot be written."""
  if output.folder is not None:
    with _restored_folder(output.path):
      yield
    return
  kept: dict[pathlib.Path, pathlib.Path] = {}
  # Writing replaces a symbolic link, not the file that it points to.
  link = output.shown.readlink() if output.shown.is_symlink() else None
  try:
    # Parts before the index: while they are put back there is no half set.
    for path in (*_parts(output), output.shown):
      if path.exists():
        _keep(path.resolve(), kept)
    try:
      yield
    except BaseException:
      _put_back(output, kept, link)
      raise
  finally:
    for old in kept.values():
      old.unlink(missing_ok=True)


@contextlib.contextmanager
def _restored_folder(path: pathlib.Path) -> Iterator[None]:
  """Removes a new folder if something fails; an empty one stays empty."""
  existed = path.is_dir()
  try:
    yield
  except BaseException:
    shutil.rmtree(path, ignore_errors=True)
    if existed:
      path.mkdir(exist_ok=True)
    raise


def _put_back(
  output: Output,
  kept: Mapping[pathlib.Path, pathlib.Path],
  link: pathlib.Path | None,
) -> None:
  """Undoes the writing of an output.

  Args:
    output: the output.
    kept: where the files that it replaced are, by their names.
    link: where its name pointed to, if it was a symbolic link.
  """
  for part in _parts(output) - kept.keys():
    part.unlink(missing_ok=True)
  if not kept:
    output.shown.unlink(missing_ok=True)
  for path, old in kept.items():
    old.replace(path)
  if link is not None:
    output.shown.unlink(missing_ok=True)
    output.shown.symlink_to(link)


def _keep(path: pathlib.Path, kept: dict[pathlib.Path, pathlib.Path]) -> None:
  """Gives a file a second name, which remains if the first is replaced."""
  old = path.with_name(f'.{path.name[:180]}.{secrets.token_hex(4)}.old')
  try:
    os.link(path, old)
  except OSError as error:
    reason = os.strerror(error.errno or errno.EIO)
    raise errors.SurgeryError(
      f'{path}: cannot be kept until all is written ({reason}). Write to '
      'another name.'
    ) from error
  kept[path] = old


def _parts(output: Output) -> set[pathlib.Path]:
  """Returns the files of a set that has been written."""
  if output.target.shard_size is None or not output.shown.exists():
    return set()
  index = strict_json.loads(output.shown.read_bytes(), str(output.shown))
  folder = output.shown.resolve().parent
  return {folder / name for name in index['weight_map'].values()}
