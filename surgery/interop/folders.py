"""Model folders as Hugging Face's libraries have them.

A model folder holds a model, as one file or as a set, and what belongs to it:
`config.json`, files of the tokenizer, licences. Here is decided what of these
goes along when a changed model is written to a folder of its own, and what its
configuration states.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery import errors
from surgery.files import atomic_folders, tokenizers
from surgery.host import location
from surgery.interop import configs
from surgery.model import manifest as manifests

if TYPE_CHECKING:
  from surgery.host.manager import Host
  from surgery.model.checkpoint import Checkpoint, Leaf
  from surgery.model.vocabulary import Vocabulary
  from surgery.naming.paths import Path

CONFIG = 'config.json'
_GENERATION = 'generation_config.json'
# What tells that a `config.json` is that of a model, and no other program's.
_TELLING = ('model_type', 'architectures', '_class_name', 'auto_map')
# What goes along. All else (weights of other programs, states of trainers,
# cards that describe another model) stays where it is.
_ALONG = (
  CONFIG,
  _GENERATION,
  *tokenizers.FILES,
  'preprocessor_config.json',
  'processor_config.json',
  'LICENSE*',
  'LICENCE*',
  'NOTICE*',
  'COPYING*',
  'USE_POLICY*',
  # sentence-transformers.
  'modules.json',
  'sentence_bert_config.json',
  'config_sentence_transformers.json',
)
_MODULES = 'modules.json'
_MODULE_FILES = ('*.json', '*.txt', '*.model', '*.safetensors')
# What transformers and diffusers call a model's file.
_STEMS = ('model', 'diffusion_pytorch_model')
_NAMES = {'.msgpack': 'flax_model'}
# Hubs and file systems have limits; transformers has had this one.
SHARD_SIZE = 5_000_000_000
# More bytes than the `config.json` of any known model has.
_MOST = 16_000_000


@dataclasses.dataclass(frozen=True)
class Along:
  """A file that goes along as it is.

  Attributes:
    name: its name in the folder, with slashes.
    source: what is copied.
  """

  name: str
  source: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Folder:
  """What is written to a folder beside the tensors.

  Attributes:
    model: name of the model's file, or of the set.
    along: what is copied.
    config: the configuration, if there is one.
    texts: what is written beside that, by name.
    source: the folder that all of it comes from, or None.
    warnings: what looks wrong, a sentence each.
  """

  model: str
  along: tuple[Along, ...] = ()
  config: configs.Edited | None = None
  texts: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
  source: pathlib.Path | None = None
  warnings: tuple[str, ...] = ()

  def write(self, folder: pathlib.Path) -> None:
    """Writes all but the model.

    Raises:
      OSError: if it cannot be written.
    """
    for one in self.along:
      target = folder / one.name
      target.parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(one.source, target)
    for name, data in self.texts.items():
      (folder / name).write_bytes(data)
    if self.config is not None and self.config.changes:
      text = json.dumps(self.config.config, ensure_ascii=False, indent=2)
      (folder / CONFIG).write_text(text + '\n', encoding='utf-8')

  def report(self) -> dict[str, Any]:
    """Returns what a plan shows of it, as JSON data.

    Returns:
      `along`, names of files that are copied; `written`, of those that are
      made; `config`, changes of the configuration with `key`, `old`, `new` and
      `why`; and `warnings`.
    """
    changes = self.config.changes if self.config else ()
    written = {'written': list(self.texts)} if self.texts else {}
    return {
      'along': [one.name for one in self.along],
      **written,
      'config': [change.to_json() for change in changes],
      'warnings': list(self.warnings),
    }


@contextlib.contextmanager
def writing(folder: Folder, path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the name to write the model to; the folder appears at the end.

  Args:
    folder: what is written beside the model.
    path: the folder: a new name, or an empty folder.

  Raises:
    FileExistsError: if there is something in it, or it is no folder.
    FormatError: if it is a symbolic link, or cannot be replaced.
    OSError: if it cannot be written.
  """
  with atomic_folders.writing(path) as hidden:
    try:
      folder.write(hidden)
      yield hidden / folder.model
    except (OSError, errors.SurgeryError) as error:
      _unhide(error, str(hidden), str(path))
      raise


def _unhide(
  error: OSError | errors.SurgeryError, hidden: str, path: str
) -> None:
  """Lets an error name a folder by the name that it was to get."""
  if isinstance(error, OSError):
    if isinstance(error.filename, str):
      error.filename = error.filename.replace(hidden, path)
    return
  plain = lambda one: one.replace(hidden, path) if isinstance(one, str) else one
  error.args = tuple(map(plain, error.args))
  error.context = tuple(map(plain, error.context))


