#!/usr/bin/env bash
# Builds, tests and measures pykd on a GPU machine, from the working tree and without a network.
#
#   benchmarks/gpu.sh [facts|build|test|sanitize|bench|all]...     default: all
#
# The machine brings python3 with a CUDA build of torch, nvcc, cmake and ninja. Packages it lacks come as wheels,
# nlohmann_json for the build among them.
#   PYKD_WHEELS   folder with those wheels (.whl)
#   PYKD_SITE     folder to install into, outside the tree (/tmp/pykd-gpu)
#   PYKD_RESULT   the benchmark's record (benchmarks/results/gpu.json)
#   PYKD_CUDA_ARCHS   architectures (native: this machine's card)
set -euo pipefail
cd "$(dirname "$0")/.."

tree=$PWD
site=${PYKD_SITE:-/tmp/pykd-gpu}
wheels=${PYKD_WHEELS:-.whl}
result=$(realpath -m "${PYKD_RESULT:-benchmarks/results/gpu.json}")
python=${PYTHON:-python3}
export PYTHONPATH=$site:$site/wheels PYTHONDONTWRITEBYTECODE=1

facts() {
  echo "== machine"
  uname -srm
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit \
    --format=csv || echo "nvidia-smi gives nothing: no card or no driver"
  nvcc --version | tail -n 2 || echo "no nvcc on the PATH"
  "$python" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)'
  echo "revision ${PYKD_REVISION:-$(git describe --always --dirty 2>/dev/null || echo unknown)}"
}

build() {
  echo "== build"
  if compgen -G "$wheels/*.whl" >/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site/wheels" "$wheels"/*.whl
  fi
  PYKD_CUDA=on PYKD_CUDA_ARCHS=${PYKD_CUDA_ARCHS:-native} "$python" -m pip install --quiet --no-index \
    --no-build-isolation --no-deps --no-compile --upgrade --target "$site" .
  cd "$site"
  "$python" -c 'from pykd._extension import load; print("compiled for torch", load().torch_version, "CUDA:", load().cuda)'
  cd "$tree"
}

# pytest from another folder and without touching the module path: the installed package is tested, not the sources.
run_pytest() {
  cd "$site"
  "$@" "$python" -m pytest -q -c "$tree/pyproject.toml" --rootdir "$tree" --import-mode importlib -p no:cacheprovider \
    "${arguments[@]}"
  cd "$tree"
}

tests() {
  echo "== gpu tests"
  arguments=(-m gpu "$tree/tests")
  run_pytest env
}

sanitize() {
  # Without torch's memory pool each tensor is an allocation of its own, whose end memcheck knows; graphs need the pool.
  arguments=(-x -m gpu -k "not graph and not compiles" "$tree/tests/ops")
  for tool in memcheck racecheck; do
    echo "== compute-sanitizer $tool"
    run_pytest env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      --kernel-regex kns=pykd
  done
}

bench() {
  echo "== benchmarks"
  mkdir -p "$(dirname "$result")"
  arguments=(-m gpu --benchmark-only --benchmark-quiet "--benchmark-json=$result" "$tree/benchmarks")
  run_pytest env
  "$python" benchmarks/table.py "$result"
}

for part in "${@:-all}"; do
  case $part in
    facts | build | sanitize | bench) "$part" ;;
    test) tests ;;
    all)
      facts
      build
      tests
      sanitize
      bench
      ;;
    *)
      echo "gpu.sh: unknown part '$part'; the parts are facts, build, test, sanitize, bench and all" >&2
      exit 2
      ;;
  esac
done
