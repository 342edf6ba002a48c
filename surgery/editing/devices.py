"""Where passes compute: files on the CPU, params where their arrays lie.

Nothing here changes JAX's configuration; all of it is scopes of one thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from surgery import errors, jaxcompat, platform


def _default() -> str:
  """Returns the platform on which JAX computes what lies nowhere yet."""
  config: Any = jax.config  # Its attributes are not typed.
  chosen = config.jax_default_device
  if chosen is None:
    return str(jax.default_backend())
  return chosen if isinstance(chosen, str) else str(chosen.platform)


def _first(name: str) -> Any:
  """Returns the first device of a platform in this process, or None.

  Local ones, since another process's device cannot be computed on.
  """
  try:
    return jax.local_devices(backend=name)[0]
  except RuntimeError:  # JAX was told to do without this platform.
    return None


@contextlib.contextmanager
def transfers() -> Iterator[None]:
  """Lets values go between host and device, whatever the caller's guard says.

  `jax.transfer_guard('disallow')` finds transfers that nobody meant. Those of a
  pass are meant: it makes weights on the host and puts them where they belong.
  """
  with jax.transfer_guard('allow'):
    yield


@contextlib.contextmanager
def _on(device: Any) -> Iterator[None]:
  with jax.default_device(device), jax.transfer_guard('allow'):
    yield


def drawing() -> contextlib.AbstractContextManager[None]:
  """Returns the scope in which first weights are drawn: the CPU's.

  Generators give the same bits everywhere, what is computed from them (the
  logarithms of a normal draw, a decomposition) does not. So a seed gives the
  same weights on every machine.

  Raises:
    SurgeryError: if JAX was told to do without the CPU.
  """
  if _default() == platform.CPU:
    return transfers()
  device = _first(platform.CPU)
  if device is None and _is_tracing():
    return transfers()  # The draw is a part of the caller's program.
  if device is None:
    listed = jax.config.read('jax_platforms')
    raise errors.SurgeryError(
      f'JAX_PLATFORMS={listed} leaves out the CPU, on which first weights are '
      'drawn, so that a seed gives the same ones on every machine. Add it '
      f'behind the others, JAX_PLATFORMS={listed},cpu: the first platform '
      'stays the default.'
    )
  return _on(device)


def _is_tracing() -> bool:
  return jaxcompat.is_traced(jax.numpy.zeros(()))


def on_cpu(value: Any) -> Any:
  """Returns a value for a draw, which may lie on other devices; or a tracer.

  Every process needs the whole of it: what is spread over several is gathered,
  which all of them have to take part in, as in any computation on it.
  """
  if not isinstance(value, jax.Array) or jaxcompat.is_traced(value):
    return value
  if not (value.is_fully_addressable or value.is_fully_replicated):
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(value, tiled=True)
  if len(value.sharding.device_set) == 1 and is_of_host(value):
    return value
  return np.asarray(value)


def is_usual() -> bool:
  """Whether JAX computes where passes over files do, without a scope."""
  return platform.of_files() in (platform.DEFAULT, _default())


def is_elsewhere(value: Any) -> bool:
  """Whether an array lies on the CPU and JAX computes somewhere else."""
  host = isinstance(value, jax.Array) and is_of_host(value)
  return host and _default() != platform.CPU


def is_of_host(value: Any) -> bool:
  """Whether a value lies in the host's memory, as those of files do."""
  if jaxcompat.is_traced(value):
    return False
  if not isinstance(value, jax.Array):
    return True
  device: Any = next(iter(value.sharding.device_set))
  return bool(device.platform == platform.CPU)


def beside(*values: Any) -> contextlib.AbstractContextManager[None]:
  """Returns the scope in which a pass computes with some values.

  Where one of them lies on an accelerator JAX computes there. Where all are the
  host's, as those of a file are, it would bring them to its default device:
  this keeps them on the CPU, or on what `SURGERY_PLATFORM` says.

  Args:
    *values: arrays of numpy or JAX, or tracers.

  Raises:
    SurgeryError: if `SURGERY_PLATFORM` names a platform that is not there.
  """
  if is_usual():
    # Only values of numpy have a way to go.
    plain = any(isinstance(v, np.ndarray) for v in values)
    return transfers() if plain else contextlib.nullcontext()
  if not all(map(is_of_host, values)):
    return contextlib.nullcontext()
  wanted = platform.of_files()
  device = _first(wanted)
  if device is not None:
    return _on(device)
  if wanted == platform.CPU:
    return transfers()  # JAX was told to do without; it has no other place.
  raise errors.SurgeryError(
    f'{platform.VARIABLE}={wanted}: JAX finds no such platform here, its '
    f'default is {jax.default_backend()!r}. Take the CPU, or install what JAX '
    'needs for it.'
  )