def shard_size(model: Checkpoint) -> int | None:
  """Returns the most bytes a file, if a model becomes several."""
  total = sum(leaf.nbytes for leaf in model.values())
  return SHARD_SIZE if total > SHARD_SIZE else None


def planned(
  before: Checkpoint,
  after: Checkpoint,
  suffix: str,
  host: Host,
  *,
  like: pathlib.Path | None = None,
  given: Mapping[str, Any] | None = None,
  tied: bool = False,
) -> Folder:
  """Returns what is written to a folder beside the tensors.

  Args:
    before: the model that was read.
    after: the model that is written.
    suffix: of the model's file.
    host: knows formats.
    like: a model folder from which files go along; by default the one that
      `before` was read from, if it is one.
    given: what the configuration is to state, by key with dots.
    tied: whether a step left out a head because the embedding stands for it.

  Raises:
    FormatError: for a configuration that cannot be read, or a link that leads
      out of the folder.
    SurgeryError: if there is no configuration to state something in.
  """
  if after.manifest.kind == manifests.ADAPTER:
    # What is beside its base describes that.
    return Folder(f'adapter{suffix}')
  name = _called(before, suffix)
  source = _source(before, like)
  if source is None:
    if given:
      raise errors.SurgeryError(
        f'--config {next(iter(given))}: there is no {CONFIG} beside '
        f'{before.origin or "the model"}. Name a model folder that has one: '
        '--like FOLDER.'
      )
    return _with_vocabulary(Folder(name), after.vocabulary)
  said = _read(source)
  read: Mapping[Path, Leaf] | None = before
  if like is not None:
    read = _model_of(like, host)
  vocabulary = after.vocabulary
  edited = configs.edited(
    said,
    read,
    after,
    given=given,
    tied=tied,
    # Numbers are those of the model that was read, not of another folder.
    sources=_Numbers(after) if like is None else lambda number: None,
    numbers=vocabulary.numbers if vocabulary and like is None else None,
  )
  warnings = [*edited.warnings]
  if vocabulary is None or vocabulary.numbers is None:
    warnings += _tokens(source, edited)
  if any('adapter' in leaf.metadata for leaf in after.values()):
    warnings.append(
      'an adapter is attached, whose weights other programs leave out. Merge '
      'it first for them.'
    )
  along = [
    one for one in _along(source) if one.name != CONFIG or not edited.changes
  ]
  folder = Folder(
    name, tuple(along), edited, source=source, warnings=tuple(warnings)
  )
  return _with_vocabulary(folder, vocabulary)


def _with_vocabulary(folder: Folder, vocabulary: Vocabulary | None) -> Folder:
  """Returns a folder with the tokenizer of a model, if it has another one."""
  if vocabulary is None:
    return folder
  along = [one for one in folder.along if not tokenizers.is_part(one.name)]
  texts: dict[str, bytes] = {}
  warnings = list(folder.warnings)
  for name, file in vocabulary.files.items():
    if isinstance(file, bytes):
      texts[name] = file
    else:
      along.append(Along(name, _followed(file.parent, file)))
  old = next((one for one in along if one.name == _GENERATION), None)
  if old is not None and vocabulary.numbers is not None:
    said = _read(old.source.parent, old.source.name)
    new, lost = configs.renumbered(said, vocabulary.numbers)
    warnings += [f'{text} in {_GENERATION}' for text in lost]
    if new != said:
      along.remove(old)
      text = json.dumps(new, ensure_ascii=False, indent=2)
      texts[_GENERATION] = f'{text}\n'.encode()
  return dataclasses.replace(
    folder, along=tuple(along), texts=texts, warnings=tuple(warnings)
  )


def _tokens(source: pathlib.Path, edited: configs.Edited) -> Iterator[str]:
  """Yields which tokens of `generation_config.json` there are not any more."""
  size = next((c.new for c in edited.changes if c.key == 'vocab_size'), None)
  path = source / _GENERATION
  if size is None or not path.is_file():
    return
  for name, value in configs.tokens(_read(source, _GENERATION), size):
    yield (
      f'{name} is {value} in {_GENERATION}, and the vocabulary has {size} '
      'tokens.'
    )


def _called(before: Checkpoint, suffix: str) -> str:
  """Returns what the model's file is called."""
  stem = pathlib.Path(before.origin).name.partition('.')[0]
  numbered = location.numbered(pathlib.Path(stem))
  stem = numbered[0] if numbered else stem
  if suffix in _NAMES:
    return _NAMES[suffix] + suffix
  return (stem if stem in _STEMS else _STEMS[0]) + suffix


