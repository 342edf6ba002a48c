"""How the weights of an adapter type are stored in the folders of PEFT.

A type has one as its class attribute `peft`. It is declarations and a few
functions on numpy arrays; opening folders, finding modules in a model, checking
names and shapes, and writing are the library's.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from surgery import errors
from surgery.contract.site import Site

Arrays = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

LINEAR, CONV, EMBEDDING = 'linear', 'conv', 'embedding'


class _Named:
  """What has a name and a configuration, whose patterns are for names."""

  name: str
  config: Mapping[str, Any]

  def value(self, key: str, patterns: str) -> Any:
    """Returns what a configuration has for a module.

    Args:
      key: the key of the value for all, e.g. `r`.
      patterns: the key of values by pattern, e.g. `rank_pattern`, of which the
        first that matches decides, as PEFT's `get_pattern_key` has it.

    Raises:
      ConfigError: for patterns that are not regular expressions.
    """
    some = self.config.get(patterns) or {}
    if not isinstance(some, Mapping):
      raise errors.ConfigError(
        f'{patterns}: expected values by pattern, found {some!r}.'
      )
    for pattern, value in some.items():
      try:
        found = re.match(rf'(.*\.)?({pattern})$', self.name)
      except re.error as error:
        raise errors.ConfigError(
          f'{patterns}: {pattern!r} is no regular expression: {error}.'
        ) from None
      if found:
        return value
    return self.config[key]


@dataclasses.dataclass(frozen=True)
class PeftModule(_Named):
  """A module of a PEFT folder, by what the folder says of it.

  Attributes:
    name: its name in the model, e.g. `mlp.hidden0`.
    shapes: shapes of its tensors, by name within the module.
    config: `adapter_config.json`, with PEFT's defaults for absent keys.
    kind: `linear`, `conv` or `embedding`; empty before its place is known.
  """

  name: str
  shapes: Shapes
  config: Mapping[str, Any]
  kind: str = ''


@dataclasses.dataclass(frozen=True)
class PeftLayer(_Named):
  """A module of a PEFT folder, and the site that it stands for.

  PEFT stores weights for kernels of torch: `(out, in)`, `(out, in, *kernel)`,
  and `(rows, features)` of embeddings. The methods bring axes of inputs and
  outputs to those of a site, whatever its layout is, and back.

  Attributes:
    name: the module's name in the model, e.g. `mlp.hidden0`.
    kind: `linear`, `conv` or `embedding`.
    site: the parameters.
    channels_last: whether the inputs of a convolution are `(*kernel, in)`, as
      in JAX, and not `(in, *kernel)`.
    base: returns the primary parameter as stored, of shape `in_shape +
      out_shape`, float32.
    config: `adapter_config.json`, with PEFT's defaults for absent keys; empty
      when a folder is written anew.
    options: the type's options that hold for the site.
    stack: sizes of the axes stacked in front: experts, whose matrices are one
      parameter; empty for most.
  """

  name: str
  kind: str
  site: Site
  channels_last: bool = False
  base: Callable[[], Any] | None = None
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  stack: tuple[int, ...] = ()

  @property
  def kernel(self) -> tuple[int, ...]:
    """Sizes of the kernel of a convolution; empty for other layers."""
    shape = self.site.in_shape
    if self.kind != CONV:
      return ()
    return shape[:-1] if self.channels_last else shape[1:]

  @property
  def features(self) -> tuple[int, ...]:
    """Axes of inputs as torch has them: `(in,)`, or `(in, *kernel)`."""
    kernel = self.kernel
    return (self.site.in_size // max(math.prod(kernel), 1), *kernel)

  def inputs(self, array: Any) -> Any:
    """Returns an array `(*features, …)` as `(*in_shape, …)`."""
    rest = array.shape[len(self.features) :]
    if self.kind == CONV and self.channels_last:
      order = (*range(1, len(self.features)), 0)
      array = array.transpose(*order, *range(len(order), array.ndim))
    return array.reshape(*self.site.in_shape, *rest)

  def torch_inputs(self, array: Any) -> Any:
    """Returns an array `(*in_shape, …)` as `(*features, …)`."""
    count = len(self.site.in_shape)
    rest = array.shape[count:]
    if self.kind == CONV and self.channels_last:
      order = (count - 1, *range(count - 1))
      array = array.transpose(*order, *range(count, array.ndim))
    return array.reshape(*self.features, *rest)

  def outputs(self, array: Any) -> Any:
    """Returns an array `(…, out)` as `(…, *out_shape)`."""
    return array.reshape(*array.shape[:-1], *self.site.out_shape)

  def torch_outputs(self, array: Any) -> Any:
    """Returns an array `(…, *out_shape)` as `(…, out)`."""
    count = len(self.site.out_shape)
    front = array.shape[: array.ndim - count]
    return array.reshape(*front, self.site.out_size)


def _number(value: float) -> int | float:
  """Returns a number as PEFT's configuration has it: whole where it can be."""
  return int(value) if float(value).is_integer() else float(value)


