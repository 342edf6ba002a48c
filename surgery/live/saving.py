"""Saving and loading params, and adapters alone."""

from __future__ import annotations

import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import blox as bx

from surgery import errors, expect
from surgery.aliases import Params
from surgery.editing import devices
from surgery.host import location
from surgery.host.manager import Host, default_host
from surgery.interop import folders
from surgery.live import adoption, checkpoints, sharded
from surgery.live import params as live
from surgery.live.plain import BloxParams
from surgery.model import layers, manifest
from surgery.model.checkpoint import Checkpoint, open_checkpoint
from surgery.naming import paths, selectors
from surgery.naming.selection import Selection
from surgery.passes import extract
from surgery.recipes.spec import is_folder

PathLike = str | os.PathLike[str]


@devices.transfers()
def save(
  path: PathLike,
  params: Params,
  *,
  graph: bx.Graph | None = None,
  overwrite: bool = True,
  like: PathLike | None = None,
  config: Mapping[str, Any] | None = None,
  host: Host | None = None,
) -> None:
  """Saves params: values, flags, metadata, keys, adapters, lock state.

  The file is plain flax msgpack with one more key; it appears whole or not at
  all. So does a folder, `out/` or an empty one, which gets a file of
  safetensors as Hugging Face's libraries call it, or a set from 5 GB on.

  Args:
    path: the file, whose suffix tells the format, or a folder.
    params: the params.
    graph: the model's graph; records types of layers, for selectors on the
      file.
    overwrite: whether an existing file may be replaced; a folder that holds
      something never is.
    like: for a folder, the model folder from which configuration, tokenizer
      and licences go along. The configuration is changed to describe `params`.
    config: for a folder with `like`, what its `config.json` is to state, by key
      with dots between levels.
    host: whose formats are known.

  Raises:
    FormatError: for a value or metadata that a file cannot hold.
    AdapterError: if an adapter has matched nothing yet.
    ConfigError: if `like` or `config` is given for a file.
    FileExistsError: if the file exists and `overwrite` is False, or a folder
      has something in it.

  Warns:
    UserWarning: if params are a half that `split()` made, or a configuration
      looks stale.

  Example:
    params = surgery.load('base/')
    surgery.save('out/', params, like='base/', config={'note': 'mine'})
  """
  host = host or default_host()
  expect.path(path, save)
  params = _settled(expect.params(params, save))
  _warn_of_half(params, f'save: the params for {path}')
  checkpoint = checkpoints.to_tensors(checkpoints.to_checkpoint(params))
  said = checkpoint.resolved(host)
  if graph is not None:
    said = said.replace(layer_types=layers.of_graph(graph))
  checkpoint = checkpoint.replace(manifest=said)
  if is_folder(path) or _is_bare_folder(path):
    _save_folder(pathlib.Path(path), checkpoint, like, config, host)
    return
  for name, value in (('like', like), ('config', config)):
    if value is not None:
      raise errors.ConfigError(
        f'save: {name} is for folders, and {path} is a file. A folder is named '
        f"with a slash: '{path}/'."
      )
  checkpoint.write(path, overwrite=overwrite, host=host)


def _is_bare_folder(path: PathLike) -> bool:
  """Whether a name without a suffix is that of a folder that is there."""
  one = pathlib.Path(path)
  return one.is_dir() and not location.suffix(one)


def _save_folder(
  path: pathlib.Path,
  checkpoint: Checkpoint,
  like: PathLike | None,
  config: Mapping[str, Any] | None,
  host: Host,
) -> None:
  """Writes a model folder.

  Raises:
    SurgeryError: if it cannot be written.
  """
  folder = folders.planned(
    checkpoint,
    checkpoint,
    host.formats['safetensors'].suffixes[0],
    host,
    like=None if like is None else pathlib.Path(like),
    given=config,
  )
  for said in folder.warnings:
    text = said.replace('--config ', 'config ')  # The option of the shell.
    warnings.warn(f'save: {path}/: {text}', UserWarning, stacklevel=4)
  size = folders.shard_size(checkpoint)
  with folders.writing(folder, path) as model:
    checkpoint.write(model, overwrite=False, host=host, shard_size=size)


def _warn_of_half(params: bx.Params, what: str) -> None:
  """Warns if params lack some of what their adapters need."""
  missing = live.missing_of(params)
  if missing:
    more = f' and {len(missing) - 1} more' if len(missing) > 1 else ''
    warnings.warn(
      f'{what} are a half that split() made: {paths.show(missing[0])}{more} '
      'that an adapter needs are not in them, and no model can use them alone. '
      'Put the halves together, half.merge(rest); to save an adapter without '
      'its base, call surgery.save_adapter with all params.',
      UserWarning,
      stacklevel=4,
    )


def _settled(params: Any) -> bx.Params:
  """Returns params that can be saved.

  Raises:
    AdapterError: if an adapter still looks for sites.
  """
  params = adoption.adopted(params)
  for record in live.records_of(params).adapters:
    if record.pending is not None:
      raise errors.AdapterError(
        f'adapter {record.name!r} still looks for sites. Call params.locked() '
        'before saving.'
      )
  return params