def _source(
  before: Checkpoint, like: pathlib.Path | None
) -> pathlib.Path | None:
  """Returns the model folder from which files go along.

  Raises:
    FormatError: if `like` is none.
  """
  if like is not None:
    if not (like / CONFIG).is_file():
      raise errors.FormatError(
        f'{like}: expected a model folder, found no {CONFIG} in it.'
      )
    return like
  if not before.origin:
    return None
  folder = pathlib.Path(before.origin).parent
  _check_there(folder / CONFIG)
  if not (folder / CONFIG).is_file():
    return None
  # Elsewhere a file of that name may be anybody's.
  return folder if set(_TELLING) & _read(folder).keys() else None


def _read(folder: pathlib.Path, name: str = CONFIG) -> dict[str, Any]:
  """Returns a configuration of a model folder.

  Raises:
    FormatError: if it cannot be read.
  """
  path = folder / name
  real = _followed(folder, path)
  if real.stat().st_size > _MOST:
    raise errors.FormatError(
      f'{path}: expected at most {_MOST:,} bytes, found '
      f'{real.stat().st_size:,}.'
    )
  try:
    # Some of transformers' configurations have Infinity, which is no JSON.
    found = json.loads(real.read_bytes())
  except (ValueError, RecursionError) as error:
    raise errors.FormatError(
      f'{path}: not JSON: {error}. Mend it, or write a file instead of a '
      'folder.'
    ) from None
  if not isinstance(found, dict):
    raise errors.FormatError(
      f'{path}: expected a JSON object, found {type(found).__name__}.'
    )
  return found


def _model_of(folder: pathlib.Path, host: Host) -> Mapping[Path, Leaf] | None:
  """Returns the model in a folder; None if there is none to compare with."""
  from surgery.model.checkpoint import open_checkpoint

  try:
    return open_checkpoint(folder, host=host)
  except errors.FormatError:
    return None


def _along(folder: pathlib.Path) -> Iterator[Along]:
  """Yields the files of a folder that go along."""
  for path in sorted(folder.iterdir()):
    if _matches(path.name, _ALONG):
      _check_there(path)
    if path.is_file() and _matches(path.name, _ALONG):
      yield Along(path.name, _followed(folder, path))
  for inner in _modules(folder):
    for path in sorted(inner.iterdir()):
      if path.is_file() and _matches(path.name, _MODULE_FILES):
        yield Along(f'{inner.name}/{path.name}', _followed(folder, path))


def _check_there(path: pathlib.Path) -> None:
  """Raises for a link that leads nowhere: what it stood for would be lost.

  Raises:
    FormatError: naming the link.
  """
  if path.is_symlink() and not path.exists():
    raise errors.FormatError(
      f'{path}: a symbolic link to {path.readlink()}, which is not there. '
      'Fetch the file, or remove the link to go on without it.'
    )


def _matches(name: str, patterns: Sequence[str]) -> bool:
  return any(fnmatch.fnmatchcase(name, one) for one in patterns)


def _modules(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the folders that sentence-transformers' `modules.json` names."""
  try:
    said = json.loads((folder / _MODULES).read_bytes())
  except (OSError, ValueError, RecursionError):
    return
  for one in said if isinstance(said, list) else []:
    name = one.get('path') if isinstance(one, dict) else None
    # Those of the model itself are empty.
    if not isinstance(name, str) or not name:
      continue
    inner = folder / name
    if inner.parent == folder and inner.name != '..' and inner.is_dir():
      yield inner


def _followed(folder: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
  """Returns the file that is meant; links lead to a cache's own files only.

  Hugging Face's cache has `snapshots/REVISION/config.json`, a link to
  `blobs/DIGEST`.

  Raises:
    FormatError: if a link leads elsewhere: what lies there is none of the
      model's.
  """
  real, home = path.resolve(), folder.resolve()
  blobs = home.parent.parent / 'blobs'
  cached = home.parent.name == 'snapshots' and real.parent == blobs
  if cached or home in real.parents:
    return real
  raise errors.FormatError(
    f'{path}: a symbolic link out of the folder, to {real}. Such a file is '
    'not taken along: put a copy in its place, or take it away.'
  )


class _Numbers:
  """Which layer each new one was, as far as tensors tell.

  Args:
    after: the tensors that are written, which know where they were read.
  """

  def __init__(self, after: Mapping[Path, Leaf]) -> None:
    self._after = after

  def __call__(self, number: Callable[[Path], int | None]) -> list[int] | None:
    """Returns the old numbers in the order of the new ones, or None.

    Args:
      number: returns the number of a tensor's layer, or None.
    """
    found: dict[int, set[int]] = {}
    for path, leaf in self._after.items():
      new = number(path)
      if new is None:
        continue
      was = None if leaf.was is None else number(leaf.was)
      # What was made anew tells nothing; the rest of its layer may.
      found.setdefault(new, set()).update(() if was is None else {was})
    if any(len(some) != 1 for some in found.values()):
      return None
    return [next(iter(found[k])) for k in sorted(found)]
