# Each target makes .venv and installs what it needs when that is missing.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := sam fastsam_kernels benchmarks tests

.PHONY: demo test test-all bench lint format clean

demo: .venv/.demo
	$(BIN)/python -m sam demo

test: .venv/.test
	$(BIN)/python -m pytest -m "not slow"

test-all: .venv/.test
	$(BIN)/python -m pytest

bench: .venv/.test
	$(BIN)/python -m benchmarks

lint: .venv/.lint
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: .venv/.lint
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf .venv build out .pytest_cache .mypy_cache .ruff_cache *.egg-info

# The stamp of an extra: installed, with the versions of constraints.txt.
.venv/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@