class PeftMapping:
  """How options and weights of an adapter type are stored by PEFT.

  A subclass says what there is by class attributes and writes `weights` and
  `tensors`, which undo each other exactly.

  Attributes:
    peft_type: PEFT's name of the method, e.g. `IA3`.
    names: names of the tensors that a module may have, without the module.
    shared: names of tensors that belong to no module, as PEFT writes them
      behind `base_model.`, by the name that `init_shared` gives them.
    replaced: parameters of a module's own that tensors stand in place of, by
      the tensors' names: what is saved with an adapter, see `modules_to_save`.
    fields: the type's options, by the key of PEFT's configuration.
    defaults: what PEFT takes for keys that a configuration lacks.
    ignored: keys that do not change what trained weights compute: how they
      begin, and what is dropped in training. They are kept and written back.
    off: keys that must have no value, or the one that means nothing, because
      the type cannot do what they ask for; and what that is, for messages.
    drawn: weights of ours that PEFT does not have; `init` draws them.
    bias: whether the configuration has `bias`, so that biases can be saved.
    conv1d: whether it has `fan_in_fan_out`, so that Conv1D can be adapted.
    saves: whether it has `modules_to_save`.
    experts: whether it has `target_parameters`, so that parameters in which
      experts are stacked can be adapted; see `PeftLayer.stack`.

  Example:
    class PeftIA3(surgery.PeftMapping):
      peft_type = 'IA3'
      names = ('ia3_l',)

      def weights(self, layer, tensors):
        return {'scale': layer.outputs(tensors['ia3_l'][:, 0])}

      def tensors(self, layer, weights):
        return {'ia3_l': layer.torch_outputs(weights['scale'])[:, None]}
  """

  peft_type: ClassVar[str] = ''
  names: ClassVar[tuple[str, ...]] = ()
  shared: ClassVar[Mapping[str, str]] = {}
  replaced: ClassVar[Mapping[str, str]] = {}
  fields: ClassVar[Mapping[str, str]] = {}
  defaults: ClassVar[Mapping[str, Any]] = {}
  ignored: ClassVar[tuple[str, ...]] = ()
  off: ClassVar[Mapping[str, str]] = {}
  drawn: ClassVar[tuple[str, ...]] = ()
  bias: ClassVar[bool] = False
  conv1d: ClassVar[bool] = False
  saves: ClassVar[bool] = True
  experts: ClassVar[bool] = False

  # Reading.

  def reads(self, config: Mapping[str, Any]) -> bool:
    """Whether a configuration of `peft_type` is one of this adapter type.

    PEFT has several types of ours under one name, such as `LORA`.
    """
    del config
    return True

  def check(self, config: Mapping[str, Any]) -> None:
    """Raises for a configuration that the type cannot do; by default never.

    Keys in `off` have been checked already.

    Raises:
      ConfigError: saying which key, and why.
    """

  def kind(self, module: PeftModule) -> str | None:
    """Returns the kind of a module where its tensors tell it."""
    del module
    return None

  def sizes(self, module: PeftModule) -> tuple[int | None, int | None]:
    """Returns the numbers of inputs and outputs that its tensors tell.

    Of a convolution the inputs are channels. None is for what they do not tell.
    """
    del module
    return None, None

  def options(self, module: PeftModule) -> dict[str, Any]:
    """Returns the type's options for a module, as JSON data."""
    return {
      option: module.config[key]
      for key, option in self.fields.items()
      if key in module.config
    }

  def weights(self, layer: PeftLayer, tensors: Arrays) -> dict[str, Any]:
    """Returns the weights of a site, as `init` names and shapes them.

    Args:
      layer: the module and its site.
      tensors: numpy arrays by their names within the module.
    """
    raise NotImplementedError

  def shared_weights(self, tensors: Arrays) -> dict[str, Any]:
    """Returns the shared weights; by default the tensors as they are.

    Args:
      tensors: numpy arrays by the names of `init_shared`.
    """
    return dict(tensors)

  # Writing.

  def config(
    self, adapter: Any, layers: Mapping[str, tuple[Any, Shapes]]
  ) -> dict[str, Any]:
    """Returns the keys of PEFT's configuration that say what the options say.

    By default those of `fields`, which must be the same for all modules.

    Args:
      adapter: the adapter.
      layers: by name of a module, the adapter with the options that hold there,
        and the shapes of its weights.

    Raises:
      ConfigError: for options that PEFT cannot say.
    """
    found: dict[str, Any] = {}
    for key, option in self.fields.items():
      values = {name: getattr(a, option) for name, (a, _) in layers.items()}
      several = list(dict.fromkeys(values.values()))
      if len(several) > 1:
        raise errors.ConfigError(
          f"adapter type '{adapter.name}', option {option!r}: PEFT has one "
          f'value of {key!r} for all modules, found {several[0]!r} and '
          f'{several[1]!r}.'
        )
      found[key] = several[0] if several else getattr(adapter, option)
    return found

  @staticmethod
  def by_pattern(
    values: Mapping[str, float], default: float
  ) -> tuple[int | float, dict[str, int | float]]:
    """Returns the value that most modules have, and the others by pattern.

    A pattern stands for one module: PEFT matches ends of names otherwise.

    Args:
      values: by name of a module.
      default: the value where there is no module.
    """
    found = list(values.values())
    most = max(dict.fromkeys(found), key=found.count) if found else default
    return _number(most), {
      f'^{re.escape(name)}': _number(value)
      for name, value in values.items()
      if value != most
    }

  def tensors(self, layer: PeftLayer, weights: Arrays) -> dict[str, Any]:
    """Returns PEFT's tensors of a site, by name within the module.

    Args:
      layer: the module and its site.
      weights: numpy arrays by the names of `init`.
    """
    raise NotImplementedError

  def shared_tensors(self, weights: Arrays) -> dict[str, Any]:
    """Returns PEFT's shared tensors, by the names of `init_shared`."""
    return dict(weights)
