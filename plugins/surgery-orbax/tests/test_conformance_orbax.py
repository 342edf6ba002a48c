"""The laws of formats, as far as they hold for folders."""

import surgery_orbax.plugin

from surgery.testing import FormatConformance


class TestOrbax(FormatConformance):
  plugin = surgery_orbax.plugin
  name = 'orbax'
  refused = (
    'float8_e3m4',
    'float8_e4m3',
    'float6_e2m3fn',
    'float6_e3m2fn',
    'uint2',
    'uint4',
    'shapes',
  )
  # A database has the time of each commit in it, and a folder is never
  # replaced; what damage does is in test_damage.py.
  test_the_same_bytes_again = None
  test_a_file_is_not_replaced_unasked = None
  test_a_file_may_be_written_over_itself = None
  test_a_write_that_fails_leaves_the_old_file = None
  test_a_damaged_file_is_refused = None
