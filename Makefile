# `make demo` and `make test` need Python 3.11 with venv, make and g++; the rest is set up in .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo test slow check bench break docs stats build sanitize gpu
.DELETE_ON_ERROR:

demo: build
	$(BIN)/shardwise train examples/movielens.toml --processes 2

test: build
	$(BIN)/python -m pytest -m "not slow"

slow: build
	$(BIN)/python -m pytest -m slow

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: build
	$(BIN)/shardwise bench
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

docs: .venv/installed
	$(BIN)/python tools/list_api.py

# Breaks lines one at a time in a copy, and wants a test to fail for each.
break: build
	$(BIN)/python tools/break_lines.py

# Tests of operators with every C++ source under the address and undefined-behaviour sanitizers.
sanitize: .venv/installed
	@$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DSHARDWISE_SANITIZE=ON $(CMAKE_FLAGS) > /dev/null
	@$(BIN)/cmake --build build/sanitize
	SHARDWISE_LIBRARY=$(CURDIR)/build/sanitize/libshardwise.so ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	$(BIN)/python -m pytest -m "not slow" --capture=sys tests/ops

# What needs a CUDA device: its tests, and the times that go to benchmarks/results/gpu.csv.
gpu: build
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python benchmarks/gpu.py

stats:
	$(PYTHON) tools/codestats.py --check .

# The C++ operators, in place: compiles only what has changed.
build: .venv/installed
	@$(BIN)/cmake -S . -B build -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja $(CMAKE_FLAGS) > /dev/null
	@$(BIN)/cmake --build build

# torch first and then held in place, so that no dependency brings another one.
.venv/torch:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install "$(TORCH)"
	$(BIN)/pip list --format=freeze | grep '^torch==' > $@

# The package in editable form; `build` makes its C++ operators.
.venv/installed: .venv/torch pyproject.toml
	$(BIN)/pip install -c .venv/torch --config-settings wheel.cmake=false -e '.[train,test,dev]'
	touch $@
