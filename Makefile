# Each target makes .venv and installs what it needs when that is missing; those for a GPU take GPU_PYTHON as it is.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
GPU_PYTHON ?= python3
OUT ?= out/gpu
PEERS ?=
BIN := .venv/bin
SOURCES := sam fastsam_kernels benchmarks tests

.PHONY: demo serve test test-all test-oracles test-page test-soak bench bench-service compile-report gpu-test gpu-bench \
	lint format clean

demo: .venv/.demo
	$(BIN)/python -m sam demo

serve: .venv/.serve
	$(BIN)/python -m sam serve

test: .venv/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-all: .venv/.test
	$(BIN)/python -m pytest

test-page: .venv/.test
	$(BIN)/python -m pytest -s -m browser

test-soak: .venv/.test
	$(BIN)/python -m pytest -s -m soak

test-oracles: .venv/.test
	$(BIN)/python -m pytest --hypothesis-profile=oracles tests/test_rle.py tests/kernels/test_nms.py \
		tests/kernels/test_connected_components.py

bench: .venv/.test
	$(BIN)/python -m benchmarks all

bench-service: .venv/.test
	$(BIN)/python -m benchmarks service

compile-report: .venv/.test
	$(BIN)/python -m benchmarks compile-report --write

gpu-test:
	mkdir -p $(OUT)
	$(GPU_PYTHON) -m pytest -ra tests/kernels tests/test_gpu.py 2>&1 | tee $(OUT)/gpu-test.log

gpu-bench:
	mkdir -p $(OUT)
	$(GPU_PYTHON) -m benchmarks tune --write 2>&1 | tee $(OUT)/gpu-tune.log
	cp -r fastsam_kernels/tile_configs $(OUT)
	$(GPU_PYTHON) -m benchmarks all --peers "$(PEERS)" --json $(OUT)/gpu.json 2>&1 | tee $(OUT)/gpu-bench.log

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
