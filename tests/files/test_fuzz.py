"""Damaged files give a `FormatError` or a model, and cost little."""

import pytest

from tests.files import fuzzing

# A few hundred thousand are for `python -m tests.files.fuzzing`.
COUNT = 1200


@pytest.mark.parametrize('seed', [0, 1])
@pytest.mark.parametrize('kind', fuzzing.KINDS)
def test_damage_is_noticed_or_harmless(tmp_path, kind, seed):
  # Most of a file is not payload, so most damage is noticed.
  assert COUNT // 2 < fuzzing.run(kind, tmp_path, seed, COUNT) < COUNT
