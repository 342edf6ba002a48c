from tests.cli.saved import assert_same, values


def test_all_else_goes(model, out, surgery_cli):
  assert 0 == surgery_cli('keep', model.file, '**/query', '-o', out).code
  left = {p: v for p, v in values(model.file).items() if 'query' in p}
  assert 2 == len(left)
  assert_same(left, values(out))


def test_selectors_are_needed(model, out, surgery_cli):
  assert 2 == surgery_cli('keep', model.file, '-o', out).code
  assert not out.exists()
