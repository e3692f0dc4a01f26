# Each target makes .venv and installs what it needs when that is missing; those for a GPU take GPU_PYTHON as it is.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
GPU_PYTHON ?= python3
OUT ?= out/gpu
PEERS ?=
# Of a command on a GPU: when it is stopped, early enough to say what it found, and the processes that run tests.
GPU_SECONDS ?= 540
GPU_WORKERS ?= 6
SANITIZER ?= compute-sanitizer
TUNE ?= --dtype bf16 --dtype fp16
BENCH ?= --no-compile --seconds 1
BIN := .venv/bin
SOURCES := sam fastsam_kernels benchmarks tests

.PHONY: demo serve test test-all test-oracles test-page test-service test-soak bench bench-service compile-report \
	compile-launches gpu-test gpu-tune gpu-bench gpu-sanitize lint format clean

demo: .venv/.demo
	$(BIN)/python -m sam demo

serve: .venv/.serve
	$(BIN)/python -m sam serve

test: .venv/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# What is timed or fills the machine runs alone, after all else.
alone := service or soak or browser
test-all: .venv/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not ($(alone))"
	$(BIN)/python -m pytest -s -m "$(alone)"

test-page: .venv/.test
	$(BIN)/python -m pytest -s -m browser

test-service: .venv/.test
	$(BIN)/python -m pytest -s -m service

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

# Every launch that gpu-test makes, compiled without a GPU.
compiled_launches := tests/kernels tests/test_gpu.py --ignore=tests/kernels/test_compile_report.py
ARCHES ?= 80 90 120
compile-launches: .venv/.test
	for arch in $(ARCHES); do \
		PYTHONPATH="$$PYTHONPATH:tests" $(BIN)/python -m pytest -q -p kernels.compile_launches --arch $$arch -m "not slow" \
			$(compiled_launches) || exit 1; \
	done

within = PYTHONUNBUFFERED=1 timeout --signal=INT --kill-after=20 $(1) $(GPU_PYTHON) -m
# Only the end of its process ends a kernel that hangs; pytest-timeout, where it is installed, brings that about.
hanging = $(shell $(GPU_PYTHON) -c "import pytest_timeout" 2>/dev/null && echo --timeout=180 --timeout-method=thread)
gpu-pytest = $(call within,$(1)) pytest -v --tb=short --durations=15 $(hanging) -m "not slow"
components := tests/kernels/test_connected_components.py

# The compile report needs no GPU. Components, whose threads wait for each other, come last, in a process of their own.
gpu-test:
	mkdir -p $(OUT)
	{ $(call gpu-pytest,$$(($(GPU_SECONDS) * 5 / 6))) -n $(GPU_WORKERS) --dist loadgroup tests/kernels tests/test_gpu.py \
		--ignore=tests/kernels/test_compile_report.py --ignore=$(components); first=$$?; \
	$(call gpu-pytest,$$(($(GPU_SECONDS) / 6))) $(components) && exit $$first; } 2>&1 | tee $(OUT)/gpu-test.log

gpu-tune:
	mkdir -p $(OUT)
	$(call within,$(GPU_SECONDS)) benchmarks tune $(TUNE) --write 2>&1 | tee $(OUT)/gpu-tune.log; status=$$?; \
	tar -czf $(OUT)/tiles.tgz -C fastsam_kernels/triton tile_configs && exit $$status

gpu-bench:
	mkdir -p $(OUT)
	$(call within,$(GPU_SECONDS)) benchmarks all $(BENCH) --peers "$(PEERS)" --json $(OUT)/gpu.json 2>&1 \
		| tee $(OUT)/gpu-bench.log

# Out-of-bounds accesses, then races in shared memory, of the kernels that share memory between threads and programs.
# Without the allocator's pool, in which a neighbour's memory is within bounds. Tests of real sizes would take hours.
sanitized := tests/kernels/test_two_way_attention.py tests/kernels/test_two_way_pass.py $(components)
gpu-sanitize:
	mkdir -p $(OUT)
	for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --signal=INT --kill-after=20 $(GPU_SECONDS) \
			$(SANITIZER) --tool $$tool --error-exitcode 1 $(GPU_PYTHON) -m pytest -v --tb=short \
			-m "not slow and not xdist_group" -k "not real_sizes" $(sanitized) || exit 1; \
	done 2>&1 | tee $(OUT)/gpu-sanitize.log

lint: .venv/.lint
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: .venv/.lint
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf .venv build out .pytest_cache .mypy_cache .ruff_cache *.egg-info

# The stamp of an extra: installed, with the versions of constraints.txt; Python compiles only what it then imports.
.venv/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@
