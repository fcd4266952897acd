# Needs Python 3.11 or later and make. `make demo` and `make test` create the environment.
# PYTHON=python3.12 picks another interpreter; TORCH_FLAGS="--index-url ..." another torch build.

PYTHON ?= python3.11
TORCH_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet -c constraints.txt

.PHONY: help demo test lint format types imports wheel check-wheel clean
.DELETE_ON_ERROR:

help:
	@echo "make demo         which training images made these three pictures possible?"
	@echo "make test         all tests"
	@echo "make lint         ruff: rules and format       make format   applies the format"
	@echo "make types        pyright                      make imports  who may import whom"
	@echo "make wheel        builds dist/                 make check-wheel  tries it in an empty environment"
	@echo "make clean        removes what can be made again; runs/ stays"

# -- environment: a stamp file for each step that has succeeded -----------------------------------

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "unsee needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# First and by itself, so that nothing else decides which build of torch it is.
$(VENV)/.torch: $(VENV)/.created constraints.txt
	@echo "installing torch, which takes a while ..."
	$(INSTALL) $(TORCH_FLAGS) torch==2.13.0
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "installing unsee and what the demo needs ..."
	$(INSTALL) -e '.[demo]'
	@touch $@

# kronfluence and dattri, which tests compare with, ask for more than the tests use of them:
# torchvision the one, a MIDI reader the other. quanda, whose metrics could be compared with too, pins
# an older numpy than the others take and is not installed.
$(VENV)/.dev: $(VENV)/.demo
	@echo "installing what the tests need ..."
	$(INSTALL) -e '.[demo,dev]'
	$(INSTALL) --no-deps kronfluence einconv dattri
	@touch $@

# -- use ------------------------------------------------------------------------------------------

demo: $(VENV)/.demo
	$(BIN)/unsee demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

imports: $(VENV)/.dev
	$(BIN)/lint-imports --no-cache

wheel: $(VENV)/.dev
	rm -rf dist
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls -l dist

# Slow: a second environment, with nothing in it but the wheel and what it asks for.
check-wheel: wheel
	rm -rf .check
	$(PYTHON) -m venv .check
	.check/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH_FLAGS) torch==2.13.0
	.check/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	.check/bin/python -m pip check
	cd .check && bin/python -I -c 'import unsee; print(unsee.__version__, unsee.__file__); [getattr(unsee, name) for name in unsee.__all__]'
	cd .check && bin/unsee --help
	rm -rf .check

clean:
	rm -rf $(VENV) .check build dist .pytest_cache .ruff_cache src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
