# make demo   a fresh machine: set up, quantize SmolLM2-135M, export it to build/demo/, check it
# make test   a fresh machine: set up, then lint, types and all tests
# make quick  the tests that take seconds each and need no real model
# make fuzz   changed containers against the reader, for 10 minutes; SECONDS_OF_FUZZING=60 for another time
# make test-arm64  the device runtime on 64-bit Arm, emulated; PACKAGE=build/demo for another package than a tiny one

PYTHON ?= python3
BIN := .venv/bin
# Idle threads that spin for long take from others on small machines; that do not spin at all take long to wake.
export GOMP_SPINCOUNT ?= 20000

SECONDS_OF_FUZZING ?= 600
PYTEST := $(BIN)/python -m pytest
IN_PARALLEL := -n auto --maxprocesses 4

.PHONY: setup browser demo test quick fuzz test-arm64 lint clean

setup: .venv/installed
	@echo "everything is in .venv; to use it: . $(BIN)/activate"

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

browser: setup
	$(BIN)/python tools/install_browser.py

# The real model's tests use all cores themselves.
test: lint browser
	$(PYTEST) $(IN_PARALLEL) --ignore tests/real
	$(PYTEST) tests/real

quick: setup
	$(PYTEST) $(IN_PARALLEL) -m "not slow"

fuzz: setup
	$(BIN)/python tools/fuzz_container.py --seconds $(SECONDS_OF_FUZZING)

test-arm64: setup
	$(BIN)/python tools/check_arm64.py $(PACKAGE)

clean:
	rm -rf build .venv
