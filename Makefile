# `make demo` and `make test` need Python 3.11 or newer, a C++ compiler (optional, for speed) and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types contract unit install clean

demo: install
	$(BIN)/subspec demo

test: lint types contract unit

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

contract: install
	$(BIN)/lint-imports

unit: install
	$(BIN)/pytest

# The stamp is older than the recipe's inputs whenever a dependency, the package's metadata or a kernel changed.
install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt hatch_build.py $(wildcard src/subspec/kernels/cpu/*) src/subspec/kernels/build.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) src/subspec/kernels/*.so src/subspec/kernels/build.json
