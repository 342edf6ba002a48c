"""A selector term: `larger:1000` means layers with more elements than that."""

import math

import surgery


@surgery.hookimpl
def surgery_match_layer(site: surgery.Site, term: str) -> bool | None:
  """Answers `larger:N`; every other term is somebody else's."""
  name, _, number = term.partition(':')
  if name != 'larger':
    return None
  if not number.isdigit():
    raise surgery.SelectorError(
      f'{term!r}: expected a number of elements, as in larger:1000.'
    )
  return sum(math.prod(p.shape) for p in site.params) > int(number)
