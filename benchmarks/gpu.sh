#!/usr/bin/env bash
# Builds, tests and measures pykd on a GPU machine, from the working tree and without a network.
#
#   benchmarks/gpu.sh [facts|build|test|sanitize|bench|all]...     default: all
#
#   facts      the card, its driver and clocks, and the versions that all else was made with
#   build      pykd for this card, with pip
#   test       pytest -m gpu
#   sanitize   the C++ tests of the kernels and of the engine under compute-sanitizer's memcheck and racecheck
#   bench      the benchmarks marked gpu, and their tables; after build
#
# Each part writes its lines into a file as they come. It has its time, the last one what the others left; what takes
# longer is cut off, what fails is told, and the next part runs. The last lines say what came of each, and the exit
# status whether all went well.
#
# The machine brings python3 with a CUDA build of torch, pytest, pytest-benchmark and pytest-xdist, nvcc with
# compute-sanitizer, cmake and ninja. Packages that it lacks come as wheels: nlohmann_json and setuptools>=77 for the
# build; for the tests and benchmarks of training accelerate, pydantic, pydantic-core, annotated-types,
# typing-inspection, PyYAML, rich, scikit-learn, typer and torchvision; liger-kernel as a peer.
#   PYKD_WHEELS      folder with those wheels (.whl)
#   PYKD_SITE        folder to install into, outside the tree (/tmp/pykd-gpu)
#   PYKD_REVISION    what is measured, where there is no .git
#   PYKD_CUDA_ARCHS  architectures (native: this machine's card)
#   PYKD_SELECT      the tests and benchmarks to run, as pytest -k has them (all)
#   PYKD_SECONDS     for all parts together (570)
#   OUT              folder of the results (benchmarks/results/gpu)
set -euo pipefail
self=$(realpath "$0")
tree=${self%/*/*}
cd "$tree"

out=$(realpath -m "${OUT:-benchmarks/results/gpu}")
site=$(realpath -m "${PYKD_SITE:-/tmp/pykd-gpu}")
wheels=$(realpath -m "${PYKD_WHEELS:-.whl}")
python=${PYTHON:-python3}
select=${PYKD_SELECT:-}
export PYTHONPATH=$site:$site/wheels PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export PYKD_REVISION=${PYKD_REVISION:-$(git describe --always --dirty 2>/dev/null || echo unknown)}
declare -A seconds=([facts]=20 [build]=240 [test]=120 [sanitize]=150 [bench]=300)  # where another part follows

# What a text of results belongs to.
headline() {
  local card
  card=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null) || card="no card"
  echo "# $1 of revision $PYKD_REVISION on ${card//$'\n'/; }, $(date -u +%Y-%m-%dT%H:%MZ)"
}

facts() {
  local code=0
  uname -srm
  echo "$(nproc) processors, $(awk '/MemTotal/ {print int($2 / 2^20)}' /proc/meminfo) GiB of memory"
  nvidia-smi --query-gpu="name,driver_version,compute_cap,memory.total,clocks.sm,clocks.max.sm,clocks.mem,\
clocks.max.mem,power.limit,power.max_limit,persistence_mode,ecc.mode.current,temperature.gpu" --format=csv || code=1
  nvcc --version | tail -n 2 || code=1
  compute-sanitizer --version | tail -n 1 || code=1
  "$python" -c 'import sys, torch
print("Python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)
print(torch.cuda.get_device_name() if torch.cuda.is_available() else sys.exit("torch finds no card here"))' ||
    code=1
  "$python" -m pip list --disable-pip-version-check 2>/dev/null |
    grep -iE '^(accelerate|cmake|cupy|liger|ninja|numpy|pydantic|pytest|setuptools|torchvision|triton)' || true
  return "$code"
}

install_wheels() {
  if compgen -G "$wheels/*.whl" >/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site/wheels" "$wheels"/*.whl
  fi
}

build() {
  install_wheels
  PYKD_CUDA=on PYKD_CUDA_ARCHS=${PYKD_CUDA_ARCHS:-native} "$python" -m pip install --verbose --no-index \
    --no-build-isolation --no-deps --no-compile --upgrade --target "$site" .
  cd "$site"
  "$python" -c 'from pykd._extension import load; print("compiled for torch", load().torch_version, "CUDA:", load().cuda)'
}

# From another folder and without touching the module path: the installed package is tested, not the sources. A file
# that misses a package fails, and the others run.
run_pytest() {
  cd "$site"
  "$python" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch finds no card here")' &&
    "$python" -m pytest -c "$tree/pyproject.toml" --rootdir "$tree" --import-mode importlib -p no:cacheprovider \
      --continue-on-collection-errors -m gpu ${select:+-k "$select"} "$@"
}

tests() {
  local files
  mapfile -t files < <(grep -rlE --include='test_*.py' 'mark\.gpu|DEVICES' "$tree/tests")
  run_pytest -q --numprocesses 8 --durations 10 -o "pythonpath=$(printf '%s ' "${files[@]%/*}")" "${files[@]}"
}

sanitize() {
  [[ -d $site/wheels ]] || install_wheels
  cmake -G Ninja -S . -B build/card -DPYKD_CARD=ON "-DPYKD_CUDA_ARCHS=${PYKD_CUDA_ARCHS:-native}" \
    "-DPYKD_JSON_INCLUDE=$("$python" -c 'import nlohmann_json; print(nlohmann_json.get_include())')"
  cmake --build build/card
  ctest --test-dir build/card --no-tests=error --parallel 8 --timeout 100 --verbose --tests-regex '_(mem|race)check$'
}

bench() {
  local code=0 files
  rm -f "$out"/gpu.{json,md}
  # What is asked for most comes first: the last may be cut off.
  mapfile -t files < <({
    printf '%s\n' "$tree"/benchmarks/test_{vocabulary_gpu,linear_distillation_loss,sparse_gpu,distillation_loss}.py
    grep -l 'mark\.gpu' "$tree"/benchmarks/test_*.py
  } | awk '!seen[$0]++')
  # pytest-benchmark writes the record when it ends, also of what was measured until it was interrupted.
  run_pytest -q --benchmark-only --benchmark-quiet --benchmark-json="$out/gpu.json" "${files[@]}" || code=$?
  if [[ -s $out/gpu.json ]]; then
    "$python" "$tree/benchmarks/table.py" "$out/gpu.json" | tee "$out/gpu.md"
  fi
  return "$code"
}

# One part, in a process of its own, which may be cut off. Interrupted, pytest still says what it has, and tee writes it.
if [[ ${1:-} == --part ]]; then
  {
    headline "$2"
    case $2 in
      facts) facts ;;
      build) build ;;
      test) tests ;;
      sanitize) sanitize ;;
      bench) bench ;;
    esac
  } 2>&1 | tee -i "$out/$2.txt"
  exit
fi

chosen=()
for each in "${@:-all}"; do
  case $each in
    all) chosen+=(facts build test sanitize bench) ;;
    facts | build | test | sanitize | bench) chosen+=("$each") ;;
    *)
      echo "gpu.sh: unknown part '$each'; the parts are facts, build, test, sanitize, bench and all" >&2
      exit 2
      ;;
  esac
done

mkdir -p "$out" "$site"
failed=0
summary=$(headline summary)
for ((i = 0; i < ${#chosen[@]}; ++i)); do
  part=${chosen[i]}
  left=$((${PYKD_SECONDS:-570} - SECONDS))
  limit=$((i + 1 < ${#chosen[@]} && seconds[$part] < left ? seconds[$part] : left))
  begun=$SECONDS
  code=1 outcome="no time was left"
  if ((limit > 0)); then
    timeout --signal INT --kill-after 20 "$limit" bash "$self" --part "$part" && code=0 || code=$?
    case $code in
      0) outcome="went well" ;;
      124 | 137) outcome="cut off after $limit s" ;;
      *) outcome="failed with $code" ;;
    esac
  fi
  [[ $code == 0 ]] || failed=1
  summary+=$'\n'$(printf '%-8s %4d s  %s' "$part" "$((SECONDS - begun))" "$outcome")
  echo "$summary" >"$out/summary.txt"
done
echo "$summary"
exit "$failed"
