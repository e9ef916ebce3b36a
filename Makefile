# quickstart, test, check: all that a fresh machine with Python 3.11 or newer needs to know.
PYTHON ?= python3
BIN := .venv/bin

# Tests and runs never ask the Hub, and torch's idle threads do not spin.
export HF_HUB_OFFLINE ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install quickstart test test-all soak check clean

quickstart: install  ## the main job on the embedded default: real weights, real text, no network after the install
	$(BIN)/fedpeft simulate

test: install  ## the tests that fit into a coffee break
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not soak"

test-all: install  ## and those that take longer
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not soak"

soak: install  ## a hundred kills at random moments (SOAK_KILLS=N, SOAK_SEED=N): no run may be lost
	$(BIN)/python -m pytest -q -s -m soak

check: install  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

install: .venv/installed

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
