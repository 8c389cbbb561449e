# Every command does its own set-up: virtual environment, pinned packages, compiled operators.
PYTHON ?= python3
BIN := .venv/bin
BENCH ?= benchmarks/results/cpu.json
FUZZ_SECONDS ?= 600
# What `make aarch64` and `make cross` lack here.
MISSING := $(strip $(foreach tool,aarch64-linux-gnu-g++ qemu-aarch64-static,$(if $(shell command -v $(tool) 2>&1),,$(tool))))
CROSS = needs $(MISSING): run apt-get install g++-aarch64-linux-gnu qemu-user-static
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt setup.py pyproject.toml
CXX_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.DEFAULT_GOAL := help
.PHONY: help demo test bench check sanitize fuzz aarch64 cross cuda engine format build clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## /{printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: RUN := runs/demo-$(shell date +%Y%m%d-%H%M%S)
demo: build ## distil a small student on real digits, export it, and let the engine answer (a minute or two)
	$(BIN)/pykd distill noisy_teacher-digits --out $(RUN)
	$(BIN)/pykd export $(RUN) -o $(RUN)/student.pykd.safetensors
	$(BIN)/pykd run $(RUN)/student.pykd.safetensors --rows 8 --top 2

test: check sanitize $(if $(MISSING),,aarch64 cross) build ## everything: check, sanitize, aarch64, cross, the Python tests and the documentation's examples
	@$(if $(MISSING),echo "aarch64 and cross are left out: $(CROSS)")
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses=auto --maxprocesses=4 --dist=loadfile

bench: build engine ## all against its peers; rewrites benchmarks/results, docs/benchmarks.md and the README's summary
	@echo "installing the peers ..."
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"] \
	  ["optional-dependencies"]["peers"], sep="\n")' | $(BIN)/python -m pip install --quiet --disable-pip-version-check -r /dev/stdin
	$(BIN)/python -m pytest -q benchmarks --benchmark-only --benchmark-quiet --benchmark-json=$(BENCH)
	@rm -f $(BENCH:.json=-*.json)
	$(BIN)/python benchmarks/table.py --write docs/benchmarks.md
	$(BIN)/python benchmarks/table.py --summary --write README.md

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
	$(BIN)/ctest --test-dir build/tests -j 2 --output-on-failure --no-tests=error

fuzz: sanitize ## all that attacks the readers: the sanitizers, their mutants, and libFuzzer for FUZZ_SECONDS (600; clang)
	@command -v clang++ >/dev/null || { echo "make fuzz needs clang++: run apt-get install clang"; exit 1; }
	@mkdir -p build/fuzz/corpus
	@for test in model_file npy; do echo "$$test: $$(build/tests/$${test}_test_address | tail -3 | paste -sd ' ')"; done
	@C="clang++ -std=c++20 -g -O1 -Icsrc -isystem $$($(BIN)/python -c 'import nlohmann_json as j; print(j.get_include())')"; \
	  $$C csrc/runtime/fuzz/model_file_seeds.cpp csrc/runtime/sha256.cpp -o build/fuzz/seeds && \
	  $$C -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all csrc/runtime/fuzz/model_file_fuzz.cpp \
	    $(addprefix csrc/runtime/,model_file.cpp json.cpp sha256.cpp file.cpp) -o build/fuzz/model_file
	build/fuzz/seeds build/fuzz/corpus
	build/fuzz/model_file -dict=csrc/runtime/fuzz/model_file.dict -max_len=8192 -max_total_time=$(FUZZ_SECONDS) \
	  -rss_limit_mb=2048 -print_final_stats=1 build/fuzz/corpus

aarch64: .venv/.packages ## the C++ tests for Arm, cross-compiled, under an emulator of the Cortex-A76 and of all that it knows
	@$(if $(MISSING),echo "make aarch64 $(CROSS)"; exit 1)
	@mkdir -p build
	@echo "compiling the C++ tests for aarch64 ..."
	@PATH="$(CURDIR)/$(BIN):$$PATH"; { cmake -G Ninja -S . -B build/aarch64 --toolchain cmake/aarch64.cmake -DPYKD_TESTS=ON \
	  && cmake --build build/aarch64; } > build/aarch64.log 2>&1 || { cat build/aarch64.log; exit 1; }
	QEMU_CPU=cortex-a76 $(BIN)/ctest --test-dir build/aarch64 -j 2 --output-on-failure --no-tests=error
	@# Of all that it knows beyond the A76, the kernels take the products of bfloat16 alone.
	QEMU_CPU=max $(BIN)/ctest --test-dir build/aarch64 -j 2 --output-on-failure --no-tests=error -R '^(engine|sparse_.*)_test'