@devices.transfers()
def load(
  path: PathLike,
  *,
  shardings: sharded.Shardings = None,
  host: Host | None = None,
) -> BloxParams:
  """Loads params of blox; see `surgery.load`, which is this and more."""
  host = host or default_host()
  checkpoint = open_checkpoint(expect.path(path, load), host=host)
  manifest.check_no_patch(checkpoint.manifest, str(path))
  if checkpoint.manifest.kind == manifest.ADAPTER:
    raise errors.FormatError(
      f'{path}: an adapter without its base. Use surgery.load_adapter.'
    )
  loaded = checkpoints.from_tensors(
    checkpoint, shardings=sharded.checked(shardings)
  )
  params = checkpoints.to_params(loaded, host)
  said = checkpoint.manifest.replace(adapters=(), trees={})
  notes = {**live.notes_of(params), 'manifest': said}
  _warn_of_half(params, f'load: the params in {path}')
  return live.with_records(params, live.records_of(params), notes)


@devices.transfers()
def save_adapter(
  path: PathLike,
  params: Params,
  name: str = 'default',
  *,
  modules_to_save: selectors.Text | Selection | None = None,
  graph: bx.Graph | None = None,
  format: str | None = None,
  names: extract.Names = None,
  overwrite: bool = True,
  host: Host | None = None,
) -> None:
  """Saves one adapter: weights and configuration, bound to its base.

  Other parameters that were trained with it are saved as well, such as a head
  or running statistics: those that differ from when the adapter was attached,
  or, if that is not known, as after `jax.jit`, all that `freeze` did not
  freeze. So freeze before training.

  Args:
    path: the file; its suffix tells the format.
    params: params with the adapter.
    name: the adapter's name.
    modules_to_save: the layers or parameters that are saved along instead, as
      selectors or a selection; `[]` for none.
    graph: the model's graph, for `type:` selectors.
    format: name of the format, where the suffix does not tell it: `peft` for a
      folder of PEFT.
    names: with another program's format: what its modules are called in
      `params`, as `load_adapter` takes it; by a map also with what all lies
      beneath (`{'name': 'llama-flax', 'root': 'params'}`). An adapter that was
      loaded knows it, unless its params came out of a transformation of JAX.
    overwrite: whether an existing file may be replaced.
    host: whose formats are known.

  Raises:
    AdapterError: for an unknown name, or a value that was trained along and is
      no array.
    SelectorError: for a selector that matches nothing.
    FileExistsError: if the file exists and `overwrite` is False.
  """
  host = host or default_host()
  expect.path(path, save_adapter)
  params = _settled(expect.params(params, save_adapter))
  checkpoint = checkpoints.to_tensors(checkpoints.to_checkpoint(params))
  alone = extract.extract(
    checkpoint,
    name,
    modules_to_save=modules_to_save,
    layer_types=None if graph is None else layers.of_graph(graph),
    host=host,
  )
  if names is not None and format is None:
    raise errors.ConfigError(
      'save_adapter: names goes with a format of another program. Give '
      "format='peft'."
    )
  if names is not None:
    alone = extract.with_names(alone, names)
  alone.write(path, format=format, overwrite=overwrite, host=host)


@devices.transfers()
def load_adapter(
  path: PathLike,
  params: Params,
  name: str | None = None,
  *,
  check_base: bool = True,
  names: extract.Names = None,
  host: Host | None = None,
) -> live.AdaptedParams:
  """Attaches an adapter that `save_adapter` wrote, or PEFT.

  What was trained along is put back: as long as the adapter is enabled it
  stands in place of what the base has, which is kept, so that `detach` gives
  the very base.

  Args:
    path: the file, or a folder of PEFT.
    params: the base; not changed.
    name: the adapter's name here; the one that it was saved under by default.
    check_base: whether the base must have the very values that the adapter
      was saved with, and the adapters beneath that it was trained over, where
      the file says them.
    names: for an adapter of another program: what its modules are called in
      `params`, by name (`{'mlp.hidden0': 'net/hidden0'}`), as rules of
      `rename`, or by a map of `surgery maps` (`llama-flax`).
    host: knows formats and adapters' types.

  Raises:
    BaseMismatchError: if a parameter of the base has other values or another
      shape than the adapter was made for, or adapters beneath are missing.
    AdapterError: if the name is taken, or an enabled adapter was saved with
      another value of the same parameter.
    FormatError: if the file holds no adapter, or its tensors are not those that
      its configuration makes.
  """
  host = host or default_host()
  expect.path(path, load_adapter)
  params = adoption.adopted(expect.params(params, load_adapter))
  alone = checkpoints.from_tensors(
    open_checkpoint(path, host=host), placed=False
  )
  before = checkpoints.to_checkpoint(params)
  after = extract.insert(
    before, alone, name=name, check_base=check_base, names=names, host=host
  )
  return checkpoints.to_params(after, host, like=params)  # type: ignore[return-value]
