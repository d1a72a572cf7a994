# make demo   a fresh machine: set up, quantize SmolLM2-135M, export it to build/demo/, check it
# make test   a fresh machine: set up, then lint, types and all tests
# make quick  the tests that take seconds each and need no real model

PYTHON ?= python3
BIN := .venv/bin
# BLAS reads these; hidden spinning of idle threads costs more than it gives on small machines.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup demo test quick lint clean

setup: .venv/installed

.venv/installed: pyproject.toml runtime/pyproject.toml tools/install.py
	$(PYTHON) -m venv .venv
	$(BIN)/python tools/install.py
	touch $@

demo: setup
	$(BIN)/python tools/demo.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

quick: setup
	$(BIN)/python -m pytest -m "not slow"

clean:
	rm -rf build .venv
