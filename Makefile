# Every command does its own set-up: virtual environment, pinned packages, compiled operators.
PYTHON ?= python3
BIN := .venv/bin
BENCH ?= benchmarks/results/cpu.json
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt setup.py pyproject.toml
CXX_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.DEFAULT_GOAL := help
.PHONY: help demo test bench check sanitize format build clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: build ## distil a noisy teacher into a small student on real digits and show the table (a minute or two)
	$(BIN)/pykd distill noisy_teacher-digits

test: check sanitize build ## everything: check, sanitize, then the Python tests and the documentation's examples
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

bench: build ## the operators against their peers; rewrites benchmarks/results and the README's table
	$(BIN)/python -m pytest -q benchmarks --benchmark-only --benchmark-quiet --benchmark-json=$(BENCH)
	@rm -f $(BENCH:.json=-*.json)
	$(BIN)/python benchmarks/table.py --write README.md

check: .venv/.packages ## formatting, lint and types, in Python and C++
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy --no-error-summary

sanitize: .venv/.packages ## C++ tests, the CUDA kernels under emulation: as released, under ASan and UBSan, under TSan
	@mkdir -p build
	@echo "compiling the C++ tests ..."
	@PATH="$(CURDIR)/$(BIN):$$PATH"; { cmake -G Ninja -S . -B build/tests -DPYKD_TESTS=ON && cmake --build build/tests; } \
	  > build/tests.log 2>&1 || { cat build/tests.log; exit 1; }
	$(BIN)/ctest --test-dir build/tests --output-on-failure --no-tests=error

format: .venv/.packages ## rewrite the sources in the house's format
	$(BIN)/ruff check --quiet --fix .
	$(BIN)/ruff format --quiet .
	$(BIN)/clang-format -i $(CXX_FILES)

build: .venv/.build ## the virtual environment with pykd in it, compiled

clean: ## remove what the build left; the virtual environment and the runs stay
	rm -rf build pykd/_C*.so pykd/_build_info.json .venv/.build

.venv/.packages: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "pykd needs Python 3.11 or newer: run make PYTHON=<path to one>")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing the pinned packages into .venv (the first time some minutes: torch is large) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

.venv/.build: .venv/.packages $(SOURCES)
	@echo "compiling pykd (the first time a minute or two) ..."
	@PYKD_WERROR=ON $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@$(BIN)/python -c 'from pykd._extension import load; c = load(); \
	  print("compiled for torch", c.torch_version, "with CUDA" if c.cuda else f"without CUDA: {c.cuda_reason}")'
	@touch $@