# CUDA's runtime for Arm comes from a package of nvcc's release; CMake says what it is missed for.
cross: .venv/.packages ## libpykd.so and pykd-run for Arm, in build/cross, with CUDA for Jetson Orin and Thor where nvcc is
	@$(if $(MISSING),echo "make cross $(CROSS)"; exit 1)
	@mkdir -p build
	@cuda=$$({ nvcc --version || /usr/local/cuda/bin/nvcc --version; } 2>/dev/null | sed -n 's/.*release \([0-9]*[.][0-9]*\),.*/\1/p'); \
	  case $$cuda in 12.*) of=-cu12 ;; *) of= ;; esac; lib=build/cudart-$$cuda/lib/libcudart_static.a; \
	  if [ -n "$$cuda" ] && [ ! -f "$$lib" ]; then \
	    rm -rf build/cudart-$$cuda && $(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps \
	      --only-binary=:all: --platform manylinux2014_aarch64 -d build/cudart-$$cuda "nvidia-cuda-runtime$$of==$$cuda.*" && \
	    (cd build/cudart-$$cuda && $(CURDIR)/$(BIN)/python -m zipfile -e *.whl . && mv nvidia/*/lib .) || \
	    echo "nvidia-cuda-runtime$$of $$cuda for aarch64 could not be fetched"; \
	  fi; \
	  [ -f "$$lib" ] && lib=$(CURDIR)/$$lib || lib=; \
	  echo "cross-compiling the engine for aarch64 ..."; \
	  PATH="$(CURDIR)/$(BIN):$$PATH"; { cmake -G Ninja -S . -B build/cross --toolchain cmake/aarch64.cmake -DPYKD_RUNTIME=ON \
	    -DPYKD_CUDART_STATIC="$$lib" && cmake --build build/cross; } > build/cross.log 2>&1 || { cat build/cross.log; exit 1; }
	@sed -n 's/^-- pykd: //p' build/cross.log; cd build/cross && wc -c pykd-run libpykd.so

cuda: .venv/.packages ## every CUDA kernel for every architecture; rewrites the record of their registers and docs/gpu.md
	@mkdir -p build
	@echo "compiling the CUDA kernels for every architecture (with two processors some ten minutes) ..."
	@PATH="$(CURDIR)/$(BIN):$$PATH"; { cmake -G Ninja -S . -B build/cuda -DPYKD_CARD=ON -DPYKD_CUDA_ARCHS=all -DPYKD_WERROR=ON \
	  && cmake --build build/cuda --target cuda --clean-first; } > build/cuda.log 2>&1 || { cat build/cuda.log; exit 1; }
	$(BIN)/python benchmarks/registers.py build/cuda.log build/cuda/cuda

engine: ## the engine without torch and Python, with CUDA where nvcc is, in build/engine: libpykd.so and pykd-run
	@PATH="$(CURDIR)/$(BIN):$$PATH"; cmake -S . -B build/engine -DPYKD_RUNTIME=ON && cmake --build build/engine -j

format: .venv/.packages ## rewrite the sources in the house's format
	$(BIN)/ruff check --quiet --fix .
	$(BIN)/ruff format --quiet .
	$(BIN)/clang-format -i $(CXX_FILES)

build: .venv/.build ## the virtual environment with pykd in it, compiled

clean: ## remove what the build left; the virtual environment and the runs stay
	rm -rf build pykd/_C*.so pykd/_runtime*.so pykd/_build_info.json .venv/.build

.venv/.packages: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "pykd needs Python 3.11 or newer: run make PYTHON=<path to one>")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing the pinned packages into .venv (the first time some minutes: torch is large) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

.venv/.build: .venv/.packages $(SOURCES)
	@echo "compiling pykd (the first time some minutes) ..."
	@PYKD_WERROR=ON $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@$(BIN)/python -c 'from pykd._extension import load; c = load(); \
	  print("compiled for torch", c.torch_version, "with CUDA" if c.cuda else f"without CUDA: {c.cuda_reason}")'
	@touch $@
