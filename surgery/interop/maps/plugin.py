"""The maps that come with the library, and the step that applies one.

The host imports this whenever any hook is asked, so what does the work is
imported when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from surgery.contract.hookspecs import hookimpl
from surgery.passes.plugin import Pass


@hookimpl
def surgery_maps() -> Mapping[str, Any]:
  """Offers the maps by name."""
  from surgery.interop import maps

  return dict(maps.shipped())


@hookimpl
def surgery_passes() -> Mapping[str, Callable[..., Any]]:
  """Offers the step."""
  return {'map': Pass('map', 'surgery.interop.maps.applying')}
