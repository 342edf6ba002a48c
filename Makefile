# `make demo` and `make test` need Python 3.11 or newer, and nothing else.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/surgery-*/pyproject.toml))
PLUGIN_FILES := $(shell find plugins -name '*.py' -not -path '*/tests/*' -not -path '*/build/*') \
	$(wildcard plugins/*/pyproject.toml)
WORKERS ?= auto
TESTS ?= tests plugins

export JAX_PLATFORMS ?= cpu

.PHONY: demo test matrix lint format docs bench clean

demo: $(VENV)/installed  ## Pretrain, adapt, merge and save on real data.
	$(BIN)/surgery demo

test: $(VENV)/plugins-installed  ## All tests, of plugins/ too.
	# A file to a worker: its tests share what they compile. In the order of
	# conftest.py.
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
		$(TESTS)

matrix: $(VENV)/dev-installed  ## The oldest and the newest of everything (nox).
	$(BIN)/nox --error-on-missing-interpreters

lint: $(VENV)/dev-installed  ## Style, types, and who may import whom.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/dev-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/dev-installed  ## The references: steps, hooks, and all else.
	$(BIN)/python -m docs.tools.steps > docs/steps.new
	mv docs/steps.new docs/steps.md
	$(BIN)/python -m docs.tools.hooks > docs/plugins/hooks.new
	mv docs/plugins/hooks.new docs/plugins/hooks.md
	$(BIN)/python -m docs.tools.library > docs/reference.new
	mv docs/reference.new docs/reference.md

bench: $(VENV)/dev-installed  ## The figures in docs/performance.md.
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) .nox build *.egg-info plugins/*/build plugins/*/*.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# pip 25.1 knows dependency groups; a venv that was there may have an older one.
$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/dev-installed: $(VENV)/installed
	$(BIN)/pip install --quiet --group dev
	touch $@

# As anybody's distributions: built and installed, not linked.
$(VENV)/plugins-installed: $(VENV)/dev-installed $(PLUGIN_FILES)
	rm -rf $(addsuffix /build,$(PLUGINS))
	$(BIN)/pip install --quiet --no-deps --force-reinstall --no-build-isolation \
		$(addprefix ./,$(PLUGINS))
	touch $@
